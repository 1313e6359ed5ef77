"""How far the programs of a launch walk: the tiles of keys or of queries that each goes through, in closed form.

A kernel's least work counts visible pairs only. What it computes is whole tiles, at the edges of the window as well,
and its programs are not equally long: both depend on the tiles, and decide between them.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from ..kernels.tunable import Config
from ..problem import Problem

Lengths = npt.NDArray[np.int64]
HOPPER_ROWS = 128
"""Rows of a tile that a kernel for Hopper holds, whatever its config."""


MOST_WAVES = 6
"""Waves of programs beyond which the end of a launch is estimated, not followed."""


@dataclass(frozen=True, slots=True)
class Walk:
    """Iterations of each program's loop, in the order of their start: `whole` tiles, and tiles at the `edge`.

    There are `copies` of them, one for each head and sequence. A tile is of `rows`, which the program holds, by
    `block`, which it walks over.
    """

    whole: Lengths
    edge: Lengths
    copies: int
    rows: int
    block: int

    @property
    def total(self) -> Lengths:
        """Iterations of each program."""
        return self.whole + self.edge

    @property
    def edge_share(self) -> float:
        """The share of all iterations that are at an edge."""
        return float(self.edge.sum() / max(1, self.total.sum()))

    def busiest(self, slots: int, start: float) -> float:
        """Iterations of the busiest of `slots`, each of which takes the next program as soon as it is free.

        A program costs `start` iterations besides its own.
        """
        lengths = self.total + start
        programs, most = len(lengths) * self.copies, float(lengths.max())
        if programs <= slots:
            return most
        if lengths.min() == most:
            return math.ceil(programs / slots) * most
        if programs > MOST_WAVES * slots:
            last = np.tile(lengths, min(self.copies, math.ceil(slots / len(lengths))))[-slots:]
            return float(lengths.sum()) * self.copies / slots + float(last.mean()) / 2
        loads = [0.0] * slots
        for length in lengths.tolist() * self.copies:
            heapq.heapreplace(loads, loads[0] + length)
        return max(loads)

    def in_turns(self, programs: int, start: float) -> float:
        """Iterations of the busiest of `programs`, which take one each in turns, every other turn in reverse order."""
        lengths = np.zeros(-(-len(self.total) * self.copies // programs) * programs)
        lengths[: len(self.total) * self.copies] = np.tile(self.total + start, self.copies)
        turns = lengths.reshape(-1, programs)
        turns[1::2] = turns[1::2, ::-1].copy()
        return float(turns.sum(axis=0).max())

    def shared_out(self, programs: int, start: float) -> float:
        """Iterations of each of `programs` if all had the same."""
        return float((self.total + start).sum()) * self.copies / programs


@lru_cache(maxsize=4096)
def walk_of(kernel: str, problem: Problem, config: Config) -> Walk | None:
    """The walk of a kernel, by its function's name; None for one that is not known."""
    walk = WALKS.get(kernel.removesuffix("_kernel").removesuffix("_hopper"))
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
    return Walk(whole[::-1], edge[::-1], problem.q_heads * problem.batch, rows, block)


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
    ratio, heads = problem.q_heads // problem.num_core_heads, problem.num_core_heads * problem.batch
    whole, edge, item_tiles = whole * ratio, edge * ratio, getattr(config, "item_tiles", 0)
    if item_tiles == 1:  # the first tiles of all heads come first
        return Walk(np.repeat(whole, heads), np.repeat(edge, heads), 1, rows, block)
    if item_tiles == 2:
        whole, edge = _paired(whole), _paired(edge)
    return Walk(whole, edge, heads, rows, block)


def _paired(lengths: Lengths) -> Lengths:
    """The first with the last, and so on; if they are odd in number, the second with the last and the first alone."""
    padded = lengths if len(lengths) % 2 == 0 else np.append(lengths, 0)
    return padded[: len(padded) // 2] + padded[::-1][: len(padded) // 2]


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
    return Walk(whole * ratio, edge * ratio, problem.kv_heads * problem.batch, rows, block)


def _of_decode(problem: Problem, config: Config) -> Walk:
    """Tiles of the cores of each head, and of the raw tokens of each key/value head, dealt out in turn to programs.

    All heads' first programs start first. Of the core heads of a key/value head only the first has programs of raw
    tokens, of which the last attends to the new token besides.
    """
    block, t, p = getattr(config, "block_k", 0), problem.seq_len, problem
    core = _dealt(p.spec.visible_cores(t), getattr(config, "splits_core", 1), block)
    raw = _dealt(len(p.spec.local_range(t)) - 1, getattr(config, "splits_raw", 1), block)
    raw[-1] += 1
    edge = np.concatenate([np.repeat(core, p.num_core_heads), np.repeat(raw, p.kv_heads)])
    return Walk(np.zeros_like(edge), edge, p.batch, max(16, p.q_heads // p.kv_heads), block)


def _dealt(keys: int, programs: int, block: int) -> Lengths:
    """Tiles of each program."""
    return _ceil(math.ceil(keys / block) - np.arange(programs, dtype=np.int64), programs).clip(0)


def _of_groups(problem: Problem, config: Config) -> Walk:
    """A tile of groups goes through their tokens."""
    rows, block = getattr(config, "block_c", 1), getattr(config, "block_t", problem.group_size)
    tiles = math.ceil(problem.spec.num_groups(problem.seq_len) / rows)
    whole = np.full(tiles, math.ceil(problem.group_size / block), dtype=np.int64)
    return Walk(whole, np.zeros_like(whole), problem.num_core_heads * problem.batch, rows, block)


WALKS: dict[str, Callable[[Problem, Config], Walk]] = {
    "forward": _over_keys,
    "backward_dq": _over_keys,
    "backward_dcore": _of_cores,
    "backward_dkv": _of_tokens,
    "decode": _of_decode,
    "pooling": _of_groups,
    "pooling_backward": _of_groups,
}
