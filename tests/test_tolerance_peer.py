"""The peer in low precision (T4): right, independent, and a rule that sees one bad tile."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from cca_attention import Problem
from cca_attention.verify.calls import oracle, run
from cca_attention.verify.cases import Case
from cca_attention.verify.inputs import FAMILIES, make_inputs
from cca_attention.verify.peer import TILE, Peer, compare_to_peer
from cca_attention.verify.tolerance import compare

BASE: dict[str, Any] = {
    "batch": 2, "q_heads": 4, "kv_heads": 2, "seq_len": 90, "head_dim": 32, "group_size": 4, "window_size": 6,
    "dtype": "float16",
}  # fmt: skip
SHAPES: tuple[dict[str, Any], ...] = (
    {},
    {"core_heads": "kv"},
    {"pooling": "mean"},
    {"pooling": "mean", "core_heads": "kv"},
    {"group_size": 1},
    {"group_size": 24, "window_size": 3},
    {"window_size": 200},
    {"seq_len": 3},
    {"seq_len": 1},
)


def make(family: str = "randn", seed: int = 0, **problem: Any) -> Case:
    return Case(problem=Problem(**{**BASE, **problem}), family=family, backend="eager", seed=seed)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_peer_computes_cca_attention(dtype: str, shape: dict[str, Any]) -> None:
    case = make(dtype=dtype, **shape)
    inputs = make_inputs(case)
    peer, expected = Peer(*inputs[:3], case.spec), oracle(case, inputs, grads=True)
    actual = {"out": peer.out, **peer.gradients(inputs.dout, inputs.dlse)}
    for name, x in actual.items():
        assert x.dtype == case.dtype
        comparison = compare(name, x, expected[name])
        assert comparison.ok, str(comparison)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_correct_kernel_is_no_worse(dtype: str, family: str) -> None:
    for seed, shape in enumerate(SHAPES):
        case = make(family, seed, dtype=dtype, **shape)
        inputs = make_inputs(case)
        actual, expected = run(case, inputs, grads=True), oracle(case, inputs, grads=True)
        peer = Peer(*inputs[:3], case.spec)
        near = {"out": peer.out, "dv": peer.gradients(inputs.dout, inputs.dlse)["dv"]}
        for name, x in near.items():
            comparison = compare_to_peer(name, actual[name], expected[name].value, x)
            assert comparison.ok and comparison.level == "peer", str(comparison)


@pytest.mark.parametrize("factor", [1.01, 1.003])
def test_a_slightly_wrong_scale_in_bfloat16(factor: float) -> None:
    """dv of keys that dominate: too small an error for a proof at 0.3 %, and beyond twice the peer's."""
    case = make("old_keys", 3, dtype="bfloat16", batch=1, q_heads=2, seq_len=300, head_dim=64, window_size=8)
    inputs = make_inputs(case)
    expected, peer = oracle(case, inputs, grads=True)["dv"], Peer(*inputs[:3], case.spec)
    near = peer.gradients(inputs.dout, inputs.dlse)["dv"]
    right, wrong = (
        run(replace(case, scale=x * case.problem.head_dim**-0.5), inputs, grads=True)["dv"] for x in (1.0, factor)
    )
    assert compare_to_peer("dv", right, expected.value, near).ok
    assert not compare_to_peer("dv", wrong, expected.value, near).ok
    assert compare("dv", wrong, expected).ok is (factor == 1.003)


def test_one_bad_tile_is_seen() -> None:
    """By the error of a whole tensor it would be hidden: the first tile's is far larger."""
    value = torch.ones(1, 2, 3 * TILE, 8, dtype=torch.float64)
    peer = value.half()
    peer[0, 0, 0, 0] = 2.0
    actual = value.half()
    actual[0, 0, 1, 1] = 2.5
    assert compare_to_peer("x", actual, value, peer).ok
    actual[0, 1, TILE, 7] = 1.0 + 3 * 2**-10
    found = compare_to_peer("x", actual, value, peer)
    assert (found.ok, found.worst_index) == (False, (0, 1, TILE, 7))
    assert found.max_abs_error == 1.5
    assert found.terms["bound"] == 2 * 2**-10


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_what_is_no_number_fails(wrong: float) -> None:
    value = torch.ones(1, 1, 2, 8, dtype=torch.float64)
    actual = value.half()
    actual[0, 0, 1, 3] = wrong
    found = compare_to_peer("x", actual, value, value.half())
    assert (found.ok, found.worst_index) == (False, (0, 0, 1, 3))
    with pytest.raises(ValueError, match="x: the expected values and the peer's must be finite"):
        compare_to_peer("x", value.half(), value, actual)
    with pytest.raises(ValueError, match="x: the expected values and the peer's must be finite"):
        compare_to_peer("x", actual, actual.double(), value.half())


def test_another_shape_or_dtype_fails_and_nothing_is_said() -> None:
    value = torch.ones(1, 2, 3, 4, dtype=torch.float64)
    assert not compare_to_peer("x", value.half()[:, :1], value, value.half()).ok
    assert not compare_to_peer("x", value.float(), value, value.half()).ok
    assert compare_to_peer("x", value.half()[:, :, :0], value[:, :, :0], value.half()[:, :, :0]).empty


def test_the_peer_is_of_half_precision() -> None:
    x = torch.ones(1, 1, 2, 16)
    with pytest.raises(ValueError, match="the dtype of q must be float16 or bfloat16, got"):
        Peer(x, x, x, make().spec)
