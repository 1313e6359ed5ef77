"""The decode kernels: token by token and several at a time against the oracle, every config, and their limits."""

from __future__ import annotations

import itertools
from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor

from cca_attention.kernels.decode import DECODE, MAX_ROWS, SPACE, UNBOUNDED, DecodeConfig, default_config, launch_decode
from cca_attention.problem import Problem
from cca_attention.spec import CCASpec
from cca_attention.verify.inputs import Case, Inputs, make_inputs
from cca_attention.verify.rounding import ErrorModel
from cca_attention.verify.tolerance import compare, compare_bitwise

SMALL = DecodeConfig(block_k=16, splits_core=2, splits_raw=1)
BASE = Problem(batch=1, q_heads=2, kv_heads=1, seq_len=11, head_dim=16, group_size=2, window_size=3, dtype="float32")


def problem(**changes: object) -> Problem:
    return replace(BASE, **changes)


class State:
    """Storage of a decode run, NaN wherever no kernel wrote, with guards behind the cores."""

    def __init__(self, p: Problem, step: int, device: str, max_tokens: int = UNBOUNDED) -> None:
        self.spec, self.max_tokens = p.spec, max_tokens
        dtype, ring = getattr(torch, p.dtype), p.window_size + p.group_size - 2 + step
        groups = p.spec.num_groups(min(p.seq_len, max_tokens))
        nan = {"fill_value": float("nan"), "dtype": dtype, "device": device}
        self.guarded = torch.full((2, p.batch, p.num_core_heads, groups + 2, p.head_dim), **nan)
        self.core, self.guard = self.guarded[:, :, :, :groups], self.guarded[:, :, :, groups:]
        self.raw = torch.full((2, p.batch, p.kv_heads, ring, p.head_dim), **nan)
        self.seen = torch.zeros(p.batch, dtype=torch.int32, device=device)

    def step(self, q: Tensor, k: Tensor, v: Tensor, config: DecodeConfig = SMALL) -> Tensor:
        out = torch.full_like(q, float("nan"))
        launch_decode(
            q, k, v, out, self.core[0], self.core[1], self.raw[0], self.raw[1], self.seen, self.seen,
            spec=self.spec, config=config, max_tokens=self.max_tokens,
        )  # fmt: skip
        return out

    def run(self, inputs: Inputs, step: int, config: DecodeConfig = SMALL) -> Tensor:
        """All of the inputs, `step` tokens at a time."""
        chunks = [
            self.step(*(x[:, :, start : start + step] for x in inputs[:3]), config)
            for start in range(0, inputs.q.shape[2], step)
        ]
        return torch.cat(chunks, dim=2)


def check(p: Problem, step: int, device: str, config: DecodeConfig = SMALL, family: str = "randn") -> None:
    """Outputs and cores of a run from nothing are the oracle's."""
    inputs = make_inputs(Case(problem=p, layout="different", family=family, device=device))
    state = State(p, step, device)
    out = state.run(inputs, step, config)
    model = ErrorModel(*(x.cpu() for x in inputs[:3]), p.spec, inputs.q.dtype)
    pairs = {"out": (out, model.out), "k_core": (state.core[0], model.k_core), "v_core": (state.core[1], model.v_core)}
    found = [compare(name, actual, expected) for name, (actual, expected) in pairs.items()]
    assert all(comparison.ok for comparison in found), "\n".join(map(str, found))
    assert state.seen.tolist() == [p.seq_len] * p.batch
    assert bool(state.guard.isnan().all())


RUNS = [
    (problem(), 1),
    (problem(core_heads="kv"), 1),
    (problem(pooling="mean", core_heads="kv"), 3),
    (problem(q_heads=4, kv_heads=2, batch=2), 4),
    (problem(q_heads=3, kv_heads=3), 4),
    (problem(q_heads=16, core_heads="kv"), 4),  # a full tile of 64 rows
    (problem(head_dim=20), 3),  # not a power of two
    (problem(group_size=5, window_size=2), 3),  # a window shorter than a group
    (problem(group_size=3, window_size=7, seq_len=17), 4),  # the group does not divide the window
    (problem(group_size=1), 3),
    (problem(window_size=1), 5),  # a step completes groups that its own later tokens see
    (problem(group_size=17, seq_len=21), 7),  # a group longer than append's tile
    (problem(window_size=40), 6),  # no core is ever visible
    (problem(dtype="float16"), 3),
    (problem(dtype="bfloat16" if torch.cuda.is_available() else "float64"), 3),  # what only one of the two can do
]


@pytest.mark.parametrize(("p", "step"), RUNS, ids=[f"{p}-by{step}" for p, step in RUNS])
def test_decode_is_the_oracles_row(p: Problem, step: int, device: str) -> None:
    check(p, step, device)


@pytest.mark.parametrize("family", ["rising", "falling"])
def test_the_largest_logit_may_come_in_any_tile(family: str, device: str) -> None:
    """Of a long group that is pooled, and of many raw tokens that are attended to."""
    check(problem(q_heads=1, group_size=40, seq_len=44), 11, device, family=family)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("core_heads", ["query", "kv"])
@pytest.mark.parametrize("step", [1, 5])
def test_decode_is_the_oracles_row_on_the_gpu(dtype: str, core_heads: str, step: int) -> None:
    p = problem(dtype=dtype, core_heads=core_heads, batch=3, q_heads=8, kv_heads=2, head_dim=96, seq_len=150)
    p = replace(p, window_size=30, group_size=7)
    check(p, step, "cuda", default_config(p, "sm_80"))


@pytest.mark.parametrize(("block_k", "splits_core", "splits_raw"), [(16, 1, 1), (16, 3, 2), (16, 2, 5), (32, 5, 1)])
def test_any_split_is_right(block_k: int, splits_core: int, splits_raw: int, device: str) -> None:
    p = problem(q_heads=1, seq_len=57, group_size=1, window_size=20)
    check(p, 19, device, DecodeConfig(block_k=block_k, splits_core=splits_core, splits_raw=splits_raw))


def test_a_row_has_the_same_bits_alone_and_again(device: str) -> None:
    p = problem(batch=3, seq_len=8)
    inputs = make_inputs(Case(problem=p, device=device))
    together, again = (State(p, 4, device).run(inputs, 4) for _ in range(2))
    assert compare_bitwise("again", again, together).ok
    alone = State(replace(p, batch=1), 4, device).run(inputs.part(slice(1, 2), slice(None)), 4)
    assert compare_bitwise("row 1 alone", alone, together[1:2]).ok


@pytest.mark.parametrize("core_heads", ["query", "kv"])
def test_nan_stays_in_its_batch_row_and_head(core_heads: str, device: str) -> None:
    p = problem(batch=2, q_heads=4, kv_heads=2, seq_len=8, core_heads=core_heads)
    inputs = make_inputs(Case(problem=p, device=device))
    clean = State(p, 4, device).run(inputs, 4)
    inputs.k[1, 1, 2] = float("nan")
    inputs.v[1, 1, 3, 5] = float("inf")
    dirty = State(p, 4, device).run(inputs, 4)
    assert bool(dirty[1, 2:, 2:].isnan().all())
    for other in (dirty, clean):
        other[1, 2:] = 0.0
    assert compare_bitwise("elsewhere", dirty, clean).ok


def test_past_max_tokens_nothing_is_stored_and_the_output_is_nan(device: str) -> None:
    p = problem(batch=2, seq_len=12)
    inputs = make_inputs(Case(problem=p, device=device))
    short, whole = State(p, 4, device, max_tokens=9), State(replace(p, seq_len=9), 4, device)
    lost, kept = short.run(inputs, 4), whole.run(inputs.part(slice(None), slice(0, 9)), 4)
    assert compare_bitwise("before", lost[:, :, :9], kept).ok
    assert bool(lost[:, :, 9:].isnan().all())
    for name in ("core", "raw", "seen"):
        assert compare_bitwise(name, getattr(short, name), getattr(whole, name)).ok
    assert bool(short.guard.isnan().all())


@pytest.mark.parametrize("core_heads", ["query", "kv"])
def test_tunable_launches_one_step_over_and_over(core_heads: str, device: str) -> None:
    p = problem(batch=2, q_heads=4, kv_heads=2, seq_len=21, group_size=4, window_size=6, core_heads=core_heads)
    tensors = DECODE.allocate(p, torch.device(device), torch.Generator(device).manual_seed(3))
    DECODE.launch(p, tensors, SMALL)
    first = tensors["out"].clone()
    DECODE.launch(p, tensors, SMALL)
    assert compare_bitwise("out", tensors["out"], first).ok
    assert tensors["seen"].tolist() == [21, 21]
    assert tensors["next_seen"].tolist() == [22, 22]
    # the same attention as one dense row: cores 0 .. 3 and positions 16 .. 21
    ring, heads = p.spec.max_local_tokens(), p.num_core_heads
    slots = [position % ring for position in p.spec.local_range(21)]
    keys, values = (
        torch.cat(
            [tensors[f"{x}_core"][:, :, :4], tensors[f"{x}_raw"][:, :, slots].repeat_interleave(heads // 2, 1)], 2
        )
        for x in "kv"
    )
    queries = tensors["q"].expand(-1, -1, keys.shape[2], -1)
    model = ErrorModel(queries, keys, values, CCASpec(1, keys.shape[2]), torch.float32)
    expected = type(model.out)(*(x[:, :, -1:] for x in model.out))
    assert (verdict := compare("out", first, expected)).ok, verdict


def test_work_counts_visible_keys() -> None:
    p = problem(batch=2, q_heads=4, kv_heads=2, seq_len=21, group_size=4, window_size=6)
    work = DECODE.work(p, SMALL)
    assert work.exp2 == 2 * 4 * (4 + 6)  # 4 cores and positions 16 .. 21
    assert work.flops == work.exp2 * 4 * 16
    assert work.bytes == 4 * 16 * 2 * (2 * (4 * 4 + 2 * 6) + 2 * (4 + 2))


def test_config_states_its_limits() -> None:
    assert SMALL.refusal(BASE) is None
    assert DecodeConfig(block_k=8).refusal(BASE) == "block_k 8 is below 16, the smallest side of a matrix product"
    assert DecodeConfig(block_k=48).refusal(BASE) == "block_k 48 is not a power of two"
    assert DecodeConfig(splits_raw=0).refusal(BASE) == "splits_raw 0 is below 1"
    assert DecodeConfig(num_warps=3).refusal(BASE) == "num_warps 3 is not a power of two"
    assert set(SPACE) == {field.name for field in fields(DecodeConfig)}
    assert all(refusal is None for _, refusal in DECODE.candidates(BASE))
    assert SMALL.launch_args() == {
        "BLOCK_K": 16, "SPLITS_CORE": 2, "SPLITS_RAW": 1, "num_warps": 4, "num_stages": 2,
    }  # fmt: skip


def test_default_config_is_legal_and_blind_to_the_batch() -> None:
    heads = [(1, 1), (32, 8), (28, 4), (16, 1), (128, 128)]
    dtypes = ["float16", "bfloat16", "float32"]
    for (q_heads, kv_heads), head_dim, dtype, arch in itertools.product(
        heads, (16, 128, 256), dtypes, ("cpu", "sm_90")
    ):
        p = problem(q_heads=q_heads, kv_heads=kv_heads, head_dim=head_dim, dtype=dtype)
        config = default_config(p, arch)
        assert config.refusal(p) is None
        assert config == default_config(replace(p, batch=64), arch)


@pytest.mark.parametrize(("seq_len", "splits_raw"), [(8192, 8), (32768, 4), (65536, 2), (131072, 2)])
def test_raw_tokens_are_shared_out_about_as_finely_as_cores(seq_len: int, splits_raw: int) -> None:
    p = Problem(q_heads=32, kv_heads=8, seq_len=seq_len, head_dim=128, group_size=16, window_size=1024)
    config = default_config(p, "sm_90")
    assert (config.splits_core, config.splits_raw) == (8, splits_raw)


def test_launcher_refuses_what_the_kernels_rely_on(device: str) -> None:
    p = problem(q_heads=4, seq_len=17)
    inputs = make_inputs(Case(problem=p, device=device))
    state = State(p, 2, device)
    with pytest.raises(ValueError, match="3 new tokens are too many for a ring of 5"):
        state.step(*(x[:, :, :3] for x in inputs[:3]))
    wide = State(p, 17, device)
    with pytest.raises(ValueError, match=f"17 new tokens are too many for a ring of 20 or for {MAX_ROWS} rows"):
        wide.step(*(x[:, :, :17] for x in inputs[:3]))
    state.raw = (state.raw[0], state.raw[1].transpose(2, 3).contiguous().transpose(2, 3))
    with pytest.raises(ValueError, match="must share their strides"):
        state.step(*(x[:, :, :1] for x in inputs[:3]))
    assert state.seen.tolist() == wide.seen.tolist() == [0]
