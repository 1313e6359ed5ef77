"""The fused forward for Hopper (spec sections 2, 3): a tile's scores while the values of the one before are added."""

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
from ..forward import allocate, work
from ..primitives import LN_2, scale_log2
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
def softmax_step(
    scores, is_core, key, offs_q, row_max, row_sum,
    SCALE_LOG2: gl.constexpr, GROUP_SIZE: gl.constexpr, WINDOW_SIZE: gl.constexpr, BLOCK_K: gl.constexpr,
    MASKED: gl.constexpr, SCORES: gl.constexpr,
):  # fmt: skip
    """(probabilities, row_max, row_sum, factor for all that was summed before), base 2, as `primitives.attend`."""
    if MASKED:
        seen = visible(offs_q, is_core, key, GROUP_SIZE, WINDOW_SIZE, BLOCK_K, SCORES)
        scores = gl.where(seen, scores, -float("inf"))
    new_max = gl.maximum(row_max, gl.max(scores, axis=1) * SCALE_LOG2)
    pivot = new_max
    if MASKED:
        # a row that has seen no key yet keeps a finite pivot: -inf - -inf is NaN
        pivot = gl.where(new_max == -float("inf"), 0.0, new_max)
    probs = gl.exp2(scores * SCALE_LOG2 - pivot[:, None])
    rescale = gl.exp2(row_max - pivot)
    return probs, new_max, row_sum * rescale + gl.sum(probs, axis=1), rescale


@gluon.jit
def sweep(
    q, keys_smem, bars, probs, acc, row_max, row_sum, offs_q, tiles, first, end, count,
    SCALE_LOG2: gl.constexpr, GROUP_SIZE: gl.constexpr, WINDOW_SIZE: gl.constexpr, BLOCK_K: gl.constexpr,
    NUM_STAGES: gl.constexpr, MASKED: gl.constexpr, SCORES: gl.constexpr, OUT: gl.constexpr,
):  # fmt: skip
    """Tiles first .. end - 1; `probs` are those of the tile before, whose values are here, and still to be added.

    The wait for the next values ends a basic block: the assembler would otherwise move the wait for the product with
    the ones before up, and leave the exponentials without a product to run beside.
    """
    k_smem, v_smem = keys_smem
    _, _, k_ready, k_free, v_ready, v_free = bars
    HALF: gl.constexpr = q.shape[0]
    HEAD_DIM: gl.constexpr = q.shape[1]
    DTYPE: gl.constexpr = v_smem.dtype
    for number in range(first, end):
        stage, parity = slot(count, NUM_STAGES)
        before = (count - 1) % NUM_STAGES
        is_core, key = key_at(number, tiles, BLOCK_K)
        k = k_smem.index(stage).reshape([BLOCK_K, HEAD_DIM])
        v = v_smem.index(before).reshape([BLOCK_K, HEAD_DIM])
        scores = gl.zeros([HALF, BLOCK_K], gl.float32, layout=SCORES)
        mbarrier.wait(k_ready.index(stage), parity)
        scores = warpgroup_mma(q, k.permute((1, 0)), scores, use_acc=False, is_async=True)
        acc = warpgroup_mma(unpack(probs, DTYPE, OUT), v, acc, is_async=True)
        scores = warpgroup_mma_wait(1, deps=[scores])
        mbarrier.arrive(k_free.index(stage), count=1)
        wide, row_max, row_sum, rescale = softmax_step(
            scores, is_core, key, offs_q, row_max, row_sum,
            SCALE_LOG2, GROUP_SIZE, WINDOW_SIZE, BLOCK_K, MASKED, SCORES,
        )  # fmt: skip
        probs = pack(wide, DTYPE)
        mbarrier.wait(v_ready.index(stage), parity)
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(v_free.index(before), count=1)
        probs = settle(probs)
        acc = acc * gl.convert_layout(rescale, gl.SliceLayout(1, OUT))[:, None]
        count += 1
    return probs, acc, row_max, row_sum, count


@gluon.jit
def compute(
    GROUP: gl.constexpr, out_desc, q_smem, keys_smem, bars, sizes, lse_ptr,
    SCALE_LOG2: gl.constexpr, GROUP_SIZE: gl.constexpr, WINDOW_SIZE: gl.constexpr, BLOCK_K: gl.constexpr,
    HEAD_DIM: gl.constexpr, NUM_STAGES: gl.constexpr,
):  # fmt: skip
    """Four computing warps: one half (GROUP 0 or 1) of the queries of every tile."""
    k_smem, v_smem = keys_smem
    q_ready, q_free, k_ready, k_free, v_ready, v_free = bars
    seq_len, heads, items, _, _ = sizes
    HALF: gl.constexpr = BLOCK_Q // 2
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_K, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    ROWS: gl.constexpr = gl.SliceLayout(1, SCORES)
    count = 0
    for turn in range(turns(items)):
        batch, head, first_q = locate(item_of(turn), sizes)
        tiles, edges, total = tiles_of(first_q, sizes, GROUP_SIZE, WINDOW_SIZE, BLOCK_K)
        first_q += GROUP * HALF
        buffer, q_parity = slot(turn, BUFFERS)
        place = 2 * buffer + GROUP
        q = q_smem.index(place).reshape([HALF, HEAD_DIM])
        offs_q = first_q + gl.arange(0, HALF, layout=ROWS)
        row_max = gl.full([HALF], -float("inf"), gl.float32, layout=ROWS)
        row_sum = gl.zeros([HALF], gl.float32, layout=ROWS)
        acc = gl.zeros([HALF, HEAD_DIM], gl.float32, layout=OUT)
        # the first tile is at an edge, as every tile of queries has its own tokens; there are no values to add yet
        stage, parity = slot(count, NUM_STAGES)
        is_core, key = key_at(0, tiles, BLOCK_K)
        k = k_smem.index(stage).reshape([BLOCK_K, HEAD_DIM])
        scores = gl.zeros([HALF, BLOCK_K], gl.float32, layout=SCORES)
        mbarrier.wait(q_ready.index(place), q_parity)
        mbarrier.wait(k_ready.index(stage), parity)
        scores = warpgroup_mma(q, k.permute((1, 0)), scores, use_acc=False, is_async=True)
        scores = warpgroup_mma_wait(0, deps=[scores])
        mbarrier.arrive(k_free.index(stage), count=1)
        wide, row_max, row_sum, _rescale = softmax_step(
            scores, is_core, key, offs_q, row_max, row_sum,
            SCALE_LOG2, GROUP_SIZE, WINDOW_SIZE, BLOCK_K, True, SCORES,
        )  # fmt: skip
        probs = pack(wide, v_smem.dtype)
        mbarrier.wait(v_ready.index(stage), parity)
        count += 1
        # the output of the tile before has left by now
        tma.store_wait(0)
        mbarrier.arrive(q_free.index((place + 2) % (2 * BUFFERS)), count=1, pred=turn > 0)
        rows = q.load(gl.DotOperandLayout(0, SCORES, 2))
        for full in gl.static_range(2):
            first, end = (1, edges) if full == 0 else (edges, total)
            probs, acc, row_max, row_sum, count = sweep(
                rows, keys_smem, bars, probs, acc, row_max, row_sum, offs_q, tiles, first, end, count,
                SCALE_LOG2, GROUP_SIZE, WINDOW_SIZE, BLOCK_K, NUM_STAGES, full == 0, SCORES, OUT,
            )  # fmt: skip
        stage = (count - 1) % NUM_STAGES
        v = v_smem.index(stage).reshape([BLOCK_K, HEAD_DIM])
        acc = warpgroup_mma(unpack(probs, v_smem.dtype, OUT), v, acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(v_free.index(stage), count=1)
        # the queries are done with: the output leaves through their memory, and is cut off at the sequence's end
        share = gl.convert_layout(1.0 / row_sum, gl.SliceLayout(1, OUT))
        q.store((acc * share[:, None]).to(v_smem.dtype))
        fence_async_shared()
        tma.async_copy_shared_to_global(out_desc, [batch, head, first_q, 0], q_smem.index(place))
        lse_at = lse_ptr + (batch * heads + head).to(gl.int64) * seq_len
        gl.store(lse_at + offs_q, (row_max + gl.log2(row_sum)) * LN_2, mask=offs_q < seq_len)
    tma.store_wait(0)


# fmt: off
@gluon.jit
def forward_hopper_kernel(
    q_desc, k_desc, v_desc, k_core_desc, v_core_desc, out_desc, lse_ptr, sizes,
    SCALE_LOG2: gl.constexpr, GROUP_SIZE: gl.constexpr, WINDOW_SIZE: gl.constexpr, HEAD_DIM: gl.constexpr,
    BLOCK_K: gl.constexpr, NUM_STAGES: gl.constexpr, FEEDER: gl.constexpr, COMPUTE: gl.constexpr,
):
    # fmt: on
    """Persistent: each program takes the tiles of queries that `item_of` gives it."""
    q_smem = allocate_rows(q_desc, HEAD_DIM)
    keys_smem, bars = allocate_keys(k_desc, BLOCK_K, HEAD_DIM, NUM_STAGES)
    key_descs = (k_desc, v_desc, k_core_desc, v_core_desc)
    gl.warp_specialize(
        [
            (compute, (0, out_desc, q_smem, keys_smem, bars, sizes, lse_ptr,
                       SCALE_LOG2, GROUP_SIZE, WINDOW_SIZE, BLOCK_K, HEAD_DIM, NUM_STAGES)),
            (compute, (1, out_desc, q_smem, keys_smem, bars, sizes, lse_ptr,
                       SCALE_LOG2, GROUP_SIZE, WINDOW_SIZE, BLOCK_K, HEAD_DIM, NUM_STAGES)),
            (feed, ((q_desc,), key_descs, (q_smem,), keys_smem, bars, sizes,
                    GROUP_SIZE, WINDOW_SIZE, BLOCK_K, HEAD_DIM, NUM_STAGES)),
        ],
        [4, 1],
        [COMPUTE, FEEDER],
    )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardHopperConfig(KeyTilesConfig):
    """Launch choices of `forward_hopper_kernel`."""


def default_config(problem: Problem, arch: str) -> ForwardHopperConfig:
    """A config that runs every `problem` of these kernels."""
    return ForwardHopperConfig(block_k=128, num_stages=2)


def launch_forward_hopper(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_core: Tensor,
    v_core: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    spec: CCASpec,
    config: ForwardHopperConfig,
) -> None:
    """Fill `out` and `lse`, as `launch_forward` does for dense sequences; `usable` must hold for the tensors.

    `lse` is contiguous. Rows of `v` and `v_core` after a query, up to the end of a tile, are multiplied by zero: unlike
    in the portable kernel, a NaN there reaches back further than its own tile of queries.
    """
    grid, keys, sizes, constants = set_up(q, (k, v, k_core, v_core), spec, config)
    rows = [describe(x, BLOCK_Q.value // 2) for x in (q, out)]
    forward_hopper_kernel[grid](
        rows[0], *keys, rows[1], lse, sizes, SCALE_LOG2=scale_log2(spec, q.shape[3]), **constants
    )


def launch(problem: Problem, tensors: dict[str, Tensor], config: ForwardHopperConfig) -> None:
    """One launch on what `allocate` made."""
    launch_forward_hopper(**tensors, spec=problem.spec, config=config)


FORWARD_HOPPER = Tunable(
    name="forward_hopper",
    config=ForwardHopperConfig,
    space=SPACE,
    default=default_config,
    allocate=allocate,
    launch=launch,
    work=work,
    kernels=(forward_hopper_kernel,),
    archs=(ARCH,),
)
