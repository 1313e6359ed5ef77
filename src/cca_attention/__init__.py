"""CCA attention: fused global-local attention kernels, their autotuner and their verification."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .problem import Problem
from .spec import CCASpec

if TYPE_CHECKING:
    from .attention import cca_attention
    from .cache import CCACache
    from .profiles.store import load_profile

__version__ = "0.1.0"

__all__ = ["CCACache", "CCASpec", "Problem", "cca_attention", "load_profile"]

# loaded on first use: the commands answer --help without waiting for torch
_HOMES = {"cca_attention": ".attention", "CCACache": ".cache", "load_profile": ".profiles.store"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name], __name__), name)
