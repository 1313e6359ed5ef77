"""`cca-bench` without a GPU: its plan and formulas, its samples, and the whole way from a case to a record."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cca_attention import CCASpec, cca_attention
from cca_attention.bench import admission, peers, samples, steps
from cca_attention.bench.admission import Gate, Launched, kernels_of
from cca_attention.bench.lab import Lab
from cca_attention.bench.plan import BOTH, DECODE, FORWARD, MEMORY, POOLING, SUITES, UNORDERED, Case, Options, cases
from cca_attention.bench.record import Ceilings, Header, Record, RecordError, Row, read, write
from cca_attention.bench.samples import Pass
from cca_attention.bench.session import Session
from cca_attention.bench.work import flops, held_bytes, moved_bytes, step_keys
from cca_attention.kernels import reference
from cca_attention.kernels.forward import ForwardConfig
from cca_attention.kernels.tunable import Tunable
from cca_attention.problem import Problem
from cca_attention.profiles.configs import tunables

TINY = Problem(batch=2, q_heads=4, kv_heads=2, seq_len=37, head_dim=16, group_size=4, window_size=9, dtype="float16")
HEADER = Header(
    device="no card", versions={"torch": "0"}, commit="", date="2026-01-01T00:00:00", command="cca-bench", state={},
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


@pytest.fixture
def lab(device: str) -> Iterator[Lab]:
    said: list[str] = []
    lab = Lab(CountingMeter(), Gate(), torch.device(device), "", 5000.0, said.append)
    yield lab
    lab.gate.close()


def measured(lab: Lab, *planned: Case) -> Record:
    return Session(HEADER, planned, lab, lambda record: None).run()


# --- the plan ---------------------------------------------------------------------------------------------------------


def test_the_suites_have_every_row_of_the_issue() -> None:
    problem = {"q_heads": 32, "head_dim": 128, "dtype": "bfloat16"}
    planned = cases(tuple(SUITES), Options(problem=problem))
    found = {
        (c.suite, what, c.problem.seq_len, c.problem.batch, c.problem.core_heads) for c in planned for what in c.whats
    }
    assert {("prefill", what, 131072, 1, "query") for what in (POOLING, FORWARD, BOTH, UNORDERED)} <= found
    assert {("decode", DECODE, 131072, b, heads) for b in (1, 8, 64) for heads in ("kv", "query")} <= found
    assert {("growth", BOTH, t, 1, "query") for t in (262144, 524288, 1048576)} <= found
    assert {("short", FORWARD, t, b, "query") for t in (512, 8192) for b in (1, 32)} <= found
    assert ("memory", MEMORY, 131072, 1, "query") in found
    assert {c.problem.kv_heads for c in planned if c.suite == "decode"} == {8}
    assert not any("flex" in c.peers for c in planned if c.suite == "decode")


def test_options_replace_what_is_usual() -> None:
    problem = {"q_heads": 4, "head_dim": 64, "group_size": 8, "window_size": 100, "dtype": "float16"}
    options = Options(contexts=(7, 9), batches=(3,), kv_heads=2, core_heads="kv", peers=("flex",), problem=problem)
    planned = cases(["prefill", "decode"], options)
    assert [c.problem.seq_len for c in planned] == [7, 9, 7, 9]
    assert planned[0].problem == Problem(batch=3, seq_len=7, kv_heads=2, core_heads="kv", **problem)
    assert [c.peers for c in planned] == [("flex",)] * 2 + [()] * 2


# --- the formulas -----------------------------------------------------------------------------------------------------


def by_counting(problem: Problem) -> tuple[int, int]:
    """(query, core) and (query, raw token) pairs of one head, one by one."""
    spec = problem.spec
    rows = range(problem.seq_len)
    return sum(map(spec.visible_cores, rows)), sum(len(spec.local_range(row)) for row in rows)


@pytest.mark.parametrize("tokens", [1, 8, 9, 37, 100])
def test_operations_are_those_of_the_visible_pairs(tokens: int) -> None:
    problem = replace(TINY, seq_len=tokens)
    pairs = 2 * 4 * sum(by_counting(problem))
    assert flops(FORWARD, problem) == 2 * 2 * 16 * pairs
    assert flops(BOTH, problem) == flops(UNORDERED, problem) == 7 * 2 * 16 * pairs
    assert flops(FORWARD, problem, dense=True) == 2 * 2 * 16 * 2 * 4 * tokens * (tokens + 1) // 2
    assert flops(DECODE, problem) == 2 * 2 * 16 * 2 * 4 * step_keys(problem)


def test_a_step_sees_what_the_next_query_of_a_sequence_sees() -> None:
    assert step_keys(replace(TINY, seq_len=131072, window_size=1024, group_size=16)) == 9153
    assert [step_keys(replace(TINY, seq_len=t)) for t in (1, 8, 12, 13)] == [2, 9, 10, 11]


@pytest.mark.parametrize("kernel", ["pooling", "forward", "decode"])
@pytest.mark.parametrize("core_heads", ["query", "kv"])
def test_bytes_agree_with_what_the_kernels_say_of_themselves(kernel: str, core_heads: Any) -> None:
    problem = replace(TINY, core_heads=core_heads, seq_len=3700)
    own = tunables()[kernel].work(problem, tunables()[kernel].default(problem, "cpu"))
    what = {"pooling": POOLING, "forward": FORWARD, "decode": DECODE}[kernel]
    cores = 2 * 2 * problem.num_core_heads * problem.spec.num_groups(3700) * 16 * 2  # written by one, read by the other
    written_by_pooling = cores if kernel == "forward" else 0
    assert moved_bytes(what, problem) - written_by_pooling == pytest.approx(own.bytes, rel=1e-3)
    assert flops(what, problem) == pytest.approx(own.flops, rel=1e-3)


def test_a_dense_step_reads_its_keys_once() -> None:
    assert moved_bytes(DECODE, TINY, keys=38) == 2 * 16 * 2 * (2 * 2 * 38 + 2 * (4 + 2))


def test_memory_is_cores_and_two_numbers_a_query() -> None:
    assert held_bytes(TINY) == 2 * (2 * 4 * 9 * 16 * 2 + 2 * 4 * 37 * 4)
    assert held_bytes(replace(TINY, core_heads="kv")) == 2 * (2 * 2 * 9 * 16 * 2 + 2 * 4 * 37 * 4)


# --- the samples ------------------------------------------------------------------------------------------------------


def exact_pass(spec: CCASpec, tokens: int = 29) -> Pass:
    """A pass of the oracle, two query heads for each key/value head."""
    generator = torch.Generator().manual_seed(5)
    q, dout = (torch.randn(2, 4, tokens, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    k, v = (torch.randn(2, 2, tokens, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, lse = reference.attention_dense(
        *leaves, group_size=spec.group_size, window_size=spec.window_size, core_heads=spec.core_heads,
        pooling=spec.pooling,
    )  # fmt: skip
    grads = torch.autograd.grad(out, leaves, dout)
    return Pass(*(x.detach() for x in (q, k, v, out, lse, dout)), grads)


SPECS = [
    CCASpec(4, 6), CCASpec(4, 6, "kv"), CCASpec(4, 6, "query", "mean"), CCASpec(4, 6, "kv", "mean"), CCASpec(1, 3),
    CCASpec(16, 40), CCASpec(5, 1),
]  # fmt: skip


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_samples_of_an_exact_pass_have_no_error(spec: CCASpec) -> None:
    run = exact_pass(spec)
    for errors in (samples.forward_errors(run, spec), samples.backward_errors(run, spec)):
        found = list(errors)
        assert found and max(found) < 1e-12
    cores = reference.pool(*run[:3], group_size=spec.group_size, core_heads=spec.core_heads, pooling=spec.pooling)
    assert max(samples.pooling_errors(*run[:3], cores, spec)) < 1e-12


@pytest.mark.parametrize("which", range(4), ids=["out", "dq", "dk", "dv"])
def test_samples_see_a_slip_in_the_last_rows(which: int) -> None:
    spec, run = CCASpec(4, 6), exact_pass(CCASpec(4, 6), tokens=28)
    assert run.grads is not None
    (run.out, *run.grads)[which][:, :, -4:] *= 1.05
    check = samples.backward_errors if which else samples.forward_errors
    assert samples.evidence("x", check(run, spec), torch.bfloat16).worst > 1


def test_a_nan_is_over_every_bound() -> None:
    assert samples.evidence("x", iter([0.0, float("nan"), 0.0]), torch.float16).worst > 1


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


@pytest.mark.parametrize("core_heads", ["query", "kv"])
@pytest.mark.parametrize("tokens", [37, 75])
def test_a_decode_step_is_held_against_what_the_cache_keeps(
    core_heads: Any, tokens: int, lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps, "CHUNK", 20)
    problem = replace(TINY, core_heads=core_heads, seq_len=tokens, dtype="float32")
    record = measured(lab, Case("decode", problem, (DECODE,), ("flash",)))
    assert [row.keys for row in record.rows] == [None, tokens + 1, step_keys(problem)]
    cca = record.rows[0]
    assert cca.status == "measured", cca.note
    assert [e.check for e in cca.evidence][-3:] == [
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
    longer = replace(TINY, seq_len=37 * 4)
    record = measured(lab, *(Case("growth", p, (FORWARD,), ("flash",)) for p in (TINY, longer)))
    assert [row.status for row in record.rows] == ["measured", "measured", "measured", "skipped"]
    assert record.rows[-1].note == "0.0 s expected from T=37, the limit is 0.01 s"


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
    tunables()
    names = [function.__name__ for name in ("decode", "pooling") for function in Tunable.REGISTRY[name].kernels]
    assert set(kernels_of([Launched(name, 1) for name in names], "cpu")) >= {"decode", "pooling"}
    assert kernels_of([Launched("somebody_elses_kernel", 1)], "cpu") == []


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


def test_every_peer_has_a_title() -> None:
    assert {*peers.BACKENDS, "flex", "cca", "eager"} == set(peers.TITLES)
