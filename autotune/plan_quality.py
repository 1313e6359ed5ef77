"""How good the model's plan was, on a run or a sweep that timed what the model ranks."""

from __future__ import annotations

import gzip
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..kernels.tunable import Config, Work
from ..problem import Problem
from ..profiles.configs import as_config
from .binary import Resources
from .compile import Launch
from .devices import Device
from .predict import PoolingConstants, predict
from .search import Trial, preference
from .tile_model import Constants
from .traits import Traits

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


@dataclass(frozen=True, slots=True)
class Timed:
    """One config of a sweep: what it launches and takes, and its median time; `role`: fit or judge."""

    kernel: str
    role: str
    problem: Problem
    config: Config
    work: Work
    launches: tuple[tuple[Launch, Resources], ...]
    us: float

    @property
    def preference(self) -> tuple[int, int, tuple[int, ...]]:
        """What decides among configs of equal predictions."""
        return preference(Trial(self.config, tuple(resources for _, resources in self.launches)))

    def predicted_us(self, device: Device, constants: Constants | PoolingConstants | None = None) -> float:
        """The model's time on `device`."""
        return predict(device, self.problem, self.config, self.work, self.launches, constants).total_us


Cell = tuple[str, Problem]
"""A kernel and a problem: what one choice is made for."""


def read_sweep(path: Path) -> dict[Cell, list[Timed]]:
    """The configs of a sweep (gzipped JSON lines) that were timed, by the choice that they are candidates of."""
    cells: dict[Cell, list[Timed]] = {}
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for timed in (_timed(row) for row in map(json.loads, lines) if "why" not in row):
            cells.setdefault((timed.kernel, timed.problem), []).append(timed)
    return cells


def _timed(row: dict[str, Any]) -> Timed:
    launches = (Launch(x["kernel"], tuple(x["grid"]), Traits(**x["traits"])) for x in row["launches"])
    resources = (Resources(**values) for values in row["resources"])
    return Timed(
        row["kernel"], row["role"], Problem(**row["problem"]), as_config(row["kernel"], row["config"]),
        Work(**row["work"]), tuple(zip(launches, resources, strict=True)), row["us"],
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Judged(PlanQuality):
    """With `short_regret`, the best time of the `short` configs that the model ranks first, over the best of all."""

    short_regret: float


def judged(
    cell: Sequence[Timed], device: Device, short: int, constants: Constants | PoolingConstants | None = None
) -> Judged:
    """The quality of the plan for one choice.

    Raises:
        ValueError: for fewer configs than say anything.
    """
    if len(cell) < 2:
        raise ValueError(f"a cell must have at least 2 configs, got {len(cell)}")
    ranked = sorted((timed.predicted_us(device, constants), timed.preference, timed.us) for timed in cell)
    predicted, _, times = zip(*ranked, strict=True)
    best = min(times)
    return Judged(len(ranked), spearman(predicted, times), times[0] / best, short_regret=min(times[:short]) / best)


def spearman(one: Sequence[float], other: Sequence[float]) -> float:
    """Rank correlation of two sequences of equal length; 0.0 if either is constant."""
    a, b = _ranks(one), _ranks(other)
    middle = statistics.fmean(a)
    spread = math.sqrt(sum((x - middle) ** 2 for x in a) * sum((y - middle) ** 2 for y in b))
    return sum((x - middle) * (y - middle) for x, y in zip(a, b, strict=True)) / spread if spread else 0.0


def _ranks(values: Sequence[float]) -> list[float]:
    """The rank of each value; equal ones share the mean of theirs."""
    return [sum(other < x for other in values) + (sum(other == x for other in values) - 1) / 2 for x in values]
