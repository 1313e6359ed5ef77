"""The command `cca-bench`: what it refuses, and what it makes of a record: tables, goals and pictures."""

from __future__ import annotations

import importlib.util
import io
import os
import struct
from pathlib import Path

import pytest
import torch
from rich.console import Console

from cca_attention import cli_bench
from cca_attention.bench import goals, table
from cca_attention.bench.plan import BOTH, DECODE, FORWARD, MEMORY, POOLING, SUITES, UNORDERED, Options, cases
from cca_attention.bench.record import Ceilings, Evidence, Header, Record, Row, write
from cca_attention.bench.work import flops, held_bytes, moved_bytes
from cca_attention.problem import Problem

NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="it would begin to measure")
SPEED = {"cca": 500.0, "flash": 320.0, "cudnn": 560.0, "flex": 380.0, "eager": 50.0}
"""TFLOP/s of each system in the record that these tests look at; decode is bound by 4 TB/s."""


@pytest.fixture(autouse=True)
def somewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty current directory."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


def row(suite: str, what: str, system: str, problem: Problem, **more: object) -> Row:
    """A row at the speed of its system."""
    dense = system in ("flash", "cudnn")
    work, moved = flops(what, problem, dense=dense), moved_bytes(what, problem, dense=dense)
    ms = moved / 4e9 if what in (DECODE, POOLING) else work / SPEED[system] / 1e9
    times = {} if what == MEMORY else {"ms": ms, "tflops": work / ms / 1e9, "tbps": moved / ms / 1e9}
    measured = {
        "status": "measured", "flops": work, "bytes": moved, **times,
        "extra_bytes": 2 * held_bytes(problem) if what in (BOTH, UNORDERED, MEMORY) else None,
        "held_bytes": held_bytes(problem) if what in (BOTH, UNORDERED, MEMORY) and system == "cca" else None,
        "evidence": (Evidence(check="rows of out", count=16, worst=0.25),) if system == "cca" else (),
    }  # fmt: skip
    facts = {"suite": suite, "what": what, "system": system, "problem": problem.as_dict()}
    return Row.model_validate({**facts, **(more or measured)})


@pytest.fixture(scope="module")
def record() -> Record:
    """Every case of every suite, FlexAttention refused at the longest prefill, nothing after it in growth."""
    problem = {"q_heads": 32, "head_dim": 128, "dtype": "bfloat16"}
    rows = []
    for case in cases(tuple(SUITES), Options(problem=problem)):
        for what in case.whats:
            peers = ("eager",) if what == POOLING else () if what == UNORDERED else case.peers
            rows += [row(case.suite, what, system, case.problem) for system in ("cca", *peers)]
    longest = next(c.problem for c in cases(["growth"], Options(contexts=(2**20,), problem=problem)))
    rows.append(
        row("growth", FORWARD, "flash", longest, status="skipped", note="9 s expected from T=1, the limit is 5 s")
    )
    return Record(
        header=Header(
            device="NVIDIA H200", versions={"torch": "2.11.0", "driver": "580"}, commit="", date="2026-11-22T20:00:00",
            command="cca-bench all", card={}, ceilings=Ceilings(tflops=700.0, tbps=4.3),
        ),
        rows=tuple(rows), complete=False, missing=("short T=8192",),
    )  # fmt: skip


def bench(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        cli_bench.main(arguments)
    return int(str(ended.value.code))


# --- what it refuses --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("decode --ctx 0", "--ctx must be at least 1, got 0"),
        ("all --batch 1,many", "--batch must be whole numbers with commas or spaces between, got '1,many'"),
        ("decode --ctx 1024 2048, 0 --quiet", "--ctx must be at least 1, got 0"),
        ("decode --heads 8 16", "Got unexpected extra argument"),
        ("all --peers flash,eager", "--peers must be of flash, cudnn, flex, none, got 'eager'"),
        ("prefill --heads 5 --kv-heads 2", "--heads must be a multiple of --kv-heads, got --heads=5 and --kv-heads=2"),
        ("prefill --dtype int8", "--dtype must be one of bf16, fp16, fp32, got 'int8'"),
        ("prefill --core-heads all", "--core-heads must be one of 'query', 'kv', got 'all'"),
        ("prefill --pooling max", "--pooling must be one of 'last_query', 'mean', got 'max'"),
        ("prefill --limit 0", "--limit must be a number of seconds above 0, got 0.0"),
        ("prefill --limit nan", "--limit must be a number of seconds above 0, got nan"),
        ("prefill --json missing/r.json", "--json missing/r.json: there is no directory missing"),
        ("prefill --plots missing/plots", "--plots missing/plots: there is no directory missing"),
        ("prefill --profile none.yaml", "--profile: there is no profile file none.yaml"),
        ("prefill --fast", "No such option: --fast"),
        ("sideways", "No such command 'sideways'"),
        ("show none.json", "none.json cannot be read: No such file or directory"),
        ("plot none.json", "Missing option '--output'"),
    ],
)
def test_wrong_usage_is_one_line_and_nothing_is_begun(
    arguments: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench(*arguments.split()) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("cca-bench: ") and err.count("\n") == 1 and said in err, err
    assert not list(Path.cwd().iterdir())


@NO_GPU
@pytest.mark.parametrize("suite", [*SUITES, "all"])
def test_without_a_gpu_it_says_so(suite: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench(suite, "--json", "r.json") == 3
    assert capsys.readouterr().err == "cca-bench: measuring needs an NVIDIA GPU, and there is none here\n"
    assert not list(Path.cwd().iterdir())


def test_pictures_are_refused_early_without_matplotlib(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert bench("prefill", "--plots", "plots") == 2
    assert "--plots needs matplotlib: pip install 'cca-attention[report]'" in capsys.readouterr().err


def test_help_has_an_example_and_the_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench("--help") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "cca-bench all --json R.json" in said and "130 interrupted" in said and all(name in said for name in SUITES)


# --- what it makes of a record ----------------------------------------------------------------------------------------


def test_a_record_is_shown_again(record: Record, capsys: pytest.CaptureFixture[str]) -> None:
    write(Path("r.json"), record)
    assert bench("show", "r.json") == 0
    said = capsys.readouterr().out
    assert said.startswith("NVIDIA H200, torch 2.11.0, driver 580, 2026-11-22\n")
    assert "\n131072\t1\tSDPA cuDNN\t251.3\t11.57\t560 TFLOP/s\t80%\n" in said
    assert "T=1048576 B=1 SDPA flash: skipped: 9 s expected from T=1, the limit is 5 s" in said
    assert "the closest used 0.25 of its bound" in said and "1 cases were not finished: short T=8192" in said


def test_a_terminal_gets_a_table_of_its_width(record: Record) -> None:
    screen = io.StringIO()
    table.show(record, Console(file=screen, force_terminal=True, width=110, color_system=None))
    lines = screen.getvalue().splitlines()
    assert any("SDPA flash" in line and "skipped" in line for line in lines)
    assert max(len(line) for line in lines if "TFLOP/s" in line and "T=" not in line) <= 110


def test_markdown_begins_with_the_goals(record: Record, capsys: pytest.CaptureFixture[str]) -> None:
    write(Path("r.json"), record)
    assert bench("show", "r.json", "--markdown") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["| what | reach | measured | reached |", "|---|---|---|---|"]
    assert "| forward with pooling, T=131072 | at most 18.5 ms | 21.7 ms | no |" in lines
    assert "|  | 14x cuDNN dense | 11.57x (251.3 ms) | no |" in lines
    assert sum(line.startswith("| ") for line in lines) > len(goals.GOALS) + len(record.rows)
    assert len({line.count(" | ") for line in lines[: len(goals.GOALS) + 2] if "---" not in line}) == 1


def test_every_goal_is_read_from_a_full_record(record: Record) -> None:
    found = {f"{goal.what}: {goal.reach}": goal.look(record) for goal in goals.GOALS}
    assert not [name for name, value in found.items() if value is None]
    assert {name for name, value in found.items() if value and "memory" in name and value[0] >= 1} == set()


def test_no_goal_is_read_from_an_empty_record(record: Record) -> None:
    empty = record.model_copy(update={"rows": ()})
    assert [goal.look(empty) for goal in goals.GOALS] == [None] * len(goals.GOALS)


def test_a_goal_is_reached_at_its_very_number(record: Record) -> None:
    (first,) = (
        r for r in record.rows if r.suite == "prefill" and r.what == FORWARD and r.ctx == 131072 and r.system == "cca"
    )
    for ms, reached in ((18.5, "yes"), (18.6, "no")):
        lines = goals.goal_table(record.model_copy(update={"rows": (first.model_copy(update={"ms": ms}),)}))
        assert next(line for line in lines if "18.5" in line).endswith(f"| {reached} |")


def test_the_break_even_is_where_it_stays_faster(record: Record) -> None:
    def timed(r: Row) -> Row:
        """cuDNN is faster up to 1024 tokens."""
        slow = r.system == "cca" and r.ctx <= 1024 and r.ms is not None
        return r.model_copy(update={"ms": 100.0}) if slow else r

    (goal,) = (goal for goal in goals.GOALS if "break-even" in goal.reach)
    found = goal.look(record.model_copy(update={"rows": tuple(map(timed, record.rows))}))
    assert found == (1.0, "faster from T=2048 on")


@pytest.mark.parametrize(
    ("complete", "status", "code"),
    [(True, "measured", 0), (True, "wrong", 1), (True, "failed", 1), (False, "failed", 130)],
)
def test_the_exit_code_says_what_came_of_it(
    complete: bool, status: str, code: int, record: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = (record.rows[0].model_copy(update={"status": status}),)
    found = record.model_copy(update={"complete": complete, "rows": rows})
    monkeypatch.setattr(cli_bench, "_measured", lambda *_: found)
    assert bench("prefill", "--peers", "none") == code


def test_pictures_are_drawn_without_a_gpu(record: Record, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="the extra [report] is not installed")
    write(Path("r.json"), record)
    assert bench("plot", "r.json", "--output", "plots") == 0
    names = ["latency.png", "memory.png", "rate.png", "roofline.png"]
    assert sorted(os.listdir("plots")) == names
    for name in names:
        header = (Path("plots") / name).read_bytes()[:24]
        width, height = struct.unpack(">II", header[16:24])
        assert header[1:4] == b"PNG" and width == 990 and height > 400
    assert capsys.readouterr().err.count("wrote plots") == 4
