"""The exact front over latency, cache bytes and error, its knee, and the point that a preference picks.

Cache bytes and error follow from group and window size alone, and the launch configs move nothing but latency: with the
inner search done for each pair, a non-dominated filter over the pairs is the whole joint front.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

Preference = Literal["knee", "latency", "memory", "quality"]
PREFERENCES: tuple[str, ...] = get_args(Preference)


@dataclass(frozen=True, slots=True)
class Point:
    """One pair of semantics: closed-form cache, error by the proxies, and latency of all kernels asked for.

    `kv_ratio`: cache bytes over those of full attention. `error`: the largest relative L2 distance from full attention
    over the data; `reached`: the least attention mass that reaches the window or the right core; `recall`: of needles,
    None where the data has none.
    """

    group_size: int
    window_size: int
    cache_bytes: int
    kv_ratio: float
    error: float
    reached: float
    recall: float | None
    latency_us: float

    @property
    def objectives(self) -> tuple[float, float, float]:
        """What is to be small: latency, cache bytes, error."""
        return (self.latency_us, float(self.cache_bytes), self.error)

    def beats(self, other: Point) -> bool:
        """Whether it is nowhere worse than `other` and somewhere better."""
        pairs = list(zip(self.objectives, other.objectives, strict=True))
        return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)


def front(points: Sequence[Point]) -> list[Point]:
    """The points that none other beats, by group and window size."""
    left = [point for point in points if not any(other.beats(point) for other in points)]
    return sorted(left, key=lambda point: (point.group_size, point.window_size))


def knee(points: Sequence[Point]) -> Point:
    """The point nearest to the best of everything, each objective scaled to 0..1 between its extremes on the front.

    Raises:
        ValueError: for no points.
    """
    if not points:
        raise ValueError("points must have at least one, got none")
    columns = list(zip(*(point.objectives for point in points), strict=True))
    spans = [(min(column), max(column)) for column in columns]

    def distance(point: Point) -> tuple[float, int, int]:
        parts = [
            (value - low) / (high - low) if high > low else 0.0
            for value, (low, high) in zip(point.objectives, spans, strict=True)
        ]
        return math.hypot(*parts), point.group_size, point.window_size

    return min(points, key=distance)


def preferred(points: Sequence[Point], preference: Preference) -> Point:
    """The point of the front that a preference picks; among equals the one best in the other objectives' order.

    Raises:
        ValueError: for no points.
    """
    if preference == "knee" or not points:
        return knee(points)
    first = {"latency": 0, "memory": 1, "quality": 2}[preference]

    def order(point: Point) -> tuple[float, ...]:
        return (point.objectives[first], *point.objectives, point.group_size, point.window_size)

    return min(points, key=order)
