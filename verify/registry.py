"""Every check by its name, with what it is a check of.

A check takes a `Case`, runs the public functions on it and returns its `Comparison`s; it never judges, prints or
skips. Tests, the gate of a candidate config, the mutants and `cca-verify` all draw from this one table.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from .cases import Case
from .tolerance import Comparison

Direction = Literal["forward", "backward", "decode"]


@dataclass(frozen=True, slots=True)
class Check:
    """A check: call it with a case.

    `name` is that of its function; `direction` which kernels it runs ("backward" runs the forward ones too);
    `properties` the properties of docs/properties.md that it holds the kernels to, empty for the plain comparison
    with the oracle.
    """

    name: str
    direction: Direction
    properties: tuple[str, ...]
    run: Callable[[Case], list[Comparison]]

    def __call__(self, case: Case) -> list[Comparison]:
        return self.run(case)


_CHECKS: dict[str, Check] = {}


def checks() -> Mapping[str, Check]:
    """Every check by name: importing a module ``checks*`` of this folder enters those that it defines."""
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        if module.name.startswith("checks"):
            importlib.import_module(f"{__package__}.{module.name}")
    return _CHECKS


def check(direction: Direction, *properties: str) -> Callable[[Callable[[Case], list[Comparison]]], Check]:
    """Decorator that enters a function in `checks`.

    Raises:
        ValueError: for a name that is taken.
    """

    def enter(function: Callable[[Case], list[Comparison]]) -> Check:
        name = function.__name__
        if name in _CHECKS:
            raise ValueError(f"there is a check {name} already, in {_CHECKS[name].run.__module__}")
        _CHECKS[name] = Check(name, direction, properties, function)
        return _CHECKS[name]

    return enter
