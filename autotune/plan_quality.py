"""How good the model's plan was, on a run that timed what the model had ranked."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

LEAST = 3
"""Configs with both a prediction and a time, below which nothing is said of their order."""


@dataclass(frozen=True, slots=True)
class PlanQuality:
    """Of `configs` that were predicted and timed: rank correlation, and the time of the planned pick over the best's.

    `correlation` is Spearman's: 1 if the model has them in the order of their times, 0 if it knows nothing.
    """

    configs: int
    correlation: float
    regret: float


def plan_quality(kernel: Mapping[str, Any]) -> PlanQuality | None:
    """The quality of the plan for one kernel of a record; None if too few configs were predicted and timed."""
    pairs = [
        (trial["predicted_us"], trial["time_us"])
        for trial in kernel["trials"]
        if trial["refusal"] is None and trial["predicted_us"] is not None and trial["time_us"] is not None
    ]
    if len(pairs) < LEAST:
        return None
    predicted, timed = zip(*pairs, strict=True)
    regret = min(pairs)[1] / min(timed)
    return PlanQuality(len(pairs), spearman(predicted, timed), regret)


def spearman(one: Sequence[float], other: Sequence[float]) -> float:
    """Rank correlation of two sequences of equal length; 0.0 if either is constant."""
    a, b = _ranks(one), _ranks(other)
    middle = statistics.fmean(a)
    spread = math.sqrt(sum((x - middle) ** 2 for x in a) * sum((y - middle) ** 2 for y in b))
    return sum((x - middle) * (y - middle) for x, y in zip(a, b, strict=True)) / spread if spread else 0.0


def _ranks(values: Sequence[float]) -> list[float]:
    """The rank of each value; equal ones share the mean of theirs."""
    return [sum(other < x for other in values) + (sum(other == x for other in values) - 1) / 2 for x in values]
