"""The command `cca-verify`: what it refuses, its exit codes, and workers that crash, hang or are interrupted."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from cca_attention import cli_verify
from cca_attention.ci.verdict import judge_file, read_expected
from cca_attention.verify import layers, run, session, units
from cca_attention.verify.cases import Case
from cca_attention.verify.layers import Extent, plan
from cca_attention.verify.record import Result, read
from cca_attention.verify.shapes import fixed_case, fixed_names
from cca_attention.verify.tolerance import Comparison
from cca_attention.verify.units import Unit, judge

COMMAND = (sys.executable, "-c", "from cca_attention.cli_verify import main; main()")
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has other counts")


@pytest.fixture(autouse=True)
def somewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty current directory."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


def verify(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        cli_verify.main(arguments)
    return int(str(ended.value.code))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--layer L7", "--layer must be one of L0, L1, L2, L3, L4, L5, L6, got 'L7'"),
        ("--gpu all", "--gpu must be one of auto, none, got 'all'"),
        ("--examples 0", "--examples must be at least 1, got 0"),
        ("--examples few", "Invalid value for '--examples'"),
        ("--jobs -1", "--jobs must be at least 1, got -1"),
        ("--budget-scale 0", "--budget-scale must be a number above 0, got 0.0"),
        ("--budget-scale nan", "--budget-scale must be a number above 0, got nan"),
        ("--json missing/r.json", "--json missing/r.json: there is no directory missing"),
        ("--junit ..", "--junit .. is a directory"),
        ("--profile none.yaml", "--profile: there is no profile file none.yaml"),
        ("--fast", "No such option: --fast"),
        ("sideways", "No such command 'sideways'"),
        ("report none.json --output r.html", "none.json cannot be read: No such file or directory"),
        ("report none.json", "Missing option '--output'"),
    ],
)
def test_wrong_usage_has_exit_code_5(arguments: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify(*arguments.split()) == 5
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("cca-verify: ") and said in err, err
    assert not list(Path.cwd().iterdir())


def test_help_has_an_example_and_the_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    assert verify("--help") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "cca-verify --json R.json" in said and "5 configuration: wrong usage" in said


def test_the_list_names_every_unit_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert verify("--list") == 0
    names = capsys.readouterr().out.splitlines()
    assert len(set(names)) == len(names)
    assert {name.partition("/")[0] for name in names} == set(cli_verify.LAYERS)


def test_as_many_checks_are_planned_as_the_repository_expects() -> None:
    expected = read_expected()
    assert set(expected) == set(cli_verify.LAYERS)
    for layer, number in expected.items():
        assert len(plan((layer,), Extent())) >= number, layer


def test_every_fixed_case_can_be_made() -> None:
    assert all(isinstance(fixed_case(name, "float32"), Case) for name in fixed_names())


# --- runs --------------------------------------------------------------------------------------------------------


def odd_unit(name: str, does: str, **fields: Any) -> Unit:
    return Unit(id=f"L0/{name}", layer="L0", check=name, runner=does, place="host", mode="host", **fields)


GOOD = odd_unit("canaries", "canaries")


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Unit]]:
    """The units of layer L0, to be replaced."""
    chosen = [GOOD]
    monkeypatch.setitem(layers.LAYERS, "L0", lambda extent: iter(chosen))
    monkeypatch.setattr("cca_attention.ci.verdict.read_expected", lambda: {"L0": 1})
    yield chosen


def test_a_run_writes_the_record_and_the_xml(planned: list[Unit], capsys: pytest.CaptureFixture[str]) -> None:
    assert verify("--layer", "L0", "--json", "r.json", "--junit", "r.xml", "--jobs", "1") == 0
    out, err = capsys.readouterr()
    assert out.startswith("1 pass in ") and "verdict 0" in out
    assert "1 checks in L0, about 1 min" in err and "1 of 1, 1 pass" in err
    record = read(Path("r.json"))
    assert record.header.planned == ("L0/canaries",) and record.results[0].status == "pass"
    assert '<testsuite name="L0"' in Path("r.xml").read_text()
    assert verify("verdict", "r.json") == 0
    assert verify("report", "r.json", "--output", "r.html") == 0
    assert "L0/canaries" in Path("r.html").read_text()


@pytest.mark.usefixtures("planned")
def test_the_record_can_go_to_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    assert verify("--layer", "L0", "--json", "-", "--jobs", "1", "--quiet") == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["footer"]["exit_code"] == 0 and err.startswith("1 pass in ")
    assert not list(Path.cwd().iterdir())


def test_what_is_wrong_is_counted_and_ends_nothing(planned: list[Unit], capsys: pytest.CaptureFixture[str]) -> None:
    planned.insert(0, odd_unit("no_such_foundation", "foundation"))
    assert verify("--layer", "L0", "--json", "r.json", "--jobs", "1", "--quiet") == 3
    results = {result.check: result for result in read(Path("r.json")).results}
    assert results["canaries"].status == "pass"
    broken = results["no_such_foundation"]
    assert (broken.status, broken.trouble) == ("error", "exception") and "KeyError" in broken.message
    out, err = capsys.readouterr()
    assert err == "" and out.startswith("error L0/no_such_foundation: KeyError")
    assert judge_file(Path("r.json"))[0] == 3


class Silence:
    def started(self, unit: Unit) -> None: ...

    def ended(self, result: Result) -> None: ...


@pytest.mark.parametrize(
    ("function", "argument", "trouble", "said"),
    [
        (signal.raise_signal, int(signal.SIGSEGV), "crash", "killed by SIGSEGV"),
        (time.sleep, 60, "timeout", "no result within 2 s"),
    ],
    ids=["crash", "hang"],
)
def test_a_lost_worker_is_an_error_and_the_next_unit_runs(
    function: Any, argument: Any, trouble: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = run.Child.call

    def call(self: Any, wanted: Any, values: Any, *, timeout_s: float) -> Any:
        harmed = values["check"] == "harmed"
        return right(self, *((function, argument) if harmed else (wanted, values)), timeout_s=timeout_s)

    monkeypatch.setattr(run.Child, "call", call)
    todo = [odd_unit("harmed", "canaries", limit_s=2.0), GOOD]
    results = {result.check: result for result in run.run(todo, run.Options(jobs=1), Silence())}
    assert (results["harmed"].status, results["harmed"].trouble) == ("error", trouble)
    assert said in results["harmed"].message
    assert results["canaries"].status == "pass"


def test_a_layer_without_time_left_is_an_error() -> None:
    (result,) = run.run([GOOD], run.Options(budget_scale=1e-9), Silence())
    assert (result.trouble, result.status) == ("timeout", "error") and "--budget-scale" in result.message


def test_without_a_gpu_what_needs_one_is_not_run() -> None:
    todo = plan(("L6",), Extent())
    assert {unit.place for unit in todo} == {"gpu"}
    results = list(run.run(todo, run.Options(gpu=False), Silence()))
    assert {result.status for result in results} == {"not-run"} and len(results) == len(todo)
    assert "needs an NVIDIA GPU" in results[0].message


@NO_GPU
def test_a_run_of_nothing_is_no_pass(capsys: pytest.CaptureFixture[str]) -> None:
    assert verify("--layer", "L6", "--json", "r.json") == 5
    assert "verdict 5" in capsys.readouterr().out
    assert judge_file(Path("r.json"))[0] == 5


def test_an_interrupt_leaves_a_record_that_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    child = subprocess.Popen(
        [*COMMAND, "--layer", "L1", "--json", str(path)], stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    assert child.stderr is not None and "checks in L1" in child.stderr.readline()
    os.kill(child.pid, signal.SIGINT)
    child.communicate(timeout=60)
    assert child.returncode == 130
    assert not read(path).complete
    assert judge_file(path)[0] in (3, 5)


# --- what makes a result -----------------------------------------------------------------------------------------


def comparison(name: str, use: float, **fields: Any) -> Comparison:
    return Comparison(name, use, (0,), use <= 1, **fields)


def judged(*found: Comparison, strict: bool = False) -> Result:
    return judge(odd_unit("x", "check", strict=strict), [(fixed_case("base", "float32"), list(found))])


def test_the_worst_comparison_is_reported() -> None:
    result = judged(comparison("a", 0.1), comparison("b", 0.9), comparison("c", 0.5))
    assert (result.status, result.tensor, result.budget_use, result.comparisons) == ("pass", "b", 0.9, 3)
    assert "B2-H4.2-T37" in result.shape and "Case(" in result.case and result.config is not None


@pytest.mark.parametrize("use", [1.5, math.inf, math.nan])
def test_a_failed_comparison_fails(use: float) -> None:
    result = judged(comparison("a", 0.1), comparison("b", use), comparison("c", 0.5))
    assert (result.status, result.tensor) == ("fail", "b") and "b: FAILED" in result.message


def test_a_suspicion_warns_and_fails_a_strict_run() -> None:
    found = comparison("a", 0.1), comparison("b", 3.0, level="statistical")
    assert judged(*found).status == "pass" and "b (statistical): FAILED" in judged(*found).warnings[0]
    assert judged(*found, strict=True).status == "fail"


def test_nothing_compared_is_a_failure() -> None:
    assert judged().status == "fail"
    assert judged(Comparison("a", 0.0, (), True, empty=True)).message == "compared nothing"


def test_the_plan_is_announced() -> None:
    settings = {"seed": 0, "examples": None, "budget_scale": 1.0, "strict": False, "ci": False}
    made = session.Session(
        [GOOD, *plan(("L6",), Extent())], ("L0", "L6"), use_gpu=False, jobs=1, settings=settings, expected={},
        allowed_skips={},
    )  # fmt: skip
    assert made.announcement().startswith("no GPU: 1 checks in L0, about 1 min; ")
    assert "more need a GPU and will not be run" in made.announcement()


def test_every_runner_is_known() -> None:
    units.run_unit(GOOD.as_dict())
    assert {unit.runner for unit in plan(cli_verify.LAYERS, Extent())} <= set(units.RUNNERS)
    assert json.dumps([unit.as_dict() for unit in plan(cli_verify.LAYERS, Extent())])
