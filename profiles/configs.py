"""Kernels and their configs by name: what files hold, turned back into the values that launchers take."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import pkgutil
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from .. import kernels
from ..kernels import primitives
from ..kernels.tunable import Config, Tunable


def tunables() -> Mapping[str, Tunable]:
    """Every tunable by name: importing a module of `kernels` registers those that it defines."""
    for module in pkgutil.iter_modules(kernels.__path__):
        importlib.import_module(f"{kernels.__name__}.{module.name}")
    return Tunable.REGISTRY


def as_config(kernel: str, values: Mapping[str, int]) -> Config:
    """The config of `kernel` with these fields.

    Raises:
        ValueError: for a kernel that there is not, or fields that are not exactly those of its config.
    """
    known = Tunable.REGISTRY if kernel in Tunable.REGISTRY else tunables()
    if kernel not in known:
        raise ValueError(f"no kernel is called {kernel!r}; there are {', '.join(sorted(known))}")
    config = known[kernel].config
    expected = set(inspect.signature(config).parameters)
    if expected != set(values):
        wrong = ", ".join(sorted(expected ^ set(values)))
        raise ValueError(f"a config of {kernel} has the fields {', '.join(sorted(expected))}; wrong here: {wrong}")
    return config(**values)


@cache
def source_hash(kernel: str) -> str:
    """sha256 of what defines `kernel`: the file of its config and launcher, and the primitives that all share."""
    source = Path(inspect.getfile(Tunable.REGISTRY[kernel].config))
    digest = hashlib.sha256(source.read_bytes())
    digest.update(Path(primitives.__file__).read_bytes())
    return digest.hexdigest()
