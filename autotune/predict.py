"""The stated cost model: what a compiled config should take on a GPU that is not there.

A kernel whose programs walk over tiles is modelled pass by pass, in `tile_model`. Any other is bounded by its slowest
resource. Each term is a time in microseconds if that alone counted:

- tensor: operations over the peak rate (of the tensor cores; of the vector units for float32, or without a product);
- issue: instructions that warps go through in their loops, one a clock and scheduler; before the kernel is compiled,
  and where its assembly is not read, six vector operations on each score;
- exp2: exponentials, 16 a clock and SM;
- shared: operands of the products and spilled registers, 128 bytes a clock and SM. Each holder of rows (a warp, a warp
  group on Hopper, a block on Blackwell) reads the other operand whole, so tall tiles with few warps read least;
- l2: bytes that tiles load, re-reads included, at 32 bytes a clock and SM;
- hbm: bytes read and written once, at the peak rate or at what the loads in flight allow (Little's law).

The terms other than the slowest hide behind it as far as there are other warps to run: what they add is divided by
the warps resident per scheduler, times 1.5 with a pipelined loop. The sum is multiplied by the quantisation (programs
of the fullest SM over the mean). Without products come on top, unhidden: single words that warps pass on to each other,
moves of spilled registers, and the start of programs. The clocks of these three are fitted; the other constants are
those of the architectures.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..kernels.tunable import Config, Work
from ..problem import Problem
from .binary import Resources
from .compile import Launch
from .devices import Device
from .tile_model import REUSED, STREAMED, Constants, pass_of, smooth_max
from .walks import Walk, walk_of

SHARED_BYTES_PER_CLOCK = 128
L2_BYTES_PER_CLOCK = 32
EXP2_PER_CLOCK = 16
SOFTMAX_OPERATIONS = 6
MEMORY_LATENCY_US = 0.7
PIPELINE_HIDING = 1.5
EXTRA_LAUNCH_US = 4.0
"""Of each further launch of a call."""
HBM_SHARE = 0.7
"""Of the peak rate of device memory, what a kernel that streams through it reaches."""
SCHEDULERS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolingConstants:
    """Clocks that nothing hides in kernels without products, fitted as the constants of `tile_model` were.

    exchange: of a word that a warp passes on, for each that shares its bank; spill: of 128 bytes of spilled registers;
    start: of a program, shared by the programs of an SM.
    """

    exchange: float
    spill: float
    start: float


POOLED = PoolingConstants(exchange=0.4635, spill=1.575, start=141.9)


@dataclass(frozen=True, slots=True)
class Prediction:
    """A modelled time and its parts: the terms in microseconds, the factors, and the resident warps per scheduler."""

    total_us: float
    parts: dict[str, float]


def roofline_us(device: Device, problem: Problem, work: Work) -> float:
    """The least time that `work` can take at the device's peak rates."""
    tensor = work.flops / _operations_per_us(device, problem, products=True)
    return max(tensor, work.bytes / (device.hbm_gbps * 1e3))


def blocks_per_sm(device: Device, resources: Resources) -> int:
    """Blocks of a kernel that one SM holds at a time; 0 if it cannot hold one."""
    threads = resources.num_warps * device.threads_per_warp
    registers = max(1, resources.registers) * threads
    limits = (
        device.blocks_per_sm,
        device.warps_per_sm // resources.num_warps,
        device.registers_per_sm // registers,
        device.shared_bytes_per_sm // max(1, resources.shared_bytes),
    )
    return 0 if resources.shared_bytes > device.shared_bytes_per_block else min(limits)


def predict(
    device: Device,
    problem: Problem,
    config: Config,
    work: Work,
    launches: Sequence[tuple[Launch, Resources]],
    constants: Constants | PoolingConstants | None = None,
) -> Prediction:
    """The time of one call; `constants` other than the fitted ones, to fit them."""
    further = EXTRA_LAUNCH_US * (len(launches) - 1)
    for launch, resources in launches:
        walk = walk_of(launch.kernel, problem, config) if resources.tile_instructions else None
        if walk is not None:
            fitted = STREAMED if launch.kernel.startswith("decode") else REUSED
            used = constants if isinstance(constants, Constants) else fitted
            total, parts = _walked(device, problem, config, work, launch, resources, walk, used)
            break
    else:
        pooled = constants if isinstance(constants, PoolingConstants) else POOLED
        total, parts = _bounded(device, problem, config, work, launches, pooled)
    return Prediction(total + further, {**parts, "further_launches_us": further})


def _walked(
    device: Device, problem: Problem, config: Config, work: Work, launch: Launch, resources: Resources, walk: Walk,
    constants: Constants,
) -> tuple[float, dict[str, float]]:  # fmt: skip
    """The time of a kernel whose programs walk over tiles: the busiest slot's, or that of all that is read."""
    blocks = max(1, blocks_per_sm(device, resources))
    resident = max(1, min(blocks, math.ceil(launch.programs / device.sm_count)))
    persistent = "_hopper" in launch.kernel
    one = pass_of(
        device, problem, config, work, resources, walk, resident, constants, persistent=persistent
    )  # fmt: skip
    slots = launch.programs if persistent else device.sm_count * resident
    passes = (walk.in_turns if persistent else walk.busiest)(slots, one.start)
    mean = walk.shared_out(min(slots, launch.programs), one.start)
    us = passes / device.clock_mhz
    hbm = work.bytes / (HBM_SHARE * device.hbm_gbps * 1e3)
    terms = {"tensor": one.tensor, "exp2": one.exp2, "issue": one.issue}
    parts = {f"{name}_us": us * one.groups * clocks for name, clocks in terms.items()}
    parts |= {"hbm_us": hbm, "exposed_us": us * one.own, "quantisation": passes / mean}
    parts |= {"warps_per_scheduler": one.groups, "passes": passes}
    dispatch = launch.programs / device.clock_mhz  # one a clock, of the whole GPU
    return smooth_max(us * one.clocks, hbm) + dispatch, {**parts, "dispatch_us": dispatch}


def _bounded(
    device: Device, problem: Problem, config: Config, work: Work, launches: Sequence[tuple[Launch, Resources]],
    constants: PoolingConstants,
) -> tuple[float, dict[str, float]]:  # fmt: skip
    """The time by the slowest resource. All work is laid on the launch that loads most; the others add their start."""
    launch, resources = max(launches, key=lambda pair: pair[0].programs * pair[0].traits.load_bytes)
    blocks = max(1, blocks_per_sm(device, resources))
    resident = min(blocks, math.ceil(launch.programs / device.sm_count))
    warps = resident * resources.num_warps / SCHEDULERS
    hiding = max(1.0, warps * (PIPELINE_HIDING if config.num_stages > 1 else 1.0))
    terms = _terms(device, problem, config, work, launch, resources, resident)
    slowest = max(terms.values())
    exposed = (sum(terms.values()) - slowest) / hiding
    quantisation = math.ceil(launch.programs / device.sm_count) * device.sm_count / launch.programs
    parts = {f"{name}_us": time for name, time in terms.items()}
    parts |= {"exposed_us": exposed, "quantisation": quantisation, "warps_per_scheduler": warps}
    alone = {} if launch.traits.dot_flops else _alone(device, problem, config, launch, resources, resident, constants)
    return (slowest + exposed) * quantisation + sum(alone.values()), parts | alone


def _alone(
    device: Device, problem: Problem, config: Config, launch: Launch, resources: Resources, resident: int,
    constants: PoolingConstants,
) -> dict[str, float]:  # fmt: skip
    """What nothing hides in a kernel without products."""
    clocks = device.sm_count * device.clock_mhz
    warps = _passes(problem, config, launch) * resources.num_warps / clocks
    spilled = device.threads_per_warp * resources.loop_spill_bytes / SHARED_BYTES_PER_CLOCK
    return {
        "exchange_us": warps * resources.loop_exchanges * constants.exchange,
        "spill_us": warps * spilled * constants.spill,
        "start_us": launch.programs * constants.start / (resident * clocks),
    }


def _passes(problem: Problem, config: Config, launch: Launch) -> float:
    """Passes of all programs through the loop of a kernel without products."""
    walk = walk_of(launch.kernel, problem, config)
    return launch.programs * (1.0 if walk is None else float(walk.total.mean()))


def _operations_per_us(device: Device, problem: Problem, products: bool) -> float:
    on_tensor_cores = products and problem.element_bytes == 2
    return (device.tensor_tflops if on_tensor_cores else device.fp32_tflops) * 1e6


def _terms(
    device: Device, problem: Problem, config: Config, work: Work, launch: Launch, resources: Resources, resident: int
) -> dict[str, float]:
    traits = launch.traits
    clocks = device.sm_count * device.clock_mhz  # of all SMs, in a microsecond
    products = traits.dot_flops > 0
    passes = work.flops / traits.dot_flops if products else _passes(problem, config, launch)
    loaded = passes * traits.load_bytes
    operands = (
        work.flops * problem.element_bytes / (2 * _rows_of_a_reader(device, launch, resources)) if products else 0
    )
    threads = resources.num_warps * device.threads_per_warp
    spilled = passes * threads * resources.loop_spill_bytes if products else 0
    in_flight = min(launch.programs, device.sm_count) * resident * _bytes_in_flight(config, launch)
    hbm = min(device.hbm_gbps * 1e3, in_flight / MEMORY_LATENCY_US)
    if resources.loop_instructions:
        issue = passes * resources.num_warps * resources.loop_instructions / (clocks * SCHEDULERS)
    else:
        issue = work.exp2 * SOFTMAX_OPERATIONS / (device.fp32_tflops * 1e6 / 2)
    return {
        "tensor": work.flops / _operations_per_us(device, problem, products),
        "issue": issue,
        "exp2": work.exp2 / (clocks * EXP2_PER_CLOCK),
        "shared": (operands + spilled) / (SHARED_BYTES_PER_CLOCK * clocks),
        "l2": loaded / (clocks * L2_BYTES_PER_CLOCK),
        "hbm": work.bytes / max(hbm, 1.0),
    }


def _bytes_in_flight(config: Config, launch: Launch) -> float:
    """Bytes that one block has asked for at a time: whole stages, or a quarter of all its loads."""
    return max(1, config.num_stages - 1) * max(launch.traits.stage_bytes, launch.traits.load_bytes / 4)


def _rows_of_a_reader(device: Device, launch: Launch, resources: Resources) -> float:
    """Rows of a product that one read of the other operand serves."""
    rows = launch.traits.dot_rows
    if device.arch == "sm_100":
        return float(min(rows, 128))
    if device.arch == "sm_90" and rows >= 64:
        return 64.0
    return max(16.0, rows / resources.num_warps)
