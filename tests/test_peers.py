"""The figures of PyTorch's attentions beside what was tuned: which are taken, on whose evidence, and how they look."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import pytest
import torch
from rich.console import Console

from cca_attention import cli_peers
from cca_attention.autotune.devices import find_device
from cca_attention.autotune.progress import Progress, Request
from cca_attention.bench.lab import Lab
from cca_attention.bench.plan import BOTH, DECODE, FORWARD
from cca_attention.kernels.tunable import Tunable
from cca_attention.problem import Problem
from cca_attention.profiles.configs import tunables
from cca_attention.verify.child import Child, ChildFailedError

TINY = Problem(q_heads=2, kv_heads=1, seq_len=29, head_dim=16, group_size=4, window_size=9, dtype="float16")


class OneMeter:
    """Runs what is measured; everything takes two milliseconds."""

    def time_ms(self, call: Callable[[], Any]) -> float:
        call()
        return 2.0

    def replay_ms(self, calls: Sequence[Callable[[], Any]], repeats: int) -> float:
        for call in calls:
            call()
        return 2.0

    def peak_bytes(self, call: Callable[[], Any]) -> int:
        call()
        return 1

    def layers(self, cold_bytes: float) -> int:
        return 1


def evidence(problem: Problem) -> dict[str, Any]:
    """As a run would have it for its built-in configs."""
    return {
        name: [asdict(tunable.default(problem, "cpu")), {"cases": 7, "worst_budget_use": 0.5}]
        for name, tunable in tunables().items()
    }


@pytest.mark.parametrize(
    ("kernels", "whats"),
    [
        (["pooling", "forward"], {FORWARD}),
        (["backward_dq"], {BOTH}),
        (["decode"], {DECODE}),
    ],
)
def test_what_was_tuned_is_what_is_measured(device: str, kernels: list[str], whats: set[str]) -> None:
    gate = cli_peers._tuned_gate(evidence(TINY))
    lab = Lab(OneMeter(), gate, torch.device(device), "", 5000.0, lambda line: None)
    rows = cli_peers.rows_beside(TINY, kernels, lab)
    assert {row.what for row in rows} == whats
    ours = next(row for row in rows if row.system == "cca")
    assert ours.status == "measured", ours.note
    assert {e.count for e in ours.evidence if e.check.startswith("gate")} == {7}
    assert {"flash", "cudnn"} <= {row.system for row in rows}
    assert all(row.keys in (None, TINY.seq_len + 1) for row in rows)


def test_the_gate_believes_the_run_of_no_other_config(monkeypatch: pytest.MonkeyPatch) -> None:
    from cca_attention.bench.admission import Gate

    asked: list[str] = []
    monkeypatch.setattr(Gate, "admit", lambda self, configs, problem: asked.extend(configs) or [])
    known = evidence(TINY)
    known["decode"][0] = {**known["decode"][0], "num_warps": 1}
    configs = {name: tunable.default(TINY, "cpu") for name, tunable in tunables().items()}
    del known["forward"]
    found = cli_peers._tuned_gate(known).admit(configs, TINY)
    assert asked == ["forward", "decode"] and len(found) == len(configs) - 2


def row(system: str, ms: float | None, status: str = "measured", note: str = "") -> dict[str, Any]:
    return {
        "what": FORWARD, "system": system, "problem": TINY.as_dict(), "status": status, "keys": None, "ms": ms,
        "note": note,
    }  # fmt: skip


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_table_compares(width: int) -> None:
    console = Console(file=io.StringIO(), width=width)
    rows = [row("cca", 2.0), row("flash", 5.0), row("cudnn", None, "refused", "RuntimeError: no"), row("flex", 0.5)]
    cli_peers.show(rows, True, console)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    text = " ".join(" ".join(lines).split())
    assert max(map(len, lines)) <= width and "…" not in text
    assert all(
        word in text for word in ("2.00 ms", "2.50x", "0.25x", "refused", "SDPA cuDNN, forward: RuntimeError: no")
    )


def test_without_the_gpu_it_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    cli_peers.show([], False, Console())
    assert "were not measured" in capsys.readouterr().out
    cli_peers.show([], True, Console())
    assert capsys.readouterr().out == ""


def test_only_what_was_timed_has_peers_and_trouble_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    tunable: Tunable = tunables()["pooling"]
    default = tunable.default(TINY, "sm_80")
    kernel = Progress(tunable, default)
    request = Request(
        device=find_device("a100"), problem=TINY, tunables=(tunable,), cache_folder=tmp_path, at_hand=True, jobs=1,
        most_compiled=0,
    )  # fmt: skip
    calls: list[Any] = []

    def call(self: Child, function: Any, argument: Any, *, timeout_s: float) -> Any:
        calls.append((function, argument))
        raise ChildFailedError("it took too long", "hung")

    monkeypatch.setattr(Child, "call", call)
    words = Console(stderr=True)
    assert cli_peers.timed([(request, [kernel])], tmp_path / "a.yaml", words) == [] and not calls
    from cca_attention.autotune.search import Trial

    kernel.chosen, kernel.rounds, kernel.evidence = Trial(default), [{default: 1.0}], {"cases": 3}
    assert cli_peers.timed([(request, [kernel])], tmp_path / "a.yaml", words) == []
    ((function, argument),) = calls
    assert function is cli_peers.measure and argument["evidence"] == {"pooling": [asdict(default), {"cases": 3}]}
    assert "were not measured: it took too long" in capsys.readouterr().err
