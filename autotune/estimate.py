"""What a kernel will take and do, before it is compiled: from its Triton IR and from what such kernels come to.

The shares of instructions are those that configs of the attention kernels had when compiled for Hopper. They are good
enough to leave out what is hopeless; what is left is compiled, and ranked by what the compiler made of it.
"""

from __future__ import annotations

from typing import Any

from ..kernels.tunable import Config, Work, padded_dim
from ..problem import Problem
from .binary import Resources, in_a_bank
from .compile import Launch
from .devices import Device
from .tile_model import GROUP
from .walks import walk_of

ASSUMED_REGISTERS = 90
"""What addresses, masks and operands take besides the live tiles."""
EACH_PASS, EACH_SCORE, EACH_LOAD, EACH_PRODUCT, EACH_MASK = 120, 7, 8, 1.6, 7
"""Instructions of a warp in every pass, for each score, load and product of it, and for each score that is masked."""
ASSUMED_EXCHANGES = 72
"""Words that a warp passes on in a pass of pooling, where several warps sum over the tokens of a group."""
ASSUMED_OUTSIDE = 1600
WARP_PRODUCT = 2 * 16 * 8 * 16
"""Operations of a warp's product."""


def estimated(device: Device, problem: Problem, config: Config, work: Work, launch: Launch) -> Resources:
    """What the kernel of `launch` will take, at least, and about do."""
    threads = config.num_warps * device.threads_per_warp
    wanted = launch.traits.working_bytes // (4 * threads) + ASSUMED_REGISTERS
    registers = min(wanted, device.registers_per_thread)
    shared = max(1, config.num_stages - 1) * launch.traits.stage_bytes
    spilled = 4 * (wanted - registers)
    code = _code(device, problem, config, work, launch, wanted - registers)
    return Resources(launch.kernel, shared, registers, spilled, config.num_warps, 0, 2 * spilled, **code)


def _code(device: Device, problem: Problem, config: Config, work: Work, launch: Launch, spills: int) -> dict[str, Any]:
    """The figures of the loop over tiles; few for one without products, none without a loop or tensor cores."""
    walk = walk_of(launch.kernel, problem, config)
    if walk is not None and not launch.traits.dot_flops:
        return {"loop_exchanges": _exchanges(device, problem, config, walk.rows)}
    if walk is None or problem.element_bytes > 2 or not work.exp2:
        return {}
    threads = config.num_warps * device.threads_per_warp
    products = round(work.flops / work.exp2 / (2 * problem.head_dim))
    by_group = device.arch in ("sm_90", "sm_100") and walk.rows >= 64 and config.num_warps % GROUP == 0
    if by_group:
        high = max(1.0, walk.rows / 16 / config.num_warps)
        wide = max(1.0, 16 * config.num_warps / walk.rows)
        gathered = products // 2
        count = high * ((products - gathered) * problem.head_dim + gathered * wide * walk.block) / 16
    else:
        count = work.flops / work.exp2 * walk.rows * walk.block / config.num_warps / WARP_PRODUCT
    scores = walk.rows * walk.block / threads
    loads = 2 * problem.element_bytes * problem.head_dim * walk.block / (16 * threads)
    tile = EACH_PASS + EACH_SCORE * scores + EACH_LOAD * loads + (0 if by_group else EACH_PRODUCT * count)
    return {
        "tile_instructions": round(tile),
        "tile_exponentials": max(1, round(scores)),
        "tile_loads": round(loads),
        "tile_products": max(1, round(count)),
        "tile_spills": spills,
        "edge_instructions": round(tile + EACH_MASK * scores),
        "edge_spills": spills,
        "outside_instructions": ASSUMED_OUTSIDE,
        "group_products": by_group,
    }


def _exchanges(device: Device, problem: Problem, config: Config, groups: int) -> int:
    """Words that are passed on in a pass of pooling, as `Resources` counts them.

    As Triton 3.6 deals a tile [C, T, D] out: 16 bytes of a row to a lane, what lanes are left first to the groups and
    then to the tokens, and the warps in the same way.
    """
    vector = 16 // problem.element_bytes
    lanes_d = min(device.threads_per_warp, padded_dim(problem.head_dim) // vector)
    lanes_c = min(device.threads_per_warp // lanes_d, groups)
    sharing = config.num_warps // min(config.num_warps, groups // lanes_c)
    if sharing == 1:
        return 0
    return ASSUMED_EXCHANGES * in_a_bank(lanes_c * lanes_d, vector * sharing)
