"""Each of the published mistakes (spec.md section 8) is planted in our sources and caught by the check it names."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from cca_attention.verify.child import ChildFailedError
from cca_attention.verify.mutants import EIGHT, copy_package, failures, judge, plant


@pytest.mark.parametrize("name", EIGHT)
def test_the_mutant_is_caught_by_its_check(name: str) -> None:
    verdict = judge(name)
    assert verdict.killed, f"{name} survives {EIGHT[name].check}: {EIGHT[name].says}"


@pytest.mark.parametrize("name", EIGHT)
def test_the_same_check_passes_without_it(name: str) -> None:
    assert failures(name) == []


def test_every_mistake_of_the_spec_is_planted() -> None:
    assert {mutant.mistake for mutant in EIGHT.values()} == set(range(1, 9))


def test_a_stale_mutant_is_an_error(tmp_path: Path) -> None:
    root = copy_package(tmp_path)
    mutant = EIGHT["padding_ignored"]
    with pytest.raises(ValueError, match=r"stale: attention\.py has it 0 times"):
        plant(replace(mutant, old="no such text"), root)
    with pytest.raises(ValueError, match="stale"):
        plant(replace(mutant, old="import"), root)
    plant(mutant, root)
    with pytest.raises(ValueError, match="stale"):
        plant(mutant, root)


def test_a_mutant_that_does_not_run_is_not_a_kill(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = replace(EIGHT["padding_ignored"], new="return Sequences.dense(")
    monkeypatch.setitem(EIGHT, "broken", broken)
    with pytest.raises(ChildFailedError, match="SyntaxError"):
        judge("broken")
