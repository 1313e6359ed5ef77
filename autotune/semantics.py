"""The search over group and window size: what they cost in closed form, what they lose by proxies, how fast they are.

Unlike launch configs they change what the model computes: what is found here is a recommendation for whoever trains or
converts the model, and nothing applies it to one. Constraints are applied before anything is compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from ..problem import Problem
from .front import Point, Preference, front, preferred
from .proxies import GENERATORS, Activations, Quality, quality

GROUP_SIZES = (4, 8, 16, 32, 64)
WINDOW_SIZES = (256, 512, 1024, 2048, 4096)
MOST_PROXY_TOKENS, MOST_PROXY_HEADS = 8192, 4
SEED = 20261122
Latency = Callable[[Problem], float]
"""Microseconds of all kernels asked for, for one problem."""


class EmptyError(ValueError):
    """Constraints that leave nothing; the message says which one empties the set."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What is asked of the semantics: cache bytes over those of full attention, and the error, at most."""

    kv_ratio: float | None = None
    error: float | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """All points that satisfy the limits, those that none other beats, and the one that is preferred."""

    points: tuple[Point, ...]
    front: tuple[Point, ...]
    preferred: Point


def grid(problem: Problem, group_sizes: Sequence[int], window_sizes: Sequence[int]) -> list[Problem]:
    """The problem with every pair of sizes below its length: beyond, it is full attention.

    Raises:
        EmptyError: if there is no such pair.
    """
    pairs = [(g, w) for g in group_sizes for w in window_sizes if max(g, w) < problem.seq_len]
    if not pairs:
        least = f"--group-sizes from {min(group_sizes)} and --window-sizes from {min(window_sizes)}"
        raise EmptyError(f"{least} leave no pair below the context of {problem.seq_len} tokens")
    return [replace(problem, group_size=g, window_size=w) for g, w in pairs]


def cache_bytes(problem: Problem) -> int:
    """Bytes of one layer's cache at the end of the context."""
    p = problem
    sizes = {"batch": p.batch, "q_heads": p.q_heads, "kv_heads": p.kv_heads, "head_dim": p.head_dim}
    return p.spec.cache_bytes(p.seq_len, **sizes, element_bytes=p.element_bytes)


def kv_ratio(problem: Problem) -> float:
    """Cache bytes over those of full attention."""
    p = problem
    return cache_bytes(p) / (2 * p.element_bytes * p.batch * p.kv_heads * p.seq_len * p.head_dim)


def generated(problem: Problem) -> dict[str, Activations]:
    """Data of every generator, of the problem's head ratio and dimension, as long as it is up to 8192 tokens."""
    ratio = min(problem.q_heads // problem.kv_heads, MOST_PROXY_HEADS)
    tokens = min(problem.seq_len, MOST_PROXY_TOKENS)
    generator = torch.Generator().manual_seed(SEED)
    return {name: make(ratio, 1, tokens, problem.head_dim, generator) for name, make in GENERATORS.items()}


def qualities(problem: Problem, data: Mapping[str, Activations]) -> dict[str, Quality]:
    """The proxies of the problem's semantics on each kind of data."""
    return {name: quality(activations, problem.spec) for name, activations in data.items()}


def small_enough(problems: Sequence[Problem], limits: Limits) -> list[Problem]:
    """Those whose cache is within the limits.

    Raises:
        EmptyError: if none is.
    """
    small = [problem for problem in problems if limits.kv_ratio is None or kv_ratio(problem) <= limits.kv_ratio]
    if not small:
        best = min(problems, key=kv_ratio)
        raise EmptyError(_emptied("--max-kv-ratio", limits.kv_ratio or 0.0, len(problems), kv_ratio(best), best))
    return small


def length(data: Mapping[str, Activations]) -> int:
    """Tokens of the shortest of them."""
    return min(activations.q.shape[1] for activations in data.values())


def long_enough(problems: Sequence[Problem], data: Mapping[str, Activations]) -> list[Problem]:
    """Those whose error can be seen on `data`: the queries that are looked at have more than the window behind them.

    Raises:
        EmptyError: if there is none.
    """
    tokens = length(data)
    judged = [problem for problem in problems if problem.window_size <= tokens // 2 or tokens >= problem.seq_len]
    if not judged:
        least = min(problem.window_size for problem in problems)
        message = f"the data has {tokens} tokens, in which no window of {least} or more can be judged"
        raise EmptyError(f"{message}: --window-sizes up to {tokens // 2}, or --qkv of a longer text")
    return judged


def search(
    problems: Sequence[Problem], data: Mapping[str, Activations], limits: Limits, latency: Latency, prefer: Preference
) -> Outcome:
    """The exact front of `problems`, which differ in group and window size alone.

    Raises:
        EmptyError: if the limits leave none, before the latency of any was asked for.
    """
    small = small_enough(problems, limits)
    found = {problem: qualities(problem, data) for problem in small}
    errors = {problem: max(q.error for q in by_name.values()) for problem, by_name in found.items()}
    good = [problem for problem in small if limits.error is None or errors[problem] <= limits.error]
    if not good:
        best = min(small, key=errors.__getitem__)
        raise EmptyError(_emptied("--max-error", limits.error or 0.0, len(small), errors[best], best))
    points = tuple(_point(problem, found[problem], latency(problem)) for problem in good)
    best_of_all = front(points)
    return Outcome(points, tuple(best_of_all), preferred(best_of_all, prefer))


def _point(problem: Problem, by_name: Mapping[str, Quality], latency_us: float) -> Point:
    recalls = [q.recall for q in by_name.values() if q.recall is not None]
    return Point(
        group_size=problem.group_size,
        window_size=problem.window_size,
        cache_bytes=cache_bytes(problem),
        kv_ratio=kv_ratio(problem),
        error=max(q.error for q in by_name.values()),
        reached=min(q.reached for q in by_name.values()),
        recall=min(recalls) if recalls else None,
        latency_us=latency_us,
    )


def _emptied(option: str, limit: float, count: int, best: float, problem: Problem) -> str:
    least = f"the least is {best:.4g} (group size {problem.group_size}, window size {problem.window_size})"
    return f"{option} {limit:g} leaves none of the {count} pairs of group and window size: {least}"
