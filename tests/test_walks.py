"""The tiles that programs walk over, against a count by brute force of what each row sees."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest

from cca_attention.autotune.walks import Walk, walk_of
from cca_attention.problem import Problem
from cca_attention.profiles.configs import tunables

PROBLEMS = [
    Problem(q_heads=4, kv_heads=2, seq_len=t, head_dim=64, group_size=g, window_size=w, core_heads=heads)
    for (t, g, w), heads in product(((257, 4, 48), (300, 16, 64), (96, 8, 200)), ("query", "kv"))
]

SIZED = Problem(q_heads=8, kv_heads=2, seq_len=1024, head_dim=128, group_size=16, window_size=256)


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
def test_decode_deals_out_what_one_row_sees(problem: Problem) -> None:
    config = tunables()["decode"].config(block_k=16, splits_core=3, splits_raw=2)
    walk = walk_of("decode", problem, config)
    position, spec = problem.seq_len, problem.spec

    def dealt(keys: int, programs: int) -> list[int]:
        return [len(range(program * 16, keys, programs * 16)) for program in range(programs)]

    core = dealt(spec.visible_cores(position), 3)
    raw = dealt(len(spec.local_range(position)) - 1, 2)
    expected = [tiles for tiles in core for _ in range(problem.num_core_heads)]
    expected += [tiles for tiles in (raw[0], raw[1] + 1) for _ in range(problem.kv_heads)]
    assert walk is not None and walk.total.tolist() == expected


def test_a_pair_of_tiles_of_cores_is_a_long_and_a_short_one() -> None:
    tunable = tunables("sm_90")["backward_dcore_hopper"]
    for t in (8192, 8192 + 16 * 128):  # cores in an even and in an odd number of tiles
        problem = Problem(q_heads=8, kv_heads=2, seq_len=t, head_dim=128, group_size=16, window_size=256)
        one, two = (walk_of("backward_dcore_hopper_kernel", problem, tunable.config(item_tiles=n)) for n in (1, 2))
        assert one is not None and two is not None
        assert one.total.sum() * one.copies == two.total.sum() * two.copies
        assert one.total.tolist() == sorted(one.total, reverse=True) and len(one.total) == t // 2048 * 8
        assert two.total.max() <= 1.2 * two.total.min() and len(two.total) == -(-t // 4096)


def test_pooling_goes_through_the_tokens_of_its_groups() -> None:
    config = tunables()["pooling"].config(block_c=4, block_t=16)
    walk = walk_of("pooling_kernel", PROBLEMS[1], config)
    assert walk is not None and walk.whole.tolist() == [3, 3, 3] if PROBLEMS[1].group_size > 32 else [1] * 5
    assert walk_of("append_kernel", PROBLEMS[0], config) is None


def simulated(lengths: list[float], slots: int) -> float:
    """When the last of `lengths` ends, each begun on the slot that is free first."""
    ends = [0.0] * slots
    for length in lengths:
        first = ends.index(min(ends))
        ends[first] += length
    return max(ends)


@pytest.mark.parametrize("slots", [1, 3, 7, 40, 500])
def test_the_busiest_slot_is_that_of_a_simulation(slots: int) -> None:
    walk = walk_of("forward_kernel", PROBLEMS[0], tunables()["forward"].config(block_q=16, block_k=16))
    assert walk is not None and walk.copies == 4
    expected = simulated([length + 0.5 for length in walk.total.tolist()] * 4, slots)
    assert walk.busiest(slots, 0.5) == pytest.approx(expected, rel=0.05 if 4 * len(walk.total) > 6 * slots else 1e-9)
    assert walk.shared_out(slots, 0.5) == pytest.approx(4 * (walk.total + 0.5).sum() / slots)


def test_programs_take_turns_there_and_back() -> None:
    walk = Walk(np.array([5, 4, 3, 2, 1]), np.zeros(5, dtype=np.int64), 2, 16, 16)
    # three programs, lengths 6 5 4, then from the last one on 3 2 6, 5 4 3, 2: the first one has 6 + 6 + 5
    assert walk.in_turns(3, 1.0) == max(6 + 6 + 5, 5 + 2 + 4, 4 + 3 + 3 + 2)
    assert walk.in_turns(20, 1.0) == 6.0


def test_equal_programs_go_in_waves() -> None:
    same = Walk(np.full(10, 3), np.full(10, 1), 2, 16, 16)
    assert [same.busiest(slots, 1.0) for slots in (20, 19, 10, 1)] == [5.0, 10.0, 10.0, 100.0]
    assert same.edge_share == 0.25


def test_one_function_of_every_kernel_has_a_walk() -> None:
    for name, tunable in tunables("sm_90").items():
        legal = next(config for config, refusal in tunable.candidates(SIZED) if refusal is None)
        walks = [walk_of(function.fn.__name__, SIZED, legal) for function in tunable.kernels]
        assert sum(walk is not None for walk in walks) == 1, name
