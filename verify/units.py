"""Units: what a run of `cca-verify` is made of. Each has an id, runs alone in a worker process and gives one result."""

from __future__ import annotations

import math
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import torch

from .cases import Case
from .record import Mode, Result, Trouble, result_as_dict
from .tolerance import Comparison

Place = Literal["host", "interpreter", "gpu"]
Evaluated = Iterable[tuple[Case | None, list[Comparison]]]
SUSPICIONS = ("statistical", "bias", "peer")
"""Levels of comparisons that warn, and fail a strict run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """One check of one kind.

    `runner` is the name of a function in RUNNERS and `arguments` what it gets; `place` the kind of process it needs,
    and `alone` that nothing else runs beside it; `limit_s` after how many seconds the process is killed, `estimate_s`
    about how long it takes; `strict` whether statistical suspicions fail it.
    """

    id: str
    layer: str
    check: str
    runner: str
    place: Place
    mode: Mode
    properties: tuple[str, ...] = ()
    direction: str = ""
    kernel: str = ""
    dtype: str = ""
    strict: bool = False
    alone: bool = False
    limit_s: float = 300.0
    estimate_s: float = 5.0
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def blank(self, **values: Any) -> Result:
        """A result of this unit with these fields."""
        names = ("id", "layer", "check", "mode", "properties", "direction", "kernel", "dtype")
        return Result(**{**{name: getattr(self, name) for name in names}, **values})


Runner = Callable[[Unit], Result]
RUNNERS: dict[str, Runner] = {}
"""Entered by `runner`; the modules that define them are imported by `run_unit`."""


def runner(function: Runner) -> Runner:
    """Decorator that enters a function in RUNNERS."""
    RUNNERS[function.__name__] = function
    return function


def judge(unit: Unit, evaluated: Evaluated) -> Result:
    """The result of comparisons, up to and with the first case that failed."""
    cases, seen, empty = 0, 0, True
    worst: tuple[float, Case | None, Comparison | None] = (-1.0, None, None)
    warnings: list[str] = []
    for case, comparisons in evaluated:
        cases += 1
        for comparison in comparisons:
            seen += 1
            empty = empty and comparison.empty
            use = math.inf if math.isnan(comparison.budget_use) else comparison.budget_use
            if use > worst[0] and comparison.level not in SUSPICIONS:
                worst = use, case, comparison
            if not comparison.ok and comparison.level in SUSPICIONS:
                warnings.append(f"{comparison} of {_shape(case)}")
            elif not comparison.ok:
                return describe(unit, case, comparison, cases, seen, warnings)
    if empty or worst[2] is None:
        return unit.blank(status="fail", cases=cases, comparisons=seen, message="compared nothing")
    return describe(unit, worst[1], worst[2], cases, seen, warnings)


def describe(
    unit: Unit, case: Case | None, comparison: Comparison, cases: int, seen: int, warnings: Sequence[str] = ()
) -> Result:
    """A result of `cases` cases and `seen` comparisons that is told by one of them: the first failed or the worst."""
    failed = not comparison.ok or (unit.strict and bool(warnings))
    message = str(comparison) if not comparison.ok else warnings[0] if failed else ""
    described = unit.blank(
        status="fail" if failed else "pass", cases=cases, comparisons=seen, message=message, warnings=tuple(warnings),
        budget_use=comparison.budget_use, tensor=comparison.name, worst_index=comparison.worst_index,
        level=comparison.level, max_abs_error=comparison.max_abs_error, terms=comparison.terms,
    )  # fmt: skip
    return described if case is None else replace(described, **of_case(case))


def of_case(case: Case) -> dict[str, Any]:
    """The fields of a result that say which case it was."""
    schedule = {name: asdict(config) for name, config in (case.schedule or {}).items()}
    return {
        "shape": str(case.problem), "case": repr(case), "seed": case.seed, "dtype": case.problem.dtype,
        "config": schedule or None,
    }  # fmt: skip


def _shape(case: Case | None) -> str:
    return "" if case is None else f"{case.problem}, {case.family}"


def run_unit(values: dict[str, Any]) -> dict[str, Any]:
    """The result of a unit, both as JSON, in a worker process; an exception is a result too."""
    from . import gpu, runners  # noqa: F401 they enter the runners

    fields: dict[str, Any] = {name: tuple(x) if isinstance(x, list) else x for name, x in values.items()}
    unit = Unit(**fields)
    started = time.monotonic()
    if unit.place == "gpu":
        torch.set_num_threads(1)  # there is a worker for each core
    try:
        result = RUNNERS[unit.runner](unit)
    except Exception as error:
        result = failed(unit, "exception", " ".join("".join(traceback.format_exception_only(error)).split()))
        result = replace(result, facts={"where": traceback.format_exc(limit=-4)})
    return result_as_dict(replace(result, duration_s=time.monotonic() - started))


def failed(unit: Unit, trouble: Trouble, message: str) -> Result:
    """The result of a unit that came to no result."""
    return unit.blank(status="error", trouble=trouble, message=message)
