"""The acceptance rules of other projects do what they are said to do, and the table of mutants is up to date."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cca_attention.verify.calls import oracle
from cca_attention.verify.inputs import make_inputs
from cca_attention.verify.mutant import small
from cca_attention.verify.mutant_table import SCHEMA, alarms, kills, page
from cca_attention.verify.mutants import MUTANTS
from cca_attention.verify.mutants_rules import DTYPES, shows_in_one_call
from cca_attention.verify.rounding import Bounded
from cca_attention.verify.rules import RULES, Judged, eager

DOCS = Path(__file__).parents[1] / "docs"


def judged(
    actual: Any, eager_error: float = 2e-4, dtype: torch.dtype = torch.float16, gradient: bool = False
) -> Judged:
    """Values that should be 1, of which PyTorch would have one `eager_error` off, as numbers or as one error."""
    value = torch.ones(1, 1, 64, 16, dtype=torch.float64)
    plain = value.clone()
    plain[0, 0, 0, 0] += eager_error
    actual = torch.as_tensor(actual, dtype=torch.float64).expand(value.shape).clone()
    return Judged(actual.to(dtype), Bounded(value, torch.full_like(value, 1e-3)), plain, gradient)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", RULES)
def test_what_is_exact_is_accepted(name: str, dtype: torch.dtype) -> None:
    assert RULES[name].accepts(judged(1.0, dtype=dtype))


@pytest.mark.parametrize("name", RULES)
def test_zeros_and_nan_are_refused(name: str) -> None:
    assert not RULES[name].accepts(judged(0.0))
    assert not RULES[name].accepts(judged(math.nan))


@pytest.mark.parametrize(
    ("name", "error", "dtype", "accepted"),
    [
        ("flash-attention", 3.5e-4, "float32", True),
        ("flash-attention", 4.5e-4, "float32", False),
        ("FlexAttention", 1e-6, "float32", True),
        ("FlexAttention", 3e-6, "float32", False),
        ("flash-linear-attention", 0.0045, "float32", True),
        ("flash-linear-attention", 0.0055, "float32", False),
        ("flash-linear-attention in CI", 0.29, "float32", True),
        ("flash-linear-attention in CI", 0.31, "float32", False),
        ("KernelBench", 0.019, "float16", True),
        ("KernelBench", 0.021, "float16", False),
        ("KernelBench", 1.9e-4, "float32", True),
        ("KernelBench", 2.1e-4, "float32", False),
        ("TransformerEngine", 0.029, "float16", True),
        ("TransformerEngine", 0.031, "float16", False),
        ("Liger", 0.039, "float16", True),
        ("Liger", 0.041, "float16", False),
        ("Liger at its widest", 0.21, "float16", True),
        ("Liger at its widest", 0.23, "float16", False),
        ("torch.testing", 9e-6, "float32", True),
        ("torch.testing", 12e-6, "float32", False),
        ("ours", 0.9e-3, "float32", True),
        ("ours", 1.1e-3, "float32", False),
    ],
)
def test_the_limits(name: str, error: float, dtype: str, accepted: bool) -> None:
    assert RULES[name].accepts(judged(1.0 + error, dtype=getattr(torch, dtype))) is accepted


def test_gradients_may_be_three_times_as_wrong_as_eager() -> None:
    accepts = RULES["flash-attention"].accepts
    assert accepts(judged(1 + 5.5e-4, dtype=torch.float32, gradient=True))
    assert not accepts(judged(1 + 6.5e-4, dtype=torch.float32, gradient=True))


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"q_heads": 6, "core_heads": "kv"},
        {"pooling": "mean"},
        {"seq_len": 3},
        {"batch": 2, "more": {"bounds": ((0, 20), (9, 29))}},
        {"more": {"lengths": (7, 0, 22)}},
    ],
    ids=str,
)
def test_the_eager_comparison_computes_cca(shape: dict[str, Any]) -> None:
    case = small(**shape)
    case = replace(case, problem=replace(case.problem, dtype="float64"))
    inputs = make_inputs(case)
    expected = oracle(case, inputs, grads=True)
    for name, actual in eager(case, inputs, grads=True).items():
        torch.testing.assert_close(actual, expected[name].value, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_the_eager_comparison_is_in_the_dtype(dtype: str) -> None:
    case = small(dtype=dtype)
    inputs = make_inputs(case)
    expected = oracle(case, inputs)["out"].value
    found = eager(case, inputs)["out"]
    unit = torch.finfo(found.dtype).eps
    assert found.dtype == case.dtype and 0.1 * unit < (found - expected).abs().max() < 10 * unit


# --- the table --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def table() -> dict[str, Any]:
    content: dict[str, Any] = json.loads((DOCS / "data" / "mutants.json").read_text())
    return content


def test_the_table_has_every_mutant_and_all_were_killed(table: dict[str, Any]) -> None:
    assert table["schema"] == SCHEMA
    assert set(table["mutants"]) == set(MUTANTS)
    assert [name for name, row in table["mutants"].items() if not row["killed"]] == []
    for name, row in table["mutants"].items():
        assert (row["id"], row["check"]) == (MUTANTS[name].id, MUTANTS[name].check)
        assert (row["refused"] is not None) == shows_in_one_call(MUTANTS[name])


def test_the_page_shows_the_table(table: dict[str, Any]) -> None:
    assert (DOCS / "mutants.md").read_text() == page(table)


def test_ours_has_no_false_alarm_and_sees_the_most(table: dict[str, Any]) -> None:
    assert list(table["rules"]) == list(RULES)
    seen = {name: kills(table, name, "float32") for name in RULES if "float32" in RULES[name].dtypes}
    assert all(seen["ours"] >= count for count in seen.values()), seen
    assert all(alarms(table, "ours", dtype)[0] == 0 < alarms(table, "ours", dtype)[1] for dtype in DTYPES)
