"""Which configs are worth compiling, and which of the compiled ones can run: rules before and after the compiler."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Literal

from ..kernels.tunable import Config, Tunable
from ..problem import Problem
from .binary import Resources
from .compile import Sketch
from .devices import Device
from .estimate import estimated
from .predict import blocks_per_sm, predict

Shortage = Literal["shared memory", "registers", "spills"]
MAX_SPILL_BYTES = 2048
"""Spilled bytes of a thread beyond which a config is dropped: twice what all its registers hold.

Fewer may lie outside of the loops and cost nothing: on an H200 the fastest backward_dkv spilled 1056.
"""


def legal_configs(tunable: Tunable, problem: Problem, default: Config) -> tuple[list[Config], int]:
    """The default and every config of the space that its own rules allow, and how many they refuse.

    Raises:
        ValueError: if the rules refuse the default itself.
    """
    if (reason := default.refusal(problem)) is not None:
        raise ValueError(f"the built-in config of {tunable.name} cannot run {problem}: {reason}")
    allowed, refused = [default], 0
    for config, refusal in tunable.candidates(problem):
        if refusal is not None:
            refused += 1
        elif config != default:
            allowed.append(config)
    return allowed, refused


def tile_groups(configs: list[Config]) -> list[tuple[Config, ...]]:
    """Configs by their tiles: those of a group differ in warps and stages only."""
    groups: dict[tuple[tuple[str, int], ...], list[Config]] = {}
    for config in configs:
        tiles = tuple((k, v) for k, v in asdict(config).items() if k not in ("num_warps", "num_stages"))
        groups.setdefault(tiles, []).append(config)
    return list(map(tuple, groups.values()))


def certain_shortage(device: Device, config: Config, sketch: Sketch) -> Shortage | None:
    """What a config will lack on `device` whatever the compiler does, from its Triton IR; None if it may fit."""
    for launch in sketch.launches:
        if (config.num_stages - 1) * launch.traits.stage_bytes > device.shared_bytes_per_block:
            return "shared memory"
        room = 4 * device.registers_per_thread * config.num_warps * device.threads_per_warp
        # Blackwell's data-centre chips keep accumulators in tensor memory
        if launch.traits.live_bytes >= room and device.arch != "sm_100":
            return "registers"
    return None


def shortage(device: Device, resources: tuple[Resources, ...]) -> Shortage | None:
    """What a compiled config lacks on `device`, or None if it runs there."""
    for kernel in resources:
        if kernel.shared_bytes > device.shared_bytes_per_block:
            return "shared memory"
        if blocks_per_sm(device, kernel) < 1:
            return "registers"
        if kernel.spill_bytes > MAX_SPILL_BYTES:
            return "spills"
    return None


def estimate_us(device: Device, problem: Problem, tunable: Tunable, config: Config, sketch: Sketch) -> float:
    """The model's time of a config that is not compiled."""
    work = tunable.work(problem, config)
    launches = [(launch, estimated(device, problem, config, work, launch)) for launch in sketch.launches]
    return predict(device, problem, config, work, launches).total_us


def distinct(sketches: Mapping[Config, Sketch]) -> dict[Config, Sketch]:
    """One config, the first, of each set that launches the very same thing."""
    first: dict[str, Config] = {}
    for config, sketch in sketches.items():
        first.setdefault(sketch.key, config)
    return {config: sketches[config] for config in first.values()}
