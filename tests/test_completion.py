"""Shell completion of every command: the scripts, and the words that a shell asks for."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from cca_attention import cli, cli_bench, cli_profile, cli_verify
from cca_attention.autotune.devices import device_table
from cca_attention.autotune.options import model_table

COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "cca-tune": cli.tune_main, "cca-verify": cli_verify.main, "cca-profile": cli_profile.main,
    "cca-bench": cli_bench.main,
}  # fmt: skip


def completed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: str, beginning: str = ""
) -> list[str]:
    """What is offered in the place of `beginning`, after these words."""
    program = words[0]
    monkeypatch.setenv(f"_{program.replace('-', '_').upper()}_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", " ".join((*words, beginning)))
    monkeypatch.setenv("COMP_CWORD", str(len(words)))
    with pytest.raises(SystemExit) as ended:
        COMMANDS[program]([])
    assert ended.value.code == 0
    return capsys.readouterr().out.split()


@pytest.mark.parametrize("program", COMMANDS)
@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_every_command_prints_its_script(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, program: str, shell: str
) -> None:
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")
    with pytest.raises(SystemExit) as ended:
        COMMANDS[program](["--show-completion", shell])
    out = capsys.readouterr().out
    assert ended.value.code == 0 and program in out and f"_{program.replace('-', '_').upper()}_COMPLETE" in out


@pytest.mark.parametrize(
    ("program", "some"), [("cca-verify", "mutants"), ("cca-profile", "coverage"), ("cca-bench", "show")]
)
def test_commands_are_offered(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, program: str, some: str
) -> None:
    assert some in completed(capsys, monkeypatch, program)


def test_the_first_word_is_a_command_or_an_option_of_tuning(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = completed(capsys, monkeypatch, "cca-tune")
    assert set(cli.cli_runs.COMMANDS) <= set(commands) and {"plan", "confirm"} <= set(commands)
    assert "tune" not in commands
    assert {"--gpu", "--group-size"} <= set(completed(capsys, monkeypatch, "cca-tune", beginning="--g"))
    assert "--png" in completed(capsys, monkeypatch, "cca-tune", "report", beginning="--")
    assert "--gpu" not in completed(capsys, monkeypatch, "cca-tune", "report", beginning="--")


@pytest.mark.parametrize("before", [("--gpu",), ("--ctx", "4096", "--gpu"), ("plan", "--gpu")])
def test_gpus_are_offered(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, before: tuple[str, ...]
) -> None:
    found = completed(capsys, monkeypatch, "cca-tune", *before, beginning="h")
    assert {name for name in device_table() if name.startswith("h")} <= set(found)
    assert all(name.startswith("h") for name in found)


def test_models_and_choices_are_offered(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(completed(capsys, monkeypatch, "cca-tune", "--model")) == set(model_table())
    assert completed(capsys, monkeypatch, "cca-tune", "--effort", beginning="q") == ["quick"]


def test_no_words_at_all_are_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.tune_main([])
    assert ended.value.code == 2 and "--ctx" in capsys.readouterr().err


def test_a_mistyped_command_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    for words, said in (
        (["explian"], "there is no command 'explian'; did you mean explain?"),
        (["4096"], "there are "),
    ):
        with pytest.raises(SystemExit) as ended:
            cli.tune_main(words)
        err = capsys.readouterr().err
        assert ended.value.code == 2 and err.count("\n") == 1 and said in err


@pytest.mark.parametrize(
    "option",
    ["--max-kv-ratio=0.1", "--max-error=1", "--prefer=memory", "--qkv=x", "--group-sizes=4", "--window-sizes=64"],
)
def test_what_would_do_nothing_is_refused(capsys: pytest.CaptureFixture[str], option: str) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.tune_main(["--gpu", "a100", "--ctx", "4096", option])
    name = option.partition("=")[0]
    assert (ended.value.code, capsys.readouterr().err) == (
        2, f"cca-tune: {name} is for --search-semantics, which is not given\n",
    )  # fmt: skip
