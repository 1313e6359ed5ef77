"""From trials to a choice. A trial that failed is a value like any other; ties are broken the same way every time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from ..kernels.tunable import Config
from .binary import Resources
from .measure import Timing
from .predict import Prediction
from .race import MARGIN


@dataclass(frozen=True, slots=True)
class Trial:
    """One config: what it takes and how fast it is, or else why it is out.

    `baseline` is the built-in config timed in turns with this one.
    """

    config: Config
    resources: tuple[Resources, ...] = ()
    prediction: Prediction | None = None
    timing: Timing | None = None
    baseline: Timing | None = None
    refusal: str | None = None

    @property
    def time_us(self) -> float | None:
        """The measured median, or the prediction where nothing was measured; None for a trial that is out."""
        if self.refusal is not None:
            return None
        if self.timing is not None:
            return self.timing.median_us
        return None if self.prediction is None else self.prediction.total_us

    @property
    def score(self) -> float | None:
        """What trials are compared by: the time over that of the built-in config next to it, or the prediction."""
        if self.refusal is None and self.timing is not None and self.baseline is not None:
            return self.timing.median_us / self.baseline.median_us
        return self.time_us


def ranked(trials: Sequence[Trial], default: Config, margin: float = MARGIN) -> list[Trial]:
    """The trials that are not out, best first.

    The default config leads unless it is beaten by more than `margin`. Equal scores are decided by `preference`.
    """
    standing = sorted(
        (trial for trial in trials if trial.score is not None),
        key=lambda trial: (trial.score or 0.0, preference(trial)),
    )
    for trial in standing:
        if trial.config == default and (trial.score or 0) * (1 - margin) <= (standing[0].score or 0):
            return [trial, *(other for other in standing if other is not trial)]
    return standing


def preference(trial: Trial) -> tuple[int, int, tuple[int, ...]]:
    """What decides among equally fast configs: fewer registers, less shared memory, then the smaller fields."""
    registers = max((r.registers for r in trial.resources), default=0)
    shared = max((r.shared_bytes for r in trial.resources), default=0)
    return registers, shared, tuple(asdict(trial.config).values())
