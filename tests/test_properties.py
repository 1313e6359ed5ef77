"""Every check of the registry on drawn cases, and that the properties P1 to P45 all have one that is documented.

The profile of hypothesis decides how many cases are drawn: `--hypothesis-profile=nightly` for a long run.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from torch import Tensor

from cca_attention import CCACache, CCASpec, Problem, cca_attention
from cca_attention.verify import calls, checks_backward, checks_symmetry, property_run, registry
from cca_attention.verify.cases import Case, same_tiles
from cca_attention.verify.property_run import PROFILES, drawn_classes, run_property
from cca_attention.verify.registry import Check, checks
from cca_attention.verify.rounding import Bounded
from cca_attention.verify.strategies import MANY_CALLS, REQUIRED
from cca_attention.verify.tolerance import Comparison, compare

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DOCUMENT = Path(__file__).parents[1] / "docs" / "properties.md"
PROPERTIES = [f"P{number}" for number in range(1, 46)]


def examples(check: str) -> int:
    """The interpreter is slow and there are many checks: a quarter of what other tests draw, a sixth of many calls."""
    return settings.default.max_examples // (6 if check in MANY_CALLS else 4)


@pytest.mark.parametrize("check", checks())
def test_drawn_cases_pass(check: str) -> None:
    result = run_property(check, examples=examples(check), derandomize=settings.default.derandomize, device=DEVICE)
    assert result.ok, result


def test_every_required_class_is_drawn() -> None:
    drawn = sum((drawn_classes(check, examples=examples(check), device=DEVICE) for check in checks()), Counter())
    assert set(drawn) >= REQUIRED, REQUIRED - set(drawn)


def test_every_property_has_a_check() -> None:
    assert sorted({p for check in checks().values() for p in check.properties}) == sorted(PROPERTIES)


def test_the_document_names_the_checks_of_each_property() -> None:
    rows = re.findall(r"^\| (P\d+) \|.*\| ([^|]*) \| [^|]* \|$", DOCUMENT.read_text(), flags=re.MULTILINE)
    documented = {name: sorted(re.findall(r"`(\w+)`", cell)) for name, cell in rows}
    assert [name for name, _ in rows] == PROPERTIES
    assert documented == {
        name: sorted(check.name for check in checks().values() if name in check.properties) for name in PROPERTIES
    }


# --- every check can fail -------------------------------------------------------------------------------------------


def spoil(monkeypatch: pytest.MonkeyPatch) -> None:
    """Queries and keys are shifted by a token, some of the keys is detached, and no call gives the same bits twice."""

    def noisy(x: Tensor) -> Tensor:
        return x * (1 + torch.rand(x.shape).to(x) / 8)

    def attention(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
        k = k.roll(-1, 2) + k.detach() / 4
        out = cca_attention(q.roll(1, 2), k, v.roll(-1, 2), **options)
        return tuple(noisy(x) for x in out) if isinstance(out, tuple) else noisy(out)

    for module in (calls, checks_backward, checks_symmetry):
        monkeypatch.setattr(module, "cca_attention", attention)
    for name in ("prefill", "decode"):
        method = getattr(CCACache, name)
        monkeypatch.setattr(CCACache, name, lambda *args, method=method, **options: noisy(method(*args, **options)))
    for name in ("k_core", "v_core"):
        cores = getattr(CCACache, name).fget
        monkeypatch.setattr(CCACache, name, property(lambda self, cores=cores: noisy(cores(self))))


@pytest.mark.parametrize("check", sorted(set(checks()) - {"integer_partition"}))
def test_no_check_passes_a_wrong_operator(check: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch)
    problem = Problem(
        batch=2, q_heads=4, kv_heads=2, seq_len=11, head_dim=16, group_size=2, window_size=3, dtype="float32"
    )
    case = Case(problem=problem, backend="eager", device=DEVICE, schedule=same_tiles(16, 16))
    assert not all(comparison.ok for comparison in checks()[check](case))


def test_a_wrong_integer_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem(q_heads=1, kv_heads=1, seq_len=11, head_dim=16, group_size=2, window_size=3)
    assert all(comparison.ok for comparison in checks()["integer_partition"](Case(problem=problem)))
    monkeypatch.setattr(CCASpec, "visible_cores", lambda self, position: max(0, (position - 3) // 2))
    monkeypatch.setattr(CCASpec, "local_range", lambda self, position: range(max(0, position - 4), position + 1))
    assert not any(comparison.ok for comparison in checks()["integer_partition"](Case(problem=problem)))


# --- the runner itself ----------------------------------------------------------------------------------------------


def plant(monkeypatch: pytest.MonkeyPatch, fails: bool | None) -> None:
    """A check that fails above three tokens, or with `fails` False never, or with None compares nothing."""

    def planted(case: Case) -> list[Comparison]:
        value = float(case.problem.seq_len > 3 and bool(fails))
        whole = torch.zeros(0 if fails is None else 1, dtype=torch.float64)
        return [compare("planted", whole + value, Bounded(whole, whole + 0.5))]

    monkeypatch.setitem(registry._CHECKS, "planted", Check("planted", "forward", (), planted))


def test_a_failure_is_reported_with_the_least_case(monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, True)
    result = run_property("planted", examples=50, derandomize=True)
    assert not result.ok
    (failure,) = result.failures
    problem = failure.case.problem
    assert (problem.seq_len, problem.batch, problem.q_heads, problem.group_size, problem.window_size) == (4, 1, 1, 1, 1)
    assert failure.found == ("planted: FAILED, budget use 2 at (0,), 1 where 0 is right",)
    assert failure.blob.startswith("@reproduce_failure(")
    assert result.worst is not None
    assert result.worst.budget_use == 2.0


def test_without_shrinking_the_first_failure_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, True)
    result = run_property("planted", examples=50, seed=3, derandomize=True, shrink=False)
    assert len(result.failures) == 1
    assert result.examples < 50


def test_an_exception_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def planted(case: Case) -> list[Comparison]:
        raise IndexError("planted")

    monkeypatch.setitem(registry._CHECKS, "planted", Check("planted", "forward", (), planted))
    result = run_property("planted", examples=5, derandomize=True)
    assert result.failures[0].found == ("IndexError: planted",)


def test_a_check_that_compares_nothing_is_not_ok(monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, None)
    result = run_property("planted", examples=5, derandomize=True)
    assert not result.failures
    assert not result.ok


def test_more_is_drawn_while_nothing_was_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    def planted(case: Case) -> list[Comparison]:
        whole = torch.zeros(case.problem.seq_len - 1, dtype=torch.float64)
        return [compare("planted", whole, Bounded(whole, whole + 0.5))]

    monkeypatch.setitem(registry._CHECKS, "planted", Check("planted", "forward", (), planted))
    result = run_property("planted", examples=1, derandomize=True)
    assert result.ok and 0 < result.classes[property_run.EMPTY] < result.examples


def test_a_run_can_be_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, False)
    first, again, other = (run_property("planted", examples=20, derandomize=True, seed=seed) for seed in (7, 7, 8))
    assert first.ok
    assert first.classes == again.classes != other.classes
    assert drawn_classes("planted", examples=20) == run_property("planted", examples=20, derandomize=True).classes


def test_a_class_that_was_never_met_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, False)
    result = run_property("planted", examples=2, derandomize=True)
    assert property_run.missing_classes([result]) == REQUIRED - set(result.classes)
    assert property_run.missing_classes([result])


def test_the_profiles_are_registered() -> None:
    assert set(PROFILES) == {"pr", "nightly", "mutants"}
    for name, wanted in PROFILES.items():
        assert settings.get_profile(name).max_examples == wanted["max_examples"]
