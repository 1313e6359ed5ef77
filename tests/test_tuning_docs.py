"""The page on the tuner names tests and commands that there are."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from cca_attention import cli, cli_plan

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "tuning.md").read_text()
NAMED = sorted(set(re.findall(r"(tests/\w+\.py)::(\w+)", PAGE)))


def test_every_complaint_has_its_test() -> None:
    section = PAGE.partition("## What users of other tuners complain about")[2].partition("\n## ")[0]
    answers = re.split(r"^\d+\. ", section, flags=re.MULTILINE)[1:]
    assert len(answers) == 14 and all("tests/test_" in answer for answer in answers)


@pytest.mark.parametrize(("file", "name"), NAMED)
def test_every_test_that_is_named_is_there(file: str, name: str) -> None:
    assert f"\ndef {name}(" in (ROOT / file).read_text()


def test_every_command_is_named() -> None:
    assert not [name for name in (*cli.cli_runs.COMMANDS, *cli_plan.COMMANDS) if f"cca-tune {name}" not in PAGE]
