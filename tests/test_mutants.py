"""Faults planted in our own sources are seen by the checks that they name, and what shows nothing counts as nothing.

Here are one mutant of each family and the eight published mistakes; `cca-verify mutants` judges all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from cca_attention.verify.child import ChildFailedError
from cca_attention.verify.mutant import Mutant, Patch, StaleError
from cca_attention.verify.mutants import (
    EIGHT,
    EXIT_CODES,
    MUTANTS,
    NOT_APPLICABLE,
    Forks,
    Judge,
    Verdict,
    copy_package,
    exit_code,
    failures,
    killers,
    planted,
    selected,
    workshop,
)

COUNTS = {"F": 16, "B": 6, "D": 5, "R": 3, "A": 4, "H": 6}
LISTED = {f"{family}{number}" for family, count in COUNTS.items() for number in range(1, count + 1)}
FAST = (
    "masked_lanes_without_other", "offsets_in_32_bits", "weights_truncated", "pooling_lost_for_queries",
    "core_not_made_when_complete", "padding_rows_not_zeroed", "config_of_another_dtype", "winner_not_verified",
    "kernel_as_oracle_of_a_check",
)  # fmt: skip
QUICK = "newest_core_lost"  # a mutant of a check that takes well below a second


@pytest.fixture(scope="module")
def judge() -> Iterator[Judge]:
    with workshop() as (forks, original):
        yield Judge(forks, original)


@pytest.mark.parametrize("name", [*EIGHT, *FAST])
def test_the_mutant_is_caught_by_its_check(judge: Judge, name: str) -> None:
    verdict = judge.judge(name, MUTANTS[name])
    assert verdict.killed, verdict
    assert verdict.seen and not verdict.error and verdict.seconds > 0


# --- the registry -----------------------------------------------------------------------------------------------------


def test_every_fault_of_the_list_is_planted() -> None:
    assert {mutant.id for mutant in MUTANTS.values()} == LISTED | {str(number) for number in range(1, 9)}
    assert {mutant.id for mutant in EIGHT.values()} == {str(number) for number in range(1, 9)}
    assert {key.partition(":")[0] for key in NOT_APPLICABLE} <= LISTED


def test_every_mutant_names_a_check_that_there_is() -> None:
    assert {mutant.check for mutant in MUTANTS.values()} <= set(killers())
    assert set(FAST) <= set(MUTANTS) and {MUTANTS[name].family for name in FAST} == set(COUNTS)


def test_every_mutant_applies(tmp_path: Path) -> None:
    copy_package(tmp_path / "original")
    for mutant in MUTANTS.values():
        assert all(patch.old != patch.new for patch in mutant.patches) and mutant.patches
        with planted(mutant, tmp_path / "original"):
            pass


def test_mutants_are_chosen_by_name_and_by_id() -> None:
    assert selected(None) == list(MUTANTS)
    assert selected(["D2", QUICK]) == [QUICK, "stale_core_after_rollback", "rollback_forgets_the_counter"]
    with pytest.raises(ValueError, match="no mutant has the name or id F99; there are truncated"):
        selected(["F99"])


# --- what is no kill --------------------------------------------------------------------------------------------------


def with_patch(old: str, new: str, module: str = "kernels/primitives.py") -> Mutant:
    return replace(MUTANTS[QUICK], patches=(Patch(module, old, new),))


@pytest.mark.parametrize(
    ("old", "times"), [("no such text", 0), ("import", "several")], ids=["nowhere", "in several places"]
)
def test_a_stale_mutant_is_an_error(judge: Judge, old: str, times: object) -> None:
    verdict = judge.judge(QUICK, with_patch(old, "x"))
    assert (verdict.outcome, verdict.killed, verdict.seen) == ("stale", False, ())
    assert "is stale: kernels/primitives.py has it" in verdict.error
    assert (" 0 times" in verdict.error) == (times == 0)


def test_a_mutant_of_a_file_that_is_gone_is_stale(tmp_path: Path) -> None:
    with pytest.raises(StaleError, match=r"kernels/gone\.py has it 0 times"):
        Patch("kernels/gone.py", "x", "y").apply(copy_package(tmp_path))


def test_a_mutant_that_changes_nothing_survives(judge: Judge) -> None:
    verdict = judge.judge(QUICK, with_patch("import math", "import math  # as before"))
    assert (verdict.outcome, verdict.seen, verdict.error) == ("survived", (), "")


@pytest.mark.parametrize(
    ("new", "error"),
    [
        ("import math, (", "SyntaxError"),
        ("import math, gone", "ModuleNotFoundError: No module named 'gone'"),
        ("import math, os\nos._exit(3)", ""),
        ("import math, signal\nsignal.raise_signal(signal.SIGSEGV)", "killed by signal 11"),
    ],
    ids=["syntax", "import", "exit", "signal"],
)
def test_a_mutant_that_does_not_run_is_not_a_kill(judge: Judge, new: str, error: str) -> None:
    verdict = judge.judge(QUICK, with_patch("import math", new))
    assert (verdict.outcome, verdict.seen) == ("failed", ())
    assert error in verdict.error


def test_a_crash_is_a_kill_where_the_mutant_says_so(judge: Judge) -> None:
    deadly = with_patch("import math", "import math, signal\nsignal.raise_signal(signal.SIGSEGV)")
    verdict = judge.judge(QUICK, replace(deadly, dies=True))
    assert (verdict.outcome, verdict.seen) == ("killed", ("killed by signal 11",))


def test_a_mutant_that_hangs_is_not_a_kill(judge: Judge) -> None:
    with planted(with_patch("import math", "import math, time\ntime.sleep(60)"), judge.original) as source:  # noqa: SIM117
        with pytest.raises(ChildFailedError, match=r"no result within 0\.5 s"):
            judge.forks.call(failures, QUICK, source=source, timeout_s=0.5)


def test_a_check_that_fails_without_the_mutant_proves_nothing(judge: Judge) -> None:
    with planted(MUTANTS[QUICK], judge.original) as broken:
        verdict = Judge(judge.forks, broken).judge(QUICK, with_patch("import math", "import math  # as before"))
    assert (verdict.outcome, verdict.seen) == ("baseline", ())
    assert "weights of tokens" in verdict.error


def test_mutants_are_not_judged_outside_of_the_copy(judge: Judge, tmp_path: Path) -> None:
    with pytest.raises(ChildFailedError, match="is not of the copy"):
        judge.forks.call(failures, QUICK, source=tmp_path)


def test_a_mutant_that_ends_the_process_that_forks_is_an_error(judge: Judge, tmp_path: Path) -> None:
    forks = Forks(tmp_path)
    deadly = with_patch("import math", "import math, os, signal\nos.kill(os.getppid(), signal.SIGTERM)")
    with planted(deadly, judge.original) as source, pytest.raises(RuntimeError, match="has ended with code -15"):
        forks.call(failures, QUICK, source=source)
    forks.close()


def test_the_exit_code_is_that_of_the_worst() -> None:
    def verdicts(*outcomes: str) -> list[Verdict]:
        return [Verdict("x", "F1", "F", "", "", outcome) for outcome in outcomes]  # type: ignore[arg-type]

    assert [exit_code(verdicts("killed", outcome)) for outcome in EXIT_CODES] == [0, 2, 3, 4, 5]
    assert exit_code(verdicts("stale", "survived")) == 5
    assert exit_code([]) == 5
