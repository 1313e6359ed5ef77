"""Bias (T3): what no elementwise bound sees, because no element is wrong.

The kernel here is emulated in torch: tiles of keys, an online softmax in float32, probabilities cast to half precision.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from cca_attention import Problem
from cca_attention.verify import levels, statistics
from cca_attention.verify.bias import compare_bias, compare_constant
from cca_attention.verify.calls import oracle
from cca_attention.verify.cases import Case
from cca_attention.verify.inputs import Inputs, make_inputs
from cca_attention.verify.peer import Peer, compare_to_peer
from cca_attention.verify.rounding import Bounded, ErrorModel
from cca_attention.verify.tolerance import compare

BASE: dict[str, Any] = {
    "batch": 2, "q_heads": 4, "kv_heads": 2, "seq_len": 200, "head_dim": 64, "group_size": 8, "window_size": 40,
}  # fmt: skip
DTYPES = ("bfloat16", "float16")
Round = Callable[[Tensor, torch.dtype], Tensor]


def make(dtype: str, family: str = "randn") -> Case:
    return Case(problem=Problem(**{**BASE, "dtype": dtype}), family=family, backend="eager", seed=3)


def nearest(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype).float()


def truncated(x: Tensor, dtype: torch.dtype) -> Tensor:
    near = x.to(dtype)
    down = torch.nextafter(near, torch.zeros((), dtype=dtype))
    return torch.where(near.float().abs() > x.abs(), down, near).float()


def kept(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x


def fused(
    inputs: Inputs, case: Case, cast: Round = nearest, accumulate: Round = kept, store: Round = nearest
) -> Tensor:
    """The forward with these roundings of probabilities, of the accumulator after each tile, and of the output."""
    peer, dtype = Peer(*inputs[:3], case.spec), case.dtype
    weights = peer.probs.double().log().float()  # logits but for a constant of the row
    acc, row_sum = torch.zeros(inputs.q.shape), torch.zeros(*inputs.q.shape[:3], 1)
    row_max = torch.full_like(row_sum, -1e30)
    for first in range(0, weights.shape[-1], 32):
        keys = slice(first, first + 32)
        new_max = torch.maximum(row_max, weights[..., keys].amax(-1, True))
        probs, rescale = (weights[..., keys] - new_max).exp(), (row_max - new_max).exp()
        acc = accumulate(acc * rescale + cast(probs, dtype) @ peer.values[:, :, keys].detach(), dtype)
        row_sum, row_max = row_sum * rescale + probs.sum(-1, True), new_max
    return store(acc / row_sum, dtype).to(dtype)


def model(case: Case, inputs: Inputs) -> ErrorModel:
    return ErrorModel(*inputs[:3], case.spec, case.dtype)


@cache
def prepared(dtype: str, family: str, equal: bool = False) -> tuple[Case, Inputs, Bounded]:
    case = make(dtype, family)
    inputs = make_inputs(case)
    if equal:
        inputs = inputs._replace(v=inputs.v[:, :, :1].expand_as(inputs.v))
    return case, inputs, oracle(case, inputs)["out"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", levels.INDEPENDENT)
def test_rounding_to_nearest_has_no_bias(family: str, dtype: str) -> None:
    case, inputs, expected = prepared(dtype, family)
    assert compare("out", fused(inputs, case), expected).ok  # the emulation is a correct kernel
    for comparison in (compare_bias("out", fused(inputs, case), expected), *levels.without_bias(case)):
        assert comparison.ok, str(comparison)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ["randn", "offset_values"])
def test_truncated_probabilities_are_seen_by_their_bias_alone(family: str, dtype: str) -> None:
    case, inputs, expected = prepared(dtype, family)
    out = fused(inputs, case, cast=truncated)
    assert compare("out", out, expected).ok
    assert compare("out", out, expected._replace(bound=statistics.out(model(case, inputs)).bound)).ok
    assert compare_to_peer("out", out, expected.value, Peer(*inputs[:3], case.spec).out).ok
    comparison = compare_bias("out", out, expected)
    assert (comparison.ok, comparison.level) == (False, "bias")
    assert comparison.terms["z_away"] < -5


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_truncated_output_is_biased(dtype: str) -> None:
    case, inputs, expected = prepared(dtype, "randn")
    out = fused(inputs, case, store=truncated)
    assert compare_to_peer("out", out, expected.value, Peer(*inputs[:3], case.spec).out).ok
    assert not compare_bias("out", out, expected).ok


def test_rows_with_the_same_logits_are_not_judged() -> None:
    with pytest.raises(ValueError, match="family must be one of"):
        levels.without_bias(make("float16", "old_keys"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_values_come_out_exactly(dtype: str) -> None:
    case, inputs, expected = prepared(dtype, "randn", equal=True)
    constant = expected.value.to(case.dtype)
    assert compare_constant("out", fused(inputs, case), constant).ok
    for fault in ({"cast": truncated}, {"store": truncated}, {"accumulate": nearest}):
        out = fused(inputs, case, **fault)
        assert not compare_constant("out", out, constant).ok, fault
        if "accumulate" not in fault:
            assert compare("out", out, expected).ok


def noise(shift: float = 0.0, rows: int = 400) -> tuple[Tensor, Bounded]:
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(2, 2, rows, 64, generator=generator, dtype=torch.float64)
    error = 0.2 * torch.rand(value.shape, generator=generator, dtype=torch.float64) - 0.1
    return (value + error + shift).half(), Bounded(value, torch.ones_like(value))


@pytest.mark.parametrize(("shift", "ok"), [(0.0, True), (0.004, False), (-0.004, False), (0.06, False)])
def test_a_shift_of_every_element(shift: float, ok: bool) -> None:
    comparison = compare_bias("x", *noise(shift))
    assert comparison.ok is ok
    assert comparison.terms["mean_up"] == pytest.approx(shift, abs=1e-3)
    assert "z_up" in str(comparison)


def test_few_elements_or_wide_dtypes_are_not_judged() -> None:
    few, expected = noise(rows=20)
    with pytest.raises(ValueError, match="x: there must be at least 100000 elements, got 5120"):
        compare_bias("x", few, expected)
    with pytest.raises(ValueError, match="x: there must be at least 100000 elements, got 5120"):
        compare_constant("x", few, few)
    many, expected = noise()
    with pytest.raises(ValueError, match="the dtype must be float16 or bfloat16, got"):
        compare_bias("x", many.float(), expected)
    with pytest.raises(ValueError, match="the dtype must be float16 or bfloat16, got"):
        compare_constant("x", many.float(), many)
    with pytest.raises(ValueError, match="the constant must be finite and not 0"):
        compare_constant("x", many, torch.zeros_like(many))
    with pytest.raises(ValueError, match="the expected values and their bounds must be finite"):
        compare_bias("x", many, expected._replace(bound=expected.bound * math.inf))


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_one_element_that_is_no_number_fails(wrong: float) -> None:
    x, expected = noise()
    constant = torch.full_like(x, 2.0)
    assert compare_bias("x", x, expected).ok and compare_constant("x", constant, constant).ok
    x[0, 0, 0, 0] = wrong
    assert not compare_bias("x", x, expected).ok
    assert not compare_constant("x", constant.clone().index_put((torch.tensor(0),) * 4, x[0, 0, 0, 0]), constant).ok


def test_a_wrong_shape_fails() -> None:
    x, expected = noise()
    assert not compare_bias("x", x.transpose(0, 2), expected).ok
    assert not compare_constant("x", x, torch.ones(1, 1, 1, 1)).ok
