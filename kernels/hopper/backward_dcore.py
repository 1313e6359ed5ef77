"""The gradients that arrive at the core tokens, for Hopper (spec section 4). No atomics."""

from __future__ import annotations

from dataclasses import dataclass

import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from ...problem import Problem
from ...spec import CCASpec
from ..backward_dkv import allocate_dcore, dcore_work
from ..primitives import LOG2_E, first_query_of_core
from ..tunable import Config, Tunable
from .limits import ARCH, refusal
from .pipeline import COMPUTE_REGISTERS, FEEDER_REGISTERS, barriers, describe, multiprocessors, slot, turn_of

BLOCK_C = 128
"""Core tokens of a tile: 64, the rows of one matrix instruction, for each of the two computing groups of warps."""


@gluon.jit
def locate(
    item, sizes, GROUP_SIZE: gl.constexpr, WINDOW_SIZE: gl.constexpr, BLOCK_C: gl.constexpr, BLOCK_Q: gl.constexpr
):
    """(batch, core head, first core, tiles of queries); a head's first cores, which most queries see, come first.

    The tiles: (first query, how many at the left edge, how many that see every core, how many at the right edge).
    """
    seq_len, num_cores, core_heads, _, _ = sizes
    columns = gl.cdiv(num_cores, BLOCK_C)
    first_c = item % columns * BLOCK_C
    last_c = gl.minimum(first_c + BLOCK_C, num_cores) - 1
    start = first_query_of_core(first_c, GROUP_SIZE, WINDOW_SIZE)
    full_from = gl.minimum(first_query_of_core(last_c, GROUP_SIZE, WINDOW_SIZE), seq_len)
    left = gl.cdiv(gl.maximum(full_from - start, 0), BLOCK_Q)
    full = gl.maximum(seq_len - start - left * BLOCK_Q, 0) // BLOCK_Q
    right = gl.cdiv(gl.maximum(seq_len - start - (left + full) * BLOCK_Q, 0), BLOCK_Q)
    return item // columns // core_heads, item // columns % core_heads, first_c, (start, left, full, right)


@gluon.jit
def feed(
    descriptors, tiles_smem, bars, sizes, lse_ptr, delta_ptr,
    GROUP_SIZE: gl.constexpr, WINDOW_SIZE: gl.constexpr, BLOCK_C: gl.constexpr, BLOCK_Q: gl.constexpr,
    HEAD_DIM: gl.constexpr, NUM_STAGES: gl.constexpr,
):  # fmt: skip
    """The feeding warp: the cores of each tile, then each query head's queries, edges first, with what is theirs."""
    q_desc, dout_desc, k_desc, v_desc = descriptors
    q_smem, dout_smem, lse_smem, delta_smem, k_smem, v_smem = tiles_smem
    core_ready, core_free, q_ready, q_free, dout_ready, dout_free = bars
    seq_len, _, core_heads, items, q_per_core = sizes
    HALF: gl.constexpr = BLOCK_C // 2
    count = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        batch, core_head, first_c, tiles = locate(item, sizes, GROUP_SIZE, WINDOW_SIZE, BLOCK_C, BLOCK_Q)
        start, left, full, right = tiles
        for half in gl.static_range(2):
            ready = core_ready.index(half)
            row = [batch, core_head, first_c + half * HALF, 0]
            mbarrier.wait(core_free.index(half), (turn_of(item) & 1) ^ 1)
            mbarrier.expect(ready, HALF * HEAD_DIM * 4)
            tma.async_copy_global_to_shared(k_desc, row, ready, k_smem.index(half))
            tma.async_copy_global_to_shared(v_desc, row, ready, v_smem.index(half))
        total = left + full + right
        for step in range(q_per_core * total):
            head = core_head * q_per_core + step // total
            number = step % total
            edge = number + gl.where(number < left, 0, full)
            query = start + gl.where(number < left + right, edge, number - right) * BLOCK_Q
            stage, parity = slot(count, NUM_STAGES)
            ready = q_ready.index(stage)
            mbarrier.wait(q_free.index(stage), parity ^ 1)
            mbarrier.expect(ready, BLOCK_Q * HEAD_DIM * 2)
            tma.async_copy_global_to_shared(q_desc, [batch, head, query, 0], ready, q_smem.index(stage))
            offs = query + gl.arange(0, BLOCK_Q, layout=gl.BlockedLayout([1], [32], [1], [0]))
            stats = (batch * core_heads * q_per_core + head).to(gl.int64) * seq_len + offs
            lse_smem.index(stage).store(gl.load(lse_ptr + stats, mask=offs < seq_len, other=0.0) * LOG2_E)
            delta_smem.index(stage).store(gl.load(delta_ptr + stats, mask=offs < seq_len, other=0.0))
            mbarrier.arrive(ready, count=1)
            ready = dout_ready.index(stage)
            mbarrier.wait(dout_free.index(stage), parity ^ 1)
            mbarrier.expect(ready, BLOCK_Q * HEAD_DIM * 2)
            tma.async_copy_global_to_shared(dout_desc, [batch, head, query, 0], ready, dout_smem.index(stage))
            count += 1


@gluon.jit
def sweep(
    k, v, dk, dv, tiles_smem, bars, offs_c, tiles, seq_len, count,
    SCALE_LOG2: gl.constexpr, GROUP_SIZE: gl.constexpr, WINDOW_SIZE: gl.constexpr, BLOCK_Q: gl.constexpr,
    NUM_STAGES: gl.constexpr, MASKED: gl.constexpr, SCORES: gl.constexpr, GRADS: gl.constexpr,
):  # fmt: skip
    """Add what the tiles of queries at the edges (MASKED), or those that see every core, give to dk and dv [C, D]."""
    q_smem, dout_smem, lse_smem, delta_smem, _, _ = tiles_smem
    _, _, q_ready, q_free, dout_ready, dout_free = bars
    start, left, full, right = tiles
    HALF: gl.constexpr = k.shape[0]
    HEAD_DIM: gl.constexpr = k.shape[1]
    QUERIES: gl.constexpr = gl.SliceLayout(0, SCORES)
    PROBS: gl.constexpr = gl.DotOperandLayout(0, GRADS, 2)
    for number in range(left + right if MASKED else full):
        stage, parity = slot(count, NUM_STAGES)
        q = q_smem.index(stage).reshape([BLOCK_Q, HEAD_DIM])
        dout = dout_smem.index(stage).reshape([BLOCK_Q, HEAD_DIM])
        blank = gl.zeros([HALF, BLOCK_Q], gl.float32, layout=SCORES)
        # cores by queries, so that the probabilities are a product's first operand as they come
        mbarrier.wait(q_ready.index(stage), parity)
        scores = warpgroup_mma(k, q.permute((1, 0)), blank, use_acc=False, is_async=True)
        mbarrier.wait(dout_ready.index(stage), parity)
        dprobs = warpgroup_mma(v, dout.permute((1, 0)), blank, use_acc=False, is_async=True)
        lse2 = lse_smem.index(stage).load(QUERIES)
        scores = warpgroup_mma_wait(1, deps=[scores])
        probs = gl.exp2(scores * SCALE_LOG2 - lse2[None, :])
        if MASKED:
            query = start + (number + gl.where(number < left, 0, full)) * BLOCK_Q
            offs_q = query + gl.arange(0, BLOCK_Q, layout=QUERIES)
            visible = offs_q[None, :] >= first_query_of_core(offs_c, GROUP_SIZE, WINDOW_SIZE)[:, None]
            probs = gl.where(visible & (offs_q < seq_len)[None, :], probs, 0.0)
        narrow = gl.convert_layout(probs.to(q_smem.dtype), PROBS)
        dv = warpgroup_mma(narrow, dout, dv, is_async=True)
        delta = delta_smem.index(stage).load(QUERIES)
        dprobs = warpgroup_mma_wait(1, deps=[dprobs])
        ds = gl.convert_layout((probs * (dprobs - delta[None, :])).to(q_smem.dtype), PROBS)
        dk = warpgroup_mma(ds, q, dk, is_async=True)
        dv = warpgroup_mma_wait(1, deps=[dv])
        mbarrier.arrive(dout_free.index(stage), count=1)
        dk = warpgroup_mma_wait(0, deps=[dk])
        mbarrier.arrive(q_free.index(stage), count=1)
        count += 1
    return dk, dv, count


@gluon.jit
def compute(
    GROUP: gl.constexpr, tiles_smem, bars, sizes, dk_ptr, dv_ptr,
    SCALE: gl.constexpr, GROUP_SIZE: gl.constexpr, WINDOW_SIZE: gl.constexpr, BLOCK_C: gl.constexpr,
    BLOCK_Q: gl.constexpr, HEAD_DIM: gl.constexpr, NUM_STAGES: gl.constexpr,
):  # fmt: skip
    """Four computing warps: one half (GROUP 0 or 1) of the cores of every tile."""
    k_smem, v_smem = tiles_smem[4], tiles_smem[5]
    core_ready, core_free = bars[0], bars[1]
    seq_len, num_cores, core_heads, items, q_per_core = sizes
    HALF: gl.constexpr = BLOCK_C // 2
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_Q, 16])
    GRADS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    k = k_smem.index(GROUP).reshape([HALF, HEAD_DIM])
    v = v_smem.index(GROUP).reshape([HALF, HEAD_DIM])
    count = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        batch, core_head, first_c, tiles = locate(item, sizes, GROUP_SIZE, WINDOW_SIZE, BLOCK_C, BLOCK_Q)
        first_c += GROUP * HALF
        offs_c = first_c + gl.arange(0, HALF, layout=gl.SliceLayout(1, SCORES))
        dk = gl.zeros([HALF, HEAD_DIM], gl.float32, layout=GRADS)
        dv = gl.zeros([HALF, HEAD_DIM], gl.float32, layout=GRADS)
        mbarrier.wait(core_ready.index(GROUP), turn_of(item) & 1)
        for _ in range(q_per_core):
            for full in gl.static_range(2):
                dk, dv, count = sweep(
                    k, v, dk, dv, tiles_smem, bars, offs_c, tiles, seq_len, count, SCALE * LOG2_E,
                    GROUP_SIZE, WINDOW_SIZE, BLOCK_Q, NUM_STAGES, full == 0, SCORES, GRADS,
                )  # fmt: skip
        mbarrier.arrive(core_free.index(GROUP), count=1)
        rows = first_c + gl.arange(0, HALF, layout=gl.SliceLayout(1, GRADS))
        columns = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, GRADS))
        base = (batch * core_heads + core_head).to(gl.int64) * num_cores * HEAD_DIM
        offs = base + rows[:, None] * HEAD_DIM + columns[None, :]
        gl.store(dk_ptr + offs, dk * SCALE, mask=(rows < num_cores)[:, None])
        gl.store(dv_ptr + offs, dv, mask=(rows < num_cores)[:, None])


# fmt: off
@gluon.jit
def backward_dcore_hopper_kernel(
    q_desc, dout_desc, k_desc, v_desc, lse_ptr, delta_ptr, dk_ptr, dv_ptr, sizes,
    SCALE: gl.constexpr, GROUP_SIZE: gl.constexpr, WINDOW_SIZE: gl.constexpr, HEAD_DIM: gl.constexpr,
    BLOCK_C: gl.constexpr, BLOCK_Q: gl.constexpr, NUM_STAGES: gl.constexpr, FEEDER: gl.constexpr,
    COMPUTE: gl.constexpr,
):
    # fmt: on
    """Persistent: each program takes every `num_programs`-th tile of cores."""
    dtype: gl.constexpr = q_desc.dtype
    line: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    q_smem = gl.allocate_shared_memory(dtype, [NUM_STAGES, 1, 1, BLOCK_Q, HEAD_DIM], q_desc.layout)
    dout_smem = gl.allocate_shared_memory(dtype, [NUM_STAGES, 1, 1, BLOCK_Q, HEAD_DIM], q_desc.layout)
    lse_smem = gl.allocate_shared_memory(gl.float32, [NUM_STAGES, BLOCK_Q], line)
    delta_smem = gl.allocate_shared_memory(gl.float32, [NUM_STAGES, BLOCK_Q], line)
    k_smem = gl.allocate_shared_memory(dtype, [2, 1, 1, BLOCK_C // 2, HEAD_DIM], k_desc.layout)
    v_smem = gl.allocate_shared_memory(dtype, [2, 1, 1, BLOCK_C // 2, HEAD_DIM], k_desc.layout)
    descriptors = (q_desc, dout_desc, k_desc, v_desc)
    tiles_smem = (q_smem, dout_smem, lse_smem, delta_smem, k_smem, v_smem)
    # q is ready when its copy has arrived and the statistics are written
    bars = (
        barriers(2, 1), barriers(2, 1), barriers(NUM_STAGES, 2), barriers(NUM_STAGES, 2),
        barriers(NUM_STAGES, 1), barriers(NUM_STAGES, 2),
    )  # fmt: skip
    gl.warp_specialize(
        [
            (compute, (0, tiles_smem, bars, sizes, dk_ptr, dv_ptr,
                       SCALE, GROUP_SIZE, WINDOW_SIZE, BLOCK_C, BLOCK_Q, HEAD_DIM, NUM_STAGES)),
            (compute, (1, tiles_smem, bars, sizes, dk_ptr, dv_ptr,
                       SCALE, GROUP_SIZE, WINDOW_SIZE, BLOCK_C, BLOCK_Q, HEAD_DIM, NUM_STAGES)),
            (feed, (descriptors, tiles_smem, bars, sizes, lse_ptr, delta_ptr,
                    GROUP_SIZE, WINDOW_SIZE, BLOCK_C, BLOCK_Q, HEAD_DIM, NUM_STAGES)),
        ],
        [4, 1],
        [COMPUTE, FEEDER],
    )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class BackwardDcoreHopperConfig(Config):
    """Launch choices of `backward_dcore_hopper_kernel`: queries of a tile; `num_stages` such tiles in flight."""

    block_q: int = 64

    def refusal(self, problem: Problem) -> str | None:
        """Why this config cannot run `problem`, or None."""
        if self.num_warps != 4:
            return f"num_warps {self.num_warps} is not 4, the warps of a matrix instruction"
        if self.block_q < 16:
            return f"block_q {self.block_q} is below 16, the smallest side of a matrix product"
        return Config.refusal(self, problem) or refusal(problem)


SPACE = {"block_q": (32, 64), "num_warps": (4,), "num_stages": (2, 3, 4)}


def default_config(problem: Problem, arch: str) -> BackwardDcoreHopperConfig:
    """A config that runs every `problem` of these kernels."""
    return BackwardDcoreHopperConfig(block_q=64, num_stages=2)


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

    lse, delta (B, Hq, T) and dk_core, dv_core (B, Hc, C, D) are float32 and contiguous.
    """
    tokens, head_dim = q.shape[2:]
    batch, core_heads, num_cores = k_core.shape[:3]
    items = triton.cdiv(num_cores, BLOCK_C) * core_heads * batch
    backward_dcore_hopper_kernel[(min(multiprocessors(q.device), items),)](
        describe(q, config.block_q), describe(dout, config.block_q),
        describe(k_core, BLOCK_C // 2), describe(v_core, BLOCK_C // 2), lse, delta, dk_core, dv_core,
        (tokens, num_cores, core_heads, items, q.shape[1] // core_heads),
        SCALE=spec.softmax_scale(head_dim),
        GROUP_SIZE=spec.group_size,
        WINDOW_SIZE=spec.window_size,
        HEAD_DIM=head_dim,
        BLOCK_C=BLOCK_C,
        BLOCK_Q=config.block_q,
        NUM_STAGES=config.num_stages,
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
    space=SPACE,
    default=default_config,
    allocate=allocate_dcore,
    launch=launch,
    work=dcore_work,
    kernels=(backward_dcore_hopper_kernel,),
    archs=(ARCH,),
)
