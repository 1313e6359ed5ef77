"""The acceptance rules can fail: what they let through, what they refuse, and that the bounds are close and sound."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from cca_attention import Problem
from cca_attention.kernels import reference
from cca_attention.verify import checks
from cca_attention.verify.cases import Case
from cca_attention.verify.inputs import FAMILIES, LAYOUTS, make_inputs
from cca_attention.verify.rounding import Bounded, ErrorModel, Precision, exact_weights
from cca_attention.verify.rounding_backward import gradients
from cca_attention.verify.tolerance import compare, compare_bitwise

NAN, INF = math.nan, math.inf
BASE: dict[str, Any] = {
    "batch": 2, "q_heads": 4, "kv_heads": 2, "seq_len": 61, "head_dim": 32, "group_size": 4, "window_size": 6,
}  # fmt: skip


def make(dtype: str = "float32", family: str = "randn", **problem: Any) -> Case:
    """A case for the eager path: its rounding is like a kernel's, and it takes milliseconds."""
    return Case(problem=Problem(**{**BASE, "dtype": dtype, **problem}), family=family, backend="eager")


# --- comparing ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("actual", "expected", "bound", "ok"),
    [
        (1.0, 1.0, 0.0, True),
        (1.25, 1.0, 0.25, True),
        (0.74, 1.0, 0.25, False),
        (1e-300, 0.0, 0.0, False),
        (NAN, 1.0, 1e300, False),
        (NAN, INF, 1.0, False),
        (INF, INF, 0.0, True),
        (-INF, -INF, 0.0, True),
        (-INF, INF, 1e300, False),
        (INF, 1.0, 1e300, False),
        (1.0, -INF, 1e300, False),
    ],
)
def test_one_element(actual: float, expected: float, bound: float, ok: bool) -> None:
    x, value, bounds = torch.tensor([[0.5, actual], [0.5, expected], [0.1, bound]], dtype=torch.float64)
    found = compare("x", x, Bounded(value, bounds))
    assert found.ok is ok
    assert found.ok == (found.budget_use <= 1)
    assert ok or found.worst_index == (1,)


def test_the_worst_element_and_its_budget_use_are_reported() -> None:
    expected = Bounded(torch.zeros(2, 3), torch.ones(2, 3))
    found = compare("x", torch.tensor([[0.0, 0.1, -0.2], [0.0, -0.5, 0.3]]), expected)
    assert (found.ok, found.worst_index) == (True, (1, 1))
    assert found.budget_use == pytest.approx(0.5)
    assert "0.5 at (1, 1)" in str(found)


def test_what_was_judged_at_the_worst_element_is_reported() -> None:
    expected = Bounded(torch.tensor([1.0, 100.0]), torch.tensor([0.5, 10.0]))
    found = compare("x", torch.tensor([1.25, 102.0]), expected)
    assert (found.level, found.worst_index, found.max_abs_error) == ("rigorous", (0,), 2.0)
    assert found.terms == {"actual": 1.25, "expected": 1.0, "error": 0.25, "bound": 0.5}
    suspicious = compare("x", torch.tensor([2.0, 100.0]), expected, level="statistical")
    assert (suspicious.level, suspicious.ok) == ("statistical", False)
    assert str(suspicious).startswith("x (statistical): FAILED, budget use 2 at (0,)")
    bits = compare_bitwise("x", torch.tensor([1.0, 3.0]), torch.tensor([1.0, 2.0]))
    assert (bits.level, bits.max_abs_error) == ("bitwise", 1.0)
    assert bits.terms == {"actual": 3.0, "expected": 2.0, "error": 1.0}


def test_nothing_compared_is_said() -> None:
    found = compare("x", torch.empty(0, 3), Bounded(torch.empty(0, 3), torch.empty(0, 3)))
    assert (found.ok, found.empty) == (True, True)
    assert "nothing to compare" in str(found)
    assert compare_bitwise("x", torch.empty(0), torch.empty(0)).empty


def test_a_wrong_shape_fails_even_if_it_broadcasts() -> None:
    assert not compare("x", torch.zeros(1, 3), Bounded(torch.zeros(2, 3), torch.ones(2, 3))).ok
    assert not compare("x", torch.empty(0), Bounded(torch.zeros(1), torch.ones(1))).ok
    assert not compare_bitwise("x", torch.zeros(3), torch.zeros(1, 3)).ok


@pytest.mark.parametrize(("value", "bound"), [(0.0, INF), (0.0, NAN), (0.0, -1.0), (NAN, 1.0)])
def test_a_comparison_that_could_not_judge_is_an_error(value: float, bound: float) -> None:
    with pytest.raises(ValueError, match="x: the bound must be finite"):
        compare("x", torch.zeros(1), Bounded(torch.tensor([value]), torch.tensor([bound])))


def test_bitwise() -> None:
    x = torch.tensor([1.0, -0.0, NAN, INF])
    assert compare_bitwise("x", x.clone(), x).ok
    assert not compare_bitwise("x", torch.tensor([1.0, 0.0, NAN, INF]), x).ok
    assert not compare_bitwise("x", torch.tensor([1.0 + 2**-23, -0.0, NAN, INF]), x).ok
    assert not compare_bitwise("x", x.double(), x).ok
    assert compare_bitwise("x", torch.arange(6).view(2, 3).T, torch.tensor([[0, 3], [1, 4], [2, 5]])).ok


# --- the bounds --------------------------------------------------------------------------------------------------

SHAPES: tuple[dict[str, Any], ...] = (
    {},
    {"core_heads": "kv"},
    {"pooling": "mean"},
    {"pooling": "mean", "core_heads": "kv"},
    {"group_size": 1},
    {"group_size": 24, "window_size": 3},
    {"seq_len": 3},
    {"seq_len": 1},
)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_error_model_computes_the_oracles_values(shape: dict[str, Any]) -> None:
    """It knows nothing of the oracle's code; if it bounded another function, its bounds would mean nothing."""
    case = make("float64", **shape)
    inputs, spec = make_inputs(case), case.spec
    model = ErrorModel(*inputs[:3], spec, torch.float64)
    expected = checks.oracle(case, inputs, grads=True)
    found = {"out": model.out, "lse": model.lse, **gradients(model, inputs.dout, inputs.dlse)._asdict()}
    sizes = {"group_size": spec.group_size, "core_heads": spec.core_heads, "pooling": spec.pooling}
    for name, core in zip(("k_core", "v_core"), reference.pool(*inputs[:3], **sizes), strict=True):
        found[name] = getattr(model, name)
        expected[name] = Bounded(core, found[name].bound)
    for name, bounded in found.items():
        comparison = compare(name, bounded.value, expected[name])
        assert comparison.ok and (comparison.empty or comparison.budget_use < 0.1), str(comparison)


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_honest_rounding_stays_within_the_bounds(family: str, dtype: str) -> None:
    for shape in SHAPES[:4]:
        comparisons = checks.backward_equals_oracle(make(dtype, family, **shape))
        assert all(c.ok for c in comparisons), "\n".join(map(str, comparisons))


def relative(bounded: Bounded) -> float:
    return float(bounded.bound.max() / bounded.value.abs().max())


def test_the_bounds_are_close() -> None:
    """The largest bound against the largest value: a bound that lets everything through is a check that cannot fail."""
    limits = {"float64": (1e-12, 1e-11), "float32": (1e-4, 5e-3), "float16": (5e-3, 1e-1), "bfloat16": (4e-2, 8e-1)}
    for dtype, (forward, backward) in limits.items():
        case = make(dtype)
        inputs = make_inputs(case)
        model = ErrorModel(*inputs[:3], case.spec, case.dtype)
        found = gradients(model, inputs.dout, inputs.dlse)
        assert max(map(relative, (model.out, model.lse, model.k_core, model.v_core))) < forward, dtype
        assert max(map(relative, found)) < backward, dtype


def test_exact_weights_allow_no_leak() -> None:
    expected = exact_weights(torch.tensor([0.0, 0.5], dtype=torch.float64), torch.float16)
    assert not compare("x", torch.tensor([1e-30, 0.5]), expected).ok
    assert compare("x", torch.tensor([0.0, 0.5 + 2**-12]), expected).ok
    assert not compare("x", torch.tensor([0.0, 0.51]), expected).ok


def test_narrow_dtypes_have_wider_precisions() -> None:
    order = [Precision.of(d) for d in (torch.float64, torch.float32, torch.float16, torch.bfloat16)]
    assert [p.store for p in order] == sorted(p.store for p in order)
    assert [p.cast for p in order[:2]] == [0.0, 0.0]


# --- faults that they must see -----------------------------------------------------------------------------------


def wrong_scale(case: Case) -> Case:
    return replace(case, scale=1.01 * case.problem.head_dim**-0.5)


def wrong_window(case: Case) -> Case:
    return replace(case, problem=replace(case.problem, window_size=case.problem.window_size + 1))


def wrong_group(case: Case) -> Case:
    return replace(case, problem=replace(case.problem, group_size=case.problem.group_size + 1))


def wrong_pooling(case: Case) -> Case:
    return replace(case, problem=replace(case.problem, pooling="mean"))


def wrong_heads(case: Case) -> Case:
    return replace(case, problem=replace(case.problem, core_heads="kv"))


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16"])
@pytest.mark.parametrize("fault", [wrong_scale, wrong_window, wrong_group, wrong_pooling, wrong_heads])
def test_another_function_is_refused(fault: Any, dtype: str) -> None:
    case = make(dtype)
    inputs = make_inputs(case)
    expected = checks.oracle(case, inputs, grads=True)
    actual = checks.run(fault(case), inputs, grads=True)
    assert not all(compare(name, actual[name], expected[name]).ok for name in ("out", "lse"))
    assert not all(compare(name, actual[name], expected[name]).ok for name in ("dq", "dk", "dv"))


@pytest.mark.parametrize("name", ["dq", "dk", "dv"])
@pytest.mark.parametrize("factor", [0.0, 0.999, -1.0])
def test_a_gradient_that_is_a_little_off_is_refused(name: str, factor: float) -> None:
    case = make("float64")
    inputs = make_inputs(case)
    expected = checks.oracle(case, inputs, grads=True)[name]
    assert not compare(name, expected.value * factor, expected).ok


# --- the inputs --------------------------------------------------------------------------------------------------


def test_layouts_change_the_memory_and_not_the_values() -> None:
    plain = make_inputs(make(seq_len=9))
    for layout in LAYOUTS:
        placed = make_inputs(replace(make(seq_len=9), layout=layout))
        assert all(x.stride(-1) == 1 for x in placed[:4])
        if layout == "expanded":
            assert 0 in placed.q.stride() and 0 in placed.k.stride()
        else:
            assert all(torch.equal(x, y) for x, y in zip(placed, plain, strict=True))
    different = make_inputs(replace(make(seq_len=9), layout="different"))
    assert len({x.stride() for x in different[:3]}) == 3
    assert make_inputs(replace(make(seq_len=9), layout="slab")).q.storage_offset() % 2 == 1


def test_a_seed_names_the_values() -> None:
    first, again, other = (make_inputs(replace(make(), seed=seed)) for seed in (1, 1, 2))
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
    assert not any(torch.equal(x, y) for x, y in zip(first, other, strict=True))


def test_everything_outside_a_padded_sequence_is_nan() -> None:
    inputs = make_inputs(replace(make(seq_len=9), bounds=((0, 5), (4, 9))))
    for x in inputs:
        assert x[0, :, 5:].isnan().all() and x[1, :, :4].isnan().all()
        assert not x[0, :, :5].isnan().any() and not x[1, :, 4:].isnan().any()


@pytest.mark.parametrize(("field", "value"), [("family", "surprise"), ("layout", "surprise")])
def test_an_unknown_family_or_layout_is_refused(field: str, value: str) -> None:
    with pytest.raises(ValueError, match=f"{field} must be one of"):
        make_inputs(replace(make(), **{field: value}))


def test_a_case_refuses_sequences_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="must add up to seq_len of a batch of one"):
        replace(make(batch=1), lengths=(3, 4))
    with pytest.raises(ValueError, match="must be one pair for each row"):
        replace(make(), bounds=((0, 3),))
