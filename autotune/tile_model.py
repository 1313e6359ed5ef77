"""How long kernels take whose programs walk over tiles: one formula for a pass of the loop, and who has most of them.

A pass through the loop costs a block, in clocks of its SM,

    pass = groups * shared + own

where `groups` of four warps are resident on the SM. What they share, the tensor cores and the exponentials, each waits
for in turn: `shared` is a group's. What a group waits for alone, its own instructions one after the other, moves of
spilled registers, barriers, loads that were not begun early enough, hides behind the others: `own` is paid once.
A program costs a start besides, and programs go to the first slot that is free. Hopper's own kernels stay on their SM
and hand on tiles through a ring, which hides nearly all that is their own, but for that of a short ring.

`shared` of tensor cores: operations at the peak rate. A product of a warp group is slower if it is narrow, since it
reads 64 rows whatever its columns, and on Hopper a single warp's reaches less than half of the peak.

The constants are in clocks. `benchmarks/plan_quality.py fit` fitted them to times of an H200 at 16384 and 65536 tokens;
docs/tuning.md says how good they are elsewhere. They are ascribed to every other GPU, with its own rates and limits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..kernels.tunable import Config, Work
from ..problem import Problem
from .binary import Resources
from .devices import Device
from .walks import Walk

GROUP = 4
"""Warps of a group, one on each scheduler of an SM."""
GROUP_PRODUCT = 2 * 64 * 16
"""Operations of a group's product for each of its columns."""
EXP2_CLOCKS = 8
"""Of a warp's exponentials, on one scheduler's share of 16 a clock and SM."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Constants:
    """Clocks, and factors on clocks, of a pass and of a program.

    narrow: columns at which a group's product becomes slow; warp_tensor: factor on products of single warps on Hopper.
    exp2: factor on exponentials. issue_shared, issue: of an instruction, shared and own. spill: of a move of spilled
    registers. loop: of barriers and waiting; coupling: of those with each further group of the block. load: of a load
    that is waited for, with load_rate: its bytes a clock; second_stage: of one begun a pass earlier; per_load: of each
    of its instructions. ring: of a ring of two on Hopper, of which a longer one has a sixteenth for each tile more;
    unhidden: the share of what is own that a ring does not hide. start: of a program, with outside and outside_spill:
    of each instruction and move outside of the loops.
    """

    narrow: float
    warp_tensor: float
    exp2: float
    issue_shared: float
    issue: float
    spill: float
    loop: float
    coupling: float
    load: float
    load_rate: float
    second_stage: float
    per_load: float
    ring: float
    unhidden: float
    start: float
    outside: float
    outside_spill: float


REUSED = Constants(
    narrow=38.31, warp_tensor=2.874, exp2=1.455, issue_shared=0.0, issue=0.9486, spill=28.68, loop=167.7,
    coupling=221.8, load=350.7, load_rate=50.98, second_stage=253.9, per_load=3.911, ring=353.1, unhidden=0.06888,
    start=1809.0, outside=6.551, outside_spill=44.63,
)  # fmt: skip
"""Of kernels whose tiles many programs read: they come from the L2 cache."""
STREAMED = Constants(
    narrow=0.0, warp_tensor=0.0, exp2=0.0, issue_shared=0.7036, issue=1.636, spill=12.32, loop=471.8, coupling=0.0,
    load=1335.0, load_rate=76.15, second_stage=830.5, per_load=0.0, ring=0.0, unhidden=0.0, start=3957.0,
    outside=0.0, outside_spill=0.0,
)  # fmt: skip
"""Of decoding, which reads every tile once: they come from device memory."""


@dataclass(frozen=True, slots=True)
class Pass:
    """A pass of a block's loop in clocks: what its groups share, by resource, and what is their own; `start`: passes
    that the start of a program is worth; `groups` resident on an SM."""

    tensor: float
    exp2: float
    issue: float
    own: float
    start: float
    groups: float

    @property
    def clocks(self) -> float:
        """All of it."""
        return self.groups * (self.tensor + self.exp2 + self.issue) + self.own


def pass_of(
    device: Device, problem: Problem, config: Config, work: Work, resources: Resources, walk: Walk, resident: int,
    constants: Constants, *, persistent: bool,
) -> Pass:  # fmt: skip
    """A pass of a block of which `resident` share an SM; `persistent`: of a kernel that stays on its SM."""
    c, r, edge = constants, resources, walk.edge_share
    groups = (walk.rows / 16 if persistent else r.num_warps) / GROUP
    instructions = (1 - edge) * r.tile_instructions + edge * r.edge_instructions
    spills = (1 - edge) * r.tile_spills + edge * r.edge_spills
    own = c.issue * instructions + c.spill * spills + c.loop + c.coupling * (groups - 1)
    if persistent:
        own = c.unhidden * own + c.ring / 16 ** (config.num_stages - 2)
    else:
        own += _load_clocks(problem, config, r, walk, c)
    outside = 0.0 if persistent else c.outside * r.outside_instructions + c.outside_spill * r.outside_spills
    made = Pass(
        tensor=_tensor_clocks(device, problem, work, r, walk, groups, c),
        exp2=c.exp2 * EXP2_CLOCKS * r.tile_exponentials,
        issue=c.issue_shared * instructions,
        own=own,
        start=0.0,
        groups=resident * groups,
    )
    return Pass(made.tensor, made.exp2, made.issue, own, (c.start + outside) / made.clocks, made.groups)


def _tensor_clocks(
    device: Device, problem: Problem, work: Work, resources: Resources, walk: Walk, groups: float, c: Constants
) -> float:
    """Of one group's products in a pass."""
    flops = work.flops / work.exp2 * walk.rows * walk.block / groups
    clocks = flops * device.sm_count * device.clock_mhz / (device.tensor_tflops * 1e6)
    if resources.group_products:
        columns = flops / (resources.tile_products * GROUP_PRODUCT)
        return clocks * max(1.0, 0.3 + c.narrow / columns)
    return clocks * (c.warp_tensor if device.arch == "sm_90" else 1.0)


def _load_clocks(problem: Problem, config: Config, resources: Resources, walk: Walk, c: Constants) -> float:
    """Of the loads that a pass waits for: all with one stage, some with two."""
    if config.num_stages > 2:
        return 0.0
    many = c.per_load * resources.tile_loads * max(1.0, resources.num_warps / GROUP)
    if config.num_stages == 2:
        return c.second_stage + many
    return c.load + 2 * problem.head_dim * problem.element_bytes * walk.block / c.load_rate + many


def smooth_max(one: float, other: float) -> float:
    """Somewhat more than the larger, where both are of a size."""
    largest = max(one, other)
    return largest * math.pow((one / largest) ** 4 + (other / largest) ** 4, 0.25)
