"""Paired comparison of configs that were timed in turns: who is clearly worse, and who is chosen among near ties.

A round gives every config that takes part one time, one right after the other, so that a drifting clock meets them all
alike: what is compared is the ratio of two times of the same round, over rounds. The ratio's centre is its median, and
its interval is meant to hold it with 99 % (with fewer than 12 rounds it does so in 93 % of simulated races, for the
spread is then itself uncertain); one round proves nothing.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..kernels.tunable import Config

MARGIN = 0.02
"""A config replaces the built-in one only if it is faster by more than this share; less is noise."""
BAND = 0.01
"""Configs closer than this to the best count as equally fast, and are chosen among without regard to their times."""
HOPELESS = 1.5
"""A config this much slower than the best is not timed again, whatever the noise."""
FEW = 5
"""Rounds below which the spread is the standard deviation; from here on outliers do not count, and configs drop out."""
LEAST = 6
"""Rounds before which no race ends."""
T_99 = (
    63.66, 9.92, 5.84, 4.60, 4.03, 3.71, 3.50, 3.36, 3.25, 3.17, 3.11, 3.05, 3.01, 2.98, 2.95, 2.92, 2.90, 2.88, 2.86,
    2.85, 2.83, 2.82, 2.81, 2.80, 2.79, 2.78, 2.77, 2.76, 2.76, 2.75,
)  # fmt: skip
"""Student's t for a two-sided 99 %, from one degree of freedom on."""
T_95 = (
    12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14, 2.13, 2.12, 2.11, 2.10, 2.09,
    2.09, 2.08, 2.07, 2.07, 2.06, 2.06, 2.06, 2.05, 2.05, 2.05, 2.04,
)  # fmt: skip
"""The same for 95 %, which is what profiles state."""

Round = Mapping[Config, float | None]
"""Microseconds of each config that was asked for, and of the built-in one; None: it failed, and always will."""
Search = Generator[tuple[Config, ...], Round, None]
"""Yields the configs to time next and is sent what came out."""


@dataclass(frozen=True, slots=True)
class Gap:
    """How much slower one config is than another, as a logarithm of the ratio of their times: centre ± half."""

    centre: float
    half: float
    rounds: int

    @property
    def least(self) -> float:
        """The lower end."""
        return self.centre - self.half

    @property
    def most(self) -> float:
        """The upper end."""
        return self.centre + self.half


def gap(rounds: Sequence[Round], config: Config, other: Config) -> Gap:
    """How much slower `config` is than `other`, over the rounds that have both.

    Raises:
        ValueError: if none has.
    """
    pairs = [(r.get(config), r.get(other)) for r in rounds]
    logs = [math.log(a / b) for a, b in pairs if a is not None and b is not None]
    if not logs:
        raise ValueError(f"no round has both {config} and {other}")
    centre, n = statistics.median(logs), len(logs)
    if config == other:
        return Gap(0.0, 0.0, n)
    if n == 1:
        return Gap(centre, math.inf, n)
    # of a normal distribution: the standard over the median deviation, and the median's scatter over the mean's
    robust = 1.4826 * 1.2533 * statistics.median(abs(x - centre) for x in logs)
    spread = statistics.stdev(logs) if n < FEW else robust
    return Gap(centre, _of_table(T_99, n) * spread / math.sqrt(n), n)


def _of_table(table: tuple[float, ...], rounds: int) -> float:
    return table[min(rounds - 2, len(table) - 1)]


def race(live: Sequence[Config], rounds: int) -> Search:
    """Time `live` together, and again without those that are clearly out of the band of the best, up to `rounds` times.

    It ends early once every config left is known to a quarter of the margin.
    """
    standing, seen = list(live), list[Round]()
    while standing and len(seen) < rounds:
        seen.append((yield tuple(standing)))
        standing = [config for config in standing if seen[-1][config] is not None]
        if not standing:
            return
        best = fastest(seen, standing)
        gaps = {config: gap(seen, config, best) for config in standing}
        standing = [config for config in standing if _may_win(gaps[config])]
        if len(seen) >= LEAST and all(gaps[config].half < MARGIN / 4 for config in standing):
            return


def _may_win(behind: Gap) -> bool:
    """Whether a config that is so far behind the best may be in its band after all."""
    if behind.centre >= math.log(HOPELESS):
        return False
    return behind.rounds < FEW or behind.least <= math.log1p(BAND)


def fastest(rounds: Sequence[Round], configs: Sequence[Config]) -> Config:
    """The one of `configs`, which all rounds have, with the least median time."""
    return min(configs, key=lambda config: statistics.median(r[config] or math.inf for r in rounds))


def ranking(
    rounds: Sequence[Round],
    default: Config,
    preference: Callable[[Config], Any],
    previous: Config | None = None,
) -> list[Config]:
    """The configs that were timed and never failed, the choice first.

    The default leads unless one is faster by more than `MARGIN` and by more than the noise. Of those that are, the
    ones that may be within `BAND` of the best are equals: the previous choice is kept, else the least by `preference`
    is taken. The others follow by their times.
    """
    failed = {config for r in rounds for config, time_us in r.items() if time_us is None}
    timed = list(dict.fromkeys(config for r in rounds for config in r if config not in failed))
    if not timed:
        return []
    counts = {config: sum(config in r for r in rounds) for config in timed}
    most = max(counts.values())
    reference = default if counts.get(default) == most else next(c for c in timed if counts[c] == most)
    gaps = {config: gap(rounds, config, reference) for config in timed if _meet(rounds, config, reference)}
    order = sorted(gaps, key=lambda config: (gaps[config].centre, preference(config)))
    beats = order
    if default in gaps:
        beats = [c for c in order if gaps[c].most < 0 and gaps[c].centre < math.log(1 - MARGIN)]
    if not beats:
        return [default, *(config for config in order if config != default)]
    best = beats[0]
    known = [c for c in beats if 2 * counts[c] >= counts[best] and _meet(rounds, c, best)]
    equals = [c for c in known if _may_win(gap(rounds, c, best))]
    choice = previous if previous in equals else min(equals, key=preference)
    return [choice, *(config for config in order if config != choice)]


def speedup(rounds: Sequence[Round], default: Config, config: Config) -> tuple[float, float, float] | None:
    """The built-in config's time over that of `config`, with its 95 % interval; None without two rounds of both."""
    if not _meet(rounds, config, default):
        return None
    saved = gap(rounds, default, config)
    if saved.rounds < 2:
        return None
    half = saved.half * _of_table(T_95, saved.rounds) / _of_table(T_99, saved.rounds)
    return math.exp(saved.centre), math.exp(saved.centre - half), math.exp(saved.centre + half)


def _meet(rounds: Sequence[Round], config: Config, other: Config) -> bool:
    return any(r.get(config) is not None and r.get(other) is not None for r in rounds)
