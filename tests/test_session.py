"""A whole command: what it leaves in a profile that others write too, within what time, and what it tries again."""

from __future__ import annotations

import errno
import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from toy_runs import PROBLEM, request_for

from cca_attention.autotune.progress import Request
from cca_attention.autotune.session import Session, SessionError
from cca_attention.profiles import store
from cca_attention.profiles.store import read_profile, update_profile


def run(request: Request, output: Path) -> tuple[Session, str]:
    """A session, and what it said."""
    words = Console(file=io.StringIO(), width=200)
    session = Session([request], output, words, quiet=False)
    session.run()
    return session, words.file.getvalue()  # type: ignore[attr-defined]


def test_what_others_add_to_the_profile_meanwhile_is_kept(toy: Any, cache: Path, tmp_path: Path) -> None:
    output, other = tmp_path / "a100.yaml", tmp_path / "other.yaml"
    run(request_for(toy, cache), other)
    elsewhere = read_profile(other)
    session = Session(
        [request_for(toy, cache, problem=replace(PROBLEM, seq_len=8192))], output, Console(quiet=True), quiet=True
    )
    update_profile(output, lambda held: elsewhere)
    assert session.run()
    found = read_profile(output)
    assert {entry.problem.seq_len for entry in found.entries} == {4096, 8192}
    assert all(entry.verification is not None and entry.verification.cases == 3 for entry in found.entries)
    resolved = found.resolutions(replace(PROBLEM, seq_len=8192))["toy"]
    (run_of_it,) = session.runs
    assert run_of_it[1][0].chosen is not None and resolved.config == run_of_it[1][0].chosen.config
    assert resolved.entry is not None and resolved.entry.problem.seq_len == 8192


def test_a_disk_that_fills_up_at_the_last_moment_loses_nothing(
    toy: Any, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "a100.yaml"
    run(request_for(toy, cache), output)
    before, journal = output.read_bytes(), (cache / "journal.jsonl").read_bytes()

    def full_disk(path: Path, text: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(store, "write_text", full_disk)
        with pytest.raises(SessionError, match=r"a100\.yaml cannot be written: .*No space left on device; what"):
            run(request_for(toy, cache), output)
    assert output.read_bytes() == before and list(tmp_path.iterdir()) == [output]
    assert (cache / "journal.jsonl").read_bytes().startswith(journal)


def test_a_budget_that_is_up_stops_compiling_and_the_built_in_config_is_there(toy: Any, tmp_path: Path) -> None:
    session, said = run(request_for(toy, tmp_path, budget_s=1e-3), tmp_path / "a100.yaml")
    ((_, (kernel,)),) = session.runs
    assert kernel.chosen is not None and kernel.chosen.config == kernel.default
    assert list(kernel.trials) == [kernel.default] and kernel.left_out > 0
    assert f"the budget left no time for {kernel.left_out} configs of toy" in said
    more, said = run(request_for(toy, tmp_path), tmp_path / "a100.yaml")
    ((_, (kernel,)),) = more.runs
    assert kernel.compiled == 4 and "the budget" not in said, "and nothing of it is remembered"


def test_a_budget_leaves_time_to_time_what_was_compiled(toy: Any, tmp_path: Path) -> None:
    request = request_for(
        toy, tmp_path, tunables=(toy.HARMFUL,), at_hand=True, budget_s=30.0, check=toy.accept, recheck=toy.accept,
        sample=toy.always_fast,
    )  # fmt: skip
    session, _ = run(request, tmp_path / "a100.yaml")
    ((_, (kernel,)),) = session.runs
    assert kernel.chosen is not None and kernel.rounds


def test_what_was_put_out_is_tried_again_only_when_asked(toy: Any, cache: Path, tmp_path: Path) -> None:
    request = request_for(toy, cache, problem=replace(PROBLEM, q_heads=2), verify=toy.reject_wide)
    ((_, (first,)),) = run(request, tmp_path / "a.yaml")[0].runs
    assert first.quarantined
    accepting = replace(request, verify=toy.accept)
    ((_, (same,)),) = run(accepting, tmp_path / "a.yaml")[0].runs
    assert same.quarantined == first.quarantined
    again, said = run(replace(accepting, retry_failed=True), tmp_path / "a.yaml")
    ((_, (kernel,)),) = again.runs
    assert not kernel.quarantined and kernel.chosen is not None and kernel.chosen.config in first.quarantined
    assert "trials that failed before may be tried again" in said
    ((_, (settled,)),) = run(accepting, tmp_path / "a.yaml")[0].runs
    assert (settled.quarantined, settled.chosen) == ({}, kernel.chosen), "the later record counts"
