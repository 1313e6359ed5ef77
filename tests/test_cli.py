"""The command `cca-tune`: what it refuses before it begins, its exit codes, and one real run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from cca_attention import cli, cli_cards
from cca_attention.autotune.devices import find_device
from cca_attention.autotune.options import EFFORTS
from cca_attention.autotune.progress import Request
from cca_attention.autotune.strategies import STRATEGIES
from cca_attention.problem import Problem
from cca_attention.profiles.resolve import resolve
from cca_attention.profiles.store import load_profile, read_profile
from cca_attention.terminal import INTERRUPTED, NO_DEVICE, OK, USAGE, WRONG, Refused

DATA = Path(__file__).parent / "data"
COMMAND = (sys.executable, "-c", "from cca_attention.cli import tune_main; tune_main()")


@pytest.fixture(autouse=True)
def somewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current directory."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """The exit code and the one line on stderr of a command that must not begin."""
    with pytest.raises(SystemExit) as ended:
        cli.tune_main(arguments)
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("cca-tune: "), (out, err)
    assert not list(Path.cwd().iterdir())
    return int(str(ended.value.code)), err.removeprefix("cca-tune: ").rstrip()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("", "Missing option '--ctx'."),
        (
            "--ctx many",
            "--ctx many: 'many' is not a whole number; it takes one (131072), several (8192,131072) or a range",
        ),
        ("--ctx 1.5", "--ctx 1.5: '1.5' is not a whole number"),
        ("--ctx 8..4 --gpu a100", "--ctx 8..4 is empty: it begins above its end"),
        ("--ctx 0", "--ctx must be in 1..2147483648, got 0"),
        ("--ctx 64 --gpu a1000", "unknown GPU 'a1000'; did you mean a100-80gb"),
        ("--ctx 64 --gpu a100 --group-size 0", "--group-size must be at least 1, got 0"),
        ("--ctx 64 --gpu a100 --window-size -1", "--window-size must be at least 1, got -1"),
        ("--ctx 64 --gpu a100 --heads 5", "--heads must be a multiple of --kv-heads, got --heads=5 and --kv-heads=8"),
        ("--ctx 64 --gpu a100 --head-dim 300", "--head-dim must be in 16..256, got 300"),
        ("--ctx 64 --gpu a100 --dtype int8", "--dtype must be one of"),
        ("--ctx 64 --gpu a100 --dtype float64", "--dtype must be one of bf16, fp16, fp32, got 'float64'"),
        ("--ctx 64 --gpu a100 --core-heads all", "--core-heads must be one of 'query', 'kv', got 'all'"),
        ("--ctx 64 --gpu a100 --kernels forward,sideways", "--kernels: there is no kernel sideways; there are "),
        ("--ctx 64 --gpu a100 --kernels ,", "--kernels: there is no kernel"),
        ("--ctx 64 --gpu a100 --kernels foward", "; did you mean forward"),
        ("--ctx 64 --gpu a100 --kernels forward --phase decode", "--phase decode leaves none of --kernels forward"),
        (
            "--ctx 64 --gpu a100 --phase decoding",
            "--phase must be of prefill, train, decode, got 'decoding'; did you mean",
        ),
        ("--ctx 64 --gpu a100 --model lama3.1-8b", "--model 'lama3.1-8b' is neither known nor a config.json here; did"),
        ("--ctx 64 --gpu a100 --model llama3.1-8b --kv-heads 5", "--heads must be a multiple of --kv-heads, got"),
        ("--ctx 64 --gpu a100 --effort much", "--effort must be one of quick, standard, exhaustive, got 'much'"),
        (
            "--ctx 64 --gpu a100 --strategy race",
            "--strategy must be one of racing, exhaustive, coordinate, evolutionary,",
        ),
        ("--ctx 64 --gpu a100 --budget 5d", "--budget must be a time such as 90s, 10m or 1h, got '5d'"),
        ("--ctx 64 --gpu a100 --seed -1", "--seed must be at least 0, got -1"),
        ("--ctx 64 --gpu a100 --search-semantics", "leave no pair below the context of 64 tokens"),
        ("--ctx 64,128 --gpu a100 --search-semantics", "--search-semantics takes one --ctx, got 64,128"),
        ("--ctx 8192 --gpu a100 --search-semantics --prefer speed", "--prefer must be one of knee, latency, memory"),
        ("--ctx 8192 --gpu a100 --search-semantics --max-error 0", "--max-error must be a number above 0, got 0"),
        ("--ctx 8192 --gpu a100 --search-semantics --group-sizes x", "--group-sizes must be whole numbers with commas"),
        ("--ctx 8192 --gpu a100 --search-semantics --max-kv-ratio 0.01", "--max-kv-ratio 0.01 leaves none of the 25"),
        ("--ctx 64 --gpu a100 --jobs 0", "--jobs must be at least 1, got 0"),
        ("--ctx 64 --gpu a100 --candidates -1", "--candidates must be at least 0, got -1"),
        ("--ctx 64 --gpu a100 --output missing/a.yaml", "--output missing/a.yaml: there is no directory missing"),
        ("--ctx 64 --gpu a100 --output ..", "--output .. is a directory"),
        ("--ctx 64 --gpu a100 --cache-dir /dev/null/x", "the cache directory /dev/null/x cannot be written"),
        ("--ctx 64 --gpu a100 --fast", "No such option: --fast"),
    ],
)
def test_bad_input_is_refused_with_one_line(capsys: pytest.CaptureFixture[str], arguments: str, said: str) -> None:
    code, line = refusal(capsys, *arguments.split())
    assert (code, said in line) == (USAGE, True), line


def test_an_output_directory_that_cannot_be_written_is_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    code, line = refusal(capsys, "--ctx", "64", "--gpu", "a100", "--output", "/a.yaml")
    assert (code, line) == (USAGE, "--output /a.yaml: the directory / cannot be written")


def test_no_gpu_and_none_named_is_its_own_exit_code(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    code, line = refusal(capsys, "--ctx", "64")
    assert code == NO_DEVICE and line.startswith("there is no GPU here; name the one to tune for: --gpu a100-40gb,")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "NVIDIA T4")
    code, line = refusal(capsys, "--ctx", "64")
    assert code == NO_DEVICE and line.startswith("unknown GPU 'NVIDIA T4'")


def test_a_file_that_is_in_the_way_is_left_alone(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "notes.yaml"
    path.write_text("milk: 2\n")
    code, line = refusal(capsys, "--ctx", "64", "--gpu", "a100", "--kernels", "pooling", "--output", str(path))
    assert code == USAGE and "exists and cannot be added to" in line
    assert path.read_text() == "milk: 2\n"


def test_help_has_an_example_and_the_exit_codes_and_loads_nothing_heavy() -> None:
    program = (
        "import sys; from cca_attention.cli import tune_main\n"
        "try: tune_main(['--help'])\n"
        "finally: print([m for m in ('torch', 'triton', 'numpy', 'pydantic', 'yaml') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    text = " ".join(done.stdout.split())
    assert "Example: cca-tune --gpu a100 --ctx 131072" in text
    assert "0 done; 1 a kernel has no config that passed verification; 2 wrong usage" in text
    assert text.endswith("[]")


def request_for(toy: Any, folder: Path, verify: Any) -> Request:
    """A run of the toy kernel."""
    return Request(
        device=find_device("a100"), problem=Problem(q_heads=1, kv_heads=1, seq_len=4096, head_dim=64),
        tunables=(toy.TOY,), cache_folder=folder, at_hand=False, jobs=1, most_compiled=2, verify=verify,
    )  # fmt: skip


def test_results_go_to_stdout_and_words_to_stderr(toy: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output, request = tmp_path / "a100.yaml", request_for(toy, tmp_path / "cache", toy.accept)
    assert cli._run([request], output, as_json=True, quiet=False) == OK
    out, err = capsys.readouterr()
    summary = json.loads(out)
    (done,) = summary["runs"]
    assert summary["profile"] == str(output) and done["kernels"]["toy"]["chosen"] is not None
    assert "toy: compiling 2 configs" in err and f'cca_attention(..., profile="{output}")' in err
    assert cli._run([request], output, as_json=False, quiet=True) == OK
    out, err = capsys.readouterr()
    assert "toy" in out and f"wrote {output}" in out and err == ""
    longer = [
        replace(request, problem=replace(request.problem, seq_len=n), least_ctx=n // 2 + 1) for n in (8192, 16384)
    ]
    assert cli._run(longer, output, as_json=True, quiet=True) == OK
    assert [done["problem"]["seq_len"] for done in json.loads(capsys.readouterr().out)["runs"]] == [8192, 16384]
    entries = read_profile(output).entries
    intervals = {entry.problem.seq_len: entry.interval and entry.interval.seq_len for entry in entries}
    assert intervals == {4096: None, 8192: (4097, 8192), 16384: (8193, 16384)}


def test_a_run_whose_kernel_is_wrong_writes_nothing(
    toy: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    request = request_for(toy, tmp_path / "cache", toy.reject_all)
    assert cli._run([request], tmp_path / "a100.yaml", as_json=True, quiet=False) == WRONG
    out, err = capsys.readouterr()
    assert json.loads(out)["profile"] is None
    assert "toy has no config: the 2 best configs are in quarantine: wrong: out is off by 3 budgets" in err
    assert "no profile was written" in err
    assert not (tmp_path / "a100.yaml").exists()


def test_the_options_become_requests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Request] = []
    monkeypatch.setattr(cli, "_run", lambda requests, output, **_: seen.extend(requests) or OK)

    def requests(line: str) -> list[Request]:
        seen.clear()
        with pytest.raises(SystemExit) as ended:
            cli.tune_main(["--gpu", "a100", *line.split()])
        assert ended.value.code == OK
        return list(seen)

    (plain,) = requests("--ctx 4096")
    assert (plain.most_compiled, plain.rounds, plain.strategy, plain.budget_s) == (24, 12, "racing", None)
    assert (plain.problem, plain.least_ctx) == (Problem(q_heads=32, kv_heads=8, head_dim=128, seq_len=4096), None)
    found = requests("--ctx 4096..16384 --model qwen2.5-7b --phase decode --effort quick --budget 1m --seed 3")
    assert [(r.problem.seq_len, r.least_ctx) for r in found] == [(4096, 4096), (8192, 4097), (16384, 8193)]
    assert all((r.problem.q_heads, r.problem.kv_heads, r.problem.head_dim) == (28, 4, 128) for r in found)
    assert all([t.name for t in r.tunables] == ["decode"] for r in found)
    assert all((r.most_compiled, r.rounds, r.budget_s, r.seed) == (2, 8, 20.0, 3) for r in found)
    (own,) = requests(
        "--ctx 64 --model llama3.2-1b --heads 64 --effort exhaustive --candidates 5 --strategy coordinate"
    )
    assert (own.problem.q_heads, own.problem.kv_heads, own.problem.head_dim) == (64, 8, 64)
    assert (own.most_compiled, own.strategy) == (5, "coordinate")
    prefill, train = ({t.name for t in requests(f"--ctx 64 --phase {p}")[0].tunables} for p in ("prefill", "train"))
    assert prefill == {"pooling", "forward"} and prefill < train and "decode" not in train


def test_the_choices_that_are_named_are_those_that_there_are() -> None:
    assert tuple(STRATEGIES) == cli.STRATEGIES and tuple(EFFORTS) == cli.EFFORTS


@pytest.mark.parametrize(("per_cent", "refused"), [(None, False), (0, False), (10, False), (55, True)])
def test_a_gpu_that_others_keep_busy_is_not_timed(
    monkeypatch: pytest.MonkeyPatch, per_cent: int | None, refused: bool
) -> None:
    class Busy:
        def busy_per_cent(self) -> int | None:
            return per_cent

    monkeypatch.setattr("cca_attention.autotune.card.card_at_hand", lambda index: Busy())
    if not refused:
        cli_cards.check_idle([])
        return
    with pytest.raises(Refused, match=r"another process keeps GPU 0 55 % busy, .* --allow-busy") as error:
        cli_cards.check_idle([])
    assert error.value.code == NO_DEVICE


def test_ctrl_c_ends_a_run_with_its_own_code_and_keeps_what_is_done(tmp_path: Path) -> None:
    options = ["--gpu", "a100", "--ctx", "4096", "--kernels", "pooling", "--cache-dir", str(tmp_path), "--jobs", "1"]
    # a shell starts background jobs with this signal ignored, and children inherit that: pytest may be in one
    listens = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    run = subprocess.Popen([*COMMAND, *options], stderr=subprocess.PIPE, text=True, preexec_fn=listens)
    journal = tmp_path / "journal.jsonl"
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline and '"compile"' not in (journal.read_text() if journal.exists() else ""):
        assert run.poll() is None
        time.sleep(0.05)
    run.send_signal(signal.SIGINT)
    _, err = run.communicate(timeout=60)
    assert run.returncode == INTERRUPTED
    assert err.splitlines()[-1] == (
        "cca-tune: interrupted; what was finished is kept, the same command goes on from there"
    )
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    assert any(line["key"]["phase"] == "compile" for line in lines)


def test_ctrl_c_before_anything_was_begun_is_said_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "_problems", Mock(side_effect=KeyboardInterrupt))
    assert refusal(capsys, "--ctx", "64") == (INTERRUPTED, "interrupted before anything was begun")


def test_a_real_kernel_from_the_command_to_its_launch(tmp_path: Path) -> None:
    shape = "--heads 2 --kv-heads 1 --head-dim 32 --group-size 4 --window-size 16 --dtype fp16 --ctx 8192"
    options = ["--gpu", "a100", "--kernels", "pooling", "--candidates", "2", "--json", *shape.split()]
    done = subprocess.run(
        [*COMMAND, *options, "--cache-dir", str(tmp_path)], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == OK, done.stderr
    summary = json.loads(done.stdout)
    (run,) = summary["runs"]
    pooling = run["kernels"]["pooling"]
    assert summary["evidence"] == "modelled" and summary["profile"] == "a100-80gb.yaml"
    assert pooling["compiled"] == 2 and pooling["verification"]["ok"] and pooling["verification"]["cases"] > 0
    profile = load_profile("a100")
    schedule = profile.schedule(Problem(**run["problem"]))
    assert {name: vars_of(config) for name, config in schedule.items()} == {"pooling": pooling["chosen"]}
    found = resolve("pooling", Problem(**run["problem"]), profile="a100-80gb.yaml")
    assert vars_of(found.config) == pooling["chosen"] and found.level == "modelled", found
    assert found.entry is not None and found.entry.verification is not None


def vars_of(config: Any) -> dict[str, int]:
    """A config's fields."""
    return {name: getattr(config, name) for name in config.__dataclass_fields__}
