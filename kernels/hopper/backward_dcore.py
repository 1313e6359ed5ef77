"""The gradients that arrive at the core tokens, for Hopper (spec section 4). No atomics."""

from __future__ import annotations

from dataclasses import dataclass

import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from ...problem import Problem
from ...spec import CCASpec
from ..backward_dkv import allocate_dcore, dcore_work
from ..enqueue import enqueue
from ..layout import core_gradient_layout
from ..primitives import LOG2_E, first_query_of_core
from ..tunable import Tunable
from .keys import BLOCK_KEYS, SPACE, QueryTilesConfig, allocate, feed_keys, feed_queries, gather, query_tiles
from .limits import ARCH, MULTIPROCESSORS
from .pipeline import COMPUTE_REGISTERS, FEEDER_REGISTERS, describe, item_of, multiprocessors, turns


@gluon.jit
def locate(
    turn, sizes, GROUP_SIZE: gl.constexpr, WINDOW_SIZE: gl.constexpr, BLOCK_Q: gl.constexpr, ITEM_TILES: gl.constexpr
):
    """(batch, core head, first core, tiles of queries, whether these come in rising order) of a turn.

    An item is one tile of cores, the first ones of all heads first; or it is two of one head, a long and a short one,
    which have the same number of queries in every item. Then the programs of a head walk through its queries side by
    side, down from the end for long tiles and up to it for short ones, and L2 serves all but one of them.
    """
    seq_len, num_cores, core_heads, items, _ = sizes
    columns = gl.cdiv(num_cores, BLOCK_KEYS)
    item = item_of(turn // ITEM_TILES)
    rising = turn % ITEM_TILES
    if ITEM_TILES == 2:
        pairs = (columns + 1) // 2
        head = item // pairs
        place = item % pairs
        column = gl.where(rising == 1, columns - (columns + 1) % 2 - place, place)
    else:
        heads = items // columns
        head = item % heads
        column = item // heads
    first_c = column * BLOCK_KEYS
    last_c = gl.minimum(first_c + BLOCK_KEYS, num_cores) - 1
    start = first_query_of_core(first_c, GROUP_SIZE, WINDOW_SIZE)
    full = first_query_of_core(last_c, GROUP_SIZE, WINDOW_SIZE)
    tiles = query_tiles(start, full, seq_len, seq_len, BLOCK_Q)
    return head // core_heads, head % core_heads, first_c, tiles, rising == 1


@gluon.jit
def feed(
    descriptors, tiles_smem, bars, sizes, lse_ptr, delta_ptr,
    GROUP_SIZE: gl.constexpr, WINDOW_SIZE: gl.constexpr, BLOCK_Q: gl.constexpr, HEAD_DIM: gl.constexpr,
    NUM_STAGES: gl.constexpr, ITEM_TILES: gl.constexpr,
):  # fmt: skip
    """The feeding warp: the cores of each tile, then the queries of each of their heads."""
    q_desc, dout_desc, k_desc, v_desc = descriptors
    seq_len, _, core_heads, items, q_per_core = sizes
    count = 0
    for turn in range(ITEM_TILES * turns(items)):
        batch, core_head, first_c, tiles, rising = locate(turn, sizes, GROUP_SIZE, WINDOW_SIZE, BLOCK_Q, ITEM_TILES)
        feed_keys(turn, batch, core_head, first_c, k_desc, v_desc, tiles_smem, bars, HEAD_DIM)
        count = feed_queries(
            batch, core_head * q_per_core, q_per_core, core_heads * q_per_core, tiles, rising, seq_len, count,
            q_desc, dout_desc, lse_ptr, delta_ptr, tiles_smem, bars, BLOCK_Q, HEAD_DIM, NUM_STAGES,
        )  # fmt: skip


@gluon.jit
def compute(
    GROUP: gl.constexpr, tiles_smem, bars, sizes, dk_ptr, dv_ptr, grad_strides,
    SCALE: gl.constexpr, GROUP_SIZE: gl.constexpr, WINDOW_SIZE: gl.constexpr, PART: gl.constexpr,
    BLOCK_Q: gl.constexpr, HEAD_DIM: gl.constexpr, NUM_STAGES: gl.constexpr, ITEM_TILES: gl.constexpr,
):  # fmt: skip
    """Four computing warps: one half (GROUP 0 or 1) of the cores of every tile."""
    seq_len, num_cores, _, items, q_per_core = sizes
    HALF: gl.constexpr = BLOCK_KEYS // 2
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_Q, 16])
    GRADS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    count = 0
    for turn in range(ITEM_TILES * turns(items)):
        batch, core_head, first_c, tiles, _rising = locate(turn, sizes, GROUP_SIZE, WINDOW_SIZE, BLOCK_Q, ITEM_TILES)
        first_c += GROUP * HALF
        offs_c = first_c + gl.arange(0, HALF, layout=gl.SliceLayout(1, SCORES))
        first_query = first_query_of_core(offs_c, GROUP_SIZE, WINDOW_SIZE)
        last_query = gl.full([HALF], 0, gl.int32, layout=gl.SliceLayout(1, SCORES)) + (seq_len - 1)
        blank = gl.zeros([HALF, HEAD_DIM], gl.float32, layout=GRADS)
        mbarrier.wait(bars[0].index(GROUP), turn & 1)
        dk, dv, count = gather(
            GROUP, q_per_core, blank, blank, tiles_smem, bars, first_query, last_query, tiles, count,
            SCALE * LOG2_E, BLOCK_Q, HEAD_DIM, NUM_STAGES, SCORES, GRADS,
        )  # fmt: skip
        mbarrier.arrive(bars[1].index(GROUP), count=1)
        rows = first_c + gl.arange(0, HALF, layout=gl.SliceLayout(1, GRADS))
        columns = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, GRADS))
        base = batch.to(gl.int64) * grad_strides[0] + core_head.to(gl.int64) * grad_strides[1]
        columns = columns // PART * grad_strides[3] + columns % PART
        offs = base + (rows.to(gl.int64) * grad_strides[2])[:, None] + columns[None, :]
        gl.store(dk_ptr + offs, dk * SCALE, mask=(rows < num_cores)[:, None])
        gl.store(dv_ptr + offs, dv, mask=(rows < num_cores)[:, None])


# fmt: off
@gluon.jit
def backward_dcore_hopper_kernel(
    q_desc, dout_desc, k_desc, v_desc, lse_ptr, delta_ptr, dk_ptr, dv_ptr, grad_strides, sizes,
    SCALE: gl.constexpr, GROUP_SIZE: gl.constexpr, WINDOW_SIZE: gl.constexpr, HEAD_DIM: gl.constexpr,
    PART: gl.constexpr, BLOCK_Q: gl.constexpr, NUM_STAGES: gl.constexpr, ITEM_TILES: gl.constexpr, FEEDER: gl.constexpr,
    COMPUTE: gl.constexpr,
):
    # fmt: on
    """Persistent: each program takes the tiles of cores that `locate` gives it."""
    tiles_smem, bars = allocate(q_desc, k_desc, BLOCK_Q, HEAD_DIM, NUM_STAGES)
    descriptors = (q_desc, dout_desc, k_desc, v_desc)
    gl.warp_specialize(
        [
            (compute, (0, tiles_smem, bars, sizes, dk_ptr, dv_ptr, grad_strides,
                       SCALE, GROUP_SIZE, WINDOW_SIZE, PART, BLOCK_Q, HEAD_DIM, NUM_STAGES, ITEM_TILES)),
            (compute, (1, tiles_smem, bars, sizes, dk_ptr, dv_ptr, grad_strides,
                       SCALE, GROUP_SIZE, WINDOW_SIZE, PART, BLOCK_Q, HEAD_DIM, NUM_STAGES, ITEM_TILES)),
            (feed, (descriptors, tiles_smem, bars, sizes, lse_ptr, delta_ptr,
                    GROUP_SIZE, WINDOW_SIZE, BLOCK_Q, HEAD_DIM, NUM_STAGES, ITEM_TILES)),
        ],
        [4, 1],
        [COMPUTE, FEEDER],
    )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class BackwardDcoreHopperConfig(QueryTilesConfig):
    """Launch choices of `backward_dcore_hopper_kernel`; `item_tiles`: tiles of cores of an item, see `locate`."""

    item_tiles: int = 1

    def refusal(self, problem: Problem) -> str | None:
        """Why this config cannot run `problem`, or None."""
        if self.item_tiles not in (1, 2):
            return f"item_tiles {self.item_tiles} is not 1 or 2"
        return QueryTilesConfig.refusal(self, problem)


def items_of(num_cores: int, heads: int, item_tiles: int) -> int:
    """Items of `heads` heads in all, of `num_cores` cores each."""
    columns: int = triton.cdiv(num_cores, BLOCK_KEYS.value)
    return -(-columns // item_tiles) * heads


def default_config(problem: Problem, arch: str) -> BackwardDcoreHopperConfig:
    """A config that runs every `problem` of these kernels: tiles in pairs where these leave few programs idle."""
    pairs = items_of(problem.seq_len // problem.group_size, problem.num_core_heads * problem.batch, 2)
    even = 10 * triton.cdiv(pairs, MULTIPROCESSORS) * MULTIPROCESSORS <= 11 * pairs
    return BackwardDcoreHopperConfig(block_q=64, num_stages=3, item_tiles=2 if even else 1)


def launch_backward_dcore_hopper(
    q: Tensor,
    k_core: Tensor,
    v_core: Tensor,
    dout: Tensor,
    lse: Tensor,
    delta: Tensor,
    dk_core: Tensor,
    dv_core: Tensor,
    *,
    spec: CCASpec,
    config: BackwardDcoreHopperConfig,
) -> None:
    """Fill dk_core and dv_core, as `launch_backward_dcore` does for dense sequences; `usable` must hold.

    lse, delta (B, Hq, T) are float32 and contiguous.
    """
    tokens, head_dim = q.shape[2:]
    batch, core_heads, num_cores = k_core.shape[:3]
    items = items_of(num_cores, core_heads * batch, config.item_tiles)
    grad_strides, part = core_gradient_layout(dk_core, dv_core)
    enqueue(
        backward_dcore_hopper_kernel, (min(multiprocessors(q.device), items), 1, 1),
        describe(q, config.block_q), describe(dout, config.block_q),
        describe(k_core, BLOCK_KEYS.value // 2), describe(v_core, BLOCK_KEYS.value // 2), lse, delta, dk_core, dv_core,
        grad_strides, (tokens, num_cores, core_heads, items, q.shape[1] // core_heads),
        SCALE=spec.softmax_scale(head_dim),
        GROUP_SIZE=spec.group_size,
        WINDOW_SIZE=spec.window_size,
        HEAD_DIM=head_dim,
        PART=part or head_dim,
        BLOCK_Q=config.block_q,
        NUM_STAGES=config.num_stages,
        ITEM_TILES=config.item_tiles,
        FEEDER=FEEDER_REGISTERS,
        COMPUTE=COMPUTE_REGISTERS,
        num_warps=config.num_warps,
    )  # fmt: skip


def launch(problem: Problem, tensors: dict[str, Tensor], config: BackwardDcoreHopperConfig) -> None:
    """One launch on what `allocate_dcore` made."""
    launch_backward_dcore_hopper(**tensors, spec=problem.spec, config=config)


BACKWARD_DCORE_HOPPER = Tunable(
    name="backward_dcore_hopper",
    config=BackwardDcoreHopperConfig,
    space={**SPACE, "item_tiles": (1, 2)},
    default=default_config,
    allocate=allocate_dcore,
    launch=launch,
    work=dcore_work,
    kernels=(backward_dcore_hopper_kernel,),
    archs=(ARCH,),
)
