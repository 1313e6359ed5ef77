"""GPUs that are not there: a handle is a file, to which everything is written that is timed "on it".

A card is dead once it has a file beside it that says so; no worker can be set up there.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from toy_tunable import ToyConfig, fate_of

from cca_attention.problem import Problem

mine = Path()
LIFE = 5
"""Samples that a doomed card gives."""


def take(handle: str) -> None:
    """This process uses one card alone."""
    global mine
    mine = Path(handle)
    if dead(mine).exists():
        raise RuntimeError(f"{mine.name} has fallen off the bus")


def dead(card: Path) -> Path:
    """What is there when the card is not."""
    return card.with_suffix(".dead")


def sample(module: str, name: str, config: ToyConfig, problem: Problem) -> list[float]:
    """A time that depends on the config alone; a card whose name says "doomed" dies of the fifth."""
    with mine.open("a") as file:
        file.write(f"{name} {problem.seq_len}\n")
    if "doomed" in mine.name and len(mine.read_text().splitlines()) > LIFE:
        dead(mine).touch()
        os.kill(os.getpid(), signal.SIGSEGV)
    return [100.0 - config.block_q / 8 - config.num_warps] * 5


def sample_after(module: str, name: str, config: ToyConfig, problem: Problem) -> list[float]:
    """The same, but other cards wait until the doomed one beside them has died."""
    until = time.monotonic() + 20
    while "doomed" not in mine.name and not dead(mine.with_name("doomed")).exists() and time.monotonic() < until:
        time.sleep(0.01)
    return sample(module, name, config, problem)


def sample_or_harm(module: str, name: str, config: ToyConfig, problem: Problem) -> list[float]:
    """The same, but some configs take their worker down on any card."""
    if fate_of(config) == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    return sample(module, name, config, problem)
