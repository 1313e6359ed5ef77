"""Timing on the GPU at hand, in a worker process of its own: what goes wrong there ends the worker, not the run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import quantiles

import torch
from torch import Tensor
from triton.testing import do_bench

from ..kernels.tunable import Config, Tunable
from ..problem import Problem
from .compile import find_tunable

WARM_UP_MS, REPEAT_MS = 10, 30
SEED = 20241219
PLAUSIBLE = 0.75
"""The least share of the roofline time that is believed: clocks boost past the ones that peak rates are stated for."""

_tensors: dict[tuple[str, Problem], dict[str, Tensor]] = {}


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


def sample(module: str, name: str, config: Config, problem: Problem) -> list[float]:
    """Microseconds of some launches, each with a cold L2 cache."""
    tunable = find_tunable(module, name)
    tensors = _inputs(tunable, problem)
    times_ms = do_bench(
        lambda: tunable.launch(problem, tensors, config), warmup=WARM_UP_MS, rep=REPEAT_MS, return_mode="all"
    )
    return [1e3 * time_ms for time_ms in times_ms]


class NoRoomError(RuntimeError):
    """The GPU has no memory for the tensors of the problem, whatever the config."""


def _inputs(tunable: Tunable, problem: Problem) -> dict[str, Tensor]:
    """The tensors of one problem, kept until another is asked for."""
    key = tunable.name, problem
    if key not in _tensors:
        _tensors.clear()
        device = torch.device("cuda")
        try:
            _tensors[key] = tunable.allocate(problem, device, torch.Generator(device).manual_seed(SEED))
        except torch.OutOfMemoryError as error:
            raise NoRoomError(f"no room for the tensors of {tunable.name} for {problem}: {error}") from error
    return _tensors[key]
