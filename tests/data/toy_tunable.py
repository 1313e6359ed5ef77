"""A small kernel with a space of every kind of config, and verifications of every kind of outcome.

Imported by name in the tests and in the tuner's worker processes, to which the tests' folder of data is on the path.
"""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from cca_attention.kernels.tunable import Config, Tunable, Work
from cca_attention.problem import Problem
from cca_attention.profiles.configs import source_hash
from cca_attention.verify.gate import Evidence

HEAD_DIM = 64


@triton.jit
def toy_kernel(x_ptr, out_ptr, x_strides, rows, HEAD_DIM: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr):
    """out = (x x^T) x, a tile of BLOCK_Q rows."""
    tl.static_assert(BLOCK_K < 1024, "a tile that does not compile")
    offs_q = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    offs_d = tl.arange(0, HEAD_DIM)
    tile = offs_q[:, None] * x_strides[0] + offs_d[None, :]
    q = tl.load(x_ptr + tile, mask=offs_q[:, None] < rows, other=0.0)
    acc = tl.zeros([BLOCK_Q, HEAD_DIM], tl.float32)
    for start in range(0, rows, BLOCK_K):
        offs_k = start + tl.arange(0, BLOCK_K)
        keys = x_ptr + offs_k[:, None] * x_strides[0] + offs_d[None, :]
        k = tl.load(keys, mask=offs_k[:, None] < rows, other=0.0)
        scores = tl.dot(q, tl.trans(k))
        acc = tl.dot(scores.to(k.dtype), k, acc=acc)
    tl.store(out_ptr + tile, acc.to(out_ptr.dtype.element_ty), mask=offs_q[:, None] < rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class ToyConfig(Config):
    """`block_k` 128 breaks a rule, 1024 does not compile, `block_q` 2048 cannot keep its accumulator."""

    block_q: int = 32
    block_k: int = 32

    def refusal(self, problem: Problem) -> str | None:
        """The one rule."""
        return "block_k is 128" if self.block_k == 128 else Config.refusal(self, problem)


def default(problem: Problem, arch: str) -> ToyConfig:
    """The built-in config."""
    return ToyConfig(num_warps=4, num_stages=2)


def allocate(problem: Problem, device: torch.device, generator: torch.Generator | None) -> dict[str, Tensor]:
    """The rows and their result."""
    x = torch.empty(problem.seq_len, HEAD_DIM, dtype=torch.float16, device=device)
    if device.type != "meta":
        x.normal_(generator=generator)
    return {"x": x, "out": torch.empty_like(x)}


def launch(problem: Problem, tensors: dict[str, Tensor], config: ToyConfig) -> None:
    """One launch."""
    x = tensors["x"]
    grid = (triton.cdiv(x.shape[0], config.block_q),)
    toy_kernel[grid](x, tensors["out"], x.stride(), x.shape[0], HEAD_DIM=HEAD_DIM, **config.launch_args())


def work(problem: Problem, config: Config) -> Work:
    """Two products over all pairs of rows."""
    rows = float(problem.seq_len)
    return Work(flops=4 * rows * rows * HEAD_DIM, bytes=4 * rows * HEAD_DIM, exp2=0.0)


TOY = Tunable(
    name="toy",
    config=ToyConfig,
    space={"block_q": (32, 64, 2048), "block_k": (32, 128, 1024), "num_warps": (4, 8), "num_stages": (2,)},
    default=default,
    allocate=allocate,
    launch=launch,
    work=work,
    kernels=(toy_kernel,),
)


HARMFUL = replace(
    TOY,
    name="harmful",
    space={"block_q": (32, 64), "block_k": (32, 64), "num_warps": (2, 4, 8), "num_stages": (2,)},
)
FATES = {
    (32, 32, 4): "100 us",
    (32, 32, 2): "80 us",
    (32, 32, 8): "wrong",
    (64, 32, 2): "raises",
    (64, 32, 4): "oom",
    (64, 32, 8): "illegal access",
    (32, 64, 2): "crash",
    (32, 64, 4): "hang",
    (32, 64, 8): "too fast",
    (64, 64, 2): "wrong after 60 us",
    (64, 64, 4): "70 us",
    (64, 64, 8): "90 us",
}
"""What becomes of each config of HARMFUL, by rows, keys and warps."""


def fate_of(config: ToyConfig) -> str:
    """Its fate."""
    return FATES[config.block_q, config.block_k, config.num_warps]


def check(module: str, name: str, config: ToyConfig, problem: Problem) -> Evidence:
    """Two configs are wrong from the start."""
    raised = replace(evidence(False, "RuntimeError: CUDA error: misaligned address"), outcome="crash")
    return {"wrong": evidence(False, "out is off by 2 budgets"), "raises": raised}.get(fate_of(config), evidence(True))


def check_or_die(module: str, name: str, config: ToyConfig, problem: Problem) -> Evidence:
    """The same, but one takes down the process that it is verified in."""
    if fate_of(config) == "raises":
        os.kill(os.getpid(), signal.SIGSEGV)
    return check(module, name, config, problem)


def check_after(module: str, name: str, config: ToyConfig, problem: Problem) -> Evidence:
    """One is wrong after it was timed."""
    return evidence(not fate_of(config).startswith("wrong"), "out is off by 9 budgets")


def time_it(module: str, name: str, config: ToyConfig, problem: Problem) -> list[float]:
    """A time, or what a GPU and its driver do instead."""
    fate = fate_of(config)
    if fate == "oom":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    if fate == "illegal access":
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    if fate == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if fate == "hang":
        time.sleep(600)
    return [1.0 if fate == "too fast" else float(fate.split()[-2])] * 5


def always_fast(module: str, name: str, config: ToyConfig, problem: Problem) -> list[float]:
    """A time on a GPU on which nothing goes wrong."""
    return [100.0 - config.num_warps] * 5


def evidence(ok: bool, message: str = "") -> Evidence:
    """What a verification might have found."""
    return Evidence(ok, "toy/1", 7, 3, 0.25, "interpreter", message, source_hash("toy"), "passed" if ok else "wrong")


def accept(module: str, name: str, config: ToyConfig, problem: Problem) -> Evidence:
    """Every config is right."""
    return evidence(True)


def reject_all(module: str, name: str, config: ToyConfig, problem: Problem) -> Evidence:
    """Every config is wrong."""
    return evidence(False, "out is off by 3 budgets")


def reject_wide(module: str, name: str, config: ToyConfig, problem: Problem) -> Evidence:
    """Configs of 8 warps are wrong."""
    return evidence(config.num_warps != 8, "out is off by 2 budgets")


def break_down(module: str, name: str, config: ToyConfig, problem: Problem) -> Evidence:
    """The verification itself does not work."""
    raise OSError("the oracle is out")
