"""Gradients of a tile of keys, cores or raw tokens, for Hopper: what `backward_dcore` and `backward_dkv` share."""

from __future__ import annotations

from dataclasses import dataclass

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from ..primitives import LOG2_E
from .limits import HopperConfig
from .pipeline import barriers, pack, slot, unpack

BLOCK_KEYS = gl.constexpr(128)
"""Keys of a tile: 64, the rows of one matrix instruction, for each of the two computing groups of warps."""

SPACE = {"block_q": (32, 64), "num_warps": (4,), "num_stages": (2, 3, 4)}


@dataclass(frozen=True, slots=True, kw_only=True)
class QueryTilesConfig(HopperConfig):
    """Launch choices of a kernel that sweeps over queries: those of a tile; `num_stages` such tiles in flight."""

    block_q: int = 64


@gluon.jit
def query_tiles(start, full, full_end, stop, BLOCK_Q: gl.constexpr):
    """Of the queries start .. stop - 1, of which full .. full_end - 1 see every key: the first, and how many tiles lie
    before, among and after those that see every key."""
    left = gl.cdiv(gl.maximum(gl.minimum(full, stop) - start, 0), BLOCK_Q)
    whole = gl.maximum(full_end - start - left * BLOCK_Q, 0) // BLOCK_Q
    right = gl.cdiv(gl.maximum(stop - start - (left + whole) * BLOCK_Q, 0), BLOCK_Q)
    return start, left, whole, right


@gluon.jit
def allocate(q_desc, k_desc, BLOCK_Q: gl.constexpr, HEAD_DIM: gl.constexpr, NUM_STAGES: gl.constexpr):
    """Shared memory (q, dout, lse, delta, k, v), and the barriers for when (keys, q, dout) are ready and are free."""
    LINE: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    q = gl.allocate_shared_memory(q_desc.dtype, [NUM_STAGES, 1, 1, BLOCK_Q, HEAD_DIM], q_desc.layout)
    dout = gl.allocate_shared_memory(q_desc.dtype, [NUM_STAGES, 1, 1, BLOCK_Q, HEAD_DIM], q_desc.layout)
    lse = gl.allocate_shared_memory(gl.float32, [NUM_STAGES, BLOCK_Q], LINE)
    delta = gl.allocate_shared_memory(gl.float32, [NUM_STAGES, BLOCK_Q], LINE)
    k = gl.allocate_shared_memory(q_desc.dtype, [2, 1, 1, BLOCK_KEYS // 2, HEAD_DIM], k_desc.layout)
    v = gl.allocate_shared_memory(q_desc.dtype, [2, 1, 1, BLOCK_KEYS // 2, HEAD_DIM], k_desc.layout)
    # q is ready when its copy has arrived and the statistics are written
    q_ready, q_free = barriers(NUM_STAGES, 2), barriers(NUM_STAGES, 2)
    dout_ready, dout_free = barriers(NUM_STAGES, 1), barriers(NUM_STAGES, 2)
    return (q, dout, lse, delta, k, v), (barriers(2, 1), barriers(2, 1), q_ready, q_free, dout_ready, dout_free)


@gluon.jit
def feed_keys(turn, batch, head, first, k_desc, v_desc, tiles_smem, bars, HEAD_DIM: gl.constexpr):
    """The keys and values of a tile, in halves."""
    k_smem, v_smem = tiles_smem[4], tiles_smem[5]
    HALF: gl.constexpr = BLOCK_KEYS // 2
    for half in gl.static_range(2):
        ready = bars[0].index(half)
        row = [batch, head, first + half * HALF, 0]
        mbarrier.wait(bars[1].index(half), (turn & 1) ^ 1)
        mbarrier.expect(ready, HALF * HEAD_DIM * 4)
        tma.async_copy_global_to_shared(k_desc, row, ready, k_smem.index(half))
        tma.async_copy_global_to_shared(v_desc, row, ready, v_smem.index(half))


@gluon.jit
def feed_queries(
    batch, first_head, heads, all_heads, tiles, rising, seq_len, count,
    q_desc, dout_desc, lse_ptr, delta_ptr, tiles_smem, bars,
    BLOCK_Q: gl.constexpr, HEAD_DIM: gl.constexpr, NUM_STAGES: gl.constexpr,
):  # fmt: skip
    """The queries of `heads` heads from `first_head` on, in the order that `sweep` takes them, with what is theirs.

    Those that see every key come last first, or first first if `rising`.
    """
    q_smem, dout_smem, lse_smem, delta_smem, _, _ = tiles_smem
    _, _, q_ready, q_free, dout_ready, dout_free = bars
    start, left, full, right = tiles
    total = left + full + right
    for step in range(heads * total):
        head = first_head + step // total
        number = step % total
        edge = number + gl.where(number < left, 0, full)
        whole = gl.where(rising, number - right, total + left - 1 - number)
        query = start + gl.where(number < left + right, edge, whole) * BLOCK_Q
        stage, parity = slot(count, NUM_STAGES)
        ready = q_ready.index(stage)
        mbarrier.wait(q_free.index(stage), parity ^ 1)
        mbarrier.expect(ready, BLOCK_Q * HEAD_DIM * 2)
        tma.async_copy_global_to_shared(q_desc, [batch, head, query, 0], ready, q_smem.index(stage))
        offs = query + gl.arange(0, BLOCK_Q, layout=gl.BlockedLayout([1], [32], [1], [0]))
        stats = (batch * all_heads + head).to(gl.int64) * seq_len + offs
        lse_smem.index(stage).store(gl.load(lse_ptr + stats, mask=offs < seq_len, other=0.0) * LOG2_E)
        delta_smem.index(stage).store(gl.load(delta_ptr + stats, mask=offs < seq_len, other=0.0))
        mbarrier.arrive(ready, count=1)
        ready = dout_ready.index(stage)
        mbarrier.wait(dout_free.index(stage), parity ^ 1)
        mbarrier.expect(ready, BLOCK_Q * HEAD_DIM * 2)
        tma.async_copy_global_to_shared(dout_desc, [batch, head, query, 0], ready, dout_smem.index(stage))
        count += 1
    return count


@gluon.jit
def sweep(
    k, v, ds, dk, dv, tiles_smem, bars, first_query, last_query, tiles, begun, count,
    SCALE_LOG2: gl.constexpr, BLOCK_Q: gl.constexpr, NUM_STAGES: gl.constexpr, MASKED: gl.constexpr,
    SCORES: gl.constexpr, GRADS: gl.constexpr,
):  # fmt: skip
    """Add to dk (without the scale) and dv [K, D] what tiles of queries at the edges give (MASKED), or all the others.

    Key j is seen by the queries first_query[j] .. last_query[j]. `ds` are the slopes of the tile before, whose queries
    are still to be added to dk; zero if there is none, which is when `count` is `begun`.
    """
    q_smem, dout_smem, lse_smem, delta_smem, _, _ = tiles_smem
    _, _, q_ready, q_free, dout_ready, dout_free = bars
    start, left, full, right = tiles
    HALF: gl.constexpr = k.shape[0]
    HEAD_DIM: gl.constexpr = k.shape[1]
    QUERIES: gl.constexpr = gl.SliceLayout(0, SCORES)
    PROBS: gl.constexpr = gl.DotOperandLayout(0, GRADS, 2)
    for number in range(left + right if MASKED else full):
        stage, parity = slot(count, NUM_STAGES)
        before = gl.where(count == begun, stage, (count - 1) % NUM_STAGES)
        q = q_smem.index(stage).reshape([BLOCK_Q, HEAD_DIM])
        dout = dout_smem.index(stage).reshape([BLOCK_Q, HEAD_DIM])
        blank = gl.zeros([HALF, BLOCK_Q], gl.float32, layout=SCORES)
        # keys by queries, so that the probabilities are a product's first operand as they come
        mbarrier.wait(q_ready.index(stage), parity)
        scores = warpgroup_mma(k, q.permute((1, 0)), blank, use_acc=False, is_async=True)
        q_before = q_smem.index(before).reshape([BLOCK_Q, HEAD_DIM])
        dk = warpgroup_mma(unpack(ds, q_smem.dtype, GRADS), q_before, dk, is_async=True)
        lse2 = lse_smem.index(stage).load(QUERIES)
        scores, dk = warpgroup_mma_wait(0, deps=[scores, dk])
        mbarrier.arrive(q_free.index(before), count=1, pred=count != begun)
        mbarrier.wait(dout_ready.index(stage), parity)
        dprobs = warpgroup_mma(v, dout.permute((1, 0)), blank, use_acc=False, is_async=True)
        probs = gl.exp2(scores * SCALE_LOG2 - lse2[None, :])
        if MASKED:
            query = start + (number + gl.where(number < left, 0, full)) * BLOCK_Q
            offs_q = query + gl.arange(0, BLOCK_Q, layout=QUERIES)
            visible = (offs_q[None, :] >= first_query[:, None]) & (offs_q[None, :] <= last_query[:, None])
            probs = gl.where(visible, probs, 0.0)
        dv = warpgroup_mma(gl.convert_layout(probs.to(q_smem.dtype), PROBS), dout, dv, is_async=True)
        delta = delta_smem.index(stage).load(QUERIES)
        dprobs = warpgroup_mma_wait(1, deps=[dprobs])
        ds = pack(probs * (dprobs - delta[None, :]), q_smem.dtype)
        dv = warpgroup_mma_wait(0, deps=[dv])
        mbarrier.arrive(dout_free.index(stage), count=1)
        count += 1
    return ds, dk, dv, count


@gluon.jit
def gather(
    GROUP: gl.constexpr, heads, dk, dv, tiles_smem, bars, first_query, last_query, tiles, begun,
    SCALE_LOG2: gl.constexpr, BLOCK_Q: gl.constexpr, HEAD_DIM: gl.constexpr, NUM_STAGES: gl.constexpr,
    SCORES: gl.constexpr, GRADS: gl.constexpr,
):  # fmt: skip
    """Add to dk (without the scale) and dv [K, D] of half a tile of keys what the queries of `heads` heads give."""
    q_smem = tiles_smem[0]
    HALF: gl.constexpr = BLOCK_KEYS // 2
    k = tiles_smem[4].index(GROUP).reshape([HALF, HEAD_DIM])
    v = tiles_smem[5].index(GROUP).reshape([HALF, HEAD_DIM])
    ds = pack(gl.zeros([HALF, BLOCK_Q], gl.float32, layout=SCORES), q_smem.dtype)
    count = begun
    for _ in range(heads):
        for full in gl.static_range(2):
            ds, dk, dv, count = sweep(
                k, v, ds, dk, dv, tiles_smem, bars, first_query, last_query, tiles, begun, count,
                SCALE_LOG2, BLOCK_Q, NUM_STAGES, full == 0, SCORES, GRADS,
            )  # fmt: skip
    if count != begun:
        last = (count - 1) % NUM_STAGES
        q = q_smem.index(last).reshape([BLOCK_Q, HEAD_DIM])
        dk = warpgroup_mma(unpack(ds, q_smem.dtype, GRADS), q, dk, is_async=True)
        dk = warpgroup_mma_wait(0, deps=[dk])
        mbarrier.arrive(bars[3].index(last), count=1)
    return dk, dv, count
