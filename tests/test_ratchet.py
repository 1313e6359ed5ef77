"""The ratchet of budget use: it turns one way, and what it records is true of the code as it is."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from cca_attention.verify import ratchet
from cca_attention.verify.ratchet import FLOOR, Regression, judge, limit, load, ratchet_key, update, updated, uses_of
from cca_attention.verify.tolerance import Comparison

KEY = ratchet_key("forward_equals_oracle", "out", "float32", "interpreter")


def kinds(found: list[Regression]) -> list[tuple[str, str]]:
    return [(regression.key, regression.kind) for regression in found]


def test_a_key_has_all_rows_of_a_tensor() -> None:
    assert KEY == "forward_equals_oracle/out/float32/interpreter"
    assert ratchet_key("forward_equals_oracle", "out of row 7", "float32", "interpreter") == KEY


def test_uses_are_the_largest_of_what_has_a_budget() -> None:
    comparisons = [
        Comparison("out", 0.25, (), True),
        Comparison("out of row 3", 0.5, (), True),
        Comparison("out", 0.0, (), True, empty=True),
        Comparison("seen", math.inf, (), False, level="bitwise"),
        Comparison("out", 0.9, (), True, level="bias"),
    ]
    assert uses_of("forward_equals_oracle", "float32", "interpreter", comparisons) == {KEY: 0.5}


@pytest.mark.parametrize(
    ("use", "fails"),
    [(0.0, False), (0.2, False), (0.3, False), (0.3001, True), (1.0, True), (math.inf, True), (math.nan, True)],
)
def test_a_use_that_grew(use: float, fails: bool) -> None:
    found = judge({"a": use}, {"a": 0.2})
    assert kinds(found) == ([("a", "worse")] if fails else [])
    assert all(regression.fails for regression in found)


def test_small_uses_may_move_by_a_rounding_and_none_may_pass_the_budget() -> None:
    assert judge({"a": 1.4 * FLOOR}, {"a": 0.0}) == []
    assert kinds(judge({"a": 1.6 * FLOOR}, {"a": 0.0})) == [("a", "worse")]
    assert limit(0.95) == 1.0
    assert kinds(judge({"a": 1.01}, {"a": 0.95})) == [("a", "worse")]


def test_what_is_new_is_said_and_what_is_gone_fails() -> None:
    uses, recorded = {"a": 0.1, "new": 0.9}, {"a": 0.1, "gone": 0.3}
    partly = judge(uses, recorded)
    assert kinds(partly) == [("new", "new")] and not partly[0].fails
    assert str(partly[0]) == "new: budget use 0.9, not recorded yet"
    fully = judge(uses, recorded, complete=True)
    assert kinds(fully) == [("gone", "gone"), ("new", "new")] and fully[0].fails
    assert str(fully[0]) == "gone: recorded, and not measured any more"
    assert str(judge({"a": 0.5}, {"a": 0.1})[0]) == "a: budget use 0.5, more than 0.15"


def test_recording_only_lowers_unless_told() -> None:
    recorded = {"a": 0.2, "b": 0.2, "c": 0.2}
    assert updated(recorded, {"a": 0.1, "b": 0.3, "d": 0.12345}) == {"a": 0.1, "b": 0.2, "c": 0.2, "d": 0.124}
    assert updated(recorded, {"b": 0.3}, loosen=True) == {"a": 0.2, "b": 0.3, "c": 0.2}


@pytest.mark.parametrize("use", [math.nan, math.inf, 1.01, -0.1])
def test_a_failure_cannot_be_recorded(use: float, tmp_path: Path) -> None:
    path = tmp_path / "ratchet.json"
    update({"a": 0.5}, path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="a budget use to record must be a number from 0 to 1, got a"):
        update({"a": use}, path, loosen=True)
    assert path.read_bytes() == before


def test_the_file_is_begun_updated_and_read(tmp_path: Path) -> None:
    path = tmp_path / "ratchet.json"
    update({"b": 0.5, "a": 0.25}, path)
    update({"b": 0.75, "a": 0.125}, path)
    assert load(path) == {"a": 0.125, "b": 0.5}
    assert list(json.loads(path.read_text())["budget_use"]) == ["a", "b"]
    assert [file.name for file in tmp_path.iterdir()] == ["ratchet.json"]


@pytest.mark.parametrize(
    "text", ['{"schema": "other/1", "budget_use": {}}', "[]", '{"schema": "cca-ratchet/1", "budget_use": {"a": 2}}']
)
def test_a_file_that_is_no_ratchet_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "ratchet.json").write_text(text)
    with pytest.raises(ValueError, match="must be"):
        load(tmp_path / "ratchet.json")


def test_the_recorded_numbers_are_of_every_measured_tensor() -> None:
    recorded = load()
    assert all(0 < use <= 1 for use in recorded.values())
    for mode, dtypes in ratchet.DTYPES.items():
        for dtype in dtypes:
            for name in ("out", "lse", "dq", "dk", "dv"):
                assert ratchet_key("every_level.rigorous", name, dtype, mode) in recorded


def test_the_eager_path_uses_what_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of `measure` is the gate's to run; this part takes a second."""
    monkeypatch.setattr(ratchet, "DTYPES", {"eager": ratchet.DTYPES["eager"]})
    uses = ratchet.measure()
    recorded = {key: use for key, use in load().items() if key.endswith("/eager")}
    assert judge(uses, recorded, complete=True) == []
    worse = {key: min(1.0, 2 * max(use, FLOOR)) for key, use in recorded.items()}
    assert {r.key for r in judge(worse, recorded) if r.fails} == {
        key for key, use in recorded.items() if limit(use) < 1
    }
