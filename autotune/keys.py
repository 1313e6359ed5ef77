"""What makes two trials the same: everything that their outcome depends on, and nothing else."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
import triton

from ..kernels.tunable import Config, Tunable
from ..problem import Problem
from ..profiles.configs import source_hash
from ..verify.gate import SUITE
from .devices import Device
from .journal import Key, Phase
from .measure import policy_of

REVISION = 5
"""Part of the key of what is read from the compiler: to be raised when the meaning of a figure changes."""


@dataclass(frozen=True, slots=True)
class Keys:
    """The keys of one run, for `device`; `card` is what `card_here` says of this machine."""

    device: Device
    problem: Problem
    card: str | None

    def of(self, phase: Phase, tunable: Tunable, config: Config) -> Key:
        """The key of one config's trial."""
        where: dict[Phase, str] = {
            "sketch": f"{self.device.arch}, revision {REVISION}",
            "compile": f"{self.device.arch}, revision {REVISION}",
            "measure": f"{self.device.name}: {self.card}; {policy_of(tunable.name)}",
        }
        checked = f"{self.card or 'interpreter'}, suite {SUITE}"
        problem = str(self.problem) if phase in where else kind_of(self.problem)
        source, fields = source_hash(tunable.name), config_fields(config)
        return Key(phase, tunable.name, source, problem, fields, where.get(phase, checked), triton.__version__)

    def choice(self, tunable: Tunable) -> Key:
        """The key of what was chosen last, whatever the versions were."""
        return Key("choice", tunable.name, "", str(self.problem), "", self.device.name, "")


def card_here(driver: str | None, index: int = 0) -> str | None:
    """A GPU of this machine by all that a kernel's behaviour on it depends on; None if there is none.

    Args:
        driver: its version, None if nobody tells.
    """
    if not torch.cuda.is_available():
        return None
    card = torch.cuda.get_device_properties(index)
    size = f"{card.multi_processor_count} SMs, {card.total_memory // 2**30} GiB"
    return f"{card.name}, sm_{card.major}{card.minor}, {size}, driver {driver or 'unknown'}, torch {torch.__version__}"


def config_fields(config: Config) -> str:
    """The fields of a config as text."""
    return ",".join(f"{name}={value}" for name, value in asdict(config).items())


def kind_of(problem: Problem) -> str:
    """What the gate takes from `problem`: equal for problems on which it runs the same cases.

    That is dtype, head_dim, semantics and the head ratio; its own small shapes stand for every length, batch and
    number of heads.
    """
    p = problem
    return (
        f"{p.dtype}-D{p.head_dim}-g{p.group_size}-w{p.window_size}-{p.core_heads}-{p.pooling}"
        f"-ratio{p.q_heads // p.kv_heads}"
    )
