"""The second verdict: it takes nothing on trust, and says with a code what is wrong with a record."""

from __future__ import annotations

import ast
import copy
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cca_attention.ci import verdict
from cca_attention.ci.verdict import complaints, exit_code, judge_file

RESULT: dict[str, Any] = {
    "id": "L0/a", "layer": "L0", "status": "pass", "mode": "host", "cases": 3, "budget_use": 0.5, "warnings": [],
    "trouble": "", "message": "", "facts": {},
}  # fmt: skip
MUTANT = {**RESULT, "id": "L5/m", "layer": "L5", "facts": {"killed": True}, "budget_use": None}
GPU = {**RESULT, "id": "L6/g", "layer": "L6", "status": "not-run", "mode": "gpu", "cases": 0, "budget_use": None}


def record() -> dict[str, Any]:
    """A record that passes: one result of three kinds."""
    results = [copy.deepcopy(each) for each in (RESULT, MUTANT, GPU)]
    return {
        "schema": "cca-verify/1",
        "complete": True,
        "header": {
            "planned": [r["id"] for r in results], "layers": ["L0", "L5", "L6"], "strict": False, "gpu": "",
        },
        "results": results,
        "footer": {"missing_classes": [], "ratchet": [], "counts": {"pass": 2, "not-run": 1, "fail": 0}},
    }  # fmt: skip


def code_of(data: Any, **options: Any) -> int:
    return exit_code(complaints(data, {"L0": 1}, **options))


def test_a_good_record_passes() -> None:
    assert complaints(record(), {"L0": 1}) == []


def change(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """Sets one place of a record."""

    def apply(data: dict[str, Any]) -> None:
        *parents, last = [int(part) if part.isdigit() else part for part in path.split(".")]
        place: Any = data
        for part in parents:
            place = place[part]
        place[last] = value

    return apply


BAD: list[tuple[str, Any, int, str]] = [
    ("schema", "cca-verify/2", 5, "not a record of schema"),
    ("complete", False, 3, "did not come to its end"),
    ("results", [], 5, "no check ran"),
    ("header.planned", ["L0/a", "L5/m", "L6/g", "L0/b"], 5, "planned, and not there: L0/b"),
    ("header.planned", ["L0/a", "L5/m"], 5, "there, and not planned: L6/g"),
    ("header.layers", ["L0", "L1"], 5, "L1 has 0 checks, expected are 1"),
    ("results.1.id", "L0/a", 5, "2 results of L0/a"),
    ("results.0.budget_use", "nan", 1, "a pass with a budget use of 'nan'"),
    ("results.0.budget_use", float("nan"), 1, "a pass with a budget use of nan"),
    ("results.0.budget_use", None, 1, "a pass with a budget use of None"),
    ("results.0.budget_use", 1.01, 1, "a pass with a budget use of 1.01"),
    ("results.0.budget_use", True, 1, "a pass with a budget use of True"),
    ("results.0.cases", 0, 1, "a pass of no case"),
    ("results.1.facts", {"killed": False}, 1, "a mutant that was not killed"),
    ("results.1.facts", {}, 1, "a mutant that was not killed"),
    ("results.0.status", "fail", 1, "L0/a"),
    ("results.1.status", "fail", 2, "L5/m"),
    ("results.0.status", "error", 3, "L0/a"),
    ("results.0.status", "skip", 5, "not in the list of allowed skips"),
    ("results.0.status", "not-run", 5, "was not run although it could have been"),
    ("header.gpu", "NVIDIA H200", 5, "L6/g was not run although it could have been"),
    ("results.0.status", "passed", 5, "unknown status 'passed'"),
    ("footer.counts", {"pass": 3}, 5, "the footer counts other results"),
    ("footer.missing_classes", ["crosses_tile"], 1, "class of inputs never hit: crosses_tile"),
    ("footer.ratchet", ["out: 0.9"], 1, "ratchet: out: 0.9"),
    ("footer", None, 5, "the record is damaged"),
    ("results.0", {"id": "L0/a"}, 5, "the record is damaged"),
]


@pytest.mark.parametrize(("path", "value", "code", "said"), BAD, ids=[f"{path}={value}" for path, value, *_ in BAD])
def test_a_bad_record_does_not(path: str, value: Any, code: int, said: str) -> None:
    data = record()
    change(path, value)(data)
    found = complaints(data, {"L0": 1})
    assert any(said in line for _, line in found), found
    assert code in {number for number, _ in found}


@pytest.mark.parametrize("data", [None, [], "pass", 0, {}])
def test_what_is_no_record_does_not(data: Any) -> None:
    assert code_of(data) == 5


@pytest.mark.parametrize(
    ("trouble", "code"), [("stale-mutant", 5), ("environment", 4), ("crash", 3), ("timeout", 3), ("exception", 3)]
)
def test_each_trouble_has_its_code(trouble: str, code: int) -> None:
    data = record()
    data["results"][0] |= {"status": "error", "trouble": trouble}
    data["footer"]["counts"] = {"pass": 1, "error": 1, "not-run": 1}
    assert code_of(data) == code


def test_a_suspicion_fails_a_strict_run_only() -> None:
    data = record()
    data["results"][0]["warnings"] = ["out (statistical): FAILED"]
    assert code_of(data) == 0
    data["header"]["strict"] = True
    assert code_of(data) == 1


def test_a_tool_that_is_missing_on_a_gpu_is_not_run() -> None:
    data = record()
    data["header"]["gpu"] = "NVIDIA H200"
    data["results"][2]["facts"] = {"missing": "compute-sanitizer"}
    assert code_of(data) == 0


def test_a_skip_needs_leave_and_a_layer_its_number() -> None:
    data = record()
    data["results"][0]["status"] = "skip"
    data["footer"]["counts"] = {"pass": 1, "skip": 1, "not-run": 1}
    assert code_of(data, allowed={}) == 5
    assert code_of(data, allowed={"L0/a": "a reason"}) == 0
    assert exit_code(complaints(record(), {"L0": 2})) == 5


def test_a_truncated_file_is_not_green(tmp_path: Path) -> None:
    path, text = tmp_path / "r.json", json.dumps(record())
    path.write_text(text)
    assert judge_file(path)[0] in (0, 5)  # the repository expects more checks of L0 than one
    for length in (0, 1, len(text) // 2, len(text) - 1):
        path.write_text(text[:length])
        assert judge_file(path)[0] == 5
    assert judge_file(tmp_path / "none.json")[0] == 5


def test_the_lists_of_the_repository_can_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(number > 0 for number in verdict.read_expected().values())
    assert all(reason for reason in verdict.read_allowed().values())
    monkeypatch.setattr(verdict, "HERE", tmp_path)
    skips = tmp_path / "allowed_skips.yaml"
    skips.write_text("# why\nL0/a: it has a reason  # said here\n\n")
    assert verdict.read_allowed() == {"L0/a": "it has a reason"}
    skips.write_text("L0/a:\n")
    with pytest.raises(ValueError, match="is not 'id: reason'"):
        verdict.read_allowed()


def test_it_is_a_program_that_imports_nothing_of_ours(tmp_path: Path) -> None:
    source = Path(verdict.__file__).read_text()
    imported = {node.module for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)}
    imported |= {a.name for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Import) for a in node.names}
    assert {str(name).partition(".")[0] for name in imported} <= sys.stdlib_module_names
    path = tmp_path / "r.json"
    path.write_text("{")
    child = subprocess.run([sys.executable, verdict.__file__, str(path)], capture_output=True, text=True)
    assert child.returncode == 5 and "is not a whole record" in child.stderr
    usage = subprocess.run([sys.executable, verdict.__file__], capture_output=True, text=True)
    assert usage.returncode == 5 and usage.stderr.startswith("usage:")
