"""The gradient of the queries for Hopper (spec section 4): a tile's products while the slopes before it are added."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ...problem import Problem
from ...spec import CCASpec
from ..backward_dq import allocate, work
from ..enqueue import enqueue
from ..primitives import LOG2_E
from ..tunable import Tunable
from .limits import ARCH
from .pipeline import describe, item_of, pack, settle, slot, turns, unpack
from .queries import (
    BLOCK_Q,
    BUFFERS,
    SPACE,
    KeyTilesConfig,
    allocate_keys,
    allocate_rows,
    feed,
    key_at,
    locate,
    set_up,
    tiles_of,
    visible,
)


@gluon.jit
def probabilities(
    scores, lse2, is_core, key, offs_q,
    SCALE_LOG2: gl.constexpr, GROUP_SIZE: gl.constexpr, WINDOW_SIZE: gl.constexpr, BLOCK_K: gl.constexpr,
    MASKED: gl.constexpr, SCORES: gl.constexpr,
):  # fmt: skip
    """The probabilities [Q, K] that the forward gave its keys; zero for those that a query does not see."""
    probs = gl.exp2(scores * SCALE_LOG2 - lse2[:, None])
    if MASKED:
        probs = gl.where(visible(offs_q, is_core, key, GROUP_SIZE, WINDOW_SIZE, BLOCK_K, SCORES), probs, 0.0)
    return probs


@gluon.jit
def sweep(
    q, dout, keys_smem, bars, ds, dq, lse2, delta, offs_q, tiles, first, end, count,
    SCALE_LOG2: gl.constexpr, GROUP_SIZE: gl.constexpr, WINDOW_SIZE: gl.constexpr, BLOCK_K: gl.constexpr,
    NUM_STAGES: gl.constexpr, MASKED: gl.constexpr, SCORES: gl.constexpr, GRADS: gl.constexpr,
):  # fmt: skip
    """Tiles first .. end - 1; `ds` are the slopes of the tile before, whose keys are still to be added to dq.

    They are zero where there is none, which is at tile 0. The waits for keys that are known to be here end basic
    blocks: the assembler would otherwise move the waits for products up, and leave the exponentials and the slopes
    without a product to run beside.
    """
    k_smem, v_smem = keys_smem
    _, _, k_ready, k_free, v_ready, v_free = bars
    HALF: gl.constexpr = q.shape[0]
    HEAD_DIM: gl.constexpr = q.shape[1]
    DTYPE: gl.constexpr = k_smem.dtype
    for number in range(first, end):
        stage, parity = slot(count, NUM_STAGES)
        before = gl.where(number == 0, stage, (count - 1) % NUM_STAGES)
        is_core, key = key_at(number, tiles, BLOCK_K)
        k = k_smem.index(stage).reshape([BLOCK_K, HEAD_DIM])
        v = v_smem.index(stage).reshape([BLOCK_K, HEAD_DIM])
        blank = gl.zeros([HALF, BLOCK_K], gl.float32, layout=SCORES)
        mbarrier.wait(k_ready.index(stage), parity)
        scores = warpgroup_mma(q, k.permute((1, 0)), blank, use_acc=False, is_async=True)
        mbarrier.wait(v_ready.index(stage), parity)
        dprobs = warpgroup_mma(dout, v.permute((1, 0)), blank, use_acc=False, is_async=True)
        keys_before = k_smem.index(before).reshape([BLOCK_K, HEAD_DIM])
        dq = warpgroup_mma(unpack(ds, DTYPE, GRADS), keys_before, dq, is_async=True)
        scores = warpgroup_mma_wait(2, deps=[scores])
        probs = probabilities(
            scores, lse2, is_core, key, offs_q, SCALE_LOG2, GROUP_SIZE, WINDOW_SIZE, BLOCK_K, MASKED, SCORES
        )
        mbarrier.wait(k_ready.index(stage), parity)
        dprobs = warpgroup_mma_wait(1, deps=[dprobs])
        mbarrier.arrive(v_free.index(stage), count=1)
        ds = pack(probs * (dprobs - delta[:, None]), DTYPE)
        mbarrier.wait(k_ready.index(stage), parity)
        dq = warpgroup_mma_wait(0, deps=[dq])
        mbarrier.arrive(k_free.index(before), count=1, pred=number != 0)
        ds = settle(ds)
        count += 1
    return ds, dq, count


@gluon.jit
def compute(
    GROUP: gl.constexpr, dq_desc, rows_smem, keys_smem, bars, sizes, lse_ptr, delta_ptr, dq_ptr, dq_strides,
    SCALE: gl.constexpr, GROUP_SIZE: gl.constexpr, WINDOW_SIZE: gl.constexpr, MEAN: gl.constexpr,
    BLOCK_K: gl.constexpr, HEAD_DIM: gl.constexpr, NUM_STAGES: gl.constexpr,
):  # fmt: skip
    """Four computing warps: one half (GROUP 0 or 1) of the queries of every tile."""
    k_smem, _ = keys_smem
    rows_ready, rows_free, _, k_free, _, _ = bars
    seq_len, heads, items, _, _ = sizes
    HALF: gl.constexpr = BLOCK_Q // 2
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_K, 16])
    GRADS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    count = 0
    for turn in range(turns(items)):
        batch, head, first_q = locate(item_of(turn), sizes)
        tiles, edges, total = tiles_of(first_q, sizes, GROUP_SIZE, WINDOW_SIZE, BLOCK_K)
        first_q += GROUP * HALF
        offs_q = first_q + gl.arange(0, HALF, layout=gl.SliceLayout(1, SCORES))
        stats = (batch * heads + head).to(gl.int64) * seq_len + offs_q
        lse2 = gl.load(lse_ptr + stats, mask=offs_q < seq_len, other=0.0) * LOG2_E
        delta = gl.load(delta_ptr + stats, mask=offs_q < seq_len, other=0.0)
        dq = gl.zeros([HALF, HEAD_DIM], gl.float32, layout=GRADS)
        ds = pack(gl.zeros([HALF, BLOCK_K], gl.float32, layout=SCORES), k_smem.dtype)
        buffer, parity = slot(turn, BUFFERS)
        place = 2 * buffer + GROUP
        mbarrier.wait(rows_ready.index(place), parity)
        q_rows = rows_smem[0].index(place).reshape([HALF, HEAD_DIM])
        q = q_rows.load(gl.DotOperandLayout(0, SCORES, 2))
        dout = rows_smem[1].index(place).reshape([HALF, HEAD_DIM])
        # the gradient of the tile before has left by now
        tma.store_wait(0)
        mbarrier.arrive(rows_free.index((place + 2) % (2 * BUFFERS)), count=1, pred=turn > 0)
        for full in gl.static_range(2):
            first, end = (0, edges) if full == 0 else (edges, total)
            ds, dq, count = sweep(
                q, dout, keys_smem, bars, ds, dq, lse2, delta, offs_q, tiles, first, end, count,
                SCALE * LOG2_E, GROUP_SIZE, WINDOW_SIZE, BLOCK_K, NUM_STAGES, full == 0, SCORES, GRADS,
            )  # fmt: skip
        last = (count - 1) % NUM_STAGES
        keys = k_smem.index(last).reshape([BLOCK_K, HEAD_DIM])
        dq = warpgroup_mma(unpack(ds, k_smem.dtype, GRADS), keys, dq, is_async=True)
        dq = warpgroup_mma_wait(0, deps=[dq]) * SCALE
        mbarrier.arrive(k_free.index(last), count=1)
        if not MEAN:
            rows = first_q + gl.arange(0, HALF, layout=gl.SliceLayout(1, GRADS))
            columns = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, GRADS))
            scored = (rows < seq_len) & ((rows + 1) % GROUP_SIZE == 0)
            pooled = dq_ptr + batch.to(gl.int64) * dq_strides[0] + head.to(gl.int64) * dq_strides[1]
            offs = rows.to(gl.int64)[:, None] * dq_strides[2] + columns[None, :]
            dq += gl.load(pooled + offs, mask=scored[:, None], other=0.0).to(gl.float32)
        # the queries are done with: their gradient leaves through their memory, and is cut off at the sequence's end
        q_rows.store(dq.to(k_smem.dtype))
        fence_async_shared()
        tma.async_copy_shared_to_global(dq_desc, [batch, head, first_q, 0], rows_smem[0].index(place))
    tma.store_wait(0)


# fmt: off
@gluon.jit
def backward_dq_hopper_kernel(
    q_desc, dout_desc, k_desc, v_desc, k_core_desc, v_core_desc, dq_desc, lse_ptr, delta_ptr, dq_ptr, dq_strides,
    sizes,
    SCALE: gl.constexpr, GROUP_SIZE: gl.constexpr, WINDOW_SIZE: gl.constexpr, MEAN: gl.constexpr,
    HEAD_DIM: gl.constexpr, BLOCK_K: gl.constexpr, NUM_STAGES: gl.constexpr, FEEDER: gl.constexpr,
    COMPUTE: gl.constexpr,
):
    # fmt: on
    """Persistent: each program takes the tiles of queries that `item_of` gives it."""
    rows_smem = (allocate_rows(q_desc, HEAD_DIM), allocate_rows(q_desc, HEAD_DIM))
    keys_smem, bars = allocate_keys(k_desc, BLOCK_K, HEAD_DIM, NUM_STAGES)
    key_descs = (k_desc, v_desc, k_core_desc, v_core_desc)
    gl.warp_specialize(
        [
            (compute, (0, dq_desc, rows_smem, keys_smem, bars, sizes, lse_ptr, delta_ptr, dq_ptr, dq_strides,
                       SCALE, GROUP_SIZE, WINDOW_SIZE, MEAN, BLOCK_K, HEAD_DIM, NUM_STAGES)),
            (compute, (1, dq_desc, rows_smem, keys_smem, bars, sizes, lse_ptr, delta_ptr, dq_ptr, dq_strides,
                       SCALE, GROUP_SIZE, WINDOW_SIZE, MEAN, BLOCK_K, HEAD_DIM, NUM_STAGES)),
            (feed, ((q_desc, dout_desc), key_descs, rows_smem, keys_smem, bars, sizes,
                    GROUP_SIZE, WINDOW_SIZE, BLOCK_K, HEAD_DIM, NUM_STAGES)),
        ],
        [4, 1],
        [COMPUTE, FEEDER],
    )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class BackwardDqHopperConfig(KeyTilesConfig):
    """Launch choices of `backward_dq_hopper_kernel`."""


def default_config(problem: Problem, arch: str) -> BackwardDqHopperConfig:
    """A config that runs every `problem` of these kernels."""
    return BackwardDqHopperConfig(block_k=64, num_stages=3)


def launch_backward_dq_hopper(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_core: Tensor,
    v_core: Tensor,
    dout: Tensor,
    lse: Tensor,
    delta: Tensor,
    dq: Tensor,
    *,
    spec: CCASpec,
    config: BackwardDqHopperConfig,
) -> None:
    """Fill `dq`, as `launch_backward_dq` does for dense sequences; `usable` must hold for all but lse and delta.

    lse, delta (B, Hq, T) are float32 and contiguous. Keys and values after a query, up to the end of a tile, are
    multiplied by zero: unlike in the portable kernel, a NaN there reaches back further than its own tile of queries.
    """
    grid, keys, sizes, constants = set_up(q, (k, v, k_core, v_core), spec, config)
    rows = [describe(x, BLOCK_Q.value // 2) for x in (q, dout, dq)]
    enqueue(
        backward_dq_hopper_kernel, grid,
        *rows[:2], *keys, rows[2], lse, delta, dq, dq.stride(), sizes,
        SCALE=spec.softmax_scale(q.shape[3]), MEAN=spec.pooling == "mean", **constants,
    )  # fmt: skip


def launch(problem: Problem, tensors: dict[str, Tensor], config: BackwardDqHopperConfig) -> None:
    """One launch on what `allocate` made."""
    launch_backward_dq_hopper(**tensors, spec=problem.spec, config=config)


BACKWARD_DQ_HOPPER = Tunable(
    name="backward_dq_hopper",
    config=BackwardDqHopperConfig,
    space=SPACE,
    default=default_config,
    allocate=allocate,
    launch=launch,
    work=work,
    kernels=(backward_dq_hopper_kernel,),
    archs=(ARCH,),
)
