"""How each kind of unit is run: the bodies of the worker processes of `cca-verify`."""

from __future__ import annotations

import atexit
import math
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import cache
from typing import Any

import torch

from ..kernels.tunable import Config, Schedule, Tunable
from ..problem import Problem
from ..profiles.configs import as_config
from . import canary, gate, ratchet, shadow
from .cache_model import REQUIRED as MUST_HAVE_DONE
from .cases import Case
from .foundations import FOUNDATIONS
from .gate_cases import Trial
from .inputs import poisoned_memory
from .levels import every_level
from .mutants import MUTANTS, Judge, workshop
from .record import Result, Trouble
from .registry import checks
from .shapes import fixed_case
from .tolerance import Comparison
from .units import Evaluated, Unit, describe, failed, judge, of_case, runner

ORDERS = (1, 2)
"""Program orders of shadowed runs, in turns: backwards, and shuffled."""
NO_HYPOTHESIS = 'random examples need hypothesis: pip install "cca-attention[test]"'


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
def drawn(unit: Unit) -> Result:
    """A check on cases that hypothesis draws; arguments: `examples`, `device`, and `seed`, None for always the same."""
    try:
        from .property_run import EMPTY, run_property
        from .strategies import REQUIRED
    except ImportError:
        return failed(unit, "environment", NO_HYPOTHESIS)
    given = unit.arguments
    found = run_property(
        unit.check, examples=given["examples"], seed=given["seed"], derandomize=True, device=given["device"]
    )
    facts: dict[str, Any] = {"classes": found.classes, "seed": found.seed}
    if given.get("covers"):
        facts["required_classes"] = sorted(REQUIRED)
    if found.failures:
        first = found.failures[0]
        message, blob = "; ".join(first.found), first.blob
        return unit.blank(
            status="fail", cases=found.examples, facts=facts, message=message, **{**of_case(first.case), "blob": blob}
        )
    if not found.ok or found.worst is None:
        message = f"compared nothing in {found.classes.get(EMPTY, 0)} of {found.examples} examples"
        return unit.blank(status="fail", cases=found.examples, facts=facts, message=message)
    result = describe(unit, found.worst_case, found.worst, found.examples, found.examples)
    return replace(result, facts=facts, seed=found.seed)


@runner
def walks(unit: Unit) -> Result:
    """The cache's state machine; arguments: `backend`, `examples`, `steps`, `seed`, None as in `drawn`, `covers`."""
    try:
        from .cache_machine import walk
    except ImportError:
        return failed(unit, "environment", NO_HYPOTHESIS)
    given = dict(unit.arguments)
    covers = given.pop("covers")
    found = walk(**given)
    tally = found.tally
    facts: dict[str, Any] = {"classes": {f"cache: {name}": count for name, count in tally.classes.items()}}
    if covers:
        facts["required_classes"] = [f"cache: {name}" for name in MUST_HAVE_DONE]
    if found.wrong or tally.worst is None:
        return unit.blank(
            status="fail", cases=tally.walks, comparisons=tally.comparisons, message=found.wrong or "compared nothing",
            facts={**facts, "steps": found.steps}, seed=found.seed, blob=found.blob,
        )  # fmt: skip
    result = describe(unit, None, tally.worst, tally.walks, tally.comparisons)
    return replace(result, facts=facts, seed=found.seed)


@runner
def levels(unit: Unit) -> Result:
    """Forward and backward by every rule of acceptance; arguments as of `check`."""
    return judge(unit, _by_every_rule(unit))


def _by_every_rule(unit: Unit) -> Evaluated:
    for case in _cases(unit):
        with poisoned_memory():
            yield case, every_level(case)


@runner
def canaries(unit: Unit) -> Result:
    """Every acceptance rule refuses what it must refuse."""
    return unit.blank(status="pass", cases=canary.canary(), budget_use=0.0)


@runner
def ratcheted(unit: Unit) -> Result:
    """The budget use of a fixed set of cases is no larger than recorded."""
    uses = ratchet.measure()
    found = ratchet.judge(uses, complete=True)
    worse = tuple(str(regression) for regression in found if regression.fails)
    worst = max(uses, key=uses.__getitem__)
    facts = {"ratchet": worse, "budget_uses": uses, "changes": tuple(map(str, found))}
    return unit.blank(
        status="fail" if worse else "pass", cases=len(uses), comparisons=len(uses), budget_use=uses[worst],
        tensor=worst, message="; ".join(worse[:3]), facts=facts,
    )  # fmt: skip


@runner
def shadowed(unit: Unit) -> Result:
    """The same under the shadow checker, with programs in other orders; arguments as of `check`."""
    return judge(unit, _watched(unit))


def _watched(unit: Unit) -> Evaluated:
    for number, case in enumerate(_cases(unit)):
        order = ORDERS[number % len(ORDERS)]
        with poisoned_memory(), shadow.watch(order=order) as report:
            comparisons = checks()[unit.check](case)
        faults = [Comparison(f"program order {order}", torch.inf, (), False, detail=str(f)) for f in report.faults]
        yield case, [*comparisons, *faults]


@runner
def config(unit: Unit) -> Result:
    """Configs of the shipped space with the same tiles, forced on small shapes one by one; arguments: `configs`."""
    lacking: list[str] = []
    result = judge(unit, _forced(unit, lacking))
    facts = {"configs": len(unit.arguments["configs"]), "without_room": len(lacking)}
    if lacking and len(lacking) == len(unit.arguments["configs"]):
        return unit.blank(status="pass", cases=len(lacking), budget_use=0.0, message=lacking[0], facts=facts)
    return replace(result, facts=facts)


def _forced(unit: Unit, lacking: list[str]) -> Evaluated:
    for values in unit.arguments["configs"]:
        forced = as_config(unit.kernel, values)
        case = replace(_ragged(unit, forced), schedule=Schedule({unit.kernel: forced}))
        comparisons, outcome, reason = gate.tried(Trial(case), unit.kernel)
        if outcome == "oom":  # the compiler refused it before anything ran
            lacking.append(reason)
            continue
        if outcome != "passed" and not comparisons:
            comparisons = [Comparison(outcome, math.inf, (), False, detail=reason)]
        yield case, comparisons


def _ragged(unit: Unit, config: Config) -> Case:
    """A case that fills one tile of the config and a part of the next."""
    on_gpu = unit.place == "gpu"
    tile = max([value for name, value in asdict(config).items() if name.startswith("block_")], default=16)
    problem = Problem(
        batch=2 if on_gpu else 1, q_heads=4 if on_gpu else 2, kv_heads=2 if on_gpu else 1, dtype=unit.dtype,
        head_dim=128 if on_gpu else 16, group_size=3, window_size=20, seq_len=min(tile, 256) + 45,
    )  # fmt: skip
    layout = "transposed" if Tunable.REGISTRY[unit.kernel].archs else "different"  # those need aligned memory
    return Case(problem=problem, layout=layout, device="cuda" if on_gpu else "cpu")


@runner
def profile_entry(unit: Unit) -> Result:
    """The gate on one entry of a profile; arguments: `config`, `problem`."""
    values, problem = unit.arguments["config"], Problem(**unit.arguments["problem"])
    candidate = as_config(unit.kernel, values)
    evidence = gate.check_config(unit.kernel, candidate, problem=problem, timeout_s=unit.limit_s - 30.0)
    facts: dict[str, Any] = {"suite": evidence.suite, "kernel_hash": evidence.kernel_hash}
    if not evidence.ok:
        facts["quarantine"] = asdict(gate.quarantine(unit.kernel, candidate, problem, evidence))
    return unit.blank(
        status="pass" if evidence.ok else "fail", cases=evidence.cases, message=evidence.message, config=values,
        budget_use=evidence.worst_budget_use, shape=str(problem), seed=evidence.seed,
        mode=evidence.mode, facts=facts,
    )  # fmt: skip


@runner
def mutant(unit: Unit) -> Result:
    """A planted mistake, which passes if it is killed; arguments: `mutant`, its name."""
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
    stack = ExitStack()
    atexit.register(stack.close)
    return Judge(*stack.enter_context(workshop()))
