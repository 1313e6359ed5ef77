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
from ..enqueue import enqueue
from ..forward import allocate, work
from ..primitives import LN_2, first_local, scale_log2, visible_cores
from ..tunable import Tunable
from .limits import ARCH
from .pipeline import describe, item_of, pack, rescaled, settle, slot, turns, unpack
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

EDGE = gl.constexpr(64)
"""Keys of a part of a tile at an edge: what none of a group's queries sees is left out in such parts."""


@gluon.jit
def softmax_step(scores, row_max, row_sum, SCALE_LOG2: gl.constexpr, MASKED: gl.constexpr):
    """(probabilities, row_max, row_sum, factor for all that was summed before), base 2, as `primitives.attend`."""
    new_max = gl.maximum(row_max, gl.max(scores, axis=1) * SCALE_LOG2)
    pivot = new_max
    if MASKED:
        # a row that has seen no key yet keeps a finite pivot: -inf - -inf is NaN
        pivot = gl.where(new_max == -float("inf"), 0.0, new_max)
    probs = gl.exp2(scores * SCALE_LOG2 - pivot[:, None])
    rescale = gl.exp2(row_max - pivot)
    return probs, new_max, row_sum * rescale + gl.sum(probs, axis=1), rescale


@gluon.jit
def sees_some(
    first_q, is_core, key,
    GROUP_SIZE: gl.constexpr, WINDOW_SIZE: gl.constexpr, QUERIES: gl.constexpr, KEYS: gl.constexpr,
):  # fmt: skip
    """Whether one of the QUERIES from `first_q` on sees one of the KEYS from `key` on."""
    last = first_q + QUERIES - 1
    near = (key <= last) & (key + KEYS > first_local(first_q, GROUP_SIZE, WINDOW_SIZE))
    return gl.where(is_core, key < visible_cores(last, GROUP_SIZE, WINDOW_SIZE), near)


@gluon.jit
def sweep_edges(
    q, keys_smem, bars, acc, row_max, row_sum, first_q, tiles, edges, count,
    SCALE_LOG2: gl.constexpr, GROUP_SIZE: gl.constexpr, WINDOW_SIZE: gl.constexpr, BLOCK_K: gl.constexpr,
    NUM_STAGES: gl.constexpr, OUT: gl.constexpr,
):  # fmt: skip
    """The tiles at the edges of what is seen, in parts of EDGE keys, without the parts that none of these rows see."""
    k_smem, v_smem = keys_smem
    _, _, k_ready, k_free, v_ready, v_free = bars
    HALF: gl.constexpr = q.shape[0]
    HEAD_DIM: gl.constexpr = q.shape[1]
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, EDGE, 16])
    ROWS: gl.constexpr = gl.SliceLayout(1, SCORES)
    offs_q = first_q + gl.arange(0, HALF, layout=ROWS)
    for number in range(edges):
        stage, parity = slot(count, NUM_STAGES)
        is_core, key = key_at(number, tiles, BLOCK_K)
        mbarrier.wait(k_ready.index(stage), parity)
        mbarrier.wait(v_ready.index(stage), parity)
        for part in gl.static_range(BLOCK_K // EDGE):
            at = key + part * EDGE
            if sees_some(first_q, is_core, at, GROUP_SIZE, WINDOW_SIZE, HALF, EDGE):
                k = k_smem.index(stage).reshape([BLOCK_K, HEAD_DIM]).slice(part * EDGE, EDGE)
                v = v_smem.index(stage).reshape([BLOCK_K, HEAD_DIM]).slice(part * EDGE, EDGE)
                scores = gl.zeros([HALF, EDGE], gl.float32, layout=SCORES)
                scores = warpgroup_mma(q, k.permute((1, 0)), scores, use_acc=False, is_async=True)
                scores = warpgroup_mma_wait(0, deps=[scores])
                seen = visible(offs_q, is_core, at, GROUP_SIZE, WINDOW_SIZE, EDGE, SCORES)
                scores = gl.where(seen, scores, -float("inf"))
                probs, row_max, row_sum, rescale = softmax_step(scores, row_max, row_sum, SCALE_LOG2, True)
                acc = acc * gl.convert_layout(rescale, gl.SliceLayout(1, OUT))[:, None]
                probs = gl.convert_layout(probs.to(v_smem.dtype), gl.DotOperandLayout(0, OUT, 2))
                acc = warpgroup_mma(probs, v, acc, is_async=True)
                acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(k_free.index(stage), count=1)
        mbarrier.arrive(v_free.index(stage), count=1)
        count += 1
    return acc, row_max, row_sum, count


@gluon.jit
def sweep(
    q, keys_smem, bars, acc, row_max, row_sum, tiles_left, count,
    SCALE_LOG2: gl.constexpr, BLOCK_K: gl.constexpr, NUM_STAGES: gl.constexpr, SCORES: gl.constexpr, OUT: gl.constexpr,
):  # fmt: skip
    """The tiles that every query sees whole: the scores of one while the values of the one before are added.

    The wait for the next values ends a basic block: the assembler would otherwise move the wait for the product with
    the ones before up, and leave the exponentials without a product to run beside.
    """
    k_smem, v_smem = keys_smem
    _, _, k_ready, k_free, v_ready, v_free = bars
    HALF: gl.constexpr = q.shape[0]
    HEAD_DIM: gl.constexpr = q.shape[1]
    DTYPE: gl.constexpr = v_smem.dtype
    # of the first tile there are only scores
    stage, parity = slot(count, NUM_STAGES)
    k = k_smem.index(stage).reshape([BLOCK_K, HEAD_DIM])
    scores = gl.zeros([HALF, BLOCK_K], gl.float32, layout=SCORES)
    mbarrier.wait(k_ready.index(stage), parity)
    scores = warpgroup_mma(q, k.permute((1, 0)), scores, use_acc=False, is_async=True)
    scores = warpgroup_mma_wait(0, deps=[scores])
    mbarrier.arrive(k_free.index(stage), count=1)
    wide, row_max, row_sum, rescale = softmax_step(scores, row_max, row_sum, SCALE_LOG2, False)
    acc = acc * gl.convert_layout(rescale, gl.SliceLayout(1, OUT))[:, None]
    probs = pack(wide, DTYPE)
    mbarrier.wait(v_ready.index(stage), parity)
    count += 1
    for _number in range(1, tiles_left):
        stage, parity = slot(count, NUM_STAGES)
        before = (count - 1) % NUM_STAGES
        k = k_smem.index(stage).reshape([BLOCK_K, HEAD_DIM])
        v = v_smem.index(before).reshape([BLOCK_K, HEAD_DIM])
        scores = gl.zeros([HALF, BLOCK_K], gl.float32, layout=SCORES)
        mbarrier.wait(k_ready.index(stage), parity)
        scores = warpgroup_mma(q, k.permute((1, 0)), scores, use_acc=False, is_async=True)
        acc = warpgroup_mma(unpack(probs, DTYPE, OUT), v, acc, is_async=True)
        scores = warpgroup_mma_wait(1, deps=[scores])
        mbarrier.arrive(k_free.index(stage), count=1)
        wide, row_max, row_sum, rescale = softmax_step(scores, row_max, row_sum, SCALE_LOG2, False)
        probs = pack(wide, DTYPE)
        mbarrier.wait(v_ready.index(stage), parity)
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(v_free.index(before), count=1)
        probs = settle(probs)
        acc = rescaled(acc, gl.convert_layout(rescale, gl.SliceLayout(1, OUT))[:, None])
        count += 1
    stage = (count - 1) % NUM_STAGES
    v = v_smem.index(stage).reshape([BLOCK_K, HEAD_DIM])
    acc = warpgroup_mma(unpack(probs, DTYPE, OUT), v, acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=[acc])
    mbarrier.arrive(v_free.index(stage), count=1)
    return acc, row_max, row_sum, count


@gluon.jit
def compute(
    GROUP: gl.constexpr, out_desc, q_smem, keys_smem, bars, sizes, lse_ptr,
    SCALE_LOG2: gl.constexpr, GROUP_SIZE: gl.constexpr, WINDOW_SIZE: gl.constexpr, BLOCK_K: gl.constexpr,
    HEAD_DIM: gl.constexpr, NUM_STAGES: gl.constexpr,
):  # fmt: skip
    """Four computing warps: one half (GROUP 0 or 1) of the queries of every tile."""
    q_ready, q_free, _, _, _, _ = bars
    seq_len, heads, items, _, _ = sizes
    HALF: gl.constexpr = BLOCK_Q // 2
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_K, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    EDGE_ROWS: gl.constexpr = gl.SliceLayout(1, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, EDGE, 16]))
    ROWS: gl.constexpr = gl.SliceLayout(1, SCORES)
    count = 0
    for turn in range(turns(items)):
        batch, head, first_q = locate(item_of(turn), sizes)
        tiles, edges, total = tiles_of(first_q, sizes, GROUP_SIZE, WINDOW_SIZE, BLOCK_K)
        first_q += GROUP * HALF
        buffer, q_parity = slot(turn, BUFFERS)
        place = 2 * buffer + GROUP
        q = q_smem.index(place).reshape([HALF, HEAD_DIM])
        row_max = gl.full([HALF], -float("inf"), gl.float32, layout=EDGE_ROWS)
        row_sum = gl.zeros([HALF], gl.float32, layout=EDGE_ROWS)
        acc = gl.zeros([HALF, HEAD_DIM], gl.float32, layout=OUT)
        mbarrier.wait(q_ready.index(place), q_parity)
        rows = q.load(gl.DotOperandLayout(0, SCORES, 2))
        # the output of the tile before has left by now
        tma.store_wait(0)
        mbarrier.arrive(q_free.index((place + 2) % (2 * BUFFERS)), count=1, pred=turn > 0)
        # every tile of queries has edges, as it has its own tokens
        acc, row_max, row_sum, count = sweep_edges(
            rows, keys_smem, bars, acc, row_max, row_sum, first_q, tiles, edges, count,
            SCALE_LOG2, GROUP_SIZE, WINDOW_SIZE, BLOCK_K, NUM_STAGES, OUT,
        )  # fmt: skip
        row_max = gl.convert_layout(row_max, ROWS)
        row_sum = gl.convert_layout(row_sum, ROWS)
        if total > edges:
            acc, row_max, row_sum, count = sweep(
                rows, keys_smem, bars, acc, row_max, row_sum, total - edges, count,
                SCALE_LOG2, BLOCK_K, NUM_STAGES, SCORES, OUT,
            )  # fmt: skip
        # the queries are done with: the output leaves through their memory, and is cut off at the sequence's end
        share = gl.convert_layout(1.0 / row_sum, gl.SliceLayout(1, OUT))
        q.store((acc * share[:, None]).to(q_smem.dtype))
        fence_async_shared()
        tma.async_copy_shared_to_global(out_desc, [batch, head, first_q, 0], q_smem.index(place))
        offs_q = first_q + gl.arange(0, HALF, layout=ROWS)
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
    enqueue(
        forward_hopper_kernel, grid,
        rows[0], *keys, rows[1], lse, sizes, SCALE_LOG2=scale_log2(spec, q.shape[3]), **constants,
    )  # fmt: skip


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
