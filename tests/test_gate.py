"""The gate of a config lets a right one through and nothing else, whatever it does."""

from __future__ import annotations

import math
import os
import signal
import time
from typing import Any

import pytest
import torch

from cca_attention import Problem, fused
from cca_attention.kernels.decode import DecodeConfig
from cca_attention.kernels.forward import ForwardConfig
from cca_attention.kernels.pooling import PoolingConfig
from cca_attention.kernels.tunable import Config
from cca_attention.profiles.configs import source_hash, tunables
from cca_attention.verify.child import ChildFailedError, call_in_child
from cca_attention.verify.gate import CHECKS_OF, SEED, SUITE, check_config, run_cases, small_cases

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
    assert evidence.mode == ("gpu" if HAS_GPU else "interpreter")
    assert evidence.message == ("" if HAS_GPU else "bfloat16 was not run, float16, float32 stood in")
    assert evidence.cases >= 3 and 0 < evidence.worst_budget_use <= 1
    assert (evidence.suite, evidence.seed, evidence.kernel_hash) == (SUITE, SEED, source_hash(kernel))


def test_every_kernel_has_its_checks() -> None:
    assert set(CHECKS_OF) == set(tunables())


@pytest.mark.parametrize("kernel", CHECKS_OF)
def test_the_small_shapes_are_of_the_problems_kind(kernel: str) -> None:
    config = tunables()[kernel].default(PROBLEM, "sm_80")
    cases = [case for _, case in small_cases(kernel, config, PROBLEM, "cpu")]
    assert {case.problem.dtype for case in cases} == {"float32", "float16"}
    assert {case.problem.dtype for _, case in small_cases(kernel, config, PROBLEM, "cuda")} == {"bfloat16"}
    assert {(case.problem.batch > 1, case.problem.kv_heads > 1) for case in cases} >= {(True, False), (False, True)}
    assert any(case.problem.window_size % 16 == PROBLEM.window_size % 16 for case in cases)
    for case in cases:
        p = case.problem
        assert (p.head_dim, p.core_heads, p.pooling) == (32, "query", "last_query")
        assert p.q_heads // p.kv_heads == 2 and p.seq_len <= 397
        assert case.schedule is not None and case.schedule[kernel] == config


def test_a_refused_config_is_not_run() -> None:
    evidence = check_config("forward", ForwardConfig(block_q=48), problem=PROBLEM)
    assert (evidence.ok, evidence.cases, evidence.worst_budget_use) == (False, 0, math.inf)
    assert evidence.message == "refused: block_q 48 is not a power of two"


def test_a_config_of_another_kernel_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"kernel must be one of pooling, .* got pooling: ForwardConfig"):
        check_config("pooling", SMALL, problem=PROBLEM)
    with pytest.raises(ValueError, match=r"kernel must be one of .* got surprise"):
        check_config("surprise", SMALL, problem=PROBLEM)


@pytest.mark.skipif(HAS_GPU, reason="on a GPU the gate runs in the caller's process")
def test_a_config_that_takes_too_long_fails() -> None:
    evidence = check_config("forward", SMALL, problem=PROBLEM, timeout_s=0.5)
    assert not evidence.ok
    assert evidence.message == "the child process failed: no result within 0.5 s"


# --- candidates that do harm, planted in this process ------------------------------------------------------------


def planted(monkeypatch: pytest.MonkeyPatch, launch: Any) -> str:
    """The message against a forward launch that does something else."""
    monkeypatch.setattr(fused, "launch_forward", launch)
    evidence = run_cases("forward", SMALL, PROBLEM, DEVICE)
    assert not evidence.ok
    return evidence.message


def test_half_of_the_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    right = fused.launch_forward

    def half(*tensors: torch.Tensor, **options: Any) -> None:
        right(*(x[:, : x.shape[1] // 2] for x in tensors), **options)

    assert "nan where" in planted(monkeypatch, half)


def test_a_stale_result(monkeypatch: pytest.MonkeyPatch) -> None:
    right, kept = fused.launch_forward, {}

    def stale(*tensors: torch.Tensor, **options: Any) -> None:
        out, lse = tensors[5:7]
        if out.shape not in kept:
            right(*tensors, **options)
            kept[out.shape] = out.clone(), lse.clone()
        out.copy_(kept[out.shape][0])
        lse.copy_(kept[out.shape][1])

    assert "FAILED" in planted(monkeypatch, stale)


def test_an_exception(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*tensors: torch.Tensor, **options: Any) -> None:
        raise RuntimeError("out of resources")

    assert "RuntimeError: out of resources" in planted(monkeypatch, refuse)


def test_changed_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    right = fused.launch_forward

    def greedy(q: torch.Tensor, *rest: Any, **options: Any) -> None:
        right(q, *rest, **options)
        q.zero_()

    assert "FAILED" in planted(monkeypatch, greedy)


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
