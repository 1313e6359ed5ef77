"""The tiles that programs walk over, against a count by brute force of what each row sees."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest

from cca_attention.autotune.walks import walk_of
from cca_attention.problem import Problem
from cca_attention.profiles.configs import tunables

PROBLEMS = [
    Problem(q_heads=4, kv_heads=2, seq_len=t, head_dim=64, group_size=g, window_size=w, core_heads=heads)
    for (t, g, w), heads in product(((257, 4, 48), (300, 16, 64), (96, 8, 200)), ("query", "kv"))
]


def seen(problem: Problem) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Which query (a row) sees which core, and which raw token."""
    t, spec = problem.seq_len, problem.spec
    cores = np.zeros((t, spec.num_groups(t)), dtype=bool)
    raw = np.zeros((t, t), dtype=bool)
    for position in range(t):
        cores[position, : spec.visible_cores(position)] = True
        raw[position, list(spec.local_range(position))] = True
    return cores, raw


def tiles(visible: np.ndarray[Any, Any], block: int) -> tuple[int, int]:
    """Tiles of `block` columns from the first one that any row sees to the last: those that all see whole, the rest."""
    columns = np.flatnonzero(visible.any(axis=0))
    if not len(columns):
        return 0, 0
    starts = range(columns[0], columns[-1] + 1, block)
    whole = sum(start + block <= visible.shape[1] and visible[:, start : start + block].all() for start in starts)
    return whole, len(starts) - whole


def counted(problem: Problem, kernel: str, rows: int, block: int) -> list[tuple[int, int]]:
    """(whole, edge) tiles of each program along the first axis of the grid."""
    cores, raw = seen(problem)
    t = problem.seq_len
    if kernel in ("forward", "backward_dq"):
        parts = [[tiles(v[first : first + rows], block) for v in (cores, raw)] for first in range(0, t, rows)]
        return [(a[0] + b[0], a[1] + b[1]) for a, b in parts[::-1]]
    visible, heads = (cores, problem.num_core_heads) if kernel == "backward_dcore" else (raw, problem.kv_heads)
    found = [tiles(visible[:, first : first + rows].T, block) for first in range(0, visible.shape[1], rows)]
    return [(whole * problem.q_heads // heads, edge * problem.q_heads // heads) for whole, edge in found]


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
@pytest.mark.parametrize("kernel", ["forward", "backward_dq", "backward_dcore", "backward_dkv"])
def test_programs_walk_over_what_their_rows_see(problem: Problem, kernel: str) -> None:
    own, inner = {"backward_dcore": ("block_c", "block_q"), "backward_dkv": ("block_k", "block_q")}.get(
        kernel, ("block_q", "block_k")
    )
    for rows, block in ((16, 16), (64, 32), (32, 64)):
        walk = walk_of(kernel, problem, tunables()[kernel].config(**{own: rows, inner: block}))
        assert walk is not None
        assert list(zip(walk.whole.tolist(), walk.edge.tolist(), strict=True)) == counted(problem, kernel, rows, block)


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_decode_shares_out_what_one_row_sees(problem: Problem) -> None:
    config = tunables()["decode"].config(block_k=16, splits_core=3, splits_raw=2)
    walk = walk_of("decode", problem, config)
    cores, raw = problem.spec.visible_cores(problem.seq_len), len(problem.spec.local_range(problem.seq_len))
    least = problem.num_core_heads * -(-cores // 16) + problem.kv_heads * -(-raw // 16)
    assert walk is not None and least <= walk.total.sum() <= least + 3 * problem.num_core_heads + 2 * problem.kv_heads
    assert len(walk.total) == 3 * problem.num_core_heads + 2 * problem.kv_heads


def test_kernels_whose_programs_do_the_same_have_no_walk() -> None:
    known = tunables()
    assert walk_of("pooling", PROBLEMS[0], known["pooling"].config()) is None
    assert walk_of("pooling_backward", PROBLEMS[0], known["pooling_backward"].config()) is None
