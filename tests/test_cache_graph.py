"""CCACache in CUDA graphs: replays go on from the device's counter, and what cannot be captured is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from cca_attention.cache import CCACache
from cca_attention.problem import Problem
from cca_attention.verify.inputs import Case, Inputs, make_inputs
from cca_attention.verify.rounding import ErrorModel
from cca_attention.verify.tolerance import compare, compare_bitwise

pytestmark = pytest.mark.gpu

BASE = Problem(batch=2, q_heads=4, kv_heads=2, seq_len=40, head_dim=32, group_size=4, window_size=6, dtype="float16")


def make_cache(**options: Any) -> CCACache:
    return CCACache(
        BASE.spec, batch=2, q_heads=4, kv_heads=2, head_dim=32, dtype=torch.float16, device="cuda",
        **{"max_tokens": 40, "rollback": 2} | options,
    )  # fmt: skip


def capture(call: Callable[..., Tensor], inputs: Inputs, tokens: int) -> Callable[[int], Tensor]:
    """A graph of one call on `tokens` tokens; its replay takes those of the inputs from a position on."""
    static = [x[:, :, :tokens].clone() for x in inputs[:3]]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call(*static)

    def replay(start: int) -> Tensor:
        for buffer, x in zip(static, inputs[:3], strict=True):
            buffer.copy_(x[:, :, start : start + tokens])
        graph.replay()
        return out.clone()

    return replay


@pytest.mark.parametrize("how", ["decode", "prefill"])
def test_replays_are_the_calls_they_captured(how: str) -> None:
    inputs = make_inputs(Case(problem=BASE, device="cuda"))
    captured, plain = make_cache(), make_cache()
    for cache in (captured, plain):
        for start in (0, 2):  # compiles
            getattr(cache, how)(*(x[:, :, start : start + 2] for x in inputs[:3]))
    replay = capture(getattr(captured, how), inputs, 2)
    assert captured.lengths.tolist() == [4, 4]  # capturing appends nothing
    for start in range(4, 40, 2):
        expected = getattr(plain, how)(*(x[:, :, start : start + 2] for x in inputs[:3]))
        assert (verdict := compare_bitwise(f"tokens from {start}", replay(start), expected)).ok, verdict
    assert captured.seen == plain.seen == 40
    assert (captured.nbytes, captured.lengths.tolist()) == (plain.nbytes, [40, 40])
    assert compare_bitwise("k_core", captured.k_core, plain.k_core).ok
    captured.crop(-3)
    replay(37)
    assert captured.lengths.tolist() == [39, 39]


@pytest.mark.parametrize("how", ["decode", "prefill"])
def test_replays_past_max_tokens_are_nan_and_store_nothing(how: str) -> None:
    inputs = make_inputs(Case(problem=replace(BASE, seq_len=46), device="cuda"))
    cache = make_cache()
    getattr(cache, how)(*(x[:, :, :3] for x in inputs[:3]))
    replay = capture(getattr(cache, how), inputs, 3)
    out = torch.cat([replay(start) for start in range(3, 45, 3)], dim=2)
    model = ErrorModel(*(x[:, :, :40].cpu() for x in inputs[:3]), BASE.spec, torch.float16)
    before = type(model.out)(*(x[:, :, 3:] for x in model.out))
    for name, actual, expected in (("out", out[:, :, :37], before), ("k_core", cache.k_core, model.k_core)):
        assert (verdict := compare(name, actual, expected)).ok, verdict
    assert bool(out[:, :, 37:].isnan().all())
    assert cache.seen == 40
    with pytest.raises(ValueError, match="max_tokens must be at least 41 for 1 tokens after 40, got 40"):
        cache.decode(*(x[:, :, :1] for x in inputs[:3]))


@pytest.mark.parametrize(
    ("options", "call", "message"),
    [
        ({"max_tokens": None}, lambda c, x: c.decode(*x), "max_tokens=None and backend='triton'"),
        ({"max_tokens": None}, lambda c, x: c.prefill(*x), "max_tokens=None and backend='triton'"),
        ({"backend": "eager"}, lambda c, x: c.decode(*x), "max_tokens=40 and backend='eager'"),
        (
            {},
            lambda c, x: c.prefill(*x, seq_bounds=c.lengths.new_zeros(2, 2)),
            "prefill with seq_bounds reads the device",
        ),
        ({}, lambda c, x: c.crop(1), "crop reads the device"),
        ({}, lambda c, x: c.reorder(torch.tensor([0, 1])), "reorder reads the device"),
    ],
)
def test_what_cannot_be_captured_is_refused(options: dict[str, Any], call: Callable[..., Any], message: str) -> None:
    inputs = [x[:, :, :2] for x in make_inputs(Case(problem=BASE, device="cuda"))[:3]]
    cache = make_cache(**options)
    cache.decode(*inputs)
    with pytest.raises(RuntimeError, match=message), torch.cuda.graph(torch.cuda.CUDAGraph()):
        call(cache, inputs)
    assert cache.lengths.tolist() == [2, 2]
