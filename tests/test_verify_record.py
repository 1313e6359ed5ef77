"""The record of a run: written whole, read back the same, and rendered as JUnit XML and as a page."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from cca_attention.ci import verdict
from cca_attention.verify import conclusion, provenance
from cca_attention.verify.junit import as_junit
from cca_attention.verify.record import Header, Record, RecordError, Result, as_json, read, write
from cca_attention.verify.report import as_html

PASS = Result(
    id="L1/a/float32", layer="L1", check="a", status="pass", mode="eager", dtype="float32", cases=2, comparisons=4,
    budget_use=0.25, tensor="out", worst_index=(0, 1), level="rigorous", terms={"z": math.nan}, duration_s=1.5,
    facts={"classes": {"several_tiles": 3}, "required_classes": ["several_tiles"]},
)  # fmt: skip
FAIL = replace(
    PASS, id="L1/a/float16", status="fail", dtype="float16", budget_use=math.inf, message="out: <b>FAILED</b>\x00",
    case="Case(...)", facts={},
)  # fmt: skip
CRASH = Result(id="L1/b", layer="L1", check="b", status="error", mode="eager", trouble="crash", message="SIGSEGV")
KILLED = Result(
    id="L5/F1/m", layer="L5", check="a", status="pass", mode="interpreter", cases=1,
    facts={"killed": True, "family": "F", "id": "F1", "check": "a", "seen": ["out"], "says": "a core too many"},
)  # fmt: skip
NOT_RUN = Result(id="L6/a", layer="L6", check="a", status="not-run", mode="gpu", message="needs a GPU")


def make(*results: Result, complete: bool = True, strict: bool = False, planned: Any = None, **header: Any) -> Record:
    """A record of these results, concluded as a run would."""
    layers = tuple(dict.fromkeys(result.layer for result in results))
    head = Header(
        commit="abc", started="2026-11-22T00:00:00+00:00", versions={"torch": "2.13.0"}, gpu="", ci=False,
        layers=layers, planned=planned or tuple(result.id for result in results), expected={}, seed=0, examples=None,
        budget_scale=1.0, strict=strict,
    )  # fmt: skip
    head = replace(head, **header)
    end = conclusion.footer(head, results, allowed_skips={}, duration_s=2.0, complete=complete)
    return Record(header=head, results=results, footer=end, complete=complete)


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    record, path = make(PASS, FAIL, CRASH, KILLED, NOT_RUN), tmp_path / "r.json"
    write(path, as_json(record))
    again = read(path)
    assert [r.id for r in again.results] == [r.id for r in record.results]
    assert again.results[1].budget_use == math.inf
    assert again.results[0].worst_index == (0, 1)
    assert as_json(again) == path.read_text()
    assert list(tmp_path.iterdir()) == [path], "no temporary file is left"


def test_numbers_that_json_does_not_know_are_strings() -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    data = json.loads(as_json(make(PASS, FAIL)), parse_constant=refuse)
    assert data["results"][1]["budget_use"] == "inf" and data["results"][0]["terms"] == {"z": "nan"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is not a record"),
        ("[]", "is not a record"),
        ('{"schema": "cca-verify/9"}', "its schema is 'cca-verify/9'"),
        ('{"schema": "cca-verify/1"}', "is not a record"),
        ('{"schema": "cca-verify/1", "results": [{"id": "x"}], "header": {}, "footer": {}}', "is not a record"),
    ],
)
def test_what_is_no_record_is_refused(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(RecordError, match=said):
        read(tmp_path / "r.json")
    with pytest.raises(RecordError, match="cannot be read"):
        read(tmp_path / "none.json")


# --- the verdict, derived twice ----------------------------------------------------------------------------------

STALE = replace(CRASH, trouble="stale-mutant")
SURVIVOR = replace(KILLED, status="fail", facts={"killed": False})
WARNED = replace(PASS, warnings=("out (bias): FAILED",))


@pytest.mark.parametrize(
    ("record", "code"),
    [
        (make(PASS, KILLED, NOT_RUN), 0),
        (make(FAIL), 1),
        (make(PASS, SURVIVOR), 2),
        (make(PASS, CRASH), 3),
        (make(PASS, replace(CRASH, trouble="environment")), 4),
        (make(PASS, STALE), 5),
        (make(NOT_RUN), 5),
        (make(PASS, NOT_RUN, gpu="NVIDIA H200"), 5),
        (make(PASS, replace(PASS, id="L1/s", status="skip")), 5),
        (make(PASS, expected={"L1": 2}), 5),
        (make(FAIL, SURVIVOR, CRASH, STALE), 5),
        (make(FAIL, SURVIVOR, CRASH), 3),
        (make(FAIL, SURVIVOR), 1),
        (make(WARNED), 0),
        (make(replace(PASS, facts={"classes": {}, "required_classes": ["several_tiles"]})), 1),
        (make(replace(PASS, facts={"ratchet": ["out: worse"]})), 1),
    ],
    ids=lambda value: "" if isinstance(value, Record) else f"exit code {value}",
)
def test_both_verdicts_agree(record: Record, code: int) -> None:
    assert record.footer.exit_code == code
    complaints = verdict.complaints(json.loads(as_json(record)), dict(record.header.expected), {})
    assert verdict.exit_code(complaints) == code, complaints


def test_an_interrupted_run_is_not_a_pass() -> None:
    record = make(PASS, complete=False)
    assert record.footer.exit_code == 130
    assert verdict.exit_code(verdict.complaints(json.loads(as_json(record)), {}, {})) == 3


# --- JUnit -------------------------------------------------------------------------------------------------------


def test_junit_counts_what_the_record_has() -> None:
    root = ElementTree.fromstring(as_junit(make(WARNED, FAIL, CRASH, KILLED, NOT_RUN)).encode())
    suites = {suite.get("name"): suite for suite in root}
    assert list(suites) == ["L1", "L5", "L6"]
    numbers = {name: suites["L1"].get(name) for name in ("tests", "failures", "errors", "skipped")}
    assert numbers == {"tests": "3", "failures": "1", "errors": "1", "skipped": "0"}
    assert suites["L6"].get("skipped") == "1"
    failure = root.find(".//failure")
    assert failure is not None and failure.get("message") == "out: <b>FAILED</b>" and failure.text == "Case(...)"
    assert root.findtext(".//system-out") == "out (bias): FAILED"


def test_junit_of_an_interrupted_run_has_an_error() -> None:
    root = ElementTree.fromstring(as_junit(make(PASS, complete=False)).encode())
    assert root.find("testsuite[@name='run']/testcase/error") is not None


# --- the page ----------------------------------------------------------------------------------------------------


def test_the_page_says_what_is_wrong_first_and_needs_nothing_else() -> None:
    page = as_html(make(PASS, FAIL, CRASH, KILLED, SURVIVOR, NOT_RUN))
    assert page.index("Wrong") < page.index("Layers") < page.index("Budget use") < page.index("Planted mistakes")
    for said in (
        "SIGSEGV",
        "out: &lt;b&gt;FAILED&lt;/b&gt;",
        "L1/a/float16",
        "a core too many",
        "1 of 2 killed",
        "L6/a",
    ):
        assert said in page, said
    assert "<b>" not in page and "<script" not in page and "http" not in page
    assert "prefers-color-scheme: dark" in page and 'name="viewport"' in page
    ElementTree.fromstring(page[page.index('<svg viewBox="0 0 860') :].partition("</svg>")[0] + "</svg>")


def test_the_page_of_a_pass_has_no_findings() -> None:
    page = as_html(make(PASS, KILLED))
    assert "<h2>Wrong</h2>" not in page and "<h2>Not run</h2>" not in page and '"verdict pass"' in page


def test_where_a_record_comes_from() -> None:
    versions = provenance.versions()
    assert versions["torch"] and versions["triton"] and versions["numpy"] and versions["python"]
    hashes = provenance.hashes()
    assert set(hashes) == {"tolerance", "mutants"} and all(len(value) == 64 for value in hashes.values())
    assert provenance._said("no-such-program-anywhere") == ""
