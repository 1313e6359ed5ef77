"""What the rules of other projects say of a mutant: runs on a patched copy of the package, for `mutant_table`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from .calls import oracle, run
from .cases import Case
from .inputs import FAMILIES as ALL_FAMILIES
from .inputs import make_inputs, poisoned_memory
from .interpreter import patch_language_once_per_launch
from .mutant import BASE, Mutant
from .mutants import MUTANTS
from .registry import checks
from .rules import RULES, Judged, eager

DTYPES = ("float16", "float32")
FAMILIES = ("randn", "old_keys", "small_values")
DECODE_FILES = {"kernels/decode.py", "cache.py", "cache_state.py"}

Refusals = dict[str, dict[str, list[str]]]
"""By dtype and family, the rules that refuse a result."""


def shows_in_one_call(mutant: Mutant) -> bool:
    """Whether the results of one forward or backward can be wrong, so that the rules have something to judge."""
    modules = {patch.module for patch in mutant.patches}
    return mutant.family in ("eight", "F", "B") and not modules <= DECODE_FILES


def refusals_of_mutant(name: str) -> Refusals:
    """What the rules say of this process's package on the case of mutant `name`."""
    mutant = MUTANTS[name]
    families = dict.fromkeys((*FAMILIES, mutant.case.family))
    return refusals(mutant.case, grads=needs_gradients(mutant), families=families)


def refusals_of_all_families(_: None) -> Refusals:
    """What the rules say of this process's package on all families of values."""
    return refusals(BASE, grads=True, families=ALL_FAMILIES)


def needs_gradients(mutant: Mutant) -> bool:
    """Whether it is seen in a backward."""
    check = checks().get(mutant.check)
    return check is not None and check.direction == "backward"


def refusals(case: Case, *, grads: bool, families: Iterable[str]) -> Refusals:
    """The rules that refuse out, or with `grads` one of out, dq, dk and dv, in each dtype and family.

    A call that raises is refused by all: no test of any project would pass.
    """
    patch_language_once_per_launch()
    result: Refusals = {}
    for dtype in DTYPES:
        result[dtype] = {}
        for family in families:
            one = replace(case, family=family, problem=replace(case.problem, dtype=dtype))
            result[dtype][family] = _refuse(one, grads)
    return result


def _refuse(case: Case, grads: bool) -> list[str]:
    inputs = make_inputs(case)
    expected, plain = oracle(case, inputs, grads=grads), eager(case, inputs, grads=grads)
    try:
        with poisoned_memory():
            actual = run(case, inputs, grads=grads)
    except Exception:  # whatever a patched kernel raises
        return list(RULES)
    judged = [Judged(actual[name], expected[name], plain[name], name != "out") for name in plain]
    return [name for name, rule in RULES.items() if not all(rule.accepts(x) for x in judged)]
