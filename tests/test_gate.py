"""The gate of a config lets a right one through and nothing else, whatever it does."""

from __future__ import annotations

import math
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from cca_attention import Problem, fused
from cca_attention.kernels.decode import DecodeConfig
from cca_attention.kernels.forward import ForwardConfig
from cca_attention.kernels.pooling import PoolingConfig
from cca_attention.kernels.tunable import Config
from cca_attention.profiles.configs import source_hash, tunables
from cca_attention.verify import gate
from cca_attention.verify.child import Child, ChildFailedError, call_in_child
from cca_attention.verify.gate import SUITE, check_config, quarantine, run_trials
from cca_attention.verify.gate_cases import DIRECTION_OF, SEED, look, trials
from cca_attention.verify.guard import PAD_BYTES, Guards
from cca_attention.verify.mutants import copy_package

HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"
PROBLEM = Problem(q_heads=8, kv_heads=4, seq_len=4096, head_dim=32, group_size=16, window_size=1000, dtype="bfloat16")
SMALL = ForwardConfig(block_q=16, block_k=16)


@pytest.mark.parametrize(
    ("kernel", "config"),
    [
        ("forward", ForwardConfig(block_q=32, block_k=16)),
        ("pooling", PoolingConfig(block_c=2, block_t=16)),
        ("decode", DecodeConfig(block_k=16, splits_core=2, splits_raw=1)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_right_config_passes(kernel: str, config: Config) -> None:
    evidence = check_config(kernel, config, problem=PROBLEM)
    assert evidence.ok, evidence.message
    assert evidence.outcome == "passed"
    assert evidence.mode == ("gpu" if HAS_GPU else "interpreter")
    assert evidence.message == ("" if HAS_GPU else "bfloat16 was not run, float16, float32 stood in")
    assert evidence.cases >= (2 if HAS_GPU else 3) and 0 < evidence.worst_budget_use <= 1
    assert (evidence.suite, evidence.seed, evidence.kernel_hash) == (SUITE, SEED, source_hash(kernel))


def test_the_first_shape_alone() -> None:
    evidence = check_config("forward", SMALL, problem=PROBLEM, seed=SEED + 1, only_first=True)
    assert evidence.ok, evidence.message
    assert (evidence.cases, evidence.seed) == (1, SEED + 1)


def test_every_kernel_has_its_direction() -> None:
    assert set(DIRECTION_OF) == set(tunables("sm_90"))


def test_a_kernel_for_one_gpu_is_refused_in_the_interpreter() -> None:
    config = tunables("sm_90")["forward_hopper"].default(PROBLEM, "sm_90")
    if not torch.cuda.is_available():
        evidence = check_config("forward_hopper", config, problem=PROBLEM)
        assert (evidence.outcome, evidence.message) == (
            "refused", "refused: it runs on sm_90 only, not in the interpreter"
        )  # fmt: skip


def test_and_on_a_gpu_of_another_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gate, "architecture", lambda device: "sm_80")
    config = tunables("sm_90")["forward_hopper"].default(PROBLEM, "sm_90")
    evidence = check_config("forward_hopper", config, problem=PROBLEM)
    assert (evidence.outcome, evidence.message) == ("refused", "refused: it runs on sm_90 only, not on sm_80")


@pytest.mark.parametrize("kernel", tunables())
def test_the_small_shapes_are_of_the_problems_kind(kernel: str) -> None:
    config = tunables()[kernel].default(PROBLEM, "sm_80")
    found = list(trials(kernel, config, PROBLEM, "cpu"))
    cases = [trial.case for trial in found]
    assert {case.problem.dtype for case in cases} == {"float32", "float16"}
    assert {trial.case.problem.dtype for trial in trials(kernel, config, PROBLEM, "cuda")} == {"bfloat16"}
    assert sum(trial.again for trial in found) == 1
    assert {(case.problem.batch > 1, case.problem.kv_heads > 1) for case in cases} >= {(True, False), (False, True)}
    assert any(case.problem.window_size % 16 == PROBLEM.window_size % 16 for case in cases)
    assert kernel == "decode" or any(case.lengths for case in cases)
    for case in cases:
        p = case.problem
        assert (p.head_dim, p.core_heads, p.pooling) == (32, "query", "last_query")
        assert p.q_heads // p.kv_heads == 2 and p.seq_len <= 397
        assert case.schedule is not None and case.schedule[kernel] == config


def test_a_refused_config_is_not_run() -> None:
    evidence = check_config("forward", ForwardConfig(block_q=48), problem=PROBLEM)
    assert (evidence.ok, evidence.cases, evidence.worst_budget_use) == (False, 0, math.inf)
    assert (evidence.outcome, evidence.message) == ("refused", "refused: block_q 48 is not a power of two")


def test_a_config_of_another_kernel_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"kernel must be one of pooling, .* got pooling: ForwardConfig"):
        check_config("pooling", SMALL, problem=PROBLEM)
    with pytest.raises(ValueError, match=r"kernel must be one of .* got surprise"):
        check_config("surprise", SMALL, problem=PROBLEM)


# --- candidates that do harm, planted in this process ------------------------------------------------------------


def planted(monkeypatch: pytest.MonkeyPatch, launch: Any) -> gate.Evidence:
    """The evidence against a forward launch that does something else."""
    monkeypatch.setattr(fused, "launch_forward", launch)
    evidence = run_trials("forward", SMALL, PROBLEM, DEVICE)
    assert not evidence.ok
    return evidence


def test_half_of_the_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    right = fused.launch_forward

    def half(*tensors: torch.Tensor, **options: Any) -> None:
        right(*(x[:, : x.shape[1] // 2] for x in tensors), **options)

    evidence = planted(monkeypatch, half)
    assert evidence.outcome == "wrong" and "nan where" in evidence.message
    assert (evidence.cases, evidence.worst_budget_use) == (1, math.inf)


def stale(key: Any) -> Any:
    """A launch that gives its first result again whenever `key` of its tensors is the same."""
    right, kept = fused.launch_forward, {}

    def launch(*tensors: torch.Tensor, **options: Any) -> None:
        out, lse = tensors[5:7]
        if key(*tensors) not in kept:
            right(*tensors, **options)
            kept[key(*tensors)] = out.clone(), lse.clone()
        out.copy_(kept[key(*tensors)][0])
        lse.copy_(kept[key(*tensors)][1])

    return launch


def test_a_stale_result(monkeypatch: pytest.MonkeyPatch) -> None:
    evidence = planted(monkeypatch, stale(lambda q, *rest: q.shape))
    assert evidence.outcome == "wrong" and "out: FAILED" in evidence.message


def test_a_result_kept_by_the_address_of_its_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    evidence = planted(monkeypatch, stale(lambda q, *rest: (q.shape, q.data_ptr())))
    assert evidence.outcome == "wrong" and "out: FAILED" in evidence.message
    assert evidence.cases == 2, "only new contents in the same memory can show it"


def test_an_exception(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*tensors: torch.Tensor, **options: Any) -> None:
        raise RuntimeError("no such instruction")

    evidence = planted(monkeypatch, refuse)
    assert evidence.outcome == "crash" and "RuntimeError: no such instruction" in evidence.message


def test_too_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def swell(*tensors: torch.Tensor, **options: Any) -> None:
        raise torch.OutOfMemoryError("tried to allocate 1000 GiB")

    assert planted(monkeypatch, swell).outcome == "oom"


def test_changed_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    right = fused.launch_forward

    def greedy(*tensors: torch.Tensor, **options: Any) -> None:
        right(*tensors, **options)
        tensors[1][0, 0, 0, 0] += 1.0

    evidence = planted(monkeypatch, greedy)
    assert evidence.outcome == "wrong" and "FAILED" in evidence.message


def test_a_write_beside_the_output(monkeypatch: pytest.MonkeyPatch) -> None:
    right = fused.launch_forward

    def loose(*tensors: torch.Tensor, **options: Any) -> None:
        right(*tensors, **options)
        out = tensors[5]
        out.as_strided((1,), (1,), out.storage_offset() + out.numel()).zero_()

    evidence = planted(monkeypatch, loose)
    assert evidence.outcome == "wrong" and "guard pads behind the tensors: FAILED" in evidence.message


def test_the_right_launch_leaves_no_trace() -> None:
    found = look(next(trials("forward", SMALL, PROBLEM, DEVICE)), "forward")
    assert [str(comparison) for comparison in found if not comparison.ok] == []
    assert {comparison.name for comparison in found} >= {"out", "lse", "hash of q as it was"}


def test_guard_pads_see_both_sides() -> None:
    guards = Guards()
    x = guards.place(torch.arange(6.0).reshape(2, 3).T)
    assert x.tolist() == [[0, 3], [1, 4], [2, 5]] and x.stride() == (1, 3)
    with guards.allocations():
        made = [torch.empty(3, dtype=torch.int32), x.new_zeros(2), torch.empty(0)]
    assert len(guards) == 3 and made[1].tolist() == [0, 0]
    assert all(comparison.ok for comparison in guards.comparisons())
    made[0].as_strided((1,), (1,), PAD_BYTES // 4 - 1).zero_()
    assert [comparison.ok for comparison in guards.comparisons()] == [False, True]


# --- candidates that take their process along, planted in a copy of the package ----------------------------------

AT_THE_LAUNCH = """

def launch_forward(*tensors, **options):
    import os, time
    {}
"""


def in_a_copy(monkeypatch: pytest.MonkeyPatch, folder: Path, does: str, timeout_s: float) -> gate.Evidence:
    """The evidence against a forward launch that does this to its process."""
    fused_module = copy_package(folder) / "fused.py"
    fused_module.write_text(fused_module.read_text() + AT_THE_LAUNCH.format(does))
    with Child(interpret=not HAS_GPU, source=folder) as child:
        monkeypatch.setattr(gate, "_child", lambda mode: child)
        return check_config("forward", SMALL, problem=PROBLEM, timeout_s=timeout_s)


def test_a_candidate_that_crashes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    evidence = in_a_copy(monkeypatch, tmp_path, "os.kill(os.getpid(), 11)", 60.0)
    assert evidence.outcome == "crash" and "killed by SIGSEGV" in evidence.message
    record = quarantine("forward", SMALL, PROBLEM, evidence)
    assert (record.outcome, record.kernel, record.dtype, record.head_dim) == ("crash", "forward", "bfloat16", 32)
    assert (record.arch == "interpreter") != HAS_GPU and record.config["block_q"] == 16
    assert record.group_size == 16 and record.kernel_hash == source_hash("forward")


def test_a_candidate_that_hangs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    evidence = in_a_copy(monkeypatch, tmp_path, "time.sleep(600)", 3.0)
    assert evidence.outcome == "hang"
    assert evidence.message == "the child process failed: no result within 3 s"


def test_what_passed_is_not_put_in_quarantine() -> None:
    with pytest.raises(ValueError, match="evidence must be against the config"):
        quarantine("forward", SMALL, None, gate.Evidence(True, SUITE, SEED, 3, 0.5, "gpu", "", ""))


# --- children ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "argument", "message"),
    [
        (signal.raise_signal, int(signal.SIGSEGV), "killed by SIGSEGV"),
        (os._exit, 7, "exit code 7"),
        (time.sleep, 60, "no result within 5 s"),
        (math.sqrt, "four", "TypeError: must be real number"),
    ],
    ids=["signal", "exit", "hang", "exception"],
)
def test_a_child_that_fails_says_how(function: Any, argument: Any, message: str) -> None:
    with pytest.raises(ChildFailedError, match=message):
        call_in_child(function, argument, interpret=False, timeout_s=5)


def test_a_child_answers() -> None:
    assert call_in_child(math.factorial, 5, interpret=False, timeout_s=60) == 120


def test_a_child_is_restarted_after_a_crash() -> None:
    with Child(interpret=False) as child:
        with pytest.raises(ChildFailedError) as failed:
            child.call(os._exit, 7, timeout_s=60)
        assert failed.value.kind == "crashed"
        with pytest.raises(ChildFailedError) as failed:
            child.call(math.sqrt, "four", timeout_s=60)
        assert failed.value.kind == "raised"
        assert child.call(math.factorial, 5, timeout_s=60) == 120


def test_a_killed_child_gives_no_result() -> None:
    with Child(interpret=False) as child:
        child.kill()
        with pytest.raises(ChildFailedError, match="killed by SIGKILL"):
            child.call(math.factorial, 5, timeout_s=60)
