"""Every kernel and both directions of the operator under pytest-benchmark: two states of the code on one GPU.

    pytest benchmarks --benchmark-autosave                            # before a change
    pytest benchmarks --benchmark-compare --benchmark-compare-fail=median:5%     # after it

A kernel is timed with its built-in config, after the gate has passed that config. A round is one call with a cold L2
cache, from its launch to its end as the host sees it: some ten microseconds more than `cca-bench` and `cca-tune` say,
which ask the GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton
from pytest_benchmark.fixture import BenchmarkFixture

from cca_attention import Problem, cca_attention
from cca_attention.configs import architecture
from cca_attention.kernels.tunable import Tunable
from cca_attention.profiles.configs import tunables
from cca_attention.verify.gate import check_config

HAS_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
ARCH = architecture(DEVICE)
ROUNDS, WARM_UP = 50, 5
PROBLEMS = (
    Problem(q_heads=32, kv_heads=32, seq_len=32768, head_dim=128),
    Problem(q_heads=32, kv_heads=8, seq_len=32768, head_dim=128, core_heads="kv"),
)

pytestmark = pytest.mark.skipif(not HAS_GPU, reason="timing a kernel needs an NVIDIA GPU, and there is none here")


@pytest.fixture
def rounds(benchmark: BenchmarkFixture) -> Callable[[Callable[[], Any]], None]:
    """Run a call `ROUNDS` times, each with a cold L2 cache."""
    driver: Any = triton.runtime.driver.active
    cache = driver.get_empty_cache_for_benchmark()

    def cold() -> None:
        driver.clear_cache(cache)
        torch.cuda.synchronize()

    def run(call: Callable[[], Any]) -> None:
        def whole() -> None:
            call()
            torch.cuda.synchronize()

        benchmark.pedantic(whole, setup=cold, rounds=ROUNDS, warmup_rounds=WARM_UP)

    return run


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
@pytest.mark.parametrize("kernel", tunables(ARCH))
def test_kernel(
    kernel: str, problem: Problem, rounds: Callable[[Callable[[], Any]], None], benchmark: BenchmarkFixture
) -> None:
    tunable = Tunable.REGISTRY[kernel]
    config = tunable.default(problem, ARCH)
    if refusal := config.refusal(problem):
        pytest.skip(f"{kernel} does not run {problem}: {refusal}")
    evidence = check_config(kernel, config, problem=problem)
    assert evidence.ok, evidence.message
    tensors = tunable.allocate(problem, DEVICE, torch.Generator(DEVICE).manual_seed(0))
    work = tunable.work(problem, config)
    benchmark.extra_info.update(config=repr(config), flops=work.flops, bytes=work.bytes)
    rounds(lambda: tunable.launch(problem, tensors, config))


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward_and_backward"])
def test_operator(backward: bool, problem: Problem, rounds: Callable[[Callable[[], Any]], None]) -> None:
    p, dtype = problem, getattr(torch, problem.dtype)
    q, dout = (torch.randn(p.batch, p.q_heads, p.seq_len, p.head_dim, device=DEVICE, dtype=dtype) for _ in range(2))
    k, v = (torch.randn(p.batch, p.kv_heads, p.seq_len, p.head_dim, device=DEVICE, dtype=dtype) for _ in range(2))
    leaves = [x.requires_grad_(backward) for x in (q, k, v)]

    def attend() -> Any:
        return cca_attention(*leaves, group_size=p.group_size, window_size=p.window_size, core_heads=p.core_heads)

    rounds((lambda: torch.autograd.grad(attend(), leaves, dout)) if backward else attend)
