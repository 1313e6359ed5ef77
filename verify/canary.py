"""Canaries: an acceptance rule that takes anything, or refuses everything, is noticed before it is believed.

Every rule is `guarded`: it carries a pair that it must accept and pairs that it must refuse, the worst of them 1.5
times beyond its tolerance, NaN and a wrong shape among them. The pairs are tried before the rule's first judgement
and again every 256 of them; `canary` tries all rules at once, as their modules have them now, so that a rule that was
replaced is seen as well as one whose body was, and the bounds that they are given.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, Protocol, TypeVar

EVERY = 256
"""Judgements between two tries of a rule's canaries."""


class CanaryError(RuntimeError):
    """An acceptance rule does not judge: what it said before is worth nothing."""


class Verdict(Protocol):
    """What a rule returns."""

    @property
    def ok(self) -> bool:
        """Whether it accepts."""


P = ParamSpec("P")
V = TypeVar("V", bound=Verdict)
Probe = Callable[[Callable[..., Verdict]], Verdict]
_PROOFS: dict[tuple[str, str], Callable[[Callable[..., Verdict]], None]] = {}


def guarded(good: Probe, *bad: Probe) -> Callable[[Callable[P, V]], Callable[P, V]]:
    """Decorator of a rule: `good` and `bad` call the rule that they are given, and it must accept and refuse them."""

    def guard(rule: Callable[P, V]) -> Callable[P, V]:
        where, trusted = f"{rule.__module__}.{rule.__name__}", 0

        def prove(judge: Callable[..., Verdict]) -> None:
            if not good(judge).ok:
                raise CanaryError(f"{where} refuses what is right")
            if accepted := [number for number, probe in enumerate(bad) if probe(judge).ok]:
                raise CanaryError(f"{where} accepts what is wrong: bad examples {accepted}")

        @wraps(rule)
        def judged(*args: P.args, **kwargs: P.kwargs) -> V:
            nonlocal trusted
            if not trusted:
                prove(rule)  # a rule that fails it is not trusted at the next call either
                trusted = EVERY
            trusted -= 1
            return rule(*args, **kwargs)

        _PROOFS[rule.__module__, rule.__name__] = prove
        return judged

    return guard


def canary() -> int:
    """Try the canaries of every rule, those of `tolerance`, `bias` and `peer`, and of the bounds; the number of rules.

    It takes a tenth of a second.

    Raises:
        CanaryError: if a rule or a bound accepts what is wrong or refuses what is right.
    """
    for module in ("tolerance", "bias", "peer"):
        importlib.import_module(f"{__package__}.{module}")
    for (module, name), prove in _PROOFS.items():
        prove(getattr(importlib.import_module(module), name))
    importlib.import_module(f"{__package__}.levels").prove_bounds()
    return len(_PROOFS)
