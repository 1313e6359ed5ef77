"""The statistical bounds (T2): no false alarm on correct kernels, and errors that the rigorous bounds let through."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from cca_attention import Problem
from cca_attention.verify import levels, statistics
from cca_attention.verify.calls import oracle, run
from cca_attention.verify.cases import Case
from cca_attention.verify.inputs import FAMILIES, make_inputs
from cca_attention.verify.peer import Peer
from cca_attention.verify.rounding import Bounded, ErrorModel
from cca_attention.verify.rounding_backward import gradients
from cca_attention.verify.tolerance import compare

BASE: dict[str, Any] = {
    "batch": 2, "q_heads": 4, "kv_heads": 2, "seq_len": 61, "head_dim": 32, "group_size": 4, "window_size": 6,
}  # fmt: skip
SHAPES: tuple[dict[str, Any], ...] = (
    {},
    {"core_heads": "kv", "head_dim": 64, "seq_len": 90},
    {"pooling": "mean", "core_heads": "kv"},
    {"group_size": 24, "window_size": 3},
    {"seq_len": 3},
    {"seq_len": 1},
)


def make(dtype: str, family: str = "randn", seed: int = 0, **problem: Any) -> Case:
    """A case for the eager path: its rounding is like a kernel's, and it takes milliseconds."""
    return Case(problem=Problem(**{**BASE, "dtype": dtype, **problem}), family=family, backend="eager", seed=seed)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_honest_rounding_raises_no_suspicion(family: str, dtype: str) -> None:
    for seed, shape in enumerate(SHAPES):
        comparisons = levels.every_level(make(dtype, family, seed, **shape))
        assert all(c.ok for c in comparisons), "\n".join(map(str, comparisons))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_casts_of_probabilities_raise_no_suspicion(family: str, dtype: str) -> None:
    """The eager path casts nothing in between; the peer casts what a kernel does."""
    for seed, shape in enumerate(SHAPES[:2]):
        case = make(dtype, family, seed, **shape)
        inputs = make_inputs(case)
        values = oracle(case, inputs, grads=True)
        peer = Peer(*inputs[:3], case.spec)
        actual = {"out": peer.out, **peer.gradients(inputs.dout, inputs.dlse)}
        for name, bounded in levels.statistical(case, inputs).items():
            expected = Bounded(values[name].value, bounded.bound)
            comparison = compare(name, actual[name], expected, level="statistical")
            assert comparison.ok, str(comparison)


@pytest.mark.parametrize(
    ("dtype", "family", "seed", "shape"),
    [
        # probabilities below the smallest normal float32
        ("float32", "falling", 277510918, {"seq_len": 7, "head_dim": 40, "group_size": 24}),
        ("float32", "falling", 37421298, {"q_heads": 1, "kv_heads": 1, "seq_len": 130, "head_dim": 64,
                                          "group_size": 8}),
        # an output that is 10^-16 of the values
        ("bfloat16", "sparse_values", 606741095, {"batch": 1, "q_heads": 8, "seq_len": 130, "head_dim": 128,
                                                  "group_size": 8, "window_size": 40}),
    ],
)  # fmt: skip
def test_underflow_and_cancellation_raise_no_suspicion(
    dtype: str, family: str, seed: int, shape: dict[str, Any]
) -> None:
    """Found by drawing cases at random: the bounds knew nothing of exponentials that underflow."""
    case = replace(make(dtype, family, seed, core_heads="kv", **shape), scale=1.0)
    comparisons = levels.every_level(case)
    assert all(c.ok for c in comparisons), "\n".join(map(str, comparisons))


def test_packed_and_padded_sequences_are_judged_one_by_one() -> None:
    packed = replace(make("float16", batch=1, seq_len=40), lengths=(0, 23, 1, 16))
    padded = replace(make("bfloat16", seq_len=20), bounds=((0, 13), (5, 20)))
    for case, sequences in ((packed, 3), (padded, 2)):
        comparisons = levels.every_level(case)
        assert [c.level for c in comparisons].count("statistical") == 4 * sequences
        assert [c.level for c in comparisons].count("peer") == 2 * sequences
        assert all(c.ok for c in comparisons), "\n".join(map(str, comparisons))


@pytest.mark.parametrize("family", ["falling", "needle", "equal", "offset_values"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_rows_that_err_all_alike_raise_no_suspicion(dtype: str, family: str) -> None:
    """All queries and all upstream gradients are equal: many casts round the same number, and nothing averages out."""
    for core_heads in ("query", "kv"):
        case = make(dtype, family, 5, batch=1, seq_len=150, window_size=12, core_heads=core_heads)
        inputs = make_inputs(case)
        inputs = inputs._replace(q=inputs.q[:, :, :1].expand_as(inputs.q), dout=torch.ones_like(inputs.dout))
        values, peer = oracle(case, inputs, grads=True), Peer(*inputs[:3], case.spec)
        actual = {"out": peer.out, **peer.gradients(inputs.dout, inputs.dlse)}
        for name, bounded in levels.statistical(case, inputs).items():
            comparison = compare(name, actual[name], Bounded(values[name].value, bounded.bound), level="statistical")
            assert comparison.ok, str(comparison)


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_the_bounds_are_at_most_the_rigorous_ones_and_mostly_far_below(dtype: str) -> None:
    case = make(dtype, "old_keys", seq_len=200, window_size=8)
    inputs = make_inputs(case)
    model = ErrorModel(*inputs[:3], case.spec, case.dtype)
    rigorous = {"out": model.out, **gradients(model, inputs.dout, inputs.dlse)._asdict()}
    for name, bounded in levels.statistical(case, inputs).items():
        assert torch.equal(bounded.value, rigorous[name].value)
        assert bool((bounded.bound <= rigorous[name].bound).all())
        closer = 1.0 if name == "out" and dtype.endswith("16") else 0.6
        assert float((bounded.bound / rigorous[name].bound).median()) < closer, name


def test_without_a_gradient_of_lse_its_bound_is_that_of_zero() -> None:
    case = make("float32", seq_len=9)
    inputs = make_inputs(case)
    model = ErrorModel(*inputs[:3], case.spec, case.dtype)
    zero = torch.zeros_like(inputs.dlse)
    for x, y in zip(
        statistics.gradients(model, inputs.dout, None), statistics.gradients(model, inputs.dout, zero), strict=True
    ):
        assert torch.equal(x.value, y.value) and torch.equal(x.bound, y.bound)


@pytest.mark.parametrize(
    ("family", "seq_len", "factor", "name"),
    [
        ("randn", 120, 1.01, "dk"),
        ("old_keys", 300, 1.01, "dq"),
        ("old_keys", 300, 1.003, "dk"),
        ("old_keys", 300, 1.003, "dv"),
    ],
)
def test_a_slightly_wrong_scale_in_bfloat16(family: str, seq_len: int, factor: float, name: str) -> None:
    """Too small an error for a proof, and enough for suspicion."""
    case = make("bfloat16", family, 3, batch=1, q_heads=2, seq_len=seq_len, head_dim=64, window_size=8)
    inputs = make_inputs(case)
    rigorous, suspicious = oracle(case, inputs, grads=True)[name], levels.statistical(case, inputs)[name]
    right, wrong = (
        run(replace(case, scale=x * case.problem.head_dim**-0.5), inputs, grads=True)[name] for x in (1.0, factor)
    )
    assert compare(name, wrong, rigorous).ok
    expected = Bounded(rigorous.value, suspicious.bound)
    assert compare(name, right, expected, level="statistical").ok
    assert not compare(name, wrong, expected, level="statistical").ok


@pytest.mark.parametrize("name", ["out", "dq", "dk", "dv"])
def test_an_error_between_the_two_bounds_is_suspicious_and_no_proof(name: str) -> None:
    case = make("float32", "old_keys", 1, seq_len=120)
    inputs = make_inputs(case)
    rigorous, suspicious = oracle(case, inputs, grads=True)[name], levels.statistical(case, inputs)[name]
    wrong = rigorous.value + (suspicious.bound * rigorous.bound).sqrt()
    assert compare(name, wrong, rigorous).ok
    found = compare(name, wrong, Bounded(rigorous.value, suspicious.bound), level="statistical")
    assert (found.ok, found.level) == (False, "statistical")
    assert "(statistical): FAILED" in str(found)
