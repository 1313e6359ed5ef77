"""The gradients of raw tokens for Hopper, as raw keys and as members of their groups (spec section 4). No atomics."""

from __future__ import annotations

from dataclasses import dataclass

import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from ...problem import Problem
from ...spec import CCASpec
from ..backward_dkv import allocate_dkv, dkv_work
from ..enqueue import enqueue
from ..layout import core_gradient_layout
from ..primitives import LOG2_E, last_query_of_token
from ..tunable import Tunable
from .keys import BLOCK_KEYS, SPACE, QueryTilesConfig, allocate, feed_keys, feed_queries, gather, query_tiles
from .limits import ARCH
from .pipeline import COMPUTE_REGISTERS, FEEDER_REGISTERS, describe, item_of, multiprocessors, turns


@gluon.jit
def locate(item, sizes, GROUP_SIZE: gl.constexpr, WINDOW_SIZE: gl.constexpr, BLOCK_Q: gl.constexpr):
    """(batch, key/value head, first token, tiles of queries) of a tile of tokens."""
    seq_len, _, kv_heads, _, _, _ = sizes
    columns = gl.cdiv(seq_len, BLOCK_KEYS)
    first = item % columns * BLOCK_KEYS
    last = gl.minimum(first + BLOCK_KEYS, seq_len) - 1
    full_end = gl.minimum(last_query_of_token(first, GROUP_SIZE, WINDOW_SIZE) + 1, seq_len)
    stop = gl.minimum(last_query_of_token(last, GROUP_SIZE, WINDOW_SIZE) + 1, seq_len)
    tiles = query_tiles(first, last, full_end, stop, BLOCK_Q)
    return item // columns // kv_heads, item // columns % kv_heads, first, tiles


@gluon.jit
def feed(
    descriptors, tiles_smem, bars, sizes, lse_ptr, delta_ptr,
    GROUP_SIZE: gl.constexpr, WINDOW_SIZE: gl.constexpr, BLOCK_Q: gl.constexpr, HEAD_DIM: gl.constexpr,
    NUM_STAGES: gl.constexpr,
):  # fmt: skip
    """The feeding warp: the tokens of each tile, then the queries of each of their heads."""
    q_desc, dout_desc, k_desc, v_desc = descriptors
    seq_len, _, kv_heads, items, q_per_kv, _ = sizes
    count = 0
    for turn in range(turns(items)):
        batch, kv_head, first, tiles = locate(item_of(turn), sizes, GROUP_SIZE, WINDOW_SIZE, BLOCK_Q)
        feed_keys(turn, batch, kv_head, first, k_desc, v_desc, tiles_smem, bars, HEAD_DIM)
        count = feed_queries(
            batch, kv_head * q_per_kv, q_per_kv, kv_heads * q_per_kv, tiles, False, seq_len, count,
            q_desc, dout_desc, lse_ptr, delta_ptr, tiles_smem, bars, BLOCK_Q, HEAD_DIM, NUM_STAGES,
        )  # fmt: skip


@gluon.jit
def mean_query(q_ptr, q_strides, batch, head, heads, rows, inside, columns):
    """Mean over `heads` query heads from `head` on, of `rows` [K]: [K, D] float32."""
    at = q_ptr + batch.to(gl.int64) * q_strides[0] + head.to(gl.int64) * q_strides[1]
    offs = rows.to(gl.int64)[:, None] * q_strides[2] + columns[None, :]
    total = gl.load(at + offs, mask=inside, other=0.0).to(gl.float32)
    for h in range(1, heads):
        total += gl.load(at + h * q_strides[1] + offs, mask=inside, other=0.0).to(gl.float32)
    return total / heads


@gluon.jit
def pooled_gradient(
    k, v, pooled, batch, kv_head, sizes, offs_k,
    GROUP_SIZE: gl.constexpr, SCALE: gl.constexpr, MEAN: gl.constexpr, HEAD_DIM: gl.constexpr, PART: gl.constexpr,
    GRADS: gl.constexpr,
):  # fmt: skip
    """What the cores of their groups pass on to the tokens `offs_k` [K], as the portable one: (dk, dv) [K, D].

    The gradients of the cores are loaded twice, as they do not fit into the registers beside all else.
    """
    q_ptr, q_strides, dk_core_ptr, dv_core_ptr, grad_strides, pool_lse_ptr, pool_delta_ptr = pooled
    _, num_cores, kv_heads, _, q_per_kv, q_per_core = sizes
    group = offs_k // GROUP_SIZE
    grouped = group < num_cores
    inside = grouped[:, None]
    columns = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, GRADS))
    parts = columns // PART * grad_strides[3] + columns % PART
    dk = gl.zeros([BLOCK_KEYS // 2, HEAD_DIM], gl.float32, layout=GRADS)
    dv = gl.zeros([BLOCK_KEYS // 2, HEAD_DIM], gl.float32, layout=GRADS)
    cores_per_kv = q_per_kv // q_per_core
    for core in range(cores_per_kv):
        core_head = kv_head * cores_per_kv + core
        at = batch.to(gl.int64) * grad_strides[0] + core_head.to(gl.int64) * grad_strides[1]
        offs = at + (group.to(gl.int64) * grad_strides[2])[:, None] + parts[None, :]
        if MEAN:
            dk += gl.load(dk_core_ptr + offs, mask=inside, other=0.0) / GROUP_SIZE
            dv += gl.load(dv_core_ptr + offs, mask=inside, other=0.0) / GROUP_SIZE
        else:
            last = group * GROUP_SIZE + GROUP_SIZE - 1
            q = mean_query(q_ptr, q_strides, batch, core_head * q_per_core, q_per_core, last, inside, columns)
            logits = gl.sum(k.load(GRADS).to(gl.float32) * q, axis=1) * SCALE
            dk_core = gl.load(dk_core_ptr + offs, mask=inside, other=0.0)
            da = gl.sum(dk_core * k.load(GRADS).to(gl.float32), axis=1)
            dv_core = gl.load(dv_core_ptr + offs, mask=inside, other=0.0)
            da += gl.sum(dv_core * v.load(GRADS).to(gl.float32), axis=1)
            stat = (batch * kv_heads * cores_per_kv + core_head).to(gl.int64) * num_cores + group
            pool_lse = gl.load(pool_lse_ptr + stat, mask=grouped, other=0.0)
            pool_delta = gl.load(pool_delta_ptr + stat, mask=grouped, other=0.0)
            weights = gl.where(grouped, gl.exp2((logits - pool_lse) * LOG2_E), 0.0)
            ds = weights * (da - pool_delta) * SCALE
            dk += weights[:, None] * gl.load(dk_core_ptr + offs, mask=inside, other=0.0, cache_modifier=".ca")
            dv += weights[:, None] * gl.load(dv_core_ptr + offs, mask=inside, other=0.0, cache_modifier=".ca")
            q = mean_query(q_ptr, q_strides, batch, core_head * q_per_core, q_per_core, last, inside, columns)
            dk += ds[:, None] * q
    return dk, dv


@gluon.jit
def compute(
    GROUP: gl.constexpr, tiles_smem, bars, sizes, pooled, dk_ptr, dv_ptr, dk_strides, dv_strides,
    SCALE: gl.constexpr, GROUP_SIZE: gl.constexpr, WINDOW_SIZE: gl.constexpr, MEAN: gl.constexpr, PART: gl.constexpr,
    BLOCK_Q: gl.constexpr, HEAD_DIM: gl.constexpr, NUM_STAGES: gl.constexpr,
):  # fmt: skip
    """Four computing warps: one half (GROUP 0 or 1) of the tokens of every tile."""
    seq_len, _, _, items, q_per_kv, _ = sizes
    HALF: gl.constexpr = BLOCK_KEYS // 2
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_Q, 16])
    GRADS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    k = tiles_smem[4].index(GROUP).reshape([HALF, HEAD_DIM])
    v = tiles_smem[5].index(GROUP).reshape([HALF, HEAD_DIM])
    count = 0
    for turn in range(turns(items)):
        batch, kv_head, first, tiles = locate(item_of(turn), sizes, GROUP_SIZE, WINDOW_SIZE, BLOCK_Q)
        first += GROUP * HALF
        first_query = first + gl.arange(0, HALF, layout=gl.SliceLayout(1, SCORES))
        last_query = gl.minimum(last_query_of_token(first_query, GROUP_SIZE, WINDOW_SIZE), seq_len - 1)
        rows = first + gl.arange(0, HALF, layout=gl.SliceLayout(1, GRADS))
        mbarrier.wait(bars[0].index(GROUP), turn & 1)
        # what comes through the pooling comes first, while the registers are not full of sums yet
        dk, dv = pooled_gradient(
            k, v, pooled, batch, kv_head, sizes, rows, GROUP_SIZE, SCALE, MEAN, HEAD_DIM, PART, GRADS
        )
        dk, dv, count = gather(
            GROUP, q_per_kv, dk / SCALE, dv, tiles_smem, bars, first_query, last_query, tiles, count,
            SCALE * LOG2_E, BLOCK_Q, HEAD_DIM, NUM_STAGES, SCORES, GRADS,
        )  # fmt: skip
        mbarrier.arrive(bars[1].index(GROUP), count=1)
        columns = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, GRADS))
        inside = (rows < seq_len)[:, None]
        at = batch.to(gl.int64) * dk_strides[0] + kv_head.to(gl.int64) * dk_strides[1]
        offs = rows.to(gl.int64)[:, None] * dk_strides[2] + columns[None, :]
        gl.store(dk_ptr + at + offs, (dk * SCALE).to(dk_ptr.dtype.element_ty), mask=inside)
        at = batch.to(gl.int64) * dv_strides[0] + kv_head.to(gl.int64) * dv_strides[1]
        offs = rows.to(gl.int64)[:, None] * dv_strides[2] + columns[None, :]
        gl.store(dv_ptr + at + offs, dv.to(dv_ptr.dtype.element_ty), mask=inside)


# fmt: off
@gluon.jit
def backward_dkv_hopper_kernel(
    q_desc, dout_desc, k_desc, v_desc, lse_ptr, delta_ptr,
    q_ptr, dk_core_ptr, dv_core_ptr, pool_lse_ptr, pool_delta_ptr, dk_ptr, dv_ptr,
    q_strides, grad_strides, dk_strides, dv_strides, sizes,
    SCALE: gl.constexpr, GROUP_SIZE: gl.constexpr, WINDOW_SIZE: gl.constexpr, MEAN: gl.constexpr, PART: gl.constexpr,
    HEAD_DIM: gl.constexpr, BLOCK_Q: gl.constexpr, NUM_STAGES: gl.constexpr, FEEDER: gl.constexpr,
    COMPUTE: gl.constexpr,
):
    # fmt: on
    """Persistent: each program takes the tiles of tokens that `item_of` gives it."""
    tiles_smem, bars = allocate(q_desc, k_desc, BLOCK_Q, HEAD_DIM, NUM_STAGES)
    descriptors = (q_desc, dout_desc, k_desc, v_desc)
    pooled = (q_ptr, q_strides, dk_core_ptr, dv_core_ptr, grad_strides, pool_lse_ptr, pool_delta_ptr)
    gl.warp_specialize(
        [
            (compute, (0, tiles_smem, bars, sizes, pooled, dk_ptr, dv_ptr, dk_strides, dv_strides,
                       SCALE, GROUP_SIZE, WINDOW_SIZE, MEAN, PART, BLOCK_Q, HEAD_DIM, NUM_STAGES)),
            (compute, (1, tiles_smem, bars, sizes, pooled, dk_ptr, dv_ptr, dk_strides, dv_strides,
                       SCALE, GROUP_SIZE, WINDOW_SIZE, MEAN, PART, BLOCK_Q, HEAD_DIM, NUM_STAGES)),
            (feed, (descriptors, tiles_smem, bars, sizes, lse_ptr, delta_ptr,
                    GROUP_SIZE, WINDOW_SIZE, BLOCK_Q, HEAD_DIM, NUM_STAGES)),
        ],
        [4, 1],
        [COMPUTE, FEEDER],
    )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class BackwardDkvHopperConfig(QueryTilesConfig):
    """Launch choices of `backward_dkv_hopper_kernel`."""


def default_config(problem: Problem, arch: str) -> BackwardDkvHopperConfig:
    """A config that runs every `problem` of these kernels."""
    return BackwardDkvHopperConfig(block_q=64, num_stages=3)


def launch_backward_dkv_hopper(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
    lse: Tensor,
    delta: Tensor,
    dk_core: Tensor,
    dv_core: Tensor,
    pool_lse: Tensor,
    pool_delta: Tensor,
    dk: Tensor,
    dv: Tensor,
    *,
    spec: CCASpec,
    config: BackwardDkvHopperConfig,
) -> None:
    """Fill dk and dv, as `launch_backward_dkv` does for dense sequences; `usable` must hold for q, k, v and dout.

    lse, delta (B, Hq, T), pool_lse and pool_delta (B, Hc, C) are float32 and contiguous.
    """
    batch, q_heads, tokens, head_dim = q.shape
    kv_heads, core_heads, num_cores = k.shape[1], *dk_core.shape[1:3]
    items = triton.cdiv(tokens, BLOCK_KEYS.value) * kv_heads * batch
    grad_strides, part = core_gradient_layout(dk_core, dv_core)
    queries = [describe(x, config.block_q) for x in (q, dout)]
    keys = [describe(x, BLOCK_KEYS.value // 2) for x in (k, v)]
    enqueue(
        backward_dkv_hopper_kernel, (min(multiprocessors(q.device), items), 1, 1),
        *queries, *keys, lse, delta, q, dk_core, dv_core, pool_lse, pool_delta, dk, dv,
        q.stride(), grad_strides, dk.stride(), dv.stride(),
        (tokens, num_cores, kv_heads, items, q_heads // kv_heads, q_heads // core_heads),
        SCALE=spec.softmax_scale(head_dim),
        GROUP_SIZE=spec.group_size,
        WINDOW_SIZE=spec.window_size,
        MEAN=spec.pooling == "mean",
        PART=part or head_dim,
        HEAD_DIM=head_dim,
        BLOCK_Q=config.block_q,
        NUM_STAGES=config.num_stages,
        FEEDER=FEEDER_REGISTERS,
        COMPUTE=COMPUTE_REGISTERS,
        num_warps=config.num_warps,
    )  # fmt: skip


def launch(problem: Problem, tensors: dict[str, Tensor], config: BackwardDkvHopperConfig) -> None:
    """One launch on what `allocate_dkv` made."""
    launch_backward_dkv_hopper(**tensors, spec=problem.spec, config=config)


BACKWARD_DKV_HOPPER = Tunable(
    name="backward_dkv_hopper",
    config=BackwardDkvHopperConfig,
    space=SPACE,
    default=default_config,
    allocate=allocate_dkv,
    launch=launch,
    work=dkv_work,
    kernels=(backward_dkv_hopper_kernel,),
    archs=(ARCH,),
)
