"""CCACache (spec section 6): every way to append tokens gives the oracle's rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from cca_attention.cache import FIRST_CORES, CCACache
from cca_attention.cache_state import CacheState
from cca_attention.kernels.decode import DecodeConfig
from cca_attention.kernels.forward import ForwardConfig
from cca_attention.kernels.pooling import PoolingConfig
from cca_attention.kernels.tunable import Schedule
from cca_attention.problem import Problem
from cca_attention.verify.inputs import Case, Inputs, make_inputs
from cca_attention.verify.rounding import ErrorModel
from cca_attention.verify.tolerance import Comparison, compare, compare_bitwise

SMALL = Schedule(
    {
        "decode": DecodeConfig(block_k=16, splits_core=1, splits_raw=2),
        "forward": ForwardConfig(block_q=16, block_k=16),
        "pooling": PoolingConfig(block_c=2, block_t=16),
    }
)
BASE = Problem(batch=1, q_heads=2, kv_heads=1, seq_len=14, head_dim=16, group_size=3, window_size=4, dtype="float32")
BACKENDS = ("eager", "triton")


def problem(**changes: Any) -> Problem:
    return replace(BASE, **changes)


def make_cache(p: Problem, backend: str, device: str, **options: Any) -> CCACache:
    return CCACache(
        p.spec, batch=p.batch, q_heads=p.q_heads, kv_heads=p.kv_heads, head_dim=p.head_dim,
        dtype=getattr(torch, p.dtype), device=device, backend=backend, **{"profile": SMALL} | options,
    )  # fmt: skip


def inputs_of(p: Problem, device: str) -> Inputs:
    return make_inputs(Case(problem=p, layout="transposed", device=device))


def append(cache: CCACache, how: str, inputs: Inputs, start: int, end: int) -> Tensor:
    return getattr(cache, how)(*(x[:, :, start:end] for x in inputs[:3]))


def feed(cache: CCACache, inputs: Inputs, cuts: Sequence[int], how: str = "prefill", start: int = 0) -> Tensor:
    """Append chunks of the given sizes from token `start` on."""
    outs = [inputs.q[:, :, :0]]
    for size in cuts:
        outs.append(append(cache, how, inputs, start, start + size))
        start += size
    return torch.cat(outs, dim=2)


def against_oracle(cache: CCACache, out: Tensor, inputs: Inputs) -> list[Comparison]:
    """The output of every token, and the cores, of a cache that was fed all of the inputs."""
    model = ErrorModel(*(x.cpu() for x in inputs[:3]), cache.spec, inputs.q.dtype)
    return [
        compare("out", out, model.out),
        compare("k_core", cache.k_core, model.k_core),
        compare("v_core", cache.v_core, model.v_core),
    ]


def assert_all(found: list[Comparison]) -> None:
    assert all(comparison.ok for comparison in found), "\n".join(map(str, found))


def state_of(cache: CCACache) -> dict[str, Tensor]:
    """All that later results depend on, by position."""
    raw = cache._state.raw
    kept = [
        torch.stack([raw[:, b, :, p % raw.shape[3]] for p in cache.spec.local_range(length)[:-1]] or [raw[:, b, :, :0]])
        for b, length in enumerate(cache.lengths.tolist())
    ]
    return {"k_core": cache.k_core, "v_core": cache.v_core, "lengths": cache.lengths, "raw": torch.cat(kept).flatten()}


def same_state(left: CCACache, right: CCACache) -> list[Comparison]:
    return [compare_bitwise(name, x, state_of(right)[name]) for name, x in state_of(left).items()]


PROBLEMS = [
    problem(),
    problem(core_heads="kv", q_heads=4, kv_heads=2, batch=2),
    problem(pooling="mean", head_dim=24),
    problem(group_size=5, window_size=2),
    problem(group_size=1, window_size=1, seq_len=9),
    problem(window_size=20, dtype="float16"),
    problem(dtype="bfloat16"),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("p", PROBLEMS, ids=str)
def test_token_by_token_is_the_whole_sequence_row_by_row(p: Problem, backend: str, device: str) -> None:
    inputs = inputs_of(p, device)
    cache = make_cache(p, backend, device)
    out = feed(cache, inputs, [1] * p.seq_len, "decode")
    assert out.dtype == inputs.q.dtype
    assert_all(against_oracle(cache, out, inputs))


CUTS = [[14], [1, 13], [3, 3, 3, 3, 2], [0, 5, 0, 9], [7, 7], [2, 1, 11]]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cuts", CUTS, ids=str)
@pytest.mark.parametrize("how", ["prefill", "decode"])
def test_any_cut_into_chunks(cuts: list[int], how: str, backend: str, device: str) -> None:
    """Also `decode` of more tokens than one step of its kernels takes."""
    p = problem(batch=2, seq_len=14)
    inputs = inputs_of(p, device)
    cache = make_cache(p, backend, device, rollback=2, max_tokens=14 if how == "decode" else None)
    out = feed(cache, inputs, [cut for cut in cuts if cut or how == "prefill"], how)
    assert_all(against_oracle(cache, out, inputs))
    assert cache.seen == 14
    assert cache.lengths.tolist() == [14, 14]


@pytest.mark.parametrize("backend", BACKENDS)
def test_growing_storage_keeps_what_it_holds(backend: str, device: str) -> None:
    room = [cores + cores // 4 for cores in (FIRST_CORES, FIRST_CORES + FIRST_CORES // 4 + 1)]
    p = problem(group_size=1, window_size=2, seq_len=room[0] + 9, q_heads=1)
    inputs = inputs_of(p, device)
    cache = make_cache(p, backend, device)
    sizes = [cache.allocated_nbytes]
    out = [feed(cache, inputs, [FIRST_CORES - 1])]
    for start in range(FIRST_CORES - 1, p.seq_len):
        sizes.append(cache.allocated_nbytes)
        out.append(append(cache, "decode", inputs, start, start + 1))
    assert_all(against_oracle(cache, torch.cat(out, dim=2), inputs))
    assert sorted(set(sizes)) == [sizes[0] + cores * 2 * 16 * 4 for cores in (0, *room)]


BOUNDS = [
    [[(2, 7), (0, 7), (7, 7)], [(0, 4), (1, 5), (0, 5)], [(3, 6), (6, 6), (0, 6)]],
    [[(0, 0), (3, 4), (0, 4)], [(2, 11), (0, 1), (5, 11)]],
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("core_heads", ["query", "kv"])
@pytest.mark.parametrize("bounds", BOUNDS, ids=["three-chunks", "two-chunks"])
def test_padded_chunks_are_each_row_alone(bounds: Any, core_heads: str, backend: str, device: str) -> None:
    """Padding is NaN, on the left, the right or everywhere; then all rows decode on, each at its own length."""
    p = problem(batch=3, core_heads=core_heads)
    cache = make_cache(p, backend, device)
    histories: list[list[Inputs]] = [[] for _ in range(3)]
    outs: list[list[Tensor]] = [[] for _ in range(3)]
    for seed, chunk in enumerate([*bounds, [(0, 1)] * 3, [(0, 1)] * 3]):
        size = replace(p, seq_len=max(end for _, end in chunk))
        inputs = make_inputs(Case(problem=size, bounds=tuple(chunk), seed=seed, device=device))
        if seed < len(bounds):
            out = cache.prefill(*inputs[:3], seq_bounds=torch.tensor(chunk, dtype=torch.int32, device=device))
        else:
            out = cache.decode(*inputs[:3])
        for row, (first, end) in enumerate(chunk):
            histories[row].append(inputs.part(slice(row, row + 1), slice(first, end)))
            outs[row].append(out[row : row + 1, :, first:end])
            assert not out[row, :, :first].any()
            assert not out[row, :, end:].any()
    for row in range(3):
        whole = Inputs(*(torch.cat(parts, dim=2) for parts in zip(*histories[row], strict=True)))
        model = ErrorModel(*(x.cpu() for x in whole[:3]), p.spec, torch.float32)
        assert cache.lengths[row] == whole.q.shape[2]
        cores = cache.k_core[row : row + 1, :, : p.spec.num_groups(whole.q.shape[2])]
        assert_all([compare("out", torch.cat(outs[row], 2), model.out), compare("k_core", cores, model.k_core)])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("drop", [1, 2, 4])
def test_crop_and_append_again_is_a_fresh_run(drop: int, backend: str, device: str) -> None:
    """Back over an edge of groups, with other tokens in the place of the dropped ones; bit for bit."""
    p = problem(batch=2, seq_len=16)
    inputs, other = inputs_of(p, device), make_inputs(Case(problem=p, seed=1, device=device))
    cropped, fresh = (make_cache(p, backend, device, rollback=3) for _ in range(2))
    feed(cropped, inputs, [7])
    feed(cropped, inputs, [1] * 3, "decode", start=7)
    if drop == 4:
        cropped.crop(6)
        feed(fresh, inputs, [6])
    else:
        cropped.crop(-drop)
        feed(fresh, inputs, [7])
        feed(fresh, inputs, [1] * (3 - drop), "decode", start=7)
    assert cropped.seen == 10 - drop
    if drop < 4:
        assert_all(same_state(cropped, fresh))
        outs = [feed(cache, other, [1, 3, 1], "decode", start=10 - drop) for cache in (cropped, fresh)]
        assert_all([compare_bitwise("out", *outs), *same_state(cropped, fresh)])
    again = Inputs(*(torch.cat([x[:, :, :9], y[:, :, 9:11]], 2) for x, y in zip(inputs, other, strict=True)))
    cropped.crop(0)
    assert (cropped.seen, cropped.nbytes) == (0, make_cache(p, backend, device).nbytes)
    assert_all(against_oracle(cropped, feed(cropped, again, [4, 3, 4], "decode"), again))


@pytest.mark.parametrize("backend", BACKENDS)
def test_crop_says_how_far_it_can_go(backend: str, device: str) -> None:
    p = problem(seq_len=14)
    cache = make_cache(p, backend, device, rollback=1)
    inputs = inputs_of(p, device)
    feed(cache, inputs, [14])  # 7 raw tokens are left, 7 .. 13; the core of 6 .. 8 must be visible to the next query
    before = state_of(cache)
    with pytest.raises(ValueError, match=r"keep at least 12 of the 14 tokens of row 0, or none, got 11: .* position 7"):
        cache.crop(11)
    with pytest.raises(ValueError, match=r"n must drop no more tokens than a row holds, got -15: row 0 holds 14"):
        cache.crop(-15)
    with pytest.raises(TypeError, match=r"n must be an int, got 1\.0"):
        cache.crop(1.0)  # type: ignore[arg-type]
    assert_all([compare_bitwise(name, x, before[name]) for name, x in state_of(cache).items()])
    cache.crop(99)
    assert cache.seen == 14
    cache.crop(12)
    with pytest.raises(ValueError, match="at least 12 of the 12 tokens"):
        cache.crop(-1)
    out = feed(cache, inputs, [2], "decode", start=12)
    model = ErrorModel(*(x.cpu() for x in inputs[:3]), p.spec, torch.float32)
    assert_all([compare("out", out, type(model.out)(*(x[:, :, 12:] for x in model.out)))])
    cache.crop(-14)
    assert cache.seen == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_reorder_moves_whole_rows(backend: str, device: str) -> None:
    p = problem(batch=3, seq_len=11)
    inputs, index = inputs_of(p, device), [2, 0, 2]
    moved = Inputs(*(x[index] for x in inputs))
    cache = make_cache(p, backend, device, rollback=1)
    feed(cache, inputs, [8])
    cache.reorder(torch.tensor(index, device=device))
    out = torch.cat(
        [feed(make_cache(p, backend, device), moved, [8]), feed(cache, moved, [1, 2], "decode", start=8)], dim=2
    )
    assert_all(against_oracle(cache, out, moved))


@pytest.mark.parametrize("core_heads", ["query", "kv"])
def test_nbytes_is_the_closed_form(core_heads: str, device: str) -> None:
    p = problem(batch=2, q_heads=6, kv_heads=2, core_heads=core_heads, seq_len=13, dtype="float16")
    heads = 6 if core_heads == "query" else 2
    cache = make_cache(p, "eager", device, max_tokens=30, rollback=2)
    cache.prefill(
        *inputs_of(p, device)[:3], seq_bounds=torch.tensor([[0, 13], [5, 13]], dtype=torch.int32, device=device)
    )
    assert cache.nbytes == 2 * 2 * 16 * (heads * (4 + 2) + 2 * 2 * (4 + 3 - 1))
    assert cache.allocated_nbytes == 2 * 2 * 16 * 2 * (heads * 10 + 2 * (4 + 3 - 1 + 2)) + 2 * 4


@pytest.mark.parametrize("backend", BACKENDS)
def test_max_tokens_refuses_what_the_host_knows_of(backend: str, device: str) -> None:
    p = problem(batch=2, seq_len=12)
    cache, inputs = make_cache(p, backend, device, max_tokens=10), inputs_of(p, device)
    feed(cache, inputs, [9])
    before = state_of(cache)
    for call in (lambda: append(cache, "decode", inputs, 9, 11), lambda: append(cache, "prefill", inputs, 9, 11)):
        with pytest.raises(ValueError, match="max_tokens must be at least 11 for 2 tokens after 9, got 10"):
            call()
    assert_all([compare_bitwise(name, x, before[name]) for name, x in state_of(cache).items()])
    one_each = torch.tensor([[0, 1], [2, 2]], dtype=torch.int32, device=device)
    cache.prefill(*(x[:, :, :2] for x in inputs[:3]), seq_bounds=one_each)
    assert cache.lengths.tolist() == [10, 9]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_chunk_past_max_tokens_is_nan_where_the_host_cannot_know(backend: str, device: str) -> None:
    """What a captured prefill does: the tokens are not stored, those before are right."""
    p = problem(batch=2, seq_len=12)
    inputs, spec = inputs_of(p, device), p.spec
    state = CacheState(
        spec,
        (2, 2, 1, 16),
        torch.float32,
        device,
        ring=spec.max_local_tokens(),
        max_tokens=10,
        backend=backend,
        profile="",
    )
    state.may_overflow = True
    parts = [state.extend(*(x[:, :, start:end] for x in inputs[:3])) for start, end in ((0, 7), (7, 11), (11, 12))]
    out = torch.cat(parts, dim=2)
    model = ErrorModel(*(x[:, :, :10].cpu() for x in inputs[:3]), spec, torch.float32)
    assert_all([compare("out", out[:, :, :10], model.out), compare("k_core", state.core[0], model.k_core)])
    assert bool(out[:, :, 10:].isnan().all())
    assert state.seen.tolist() == [10, 10]
    assert_all([compare_bitwise("newest token", state.raw[0, :, :, 9 % state.ring], inputs.k[:, :, 9])])
