"""`cca-profile`: what each command prints, what it writes and with which exit code it ends."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from cca_attention import cli_profile
from cca_attention.profiles import places
from cca_attention.profiles.configs import source_hash
from cca_attention.profiles.json_schema import PUBLISHED
from cca_attention.profiles.reading import read_profile
from cca_attention.verify.sample_profile import TEXT


@pytest.fixture
def cca(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Run the command where there is one profile, a100.yaml; the exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(places.ENVIRONMENT, raising=False)
    monkeypatch.setattr(places, "user_folder", lambda: tmp_path / "user")
    monkeypatch.setattr(places, "bundled_folder", lambda: tmp_path / "bundled")
    (tmp_path / "a100.yaml").write_text(TEXT)

    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            cli_profile.main(arguments)
        assert isinstance(ended.value.code, int)
        return ended.value.code, *capsys.readouterr()

    return run


def rows(printed: str) -> list[dict[str, str]]:
    """What is printed where there is no terminal: names, then values, with tabs between."""
    names, *lines = (line.split("\t") for line in printed.splitlines())
    return [dict(zip(names, line, strict=True)) for line in lines]


def test_list_names_every_place_and_what_is_damaged(cca: Any, tmp_path: Path) -> None:
    (tmp_path / "user").mkdir()
    (tmp_path / "user" / "b.yaml").write_text(TEXT)
    code, out, _ = cca("list")
    assert code == 0
    assert [(row["place"], row["gpu"], row["entries"]) for row in rows(out)] == [
        ("current folder", "a100-80gb", "1 measured"),
        ("user", "a100-80gb", "1 measured"),
    ]
    (tmp_path / "user" / "b.yaml").write_text("schema: cca-profile/1.0\n")
    code, out, err = cca("list", "--json")
    assert code == 1 and json.loads(out)[1]["entries"] == "damaged" and "b.yaml has" in err
    (tmp_path / "user" / "b.yaml").unlink()
    (tmp_path / "a100.yaml").unlink()
    code, out, err = cca("list")
    assert (code, out) == (0, "") and f"no profiles in {tmp_path}" in err


def test_show_prints_an_entry_a_line_or_everything(cca: Any) -> None:
    code, out, err = cca("show", "a100")
    (row,) = rows(out)
    assert code == 0 and "a100-80gb (sm_80), g16 w1024 query last_query" in err
    assert (row["kernel"], row["evidence"], row["time"], row["verified"]) == (
        "forward",
        "measured",
        "51000.0 us",
        "gpu",
    )
    code, out, _ = cca("show", "a100.yaml", "--json")
    assert code == 0 and json.loads(out)["entries"][0]["baseline"]["margin"]["speedup"] == 1.02


def test_explain_says_which_config_and_why(cca: Any) -> None:
    code, out, _ = cca("explain", "forward", "--profile", "a100", "--ctx", "40000", "--json")
    found = json.loads(out)
    assert (code, found["level"], found["config"]["block_q"]) == (0, "nearest", 128)
    assert found["from"].endswith("a100.yaml") and "0.7 doublings away" in found["because"]
    code, out, _ = cca("explain", "forward", "--profile", "a100", "--ctx", "40000")
    assert code == 0 and "level\tnearest" in out
    code, out, _ = cca("explain", "pooling", "--profile", "a100", "--ctx", "40000", "--json")
    assert code == 0 and json.loads(out)["level"] == "default"


@pytest.mark.parametrize(
    ("code", "said", "arguments"),
    [
        (1, "mode 'strict'", ["explain", "forward", "--profile", "a100", "--ctx", "40000", "--mode", "strict"]),
        (1, "is for Semantics", ["explain", "forward", "--profile", "a100", "--ctx", "40000", "--group-size", "8"]),
        (2, "no kernel is called 'sideways'", ["explain", "sideways", "--ctx", "8"]),
        (2, "--mode must be one of", ["explain", "forward", "--ctx", "8", "--mode", "hope"]),
        (2, "--dtype must be one of", ["explain", "forward", "--ctx", "8", "--dtype", "int8"]),
        (2, "--ctx must be at least 1", ["explain", "forward", "--ctx", "0"]),
        (2, "no profile for the GPU 'h200'", ["show", "h200"]),
        (2, "there is no profile file none.yaml", ["diff", "a100.yaml", "none.yaml"]),
        (2, "--format must be one of vllm", ["export", "a100", "--format", "xml", "--output", "x"]),
        (2, "--output a100.yaml is not a folder", ["export", "a100", "--format", "vllm", "--output", "a100.yaml"]),
        (2, "there is no directory nowhere", ["merge", "a100.yaml", "--output", "nowhere/x.yaml"]),
        (2, "there is no profile file none.yaml", ["stale", "none.yaml"]),
        (2, "'--triton': 'newest' is not a version", ["stale", "a100.yaml", "--triton", "newest"]),
        (2, "gpt-9", ["coverage", "a100.yaml", "--models", "gpt-9"]),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_one_message(cca: Any, code: int, said: str, arguments: list[str]) -> None:
    ended, out, err = cca(*arguments)
    assert (ended, out) == (code, "") and said in err and err.startswith("cca-profile: ") and "Traceback" not in err


def test_validate_lists_the_mistakes_of_every_file(cca: Any, tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text(TEXT.replace("sm_count: 108", "sm_count: many"))
    code, out, err = cca("validate", "a100.yaml", "bad.yaml")
    assert code == 1 and "a100.yaml: valid, 1 measured" in out and "line 8: device.sm_count" in err
    code, out, _ = cca("validate", "a100.yaml", "--json")
    assert code == 0 and json.loads(out)[0]["valid"] == "yes"


def test_coverage_shows_holes(cca: Any) -> None:
    code, out, _ = cca("coverage", "a100.yaml", "--models", "llama3.1-8b,qwen2.5-7b")
    found = {(row["model"], row["kernel"]): row for row in rows(out)}
    served = found["llama3.1-8b", "forward"]
    assert code == 1 and [served[ctx] for ctx in ("4K", "64K", "256K", "1024K")] == [
        "nearest",
        "exact",
        "exact",
        "nearest",
    ]
    assert found["llama3.1-8b", "decode"]["64K"] == "hole" and ("qwen2.5-7b", "forward") in found


def test_diff_is_empty_for_equals(cca: Any, tmp_path: Path) -> None:
    assert cca("diff", "a100.yaml", "a100.yaml") == (0, "", "")
    (tmp_path / "b.yaml").write_text(TEXT.replace("median_us: 51000.0", "median_us: 50900.0"))
    code, out, _ = cca("diff", "a100.yaml", "b.yaml")
    (row,) = rows(out)
    assert code == 1 and row["what"].endswith("latency") and "51000.0" in row["old"] and "50900.0" in row["new"]


def test_merge_adds_to_what_is_there(cca: Any, tmp_path: Path) -> None:
    (tmp_path / "b.yaml").write_text(TEXT.replace("seq_len: 131072", "seq_len: 65536"))
    assert cca("merge", "a100.yaml", "--output", "c.yaml")[0] == 0
    code, _, err = cca("merge", "b.yaml", "--output", "c.yaml")
    assert code == 0 and "wrote c.yaml: 2 measured" in err
    assert {entry.problem.seq_len for entry in read_profile(tmp_path / "c.yaml").entries} == {65536, 131072}
    (tmp_path / "b.yaml").write_text(TEXT.replace("name: a100-80gb", "name: other"))
    before = (tmp_path / "c.yaml").read_bytes()
    code, _, err = cca("merge", "b.yaml", "--output", "c.yaml")
    assert code == 1 and "its GPU is" in err and (tmp_path / "c.yaml").read_bytes() == before


def test_export_writes_below_the_folder_and_says_what_is_left_out(cca: Any, tmp_path: Path) -> None:
    code, out, _ = cca("export", "a100", "--format", "sglang", "--output", "tuned")
    (path,) = map(Path, out.splitlines())
    assert code == 0 and path.is_relative_to("tuned") and json.loads(path.read_text())["131072"]["BLOCK_Q"] == 128
    (tmp_path / "b.yaml").write_text(TEXT.replace("bitwise_repeatable: true", "bitwise_repeatable: false"))
    content = TEXT[: TEXT.index("  verification:")] + TEXT[TEXT.index("  determinism:") :]
    (tmp_path / "b.yaml").write_text(content)
    code, out, err = cca("export", "b.yaml", "--format", "t4", "--output", "tuned")
    assert (code, out) == (1, "") and "left out: forward on B1-" in err and "not verified" in err


@pytest.mark.parametrize(
    ("options", "effect", "reason"),
    [
        (["--triton", "9.1.0"], "degraded", "now 9.1.0"),
        (["--no-fp-fusion"], "rejected", "fp_fusion True, now False"),
        (["--driver", "999.1"], "noted", "driver 580.65.06, now 999.1"),
    ],
)
def test_stale_says_what_a_change_would_do(cca: Any, options: list[str], effect: str, reason: str) -> None:
    code, out, _ = cca("stale", "a100.yaml", *options)
    (row,) = rows(out)
    assert row["effect"] == effect and reason in row["because"] and code == int(effect != "noted")
    assert cca("stale", "a100.yaml", "--fp-fusion")[:2] == (0, "")


def test_stale_knows_another_source_and_abi(cca: Any, tmp_path: Path) -> None:
    for change in ((source_hash("forward"), "0" * 64), ("abi: 1", "abi: 2")):
        (tmp_path / "b.yaml").write_text(TEXT.replace(*change))
        code, out, _ = cca("stale", "b.yaml", "--json")
        assert code == 1 and json.loads(out)[0]["effect"] == "rejected"


def test_schema_is_the_published_one(cca: Any) -> None:
    assert cca("schema") == (0, PUBLISHED.read_text(), "")


def test_on_a_terminal_there_is_a_table(cca: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    code, out, _ = cca("show", "a100")
    assert code == 0 and "┃" in out and "\t" not in out


@pytest.mark.parametrize("command", ["validate", "coverage", "stale", "show", "merge --output new.yaml"])
def test_what_is_no_file_is_wrong_usage(cca: Any, command: str, tmp_path: Path) -> None:
    (tmp_path / "folder.yaml").mkdir()
    for name, said in (("none.yaml", "there is no profile file none.yaml"), ("folder.yaml", "is not a file")):
        code, out, err = cca(*command.split(), name)
        assert (code, out, err.count("\n")) == (2, "", 1) and said in err
    assert not (tmp_path / "new.yaml").exists()


@pytest.mark.parametrize("raised", [KeyboardInterrupt(), OSError(28, "No space left on device", "new.yaml")], ids=repr)
def test_a_merge_that_is_broken_off_leaves_what_was_there(
    cca: Any, raised: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "old.yaml").write_text(TEXT)
    before = sorted(path.name for path in tmp_path.iterdir())
    monkeypatch.setattr(os, "replace", mock.Mock(side_effect=raised))
    code, out, err = cca("merge", "a100.yaml", "--output", "old.yaml")
    assert (code, out, err.count("\n")) == (130 if isinstance(raised, KeyboardInterrupt) else 2, "", 1)
    assert (tmp_path / "old.yaml").read_text() == TEXT and sorted(path.name for path in tmp_path.iterdir()) == before
    code, _, err = cca("export", "a100.yaml", "--format", "fla", "--output", "out")
    assert code in (2, 130) and err.count("\n") == 1
