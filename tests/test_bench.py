"""`cca-bench` without a GPU: the whole way from a case to a record, with a meter that only counts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cca_attention import cca_attention
from cca_attention.bench import admission, steps
from cca_attention.bench.admission import Gate, kernels_of
from cca_attention.bench.lab import Lab
from cca_attention.bench.plan import BOTH, DECODE, FORWARD, MEMORY, POOLING, UNORDERED, Case
from cca_attention.bench.record import Ceilings, Header, Record, RecordError, Row, read, write
from cca_attention.bench.session import Session
from cca_attention.bench.work import flops, held_bytes, step_keys
from cca_attention.kernels.forward import ForwardConfig
from cca_attention.kernels.tunable import Tunable
from cca_attention.problem import Problem
from cca_attention.verify.gate import Launched, launches

TINY = Problem(batch=1, q_heads=2, kv_heads=1, seq_len=21, head_dim=16, group_size=4, window_size=6, dtype="float16")
HEADER = Header(
    device="no card", versions={"torch": "0"}, commit="", date="2026-01-01T00:00:00", command="cca-bench", card={},
    ceilings=Ceilings(tflops=100.0, tbps=1.0),
)  # fmt: skip


class CountingMeter:
    """Runs everything that is measured; the n-th measurement takes n milliseconds and n kilobytes."""

    def __init__(self) -> None:
        self.count = 0

    def _next(self) -> int:
        self.count += 1
        return self.count

    def time_ms(self, call: Callable[[], Any]) -> float:
        call()
        return float(self._next())

    def replay_ms(self, calls: Sequence[Callable[[], Any]], repeats: int) -> float:
        for call in calls * min(repeats, 2):
            call()
        return float(self._next())

    def peak_bytes(self, call: Callable[[], Any]) -> int:
        call()
        return 10**6 * self._next()

    def layers(self, cold_bytes: float) -> int:
        assert cold_bytes > 0
        return 2


class TrustingGate(Gate):
    """Passes every config; which ones it was asked for is in `asked`."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []

    def _ask(self, idle: Any, kernel: str, config: Any, problem: Problem) -> dict[str, Any]:
        self.asked.append(kernel)
        return {"ok": True, "cases": 3, "worst_budget_use": 0.5, "message": ""}


@pytest.fixture
def lab(device: str) -> Iterator[Lab]:
    said: list[str] = []
    lab = Lab(CountingMeter(), TrustingGate(), torch.device(device), "", 5000.0, said.append)
    yield lab
    lab.gate.close()


def measured(lab: Lab, *planned: Case) -> Record:
    return Session(HEADER, planned, lab, lambda record: None).run()


# --- from a case to a record ------------------------------------------------------------------------------------------


def test_every_measurement_runs_and_comes_with_evidence(lab: Lab) -> None:
    record = measured(lab, Case("prefill", TINY, (POOLING, FORWARD, BOTH, UNORDERED, MEMORY), ("flash", "cudnn")))
    assert record.complete and not record.missing
    mine = {row.what: row for row in record.rows if row.system == "cca"}
    assert {what: row.status for what, row in mine.items()} == {
        POOLING: "measured", FORWARD: "measured", BOTH: "measured", MEMORY: "measured", UNORDERED: "not offered"
    }  # fmt: skip
    assert all(row.evidence and max(e.worst for e in row.evidence) <= 1 for row in mine.values() if row.ms)
    assert mine[MEMORY].ms is None and mine[MEMORY].extra_bytes and mine[MEMORY].held_bytes == held_bytes(TINY)
    assert mine[FORWARD].tflops == pytest.approx(flops(FORWARD, TINY) / (mine[FORWARD].ms or 0) / 1e9)
    assert record.find(system="eager", what=POOLING) is not None
    portable = {"pooling", "forward", "backward_dcore", "pooling_backward", "backward_dkv", "backward_dq"}
    assert set(lab.gate.asked) == portable and len(lab.gate.asked) == len(portable)  # type: ignore[attr-defined]
    assert [e.check for e in mine[POOLING].evidence] == ["gate of pooling", "core tokens"]


@pytest.mark.parametrize("core_heads", ["query", "kv"])
@pytest.mark.parametrize("tokens", [21, 43])
def test_a_decode_step_is_held_against_what_the_cache_keeps(
    core_heads: Any, tokens: int, lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps, "CHUNK", 20)
    problem = replace(TINY, core_heads=core_heads, seq_len=tokens, dtype="float32")
    record = measured(lab, Case("decode", problem, (DECODE,), ("flash",)))
    assert [row.keys for row in record.rows] == [None, tokens + 1, step_keys(problem)]
    cca = record.rows[0]
    assert cca.status == "measured", cca.note
    assert [e.check for e in cca.evidence] == [
        "gate of decode",
        "core tokens of the cache", "first step", "step after the last replay"
    ]  # fmt: skip


def test_a_wrong_result_has_no_figure(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    def slip(*args: Any, **kwargs: Any) -> Any:
        out = cca_attention(*args, **kwargs)
        return (1.1 * out[0], out[1]) if isinstance(out, tuple) else 1.1 * out

    monkeypatch.setattr("cca_attention.bench.attention.cca_attention", slip)
    (row,) = measured(lab, Case("prefill", TINY, (FORWARD,), ())).rows
    assert row.status == "wrong" and row.ms is None and row.tflops is None
    assert "rows of out" in row.note and lab.meter.count == 0  # type: ignore[attr-defined]


def test_errors_become_rows(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    def attend(name: str) -> Any:
        raise torch.OutOfMemoryError("no room") if name == "flash" else RuntimeError("no kernel here\nmore")

    monkeypatch.setattr("cca_attention.bench.attention.dense", attend)
    rows = measured(lab, Case("prefill", TINY, (FORWARD,), ("flash", "cudnn"))).rows
    assert [(row.status, row.note) for row in rows[1:]] == [
        ("out of memory", "OutOfMemoryError: no room"),
        ("refused", "RuntimeError: no kernel here"),
    ]
    monkeypatch.setattr("cca_attention.bench.attention.cca_attention", attend)
    assert measured(lab, Case("prefill", TINY, (FORWARD,), ())).rows[-1].status == "failed"


def test_a_peer_that_would_take_too_long_is_not_waited_for(lab: Lab) -> None:
    lab.limit_ms = 10.0
    longer = replace(TINY, seq_len=21 * 4)
    record = measured(lab, *(Case("growth", p, (FORWARD,), ("flash",)) for p in (TINY, longer)))
    assert [row.status for row in record.rows] == ["measured", "measured", "measured", "skipped"]
    assert record.rows[-1].note == "0.0 s expected from T=21, the limit is 0.01 s"


def test_an_interrupt_keeps_what_was_measured(lab: Lab) -> None:
    kept: list[Record] = []

    def interrupt(call: Callable[[], Any]) -> float:
        if lab.rows:
            raise KeyboardInterrupt
        return 1.0

    lab.meter.time_ms = interrupt  # type: ignore[method-assign]
    planned = [Case("prefill", TINY, (FORWARD, FORWARD), ()), Case("growth", TINY, (FORWARD,), ())]
    record = Session(HEADER, planned, lab, kept.append).run()
    assert not record.complete and len(record.rows) == 1 and record.missing == tuple(map(str, planned))
    assert kept[-1] == record and not kept[0].complete


# --- the gate ---------------------------------------------------------------------------------------------------------


def verdict(request: dict[str, Any]) -> dict[str, Any]:
    """What a child process says; a config of two stages is wrong."""
    ok = request["config"]["num_stages"] != 2
    return {"ok": ok, "cases": 3, "worst_budget_use": 0.5, "message": "" if ok else "off by one"}


def test_a_config_is_asked_for_once_and_judged() -> None:
    asked: list[dict[str, Any]] = []

    class Here(Gate):
        def _ask(self, idle: Any, kernel: str, config: Any, problem: Problem) -> dict[str, Any]:
            asked.append(dataclasses.asdict(config))
            return verdict({"config": asked[-1]})

    gate = Here()
    good, bad = (ForwardConfig(block_q=32, block_k=32, num_stages=n) for n in (1, 2))
    assert [e.worst for e in gate.admit({"forward": good}, TINY)] == [0.5]
    assert gate.admit({"forward": good}, replace(TINY, seq_len=999, batch=1))[0].count == 3 and len(asked) == 1
    assert gate.admit({"forward": bad}, TINY)[0].worst > 1
    assert gate.admit({"forward": good}, replace(TINY, core_heads="kv")) and len(asked) == 3


def test_a_config_that_its_kernel_refuses_is_not_admitted() -> None:
    (found,) = Gate().admit({"forward": ForwardConfig(block_q=24, block_k=32)}, TINY)
    assert found.worst > 1 and "not a power of two" in found.detail


def test_a_child_that_fails_speaks_against_the_config(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission, "Child", FailingChild)
    (found,) = Gate().admit({"forward": ForwardConfig(block_q=32, block_k=32)}, TINY)
    assert found.worst > 1 and "lost" in found.detail


class FailingChild:
    """A process that is lost at its first call."""

    def __init__(self, *, interpret: bool) -> None:
        assert not interpret

    def call(self, *_: Any, **__: Any) -> Any:
        raise admission.ChildFailedError("lost")

    def close(self) -> None:
        """Nothing is left to end."""


def test_kernels_are_known_by_their_functions() -> None:
    names = [function.__name__ for name in ("decode", "pooling") for function in Tunable.REGISTRY[name].kernels]
    assert set(kernels_of([Launched(name) for name in names], "cpu")) >= {"decode", "pooling"}
    assert kernels_of([Launched("somebody_elses_kernel")], "cpu") == []


# --- the file ---------------------------------------------------------------------------------------------------------


def test_a_record_survives_its_file(lab: Lab, tmp_path: Path) -> None:
    record = measured(lab, Case("prefill", TINY, (FORWARD, BOTH), ("flash",)))
    write(tmp_path / "r.json", record)
    assert read(tmp_path / "r.json") == record
    assert list(tmp_path.iterdir()) == [tmp_path / "r.json"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "the file"),
        ('{"schema_version": "cca-bench/0"}', "schema_version"),
        ("[1]", "the file"),
    ],
)
def test_another_file_is_refused_by_name(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(RecordError, match=rf"r\.json is not a record of cca-bench: {said}"):
        read(tmp_path / "r.json")


def test_rows_refuse_what_is_no_number() -> None:
    with pytest.raises(ValueError, match="finite"):
        Row(suite="x", what=FORWARD, system="cca", problem={}, status="measured", ms=float("nan"))


class Kernel:
    """What stands for a compiled function, with the attributes of Triton's that are used."""

    def __init__(self, name: str) -> None:
        self.fn = SimpleNamespace(__name__=name)

    def run(self, x: int, **options: object) -> int:
        return x + 1


def test_launches_are_seen_while_one_looks_and_of_the_kernels_that_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    mine, other = Kernel("mine"), Kernel("other")
    monkeypatch.setattr(Tunable, "REGISTRY", {"a": SimpleNamespace(kernels=(mine,), archs=())})
    monkeypatch.setitem(Tunable.REGISTRY, "b", SimpleNamespace(kernels=(mine, other), archs=()))
    for named, expected in (((), {"mine", "other"}), (("a",), {"mine"})):
        with launches(*named) as seen:
            assert [kernel.run(1, BLOCK=16, scale=0.5) for kernel in (mine, mine, other)] == [2, 2, 2]
        assert {launch.function for launch in seen} == expected
        assert {launch.options for launch in seen} == {"[('BLOCK', 16)]"}
        mine.run(1)
        assert len(seen) == len(expected)
