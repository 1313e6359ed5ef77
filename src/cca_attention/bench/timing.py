"""How long a call takes on the GPU, what a CUDA graph of calls takes, and how much memory a call needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median
from typing import Any, Protocol

import torch
import triton

Call = Callable[[], Any]

WARM_UP_MS, REPEAT_MS = 50, 300
SLOW_MS = 200.0
SLOW_SAMPLES = 3
WARM_REPLAYS, REPLAYS = 5, 40
CALLS_OF_A_GRAPH = 16
"""At least as many calls are in a graph, so that its start is a small part of each."""
MATRIX, COPY_BYTES = 8192, 2**30


class Meter(Protocol):
    """What measures; the tests have one that needs no GPU."""

    def time_ms(self, call: Call) -> float:
        """Median milliseconds of `call`, L2 cleared before each run."""

    def replay_ms(self, calls: Sequence[Call], repeats: int) -> float:
        """Milliseconds of one of `calls`, in replays of one CUDA graph of all of them, `repeats` times over."""

    def peak_bytes(self, call: Call) -> int:
        """The most memory allocated during `call`, beyond what was before it."""

    def layers(self, cold_bytes: float) -> int:
        """How many tensors of `cold_bytes` to go round, so that none is still in the L2 cache when its turn comes."""


def steps_of(layers: int) -> tuple[int, int]:
    """(`repeats` for `replay_ms` of so many calls, how often it makes each call altogether, the warm-up included)."""
    repeats = -(-CALLS_OF_A_GRAPH // layers)
    return repeats, 1 + (WARM_REPLAYS + REPLAYS) * repeats


class GpuMeter:
    """Measures with CUDA events on the current device."""

    def __init__(self) -> None:
        self._driver: Any = triton.runtime.driver.active
        self._cache = self._driver.get_empty_cache_for_benchmark()

    def time_ms(self, call: Call) -> float:
        """See `Meter`; calls of over 0.2 s are run three times, others for 0.3 s by `triton.testing.do_bench`."""
        call()
        first = self._cold_ms(call)
        if first < SLOW_MS:
            return float(triton.testing.do_bench(call, warmup=WARM_UP_MS, rep=REPEAT_MS, return_mode="median"))
        return median([first, *(self._cold_ms(call) for _ in range(SLOW_SAMPLES - 1))])

    def _cold_ms(self, call: Call) -> float:
        self._driver.clear_cache(self._cache)
        return _elapsed_ms(call)

    def replay_ms(self, calls: Sequence[Call], repeats: int) -> float:
        """See `Meter`."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for call in calls:
                call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(repeats):
                for call in calls:
                    call()
        for _ in range(WARM_REPLAYS):
            graph.replay()
        times = [_elapsed_ms(graph.replay) for _ in range(REPLAYS)]
        return median(times) / (repeats * len(calls))

    def peak_bytes(self, call: Call) -> int:
        """See `Meter`."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def layers(self, cold_bytes: float) -> int:
        """See `Meter`: four times the L2 cache."""
        l2 = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
        return max(1, -int(-4 * l2 // cold_bytes))


def _elapsed_ms(call: Call) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def measured_ceilings(dtype: torch.dtype) -> tuple[float, float]:
    """(TFLOP/s of an 8192^3 product of `dtype`, TB/s of a copy of 1 GiB, read plus written) of the GPU at hand."""
    meter = GpuMeter()
    a, b = (torch.randn(MATRIX, MATRIX, device="cuda", dtype=dtype) for _ in range(2))
    product_ms = meter.time_ms(lambda: a @ b)
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda").fill_(1)
    target = torch.empty_like(source)
    copy_ms = meter.time_ms(lambda: target.copy_(source))
    return 2.0 * MATRIX**3 / product_ms / 1e9, 2.0 * COPY_BYTES / copy_ms / 1e9
