"""A recommendation of group and window size for one context on one GPU, before any launch config is tuned."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.table import Table

from ..kernels.tunable import Tunable
from ..problem import Problem
from ..profiles.schema import ParetoPoint
from . import jobs, semantics, space
from .compile import Sketch, aim
from .front import Point, Preference, knee
from .pool import Pool
from .progress import Request
from .report import time_text
from .semantics import Latency, Limits, Outcome
from .tensors_file import read_activations
from .worker import Done, Job

LIMIT_S = 120.0


class LatencyError(RuntimeError):
    """A built-in config whose time could not be found; the message says for what, and why."""


class BuiltIn:
    """The latency of a problem: the sum over the kernels with their built-in configs, measured or by the model.

    A context manager that owns the workers.
    """

    def __init__(self, request: Request) -> None:
        self._request = request
        at_hand = request.at_hand
        self._pool = Pool(1, jobs.no_setup) if at_hand else Pool(request.jobs, aim, request.device.arch)

    def __enter__(self) -> BuiltIn:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.close()

    def __call__(self, problem: Problem) -> float:
        """Microseconds of one launch of each kernel.

        Raises:
            LatencyError: if a kernel gives none.
        """
        request = self._request
        work = [self._job(tunable, problem) for tunable in request.tunables]
        total = 0.0
        for job, outcome in self._pool.run(work, LIMIT_S):
            tunable: Tunable = job.tag
            if not isinstance(outcome, Done):
                message = f"the built-in config of {tunable.name} gave no time for {problem}"
                raise LatencyError(f"{message}: {outcome.message}")
            if request.at_hand:
                total += statistics.median(outcome.value)
            else:
                config, (found,) = tunable.default(problem, request.device.arch), outcome.value
                total += space.estimate_us(request.device, problem, tunable, config, Sketch.from_dict(found))
        return total

    def _job(self, tunable: Tunable, problem: Problem) -> Job:
        module, config = tunable.config.__module__, tunable.default(problem, self._request.device.arch)
        if self._request.at_hand:
            return Job(tunable, self._request.sample, (module, tunable.name, config, problem))
        return Job(tunable, jobs.sketch_job, (module, tunable.name, problem, (config,)))


def recommend(
    request: Request,
    sizes: tuple[Sequence[int], Sequence[int]],
    limits: Limits,
    prefer: Preference,
    qkv: Path | None,
    latency: Latency,
    say: Callable[[str], None],
) -> Outcome:
    """The front over pairs of group and window sizes, and the preferred pair.

    Args:
        sizes: those of groups, and those of windows.
        qkv: a file with a model's own activations, None for generated data.
        latency: of a problem. say: is told what goes on.

    Raises:
        EmptyError: if nothing satisfies the limits. TensorsFileError: for a file that cannot be used.
        LatencyError: if `latency` has none.
    """
    problems = semantics.grid(request.problem, *sizes)
    small = semantics.small_enough(problems, limits)
    data = semantics.generated(request.problem) if qkv is None else read_activations(qkv)
    say(f"{len(small)} of {len(problems)} pairs of group and window size are small enough; errors are proxies")
    say(f"taking errors on {semantics.length(data)} tokens: {', '.join(data)}")
    judged = semantics.long_enough(small, data)
    if len(judged) < len(small):
        say(f"{len(small) - len(judged)} of them have windows too long for data of {semantics.length(data)} tokens")
    return semantics.search(judged, data, limits, latency, prefer)


@dataclass(frozen=True, slots=True)
class Found:
    """What was recommended: the request for it, and the front as a profile and as a machine reads it."""

    request: Request
    pareto: tuple[ParetoPoint, ...]
    summary: dict[str, Any]

    @classmethod
    def of(cls, request: Request, outcome: Outcome, data: str) -> Found:
        """The preferred pair in the place of the request's; `data` names what the errors were found on."""
        best = outcome.preferred
        problem = replace(request.problem, group_size=best.group_size, window_size=best.window_size)
        pareto = tuple(_kept(point, data) for point in outcome.front)
        return cls(replace(request, problem=problem), pareto, {**_summary(outcome), "data": data})


def front_table(outcome: Outcome) -> Table:
    """The front; the knee and the preferred point are marked."""
    table, middle = Table(box=None, pad_edge=False, header_style="bold"), knee(outcome.front)
    has_needles = any(point.recall is not None for point in outcome.front)
    for title in ("group", "window", "latency", "cache", "of full", "error", "reached", *["needles"] * has_needles):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("")
    for point in outcome.front:
        marks = [name for name, is_it in (("knee", middle), ("preferred", outcome.preferred)) if point == is_it]
        recall = "" if point.recall is None else f"{point.recall:.0%}"
        table.add_row(
            str(point.group_size), str(point.window_size), time_text(point.latency_us),
            f"{point.cache_bytes / 2**20:.1f} MiB", f"{point.kv_ratio:.1%}", f"{point.error:.3f}",
            f"{point.reached:.0%}", *[recall] * has_needles, ", ".join(marks),
        )  # fmt: skip
    return table


def _summary(outcome: Outcome) -> dict[str, Any]:
    """All that was looked at, for machines."""
    return {
        "points": [asdict(point) for point in outcome.points],
        "front": [asdict(point) for point in outcome.front],
        "knee": asdict(knee(outcome.front)),
        "preferred": asdict(outcome.preferred),
    }


def _kept(point: Point, data: str) -> ParetoPoint:
    return ParetoPoint(
        group_size=point.group_size,
        window_size=point.window_size,
        kv_ratio=point.kv_ratio,
        quality=point.error,
        quality_proxy=f"relative L2 distance from full attention, less is better, worst of {data}",
        latency_us=point.latency_us,
    )
