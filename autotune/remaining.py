"""How far a run is: the best so far of each kernel, and the time that is left."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence

from .progress import Progress
from .race import gap
from .report import baseline_us

ROUNDS = 12
"""Rounds that a race usually takes."""
USUAL_S = {"compiling": 2.0, "checking": 2.0, "timing": 20.0, "verifying": 20.0}
"""Seconds of a config or, from timing on, of a kernel, as long as the run has not shown its own."""


def standing(kernel: Progress) -> tuple[float | None, float | None]:
    """Microseconds of the choice, or of the best so far, and of the built-in config beside it; None: not known yet."""
    if kernel.chosen is not None:
        return kernel.chosen.time_us, baseline_us(kernel)
    if rounds := [found for found in list(kernel.rounds) if found.get(kernel.default) is not None]:
        timed = {config for found in rounds for config, time_us in found.items() if time_us is not None}
        behind = min(gap(rounds, config, kernel.default).centre for config in timed)
        builtin = statistics.median(found[kernel.default] or 0.0 for found in rounds)
        return builtin * math.exp(behind), builtin
    times = [trial.time_us for trial in list(kernel.trials.values()) if trial.time_us is not None]
    return min(times, default=None), baseline_us(kernel)


class Remaining:
    """Estimates the seconds that a run still takes, by the rate of the phase it is in and what is usual of the rest."""

    def __init__(self, kernels: Sequence[Progress], clock: Callable[[], float] = time.monotonic) -> None:
        self._kernels, self._clock = kernels, clock
        self._begun: dict[str, tuple[float, float]] = {}

    def __call__(self) -> float | None:
        """Seconds left; None before compiling has begun and after everything has ended."""
        kernels, now = self._kernels, self._clock()
        stages = {kernel.stage for kernel in kernels}
        current = next((phase for phase in USUAL_S if phase in stages), None)
        if current is None or stages & {"waiting", "examining"}:
            return None
        left = 0.0
        for phase in list(USUAL_S)[list(USUAL_S).index(current) :]:
            done, total = _units(phase, kernels)
            if phase == current:
                since, before = self._begun.setdefault(phase, (now, done))
                if done > before:
                    left += (total - done) * (now - since) / (done - before)
                else:
                    left += max(0.0, (total - done) * USUAL_S[phase] - (now - since))
            else:
                left += (total - done) * USUAL_S[phase]
        return left


def _units(phase: str, kernels: Sequence[Progress]) -> tuple[float, float]:
    """What is done of a phase, and all of it: configs, or from timing on kernels."""
    if phase == "compiling":
        return sum(k.compiled for k in kernels), sum(k.to_compile for k in kernels)
    timed = [kernel for kernel in kernels if kernel.at_hand]
    if phase == "checking":
        fit = sum(k.to_compile - k.failed.total() - k.dropped.total() for k in timed)
        return min(fit, sum(len(k.checked) + len(k.quarantined) for k in timed)), fit
    if phase == "timing":
        past = ("verifying", "done", "failed")
        return sum(1.0 if k.stage in past else min(1.0, len(k.rounds) / ROUNDS) for k in timed), len(timed)
    return sum(k.stage in ("done", "failed") for k in kernels), len(kernels)
