"""Kernels and their configs by name: what files hold, turned back into the values that launchers take."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import pkgutil
import re
from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from pathlib import Path

from .. import kernels
from ..kernels import primitives
from ..kernels.tunable import Config, Tunable

NO_KERNEL_CODE = ("tunable", "layout", "limits")
KERNEL_ABI = 1
"""What the fields of the kernels' configs mean; raised when a value would no longer mean what it did."""

for _module in pkgutil.iter_modules(kernels.__path__):  # each registers its tunables
    importlib.import_module(f"{kernels.__name__}.{_module.name}")


def tunables(arch: str | None = None) -> Mapping[str, Tunable]:
    """Every portable tunable by name, and those for the GPU at hand if `arch` names its architecture."""
    return {name: tunable for name, tunable in Tunable.REGISTRY.items() if not tunable.archs or arch in tunable.archs}


def known_kernel(kernel: str) -> Tunable:
    """The tunable called `kernel`. Raises ValueError, with the names that there are, for another."""
    known = Tunable.REGISTRY
    if kernel not in known:
        raise ValueError(f"no kernel is called {kernel!r}; there are {', '.join(sorted(known))}")
    return known[kernel]


@cache
def _fields(kernel: str) -> frozenset[str]:
    return frozenset(field.name for field in fields(known_kernel(kernel).config))


def as_config(kernel: str, values: Mapping[str, int]) -> Config:
    """The config of `kernel` with these fields.

    Raises:
        ValueError: for a kernel that there is not, or fields that are not exactly those of its config.
    """
    expected = _fields(kernel)
    if expected != set(values):
        wrong = ", ".join(sorted(expected ^ set(values)))
        raise ValueError(f"a config of {kernel} has the fields {', '.join(sorted(expected))}; wrong here: {wrong}")
    return known_kernel(kernel).config(**values)


@cache
def _content(path: Path) -> bytes:
    return path.read_bytes()


@cache
def source_hash(kernel: str) -> str:
    """sha256 of what defines `kernel`: the file of its config and launcher, and what it shares with others.

    That is primitives.py, and the files beside its own that it imports from, but for those that only say what can run
    or how sequences lie.
    """
    source = Path(inspect.getfile(known_kernel(kernel).config))
    imported = [name.decode() for name in re.findall(rb"\nfrom \.(\w+) import", _content(source))]
    beside = [source.with_name(f"{name}.py") for name in imported if name not in NO_KERNEL_CODE]
    digest = hashlib.sha256()
    for path in dict.fromkeys((source, Path(primitives.__file__), *beside)):
        digest.update(_content(path))
    return digest.hexdigest()


for _name in Tunable.REGISTRY:
    source_hash(_name)  # now, so that the first look-up need not
