"""Faults on real GPUs, planted among the configs of the toy kernel, and a GPU that falls off the bus in a race.

A worker imports this before it takes its card: nothing here asks CUDA anything at import.
"""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path

import torch
import triton
import triton.language as tl
from toy_tunable import ToyConfig, accept, check, fate_of
from triton.language.extra.cuda import globaltimer

from cca_attention.autotune.host import take_card
from cca_attention.autotune.measure import sample
from cca_attention.problem import Problem
from cca_attention.verify.gate import Evidence

HANG_NS = 15_000_000_000
"""Longer than any limit that is set for it; it ends all the same, should nobody end it."""
FAR = 1 << 40
LIFE = 9
"""Samples that a doomed card gives."""

state = Path()
mine = ""
taken = 0


@triton.jit
def wild_kernel(x_ptr, FAR: tl.constexpr):
    """Writes where nobody may."""
    tl.store(x_ptr + (tl.program_id(0).to(tl.int64) + 1) * FAR, 1.0)


@triton.jit
def endless_kernel(x_ptr, HANG_NS: tl.constexpr):
    """Waits on the GPU."""
    first = globaltimer()
    now = first
    while now - first < HANG_NS:
        now = globaltimer()
    tl.store(x_ptr, (now - first).to(tl.float32))


def harm(fate: str) -> None:
    """What a config does beside its work, for real."""
    if fate == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    x = torch.zeros(16, device="cuda")
    if fate == "oom":
        torch.empty(1 << 42, dtype=torch.uint8, device="cuda")
    if fate == "illegal access":
        wild_kernel[(64,)](x, FAR)
    if fate == "hang":
        endless_kernel[(1,)](x, HANG_NS)
    torch.cuda.synchronize()


def check_or_harm(module: str, name: str, config: ToyConfig, problem: Problem) -> Evidence:
    """Of those that are right, one hangs and one crashes; one writes where it may not, and its exception is told."""
    harm({"90 us": "hang", "80 us": "crash"}.get(fate_of(config), "none"))
    if fate_of(config) != "raises":
        return check(module, name, config, problem)
    try:
        harm("illegal access")
    except RuntimeError as error:
        return replace(accept(module, name, config, problem), ok=False, outcome="crash", message=str(error))
    return accept(module, name, config, problem)


def sample_or_harm(module: str, name: str, config: ToyConfig, problem: Problem) -> list[float]:
    """Times of the card, but for the faults; what is wrong after it was timed is the fastest."""
    fate = fate_of(config)
    harm(fate)
    if fate == "too fast":
        return [0.5] * 5
    times_us = sample(module, name, config, problem)
    return [time_us / 2 for time_us in times_us] if fate.startswith("wrong after") else times_us


def take(folder: str, handle: str) -> None:
    """This process uses one card alone, unless that has died."""
    global state, mine
    state, mine = Path(folder), handle
    take_card(handle)
    if (state / "dead").exists() and doomed():
        raise RuntimeError("planted: it has fallen off the bus")


def doomed() -> bool:
    """Whether this process's card is the one that dies."""
    return (state / "doomed").read_text() == mine


def sample_until_death(module: str, name: str, config: ToyConfig, problem: Problem) -> list[float]:
    """Times of the card, noted; the doomed one dies of the ninth."""
    global taken
    taken += 1
    with (state / "samples").open("a") as file:
        file.write(f"{problem.seq_len} {mine}\n")
    if doomed() and taken == LIFE:
        (state / "dead").touch()
        os.kill(os.getpid(), signal.SIGSEGV)
    return sample(module, name, config, problem)
