"""How far the programs of a launch walk: the tiles of keys or of queries that each goes through, in closed form.

A kernel's least work counts visible pairs only. What it computes is whole tiles, at the edges of the window as well,
and its programs are not equally long: both depend on the tiles, and decide between them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..kernels.tunable import Config
from ..problem import Problem

Lengths = npt.NDArray[np.int64]
HOPPER_ROWS = 128
"""Rows of a tile that a kernel for Hopper holds, whatever its config."""


@dataclass(frozen=True, slots=True)
class Walk:
    """Iterations of each program's loop, by its place on the first axis of the grid: `whole` tiles, and at the `edge`.

    There are `copies` of them, one for each head and sequence.
    """

    whole: Lengths
    edge: Lengths
    copies: int

    @property
    def total(self) -> Lengths:
        """Iterations of each program."""
        return self.whole + self.edge


def walk_of(kernel: str, problem: Problem, config: Config) -> Walk | None:
    """The walk of `kernel`'s programs, None for a kernel whose programs all do the same."""
    walk = WALKS.get(kernel.removesuffix("_hopper"))
    return None if walk is None else walk(problem, config)


def _ceil(a: Lengths, b: int) -> Lengths:
    return -(-a // b)


def _visible_cores(problem: Problem, position: Lengths) -> Lengths:
    return np.maximum(position + 1 - problem.window_size, 0) // problem.group_size


def _over_keys(problem: Problem, config: Config) -> Walk:
    """A tile of queries walks over the cores and the raw tokens that its rows see."""
    rows, block = getattr(config, "block_q", HOPPER_ROWS), getattr(config, "block_k", 0)
    first = np.arange(0, problem.seq_len, rows, dtype=np.int64)
    end = np.minimum(first + rows, problem.seq_len)
    seen_by_all, seen = _visible_cores(problem, first), _visible_cores(problem, end - 1)
    core_full = seen_by_all // block
    core_edge = _ceil(seen - core_full * block, block)
    start = seen_by_all * problem.group_size
    left = _ceil(seen * problem.group_size - start, block)
    raw_full = np.maximum(first + 1 - start - left * block, 0) // block
    right = _ceil(np.maximum(end - start - (left + raw_full) * block, 0), block)
    # the last tiles start first
    whole, edge = core_full + raw_full, core_edge + left + right
    return Walk(whole[::-1], edge[::-1], problem.q_heads * problem.batch)


def _queries(start: Lengths, full: Lengths, full_end: Lengths, stop: Lengths, block: int) -> tuple[Lengths, Lengths]:
    """Tiles of the queries start .. stop - 1: those of full .. full_end - 1, whole, and the others."""
    left = _ceil(np.maximum(np.minimum(full, stop) - start, 0), block)
    whole = np.maximum(full_end - start - left * block, 0) // block
    right = _ceil(np.maximum(stop - start - (left + whole) * block, 0), block)
    return whole, left + right


def _of_cores(problem: Problem, config: Config) -> Walk:
    """A tile of cores walks over all later queries, of each query head."""
    rows, block, g = getattr(config, "block_c", HOPPER_ROWS), getattr(config, "block_q", 0), problem.group_size
    cores = problem.spec.num_groups(problem.seq_len)
    first = np.arange(0, cores, rows, dtype=np.int64)
    last = np.minimum(first + rows, cores) - 1
    begin, full = ((c + 1) * g + problem.window_size - 1 for c in (first, last))
    end = np.full_like(first, problem.seq_len)
    whole, edge = _queries(begin, full, end, end, block)
    heads = problem.num_core_heads
    return Walk(whole * (problem.q_heads // heads), edge * (problem.q_heads // heads), heads * problem.batch)


def _of_tokens(problem: Problem, config: Config) -> Walk:
    """A tile of raw tokens walks over the queries of its window, of each query head."""
    rows, block, t = getattr(config, "block_k", HOPPER_ROWS), getattr(config, "block_q", 0), problem.seq_len
    first = np.arange(0, t, rows, dtype=np.int64)
    last = np.minimum(first + rows, t) - 1
    by_all, by_any = (
        (x // problem.group_size + 1) * problem.group_size + problem.window_size - 2 for x in (first, last)
    )
    whole, edge = _queries(first, last, np.minimum(by_all + 1, t), np.minimum(by_any + 1, t), block)
    ratio = problem.q_heads // problem.kv_heads
    return Walk(whole * ratio, edge * ratio, problem.kv_heads * problem.batch)


def _of_decode(problem: Problem, config: Config) -> Walk:
    """Each share of the cores of a head, and of the raw tokens of a key/value head, by one program."""
    block, t = getattr(config, "block_k", 0), problem.seq_len
    cores = problem.spec.visible_cores(t)
    lengths = []
    for keys, shares, heads in (
        (cores, getattr(config, "splits_core", 1), problem.num_core_heads),
        (len(problem.spec.local_range(t)), getattr(config, "splits_raw", 1), problem.kv_heads),
    ):
        share = math.ceil(math.ceil(keys / shares) / block) * block
        own = np.clip(keys - np.arange(shares, dtype=np.int64) * share, 0, share)
        lengths.append(np.tile(_ceil(own, block), heads))
    edge = np.concatenate(lengths)
    return Walk(np.zeros_like(edge), edge, problem.batch)


WALKS: dict[str, Callable[[Problem, Config], Walk]] = {
    "forward": _over_keys,
    "backward_dq": _over_keys,
    "backward_dcore": _of_cores,
    "backward_dkv": _of_tokens,
    "decode": _of_decode,
}
