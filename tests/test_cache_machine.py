"""The cache's state machine (P27 and P28 of docs/properties.md), which layer L4 runs too, and what it sees."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import settings
from hypothesis.errors import Unsatisfiable

from cca_attention.cache import CCACache
from cca_attention.verify import cache_machine, runners
from cca_attention.verify.cache_machine import machine, walk
from cca_attention.verify.cache_model import REQUIRED, Tally
from cca_attention.verify.layers import Extent, plan
from cca_attention.verify.mutant import Mutant, Patch, fault
from cca_attention.verify.mutants import MUTANTS, Forks, planted, workshop
from cca_attention.verify.units import RUNNERS, Unit, run_unit

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
UNITS = {unit.id: unit for unit in plan(("L4",), Extent()) if unit.runner == "walks"}
FEW = {unit.id: unit for unit in plan(("L4",), Extent(examples=12)) if unit.runner == "walks"}

TestEager = machine("eager", DEVICE, Tally()).TestCase
TestEager.settings = settings(max_examples=3 * settings.default.max_examples, stateful_step_count=16)
TestTriton = machine("triton", DEVICE, Tally()).TestCase
TestTriton.settings = settings(stateful_step_count=10)


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_the_walks_of_the_layer_do_all_that_is_required(backend: str) -> None:
    """Which steps are drawn does not depend on the backend, so that the cheaper one shows it for both."""
    given = UNITS[f"L4/walks/{backend}"].arguments
    assert given["covers"] and given["backend"] == backend
    found = walk("eager", examples=given["examples"], steps=given["steps"], seed=walk_seed(backend))
    assert found.wrong == "" and not [name for name in REQUIRED if not found.tally.classes[name]]
    assert found.tally.walks >= given["examples"] and found.tally.comparisons > 500


def walk_seed(backend: Any) -> int:
    """The seed of a backend's own walks."""
    return walk(backend, examples=1, steps=1).seed


def test_walks_are_counted_and_required() -> None:
    unit = UNITS["L4/walks/eager"]
    result = RUNNERS["walks"](unit)
    assert result.status == "pass" and 0 < (result.budget_use or 0) <= 1 and result.seed
    assert set(result.facts["required_classes"]) <= set(result.facts["classes"])
    assert not FEW[unit.id].arguments["covers"]


def test_a_walk_that_fails_says_what_it_did(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CCACache, "seen", property(lambda self: 3))
    result = RUNNERS["walks"](FEW["L4/walks/eager"])
    assert result.status == "fail" and result.message == "ModelError: seen is 3, not 0"
    assert result.facts["steps"][0].startswith("create(spec=CCASpec(") and "reproduce_failure" in result.blob


def test_a_walk_that_crashes_says_in_which_step(monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    monkeypatch.setattr(CCACache, "crop", lambda self, tokens: ctypes.string_at(0))
    result = RUNNERS["walks"](FEW["L4/walks/eager"])
    assert result.status == "fail" and result.message.startswith("killed by SIGSEGV in crop(")
    assert result.facts["steps"][0].startswith("create(CCASpec(") and result.facts["steps"][-1] in result.message


def test_what_no_cache_did_is_raised(monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    monkeypatch.setattr(cache_machine, "run_state_machine_as_test", mock.Mock(side_effect=Unsatisfiable("nothing")))
    with pytest.raises(RuntimeError, match="an exception that is no cache's"):
        walk("eager", examples=1, steps=1)
    assert "Unsatisfiable: nothing" in capfd.readouterr().err


def test_without_hypothesis_the_environment_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, f"{runners.__package__}.cache_machine", None)
    result = RUNNERS["walks"](FEW["L4/walks/eager"])
    assert (result.status, result.trouble) == ("error", "environment") and "pip install" in result.message


# --- planted mistakes --------------------------------------------------------------------------------------------

REORDER_FORGETS = fault(
    "D2",
    "after a reorder, a row does not know which of its raw tokens are gone",
    Patch("cache.py", "[self._oldest[row] for row in rows]", "self._oldest"),
    check="reorder_equals_fresh",
)
PLANTED = {
    name: (MUTANTS[name], "triton")
    for name in ("core_not_made_when_complete", "raw_token_given_up_early", "slot_of_the_neighbour")
} | {
    "stale_core_after_rollback": (MUTANTS["stale_core_after_rollback"], "triton"),
    "rollback_forgets_the_counter": (MUTANTS["rollback_forgets_the_counter"], "eager"),
    "ring_overwritten_early": (MUTANTS["ring_overwritten_early"], "eager"),
    "reorder_forgets": (REORDER_FORGETS, "eager"),
}


@pytest.fixture(scope="module")
def copies() -> Any:
    """Forks, and a copy of the package."""
    with workshop() as made:
        yield made


def run_on(forks: Forks, source: Path, unit: Unit) -> dict[str, Any]:
    """The result of a unit with the copy of the package in `source`."""
    result: dict[str, Any] = forks.call(run_unit, unit.as_dict(), source=source, timeout_s=120.0)
    return result


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_a_copy_without_a_mistake_passes(backend: str, copies: tuple[Forks, Path]) -> None:
    result = run_on(*copies, FEW[f"L4/walks/{backend}"])
    assert result["status"] == "pass", result["message"]


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_mistake_is_killed_by_the_unit(name: str, copies: tuple[Forks, Path]) -> None:
    mutant: Mutant
    mutant, backend = PLANTED[name]
    with planted(mutant, copies[1]) as source:
        result = run_on(copies[0], source, UNITS[f"L4/walks/{backend}"])
    assert result["status"] == "fail" and result["facts"]["steps"], result["message"]
