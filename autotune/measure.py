"""Timing on the GPU at hand, in a worker process of its own: what goes wrong there ends the worker, not the run."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import quantiles
from typing import Any, Literal

import torch
from torch import Tensor

from ..kernels.tunable import Config, Tunable
from ..problem import Problem
from .compile import find_tunable

FLUSH_BYTES = 512 * 2**20
"""Written before each launch: more than any L2 cache holds, and long enough for the host to be ahead of the GPU."""
WINDOW_MS = 25.0
FEWEST, MOST = 3, 40
"""Launches of one sample: as many as there is time for in the window, within these."""
SEED = 20241219
PLAUSIBLE = 0.75
"""The least share of the roofline time that is believed: clocks boost past the ones that peak rates are stated for."""


@dataclass(frozen=True, slots=True)
class Policy:
    """How a kernel is timed. Part of what a time is kept under: times of different policies are never compared."""

    mode: Literal["eager", "cuda_graph"]
    cold_l2: bool = True
    interleaved: bool = True

    def __str__(self) -> str:
        return f"{self.mode}, {'cold' if self.cold_l2 else 'warm'} L2{', interleaved' if self.interleaved else ''}"


def policy_of(kernel: str) -> Policy:
    """Decoding runs in a CUDA graph, as it is deployed; all else is launched as it comes."""
    return Policy("cuda_graph" if kernel.startswith("decode") else "eager")


@dataclass(frozen=True, slots=True)
class Timing:
    """Microseconds of one launch: median, 20th and 80th percentile of `samples` launches with a cold L2 cache."""

    median_us: float
    p20_us: float
    p80_us: float
    samples: int

    @classmethod
    def of(cls, samples_us: list[float]) -> Timing:
        """The summary of at least two samples."""
        fifths = quantiles(samples_us, n=5, method="inclusive")
        return cls(quantiles(samples_us, n=2, method="inclusive")[0], fifths[0], fifths[3], len(samples_us))

    def refusal(self, roofline_us: float) -> str | None:
        """Why this timing is not believed, or None."""
        if not all(map(math.isfinite, (self.median_us, self.p20_us, self.p80_us))) or self.p20_us <= 0:
            return f"the timing is not a positive finite number: {self}"
        if self.median_us < PLAUSIBLE * roofline_us:
            return f"{self.median_us:.2f} us is faster than the hardware can be ({roofline_us:.2f} us)"
        return None


class NoRoomError(RuntimeError):
    """The GPU has no memory for the tensors of the problem, whatever the config."""


def sample(module: str, name: str, config: Config, problem: Problem) -> list[float]:
    """Microseconds of some launches, each with a cold L2 cache.

    Raises:
        NoRoomError: if not even the tensors fit; whatever the launch raises besides.
    """
    tunable = find_tunable(module, name)
    bench = _bench(tunable, problem)
    if config not in bench.runs:
        bench.runs[config] = _runnable(tunable, problem, config, bench.tensors)
        bench.spans_ms[config] = _time_ms(bench.runs[config], bench.flush, 2)[-1]
    launches = int(WINDOW_MS / max(bench.spans_ms[config], 1e-3))
    times_ms = _time_ms(bench.runs[config], bench.flush, min(MOST, max(FEWEST, launches)))
    return [1e3 * time_ms for time_ms in times_ms]


@dataclass(frozen=True, slots=True)
class _Bench:
    """The tensors of one problem, and how each config that was timed on them is launched."""

    tensors: dict[str, Tensor]
    flush: Tensor
    runs: dict[Config, Callable[[], Any]]
    spans_ms: dict[Config, float]


_benches: dict[tuple[str, Problem], _Bench] = {}


def _bench(tunable: Tunable, problem: Problem) -> _Bench:
    """What one kernel is timed with, kept until another kernel or problem is asked for."""
    key = tunable.name, problem
    if key not in _benches:
        _benches.clear()
        device = torch.device("cuda")
        try:
            tensors = tunable.allocate(problem, device, torch.Generator(device).manual_seed(SEED))
            flush = torch.empty(FLUSH_BYTES // 4, dtype=torch.int32, device=device)
        except torch.OutOfMemoryError as error:
            raise NoRoomError(f"no room for the tensors of {tunable.name} for {problem}: {error}") from error
        _benches[key] = _Bench(tensors, flush, {}, {})
    return _benches[key]


def _runnable(tunable: Tunable, problem: Problem, config: Config, tensors: dict[str, Tensor]) -> Callable[[], Any]:
    """What launches the config, after it was launched once: compiled, and captured if its policy says so."""

    def launch() -> None:
        tunable.launch(problem, tensors, config)

    launch()
    torch.cuda.synchronize()
    if policy_of(tunable.name).mode == "eager":
        return launch
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch()
    return graph.replay


def _time_ms(run: Callable[[], Any], flush: Tensor, launches: int) -> list[float]:
    """Milliseconds of each of some launches by the GPU's own clock, the L2 cache overwritten before each."""
    starts, ends = ([torch.cuda.Event(enable_timing=True) for _ in range(launches)] for _ in range(2))
    for start, end in zip(starts, ends, strict=True):
        flush.zero_()
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in zip(starts, ends, strict=True)]
