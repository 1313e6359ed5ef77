"""How each kind of unit is run: the bodies of the worker processes of `cca-verify`."""

from __future__ import annotations

import atexit
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import cache
from typing import TYPE_CHECKING

import torch

from ..kernels.tunable import Schedule
from ..problem import Problem
from ..profiles.configs import as_config, tunables
from . import gate, shadow
from .cases import Case
from .foundations import FOUNDATIONS
from .inputs import poisoned_memory
from .record import Result, Trouble
from .registry import checks
from .shapes import fixed_case
from .tolerance import Comparison
from .units import Evaluated, Unit, judge, runner

if TYPE_CHECKING:
    from .mutants import Judge

ORDERS = (1, 2)
"""Program orders of a shadowed run: backwards, and shuffled."""


@runner
def foundation(unit: Unit) -> Result:
    """Integers and oracles: `foundations.FOUNDATIONS`."""
    return judge(unit, FOUNDATIONS[unit.check]())


@runner
def check(unit: Unit) -> Result:
    """A check on fixed cases, in poisoned memory; arguments: `cases` by name, `backend`, `device`."""
    return judge(unit, _evaluated(unit))


def _cases(unit: Unit) -> Iterator[Case]:
    for name in unit.arguments["cases"]:
        options = {key: unit.arguments[key] for key in ("backend", "device") if key in unit.arguments}
        yield fixed_case(name, unit.dtype, **options)


def _evaluated(unit: Unit) -> Evaluated:
    for case in _cases(unit):
        with poisoned_memory():
            yield case, checks()[unit.check](case)


@runner
def shadowed(unit: Unit) -> Result:
    """The same under the shadow checker, with programs in other orders; arguments as of `check`."""
    return judge(unit, _watched(unit))


def _watched(unit: Unit) -> Evaluated:
    for case in _cases(unit):
        for order in ORDERS:
            with poisoned_memory(), shadow.watch(order=order) as report:
                comparisons = checks()[unit.check](case)
            faults = [Comparison(f"program order {order}", torch.inf, (), False, detail=str(f)) for f in report.faults]
            yield case, [*comparisons, *faults]


@runner
def config(unit: Unit) -> Result:
    """Every config of the shipped space with some tiles, forced on small shapes; arguments: `configs`, `device`."""
    return judge(unit, _forced(unit))


def _forced(unit: Unit) -> Evaluated:
    tunables()
    for values in unit.arguments["configs"]:
        forced = Schedule({unit.kernel: as_config(unit.kernel, values)})
        for name in unit.arguments["cases"]:
            case = fixed_case(name, unit.dtype, device=unit.arguments["device"], schedule=forced)
            with poisoned_memory():
                yield case, checks()[unit.check](case)


@runner
def profile_entry(unit: Unit) -> Result:
    """The gate on one entry of a profile; arguments: `config`, `problem`."""
    tunables()
    values, problem = unit.arguments["config"], Problem(**unit.arguments["problem"])
    evidence = gate.check_config(unit.kernel, as_config(unit.kernel, values), problem=problem)
    return unit.blank(
        status="pass" if evidence.ok else "fail", cases=evidence.cases, message=evidence.message, config=values,
        budget_use=evidence.worst_budget_use, shape=str(problem), seed=evidence.seed,
        mode=evidence.mode, facts={"suite": evidence.suite, "kernel_hash": evidence.kernel_hash},
    )  # fmt: skip


@runner
def mutant(unit: Unit) -> Result:
    """A planted mistake, which passes if it is killed; arguments: `mutant`, its name."""
    from .mutants import MUTANTS

    name = unit.arguments["mutant"]
    verdict = _judge().judge(name, MUTANTS[name])
    facts = {**asdict(verdict), "killed": verdict.killed}
    result = unit.blank(status="pass", cases=1, case=repr(MUTANTS[name].case), facts=facts)
    if verdict.outcome == "survived":
        return replace(result, status="fail", message=f"{name} survives {verdict.check}: {verdict.says}")
    troubles: dict[str, Trouble] = {"stale": "stale-mutant", "baseline": "environment", "failed": "crash"}
    if verdict.killed:
        return result
    return replace(result, status="error", trouble=troubles[verdict.outcome], message=verdict.error)


@cache
def _judge() -> Judge:
    """One workshop for all mutants of this process; its folder goes when the process ends."""
    from .mutants import Judge, workshop

    stack = ExitStack()
    atexit.register(stack.close)
    return Judge(*stack.enter_context(workshop()))
