"""Looking at finished runs: records, explain, diff, replay, the page, and the list of GPUs."""

from __future__ import annotations

import copy
import importlib.util
import io
import json
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cca_attention import cli
from cca_attention.autotune import figures
from cca_attention.autotune.binary import Resources
from cca_attention.autotune.devices import device_table, find_device
from cca_attention.autotune.explain import differences, explanation, replay
from cca_attention.autotune.front import Point
from cca_attention.autotune.measure import Timing
from cca_attention.autotune.outcome import Quarantined
from cca_attention.autotune.page import as_html
from cca_attention.autotune.predict import Prediction
from cca_attention.autotune.progress import Progress, Request
from cca_attention.autotune.record import RecordError, latest, read_record, record_of, write_record
from cca_attention.autotune.search import Trial
from cca_attention.autotune.session import Session
from cca_attention.problem import Problem
from cca_attention.terminal import OK, USAGE, WRONG

PROBLEM = Problem(q_heads=1, kv_heads=1, seq_len=4096, head_dim=64)
PARTS = {"tensor_us": 14.0, "issue_us": 3.0, "exp2_us": 0.0, "hbm_us": 2.0, "exposed_us": 1.0, "quantisation": 1.25}


def time_us(config: Any) -> float:
    return float(100 - config.block_q / 8 - config.block_k / 16 - config.num_warps)


def made(toy: Any, folder: Path, measured: bool = True) -> dict[str, Any]:
    """The record of a run whose every time is known; one config is in quarantine."""
    default = toy.default(PROBLEM, "sm_80")
    configs = [default, *(config for config, _ in toy.HARMFUL.candidates(PROBLEM) if config != default)]
    kernel = Progress(toy.HARMFUL, default, stage="done", legal=12, space=tuple(configs))
    used = (Resources("harmful", 4096, 64, 0, 4, 100, 0),)
    for config in configs:
        prediction, us = Prediction(2 * time_us(config), PARTS), time_us(config)
        timing, baseline = (Timing(t, t, t, 30) if measured else None for t in (us, time_us(default)))
        kernel.trials[config] = Trial(config, used, prediction, timing, baseline)
    if measured:
        kernel.rounds = [{config: time_us(config) for config in configs}] * 6
    bad, *_ = configs[1:]
    kernel.quarantined[bad] = Quarantined("illegal access", "CUDA error: <illegal> & more", "measure")
    kernel.trials[bad] = replace(kernel.trials[bad], refusal="illegal access", timing=None)
    kernel.rounds = [{**found, bad: None} for found in kernel.rounds]
    kernel.chosen = min((t for t in kernel.trials.values() if t.refusal is None), key=lambda t: time_us(t.config))
    request = Request(
        device=find_device("a100"), problem=PROBLEM, tunables=(toy.HARMFUL,), cache_folder=folder, at_hand=measured,
        jobs=1, most_compiled=0,
    )  # fmt: skip
    session = Session([request], folder / "a.yaml", Console(file=io.StringIO()), quiet=True)
    session.runs = [(request, [kernel])]
    return record_of(session)


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command."""
    with pytest.raises(SystemExit) as ended:
        cli.tune_main(arguments)
    out, err = capsys.readouterr()
    return int(str(ended.value.code)), out, err


def test_a_record_is_kept_and_found_again(toy: Any, tmp_path: Path) -> None:
    record = made(toy, tmp_path)
    with pytest.raises(RecordError, match="no run is kept in"):
        latest(tmp_path)
    path = write_record(record, tmp_path)
    assert latest(tmp_path) == path and read_record(path) == json.loads(json.dumps(record))
    later = write_record({**record, "created": "2999-01-01T00:00:00+00:00"}, tmp_path)
    assert latest(tmp_path) == later != path


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema": "cca-run/2", "runs": []}', '{"schema": "cca-run/1"}'])
def test_a_file_that_is_no_record(tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.json").write_text(text)
    code, out, err = run(capsys, "explain", str(tmp_path / "run.json"))
    assert (code, out, err.count("\n")) == (USAGE, "", 1) and "cca-tune: " in err and "run.json" in err


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda r: r["runs"].append({}), "is damaged: runs.1.problem: Field required"),
        (
            lambda r: r["runs"][0]["kernels"]["harmful"].pop("trials"),
            "is damaged: runs.0.kernels.harmful.trials: Field",
        ),
        (lambda r: r.update(device="gtx9"), "is of another version: unknown GPU 'gtx9'"),
        (lambda r: r["runs"][0]["kernels"].update(x=r["runs"][0]["kernels"]["harmful"]), "no kernel is called 'x'"),
        (lambda r: r["runs"][0]["kernels"]["harmful"]["chosen"].update(x=1), "wrong here: x"),
        (lambda r: r["runs"][0]["problem"].update(head_dim=0), "is of another version: head_dim"),
    ],
)
@pytest.mark.parametrize("command", ["explain", "replay", "report"])
def test_a_damaged_record_is_one_line(
    toy: Any, tmp_path: Path, command: str, spoil: Any, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    record = json.loads(json.dumps(made(toy, tmp_path)))
    spoil(record)
    code, out, err = run(capsys, command, str(write_record(record, tmp_path)))
    assert (code, out, err.count("\n")) == (USAGE, "", 1) and said in err


def test_explain_says_why(toy: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_record(made(toy, tmp_path), tmp_path)
    code, out, _ = run(capsys, "explain", "--cache-dir", str(tmp_path))
    assert code == OK and out == run(capsys, "explain", str(path), "--kernels", "harmful")[1]
    assert "12 of 12 configs are legal, 12 were compiled" in out
    assert "chosen: q=64 k=64 warps=8 stages=2, 80.0 us" in out
    assert "the built-in config (q=32 k=32 warps=4 stages=2) takes 90.0 us: 1.125 times as long (95 %: 1.125 to" in out
    assert "bounded by tensor 14.0 us, issue 3.0 us, hbm 2.0 us; waves cost a factor 1.25" in out
    assert "illegal access: CUDA error: <illegal> & more" in out
    assert "orders the 11 configs that were timed with rank correlation 1.00; its own pick takes 1.00 times as" in out
    code, _, err = run(capsys, "explain", str(path), "--kernels", "forward")
    assert code == USAGE and "the run has no kernel forward; it has harmful" in err


def test_explain_without_a_measurement_or_a_choice(toy: Any, tmp_path: Path) -> None:
    record = made(toy, tmp_path, measured=False)
    text = "\n".join(explanation(record))
    assert "4096 tokens, modelled" in text and "160.0 us  q=64 k=64" in text and "times as long" not in text
    kernel = record["runs"][0]["kernels"]["harmful"]
    kernel["chosen"], kernel["trouble"] = None, "no config runs"
    assert "nothing was chosen: no config runs" in "\n".join(explanation(record))


def test_diff_says_what_moved(toy: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = made(toy, tmp_path)
    assert list(differences(old, copy.deepcopy(old))) == []
    new = copy.deepcopy(old)
    kernel = new["runs"][0]["kernels"]["harmful"]
    kernel["chosen"], kernel["time_us"] = kernel["default"], 90.0
    kernel["quarantined"].append({**kernel["quarantined"][0], "config": kernel["default"], "outcome": "hang"})
    new["runs"][0]["kernels"]["other"] = kernel
    lines = list(differences(old, new))
    assert len(lines) == 4 and any("80.0 us -> 90.0 us (1.12 times)" in line for line in lines)
    assert any("is newly in quarantine: hang" in line for line in lines)
    assert any(line.startswith("other, ") and line.endswith("only in the new run") for line in lines)
    one, other = write_record(old, tmp_path), write_record(new, tmp_path)
    assert run(capsys, "diff", str(one), str(one))[:2] == (OK, "")
    assert run(capsys, "diff", str(one), str(other))[:2] == (WRONG, "\n".join(lines) + "\n")


@pytest.mark.parametrize("strategy", ["racing", "exhaustive", "coordinate", "evolutionary"])
def test_a_sweep_is_replayed_by_every_strategy(
    toy: Any, tmp_path: Path, strategy: str, capsys: pytest.CaptureFixture[str]
) -> None:
    record = made(toy, tmp_path)
    kernel = record["runs"][0]["kernels"]["harmful"]
    order, looked = replay("harmful", kernel, strategy)
    assert time_us(order[0]) == 80.0 and looked <= 12
    code, out, _ = run(capsys, "replay", str(write_record(record, tmp_path)), "--strategy", strategy)
    assert (code, out) == (OK, f"harmful, 4096 tokens: q=64 k=64 warps=8 stages=2, after {looked} configs\n")


def test_what_cannot_be_replayed(toy: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(write_record(made(toy, tmp_path, measured=False), tmp_path))
    code, _, err = run(capsys, "replay", path)
    assert code == USAGE and "harmful was not timed: there is nothing to replay" in err
    assert "did you mean racing?" in run(capsys, "replay", path, "--strategy", "racng")[2]


class Page(HTMLParser):
    """What a page consists of."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.mark.parametrize("measured", [True, False])
def test_the_page_needs_nothing_else_and_shows_all(toy: Any, tmp_path: Path, measured: bool) -> None:
    record = made(toy, tmp_path, measured)
    points = [Point(g, 256, 1000 // g, 1 / g, 0.1 * g, 0.5, None, 100.0 / g) for g in (4, 8)]
    as_dicts = [{name: getattr(p, name) for name in Point.__dataclass_fields__} for p in points]
    record["semantics"] = {
        "points": as_dicts, "front": as_dicts, "knee": as_dicts[0], "preferred": as_dicts[1], "data": "generated data",
    }  # fmt: skip
    text = as_html(record)
    page = Page(text)
    assert page.open == [] and page.links == [] and "script" not in page.tags
    assert page.tags.count("svg") == 6, "the front twice, history, tiles, roofline, what bounds the choice"
    assert "CUDA error: &lt;illegal&gt; &amp; more" in text and "q=64 k=64 warps=8" in text
    assert "nan" not in text.lower().replace("quarantine", "") and "g 8, w 256" in text


def test_the_page_of_a_kernel_without_anything(toy: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = made(toy, tmp_path)
    kernel = record["runs"][0]["kernels"]["harmful"]
    kernel |= {"trials": [], "rounds": [], "chosen": None, "time_us": None, "default_time_us": None}
    kernel["trouble"] = "no config runs: 12 <b>"
    page = Page(as_html(record))
    assert "svg" not in page.tags
    code, _, err = run(capsys, "report", str(write_record(record, tmp_path)), "--output", str(tmp_path / "run.html"))
    assert code == OK and "wrote" in err and "12 &lt;b&gt;" in (tmp_path / "run.html").read_text()
    assert "is a directory" in run(capsys, "report", "--output", str(tmp_path), "--cache-dir", str(tmp_path))[2]


def test_the_pictures_are_files(
    toy: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    record = made(toy, tmp_path)
    point = dict.fromkeys(Point.__dataclass_fields__, 1.0)
    record["semantics"] = {"points": [point], "front": [point], "knee": point, "preferred": point, "data": "mine"}
    path, folder = write_record(record, tmp_path), tmp_path / "pictures"
    options = ("report", str(path), "--output", str(tmp_path / "run.html"), "--png")
    code, _, err = run(capsys, *options, str(folder))
    assert code == OK and err.count("wrote ") == 3
    assert sorted(p.name for p in folder.iterdir()) == ["front.png", "harmful-4096.png"]
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in folder.iterdir())
    assert "is a file, not a directory" in run(capsys, *options, str(path))[2]
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name))
    assert "--png needs matplotlib: pip install 'cca-attention[report]'" in run(capsys, *options, str(folder))[2]


def test_the_figures_are_those_of_the_run(toy: Any, tmp_path: Path) -> None:
    record = made(toy, tmp_path)
    kernel = record["runs"][0]["kernels"]["harmful"]
    assert figures.history(kernel) == [80.0] * 6 and figures.failures(kernel) == {"illegal access": 1}
    found = figures.tiles(kernel)
    assert (
        found is not None and {found.down, found.across} == {"block_q", "block_k"} and min(found.best_us.values()) == 80
    )
    assert figures.bounds(kernel) == {"tensor": 14.0, "issue": 3.0, "hbm": 2.0, "exp2": 0.0}
    roofline = figures.roofline("harmful", kernel, record["runs"][0]["problem"], "a100-80gb")
    assert roofline is not None and roofline.roof(1e9) == roofline.peak_tflops == find_device("a100").tensor_tflops
    work = toy.HARMFUL.work(PROBLEM, toy.default(PROBLEM, "sm_80"))
    assert roofline.points["built-in"] == pytest.approx((work.flops / work.bytes, work.flops / 90e-6 / 1e12))


def test_a_narrow_page_names_each_cell(toy: Any, tmp_path: Path) -> None:
    record = made(toy, tmp_path)
    row = {"what": "forward", "problem": record["runs"][0]["problem"], "keys": None}
    record["peers"] = [
        {**row, "system": "flash", "status": "measured", "ms": 2.5, "note": ""},
        {**row, "system": "cudnn", "status": "refused", "ms": None, "note": "no <kernel>"},
    ]
    text = as_html(record)
    assert '<td data-head="built-in">90.0 us</td>' in text and "td::before" in text
    assert "2.50 ms" in text and "no &lt;kernel&gt;" in text


def test_the_gpus_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "devices")
    assert code == OK and all(name[:12] in out for name in device_table())
    code, out, _ = run(capsys, "devices", "--json")
    assert code == OK and [device["name"] for device in json.loads(out)] == list(device_table())


def test_every_command_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    for command in cli.cli_runs.COMMANDS:
        code, out, _ = run(capsys, command, "--help")
        assert code == OK and f"Example: cca-tune {command}" in " ".join(out.split())
    code, _, err = run(capsys, "explian")
    assert code == USAGE and err.startswith("cca-tune: ")
