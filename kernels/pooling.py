"""Pooling: every complete group of `g` tokens becomes one core token (spec section 1; paper equations 4 and 5)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..problem import Problem
from ..spec import CCASpec
from .enqueue import enqueue
from .layout import Sequences, core_gradient_layout, core_gradients_in
from .primitives import (
    LN_2,
    LOG2_E,
    PACKED,
    core_gradient_offsets,
    locate,
    mean_query,
    offset,
    scale_log2,
    store_rows,
    tiles_to_launch,
)
from .tunable import Config, Tunable, Work, accumulator_dtype, draw, padded_dim


@triton.jit
def load_groups(head_ptr, stride, tokens, inside, head_dim, BLOCK_D: tl.constexpr):
    """Rows `tokens` [C, T] (int64) of one head as [C, T, BLOCK_D]; zero where not `inside` [C, T]."""
    offs_d = tl.arange(0, BLOCK_D)[None, None, :]
    pointers = head_ptr + (tokens * stride)[:, :, None] + offs_d
    return tl.load(pointers, mask=inside[:, :, None] & (offs_d < head_dim), other=0.0)


@triton.jit
def side_by_side(program, kv_head, cores_per_kv):
    """(tile, core head) of a program: the core heads of a key/value head take each tile one after the other.

    Its keys and values then come from device memory once; head after head, those of long sequences leave the L2 cache.
    """
    return program // cores_per_kv, kv_head * cores_per_kv + program % cores_per_kv


# fmt: off
@triton.jit
def pooling_kernel(
    q_ptr, k_ptr, v_ptr, k_core_ptr, v_core_ptr, pool_lse_ptr, table_ptr,
    q_strides, k_strides, v_strides, core_strides, pool_lse_strides,
    sizes,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, GROUP_SIZE: tl.constexpr, MEAN: tl.constexpr,
    SCALE_LOG2: tl.constexpr, LAYOUT: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_T: tl.constexpr,
):
    # fmt: on
    """Pool BLOCK_C groups of one core head; a group longer than BLOCK_T goes through an online softmax."""
    kv_head, batch = tl.program_id(1), tl.program_id(2)
    num_seqs, seq_len, cores_per_kv, q_per_core = sizes
    tile, core_head = side_by_side(tl.program_id(0), kv_head, cores_per_kv)
    q_base, k_base, begin, length, tile = locate(
        tile, batch, table_ptr, num_seqs, seq_len, BLOCK_C * GROUP_SIZE, LAYOUT
    )
    offs_c = begin // GROUP_SIZE + tile * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < length // GROUP_SIZE
    offs_d, offs_t = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_T)
    wide = pool_lse_ptr.dtype.element_ty
    k_head = k_ptr + offset((batch, kv_head), k_strides)
    v_head = v_ptr + offset((batch, kv_head), v_strides)
    if not MEAN:
        last = q_base + offs_c * GROUP_SIZE + GROUP_SIZE - 1
        q = mean_query(q_ptr, q_strides, batch, core_head * q_per_core, q_per_core, last, mask_c, HEAD_DIM, BLOCK_D)
    k_core = tl.zeros([BLOCK_C, BLOCK_D], wide)
    v_core = tl.zeros([BLOCK_C, BLOCK_D], wide)
    row_max = tl.full([BLOCK_C], -float("inf"), wide)
    row_sum = tl.zeros([BLOCK_C], wide)
    for start in range(0, GROUP_SIZE, BLOCK_T):
        inside = mask_c[:, None] & (start + offs_t < GROUP_SIZE)[None, :]  # [C, T]
        tokens = (k_base + offs_c * GROUP_SIZE + start).to(tl.int64)[:, None] + offs_t[None, :]
        k = load_groups(k_head, k_strides[2], tokens, inside, HEAD_DIM, BLOCK_D).to(wide)
        v = load_groups(v_head, v_strides[2], tokens, inside, HEAD_DIM, BLOCK_D).to(wide)
        scores = tl.zeros([BLOCK_C, BLOCK_T], wide) if MEAN else tl.sum(k * q[:, None, :], axis=2) * SCALE_LOG2
        new_max = tl.maximum(row_max, tl.max(tl.where(inside, scores, -float("inf")), axis=1))
        pivot = tl.where(mask_c, new_max, 0.0)
        weights = tl.where(inside, tl.exp2(scores - pivot[:, None]), 0.0)
        rescale = tl.where(mask_c, tl.exp2(row_max - pivot), 0.0)
        row_sum = row_sum * rescale + tl.sum(weights, axis=1)
        k_core = k_core * rescale[:, None] + tl.sum(weights[:, :, None] * k, axis=1)
        v_core = v_core * rescale[:, None] + tl.sum(weights[:, :, None] * v, axis=1)
        row_max = new_max
    row_sum = tl.where(mask_c, row_sum, 1.0)
    slots = offs_c + (q_base // GROUP_SIZE if LAYOUT == PACKED else 0)
    core_offs = offset((batch, core_head, slots), core_strides)[:, None] + offs_d[None, :]
    store_rows(k_core_ptr + core_offs, k_core / row_sum[:, None], mask_c, HEAD_DIM, BLOCK_D)
    store_rows(v_core_ptr + core_offs, v_core / row_sum[:, None], mask_c, HEAD_DIM, BLOCK_D)
    lse = (row_max + tl.log2(row_sum)) * LN_2
    tl.store(pool_lse_ptr + offset((batch, core_head, slots), pool_lse_strides), lse, mask=mask_c)


# fmt: off
@triton.jit
def pooling_backward_kernel(
    q_ptr, k_ptr, v_ptr, k_core_ptr, v_core_ptr, dk_core_ptr, dv_core_ptr, pool_lse_ptr, pool_delta_ptr, dq_ptr,
    table_ptr,
    q_strides, k_strides, v_strides, core_strides, grad_strides, stat_strides, dq_strides,
    sizes,
    BLOCK_D: tl.constexpr, GROUP_SIZE: tl.constexpr, SCALE: tl.constexpr, LAYOUT: tl.constexpr,
    PART: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_T: tl.constexpr,
):
    # fmt: on
    """Gradient of the pooling weights of BLOCK_C groups of one core head (spec section 4).

    Writes pool_delta[c] = sum_t a_t da_t, and scale * sum_t ds_t k_t, shared out over the query heads that scored the
    group, into the rows of its last query in dq, which backward_dq_kernel adds to.
    """
    kv_head, batch = tl.program_id(1), tl.program_id(2)
    num_seqs, seq_len, cores_per_kv, q_per_core, head_dim = sizes
    tile, core_head = side_by_side(tl.program_id(0), kv_head, cores_per_kv)
    q_base, k_base, _, length, tile = locate(
        tile, batch, table_ptr, num_seqs, seq_len, BLOCK_C * GROUP_SIZE, LAYOUT
    )
    offs_c = tile * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < length // GROUP_SIZE
    offs_d, offs_t = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_T)
    mask = mask_c[:, None] & (offs_d < head_dim)[None, :]
    wide = pool_lse_ptr.dtype.element_ty
    last = q_base + offs_c * GROUP_SIZE + GROUP_SIZE - 1
    head = core_head * q_per_core
    q = mean_query(q_ptr, q_strides, batch, head, q_per_core, last, mask_c, head_dim, BLOCK_D)
    slots = offs_c + (q_base // GROUP_SIZE if LAYOUT == PACKED else 0)
    core_offs = offset((batch, core_head, slots), core_strides)[:, None] + offs_d[None, :]
    k_core = tl.load(k_core_ptr + core_offs, mask=mask, other=0.0).to(wide)
    v_core = tl.load(v_core_ptr + core_offs, mask=mask, other=0.0).to(wide)
    grad_offs = core_gradient_offsets(
        batch, core_head, q_base, offs_c, offs_d, grad_strides, PART, GROUP_SIZE, LAYOUT
    )
    dk_core = tl.load(dk_core_ptr + grad_offs, mask=mask, other=0.0)
    dv_core = tl.load(dv_core_ptr + grad_offs, mask=mask, other=0.0)
    stat_offs = offset((batch, core_head, slots), stat_strides)
    pool_lse = tl.load(pool_lse_ptr + stat_offs, mask=mask_c, other=0.0)
    # the stored cores give the mean of da to rounding; what is left of it is summed exactly
    mean = tl.sum(dk_core * k_core + dv_core * v_core, axis=1)
    rest = tl.zeros([BLOCK_C], wide)
    dq = tl.zeros([BLOCK_C, BLOCK_D], wide)
    pooled = tl.zeros([BLOCK_C, BLOCK_D], wide)
    k_head = k_ptr + offset((batch, kv_head), k_strides)
    v_head = v_ptr + offset((batch, kv_head), v_strides)
    for start in range(0, GROUP_SIZE, BLOCK_T):
        inside = mask_c[:, None] & (start + offs_t < GROUP_SIZE)[None, :]  # [C, T]
        tokens = (k_base + offs_c * GROUP_SIZE + start).to(tl.int64)[:, None] + offs_t[None, :]
        k = load_groups(k_head, k_strides[2], tokens, inside, head_dim, BLOCK_D).to(wide)
        v = load_groups(v_head, v_strides[2], tokens, inside, head_dim, BLOCK_D).to(wide)
        weights = tl.exp2((tl.sum(k * q[:, None, :], axis=2) * SCALE - pool_lse[:, None]) * LOG2_E)
        weights = tl.where(inside, weights, 0.0)
        da = tl.sum(dk_core[:, None, :] * k + dv_core[:, None, :] * v, axis=2)
        ds = weights * (da - mean[:, None])
        rest += tl.sum(ds, axis=1)
        dq += tl.sum(ds[:, :, None] * k, axis=1)
        pooled += tl.sum(weights[:, :, None] * k, axis=1)
    dq = (dq - rest[:, None] * pooled) * SCALE / q_per_core
    tl.store(pool_delta_ptr + stat_offs, mean + rest, mask=mask_c)
    for h in range(q_per_core):
        row_offs = offset((batch, head + h, last), dq_strides)[:, None] + offs_d[None, :]
        tl.store(dq_ptr + row_offs, dq.to(dq_ptr.dtype.element_ty), mask=mask)


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolingConfig(Config):
    """Launch choices of both pooling kernels: groups of a tile, and tokens of a group per step."""

    block_c: int = 4
    block_t: int = 16

    def effective(self, spec: CCASpec) -> PoolingConfig:
        """This config with `block_t` no longer than a group needs."""
        return _effective(self, spec.group_size)


@cache
def _effective(config: PoolingConfig, group_size: int) -> PoolingConfig:
    return replace(config, block_t=min(config.block_t, triton.next_power_of_2(group_size)))


SPACE = {
    "block_c": (1, 2, 4, 8, 16, 32),
    "block_t": (16, 32, 64),
    "num_warps": (2, 4, 8),
    "num_stages": (1,),
}


def default_config(problem: Problem, arch: str) -> PoolingConfig:
    """A config that runs `problem` on every supported GPU: tiles of at most 8 groups and 8192 elements.

    More groups of a tile, or rows that cannot be read 16 bytes at a time, need more registers than there are.
    """
    block_t = min(16, triton.next_power_of_2(problem.group_size))
    elements = padded_dim(problem.head_dim) * block_t * (2 if problem.element_bytes > 2 else 1)
    most = min(8, 8192 // elements) // (1 if problem.head_dim % 16 == 0 else 4)
    return PoolingConfig(block_c=max(1, most), block_t=block_t, num_warps=2, num_stages=1)


def pooling_grid(
    q: Tensor, k: Tensor, k_core: Tensor, sequences: Sequences, spec: CCASpec, block_c: int
) -> tuple[int, int, int]:
    """(tiles of each core head of a key/value head, key/value heads, batch).

    A chunk can complete one group more than its tokens alone would.
    """
    tokens = q.shape[2] if sequences.is_packed else q.shape[2] + spec.group_size - 1
    tiles = tiles_to_launch(tokens, sequences.count, block_c * spec.group_size, sequences.is_packed)
    return tiles * (k_core.shape[1] // k.shape[1]), k.shape[1], k.shape[0]


def launch_pooling(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_core: Tensor,
    v_core: Tensor,
    pool_lse: Tensor,
    *,
    spec: CCASpec,
    sequences: Sequences,
    config: PoolingConfig,
) -> None:
    """Pool every group that the call completes.

    Args:
        q: (B, Hq, T, D); k, v: (B, Hkv, T', D), T' = T unless `sequences` is a chunk; any strides, last one 1.
        k_core, v_core: (B, Hc, C, D), with the same strides, filled where a group is complete.
        pool_lse: (B, Hc, C) float32 (float64 for float64), log-sum-exp of each group's scores, filled likewise.
    """
    if 0 in k_core.shape or q.shape[2] == 0:
        return
    if k_core.stride() != v_core.stride():
        raise ValueError("k_core and v_core must share their strides")
    config = config.effective(spec)
    kv_heads, core_heads = k.shape[1], k_core.shape[1]
    enqueue(
        pooling_kernel, pooling_grid(q, k, k_core, sequences, spec, config.block_c),
        q, k, v, k_core, v_core, pool_lse, sequences.table,
        q.stride(), k.stride(), v.stride(), k_core.stride(), pool_lse.stride(),
        (sequences.count, q.shape[2], core_heads // kv_heads, q.shape[1] // core_heads),
        HEAD_DIM=q.shape[3],
        BLOCK_D=padded_dim(q.shape[3]),
        GROUP_SIZE=spec.group_size,
        MEAN=spec.pooling == "mean",
        SCALE_LOG2=scale_log2(spec, q.shape[3]),
        LAYOUT=sequences.layout,
        **config.launch_args(),
    )  # fmt: skip


def launch_pooling_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_core: Tensor,
    v_core: Tensor,
    dk_core: Tensor,
    dv_core: Tensor,
    pool_lse: Tensor,
    pool_delta: Tensor,
    dq: Tensor,
    *,
    spec: CCASpec,
    sequences: Sequences,
    config: PoolingConfig,
) -> None:
    """Fill `pool_delta` (B, Hc, C) and, in `dq` (B, Hq, T, D), the rows of each complete group's last query.

    dk_core, dv_core: (B, Hc, C, D) in pool_lse's dtype, or in `dq` as `core_gradients_in` lays them.
    """
    if 0 in k_core.shape or q.shape[2] == 0:
        return
    if k_core.stride() != v_core.stride():
        raise ValueError("k_core and v_core must share their strides")
    grad_strides, part = core_gradient_layout(dk_core, dv_core)
    config = config.effective(spec)
    kv_heads, core_heads = k.shape[1], k_core.shape[1]
    enqueue(
        pooling_backward_kernel, pooling_grid(q, k, k_core, sequences, spec, config.block_c),
        q, k, v, k_core, v_core, dk_core, dv_core, pool_lse, pool_delta, dq, sequences.table,
        q.stride(), k.stride(), v.stride(), k_core.stride(), grad_strides, pool_lse.stride(), dq.stride(),
        (sequences.count, q.shape[2], core_heads // kv_heads, q.shape[1] // core_heads, q.shape[3]),
        BLOCK_D=padded_dim(q.shape[3]),
        GROUP_SIZE=spec.group_size,
        SCALE=spec.softmax_scale(q.shape[3]),
        LAYOUT=sequences.layout,
        PART=part,
        **config.launch_args(),
    )  # fmt: skip


def work(problem: Problem, config: Config) -> Work:
    """k and v read once for each core head that scores them, last queries read, cores written."""
    b, t, d = problem.batch, problem.seq_len, problem.head_dim
    groups = problem.spec.num_groups(t)
    tokens = float(b * problem.num_core_heads * groups * problem.group_size)
    heads = 2 * problem.kv_heads * problem.group_size + problem.q_heads + 2 * problem.num_core_heads
    rows = b * groups * heads
    return Work(flops=6.0 * tokens * d, bytes=float(rows * d * problem.element_bytes), exp2=tokens)


def backward_work(problem: Problem, config: Config) -> Work:
    """As the forward, with the cores' gradients read and the last queries' written."""
    forward = work(problem, config)
    groups = problem.batch * problem.spec.num_groups(problem.seq_len)
    extra = groups * problem.head_dim * (8 * problem.num_core_heads + problem.q_heads * problem.element_bytes)
    return Work(flops=2.0 * forward.flops, bytes=forward.bytes + extra, exp2=forward.exp2)


def allocate(problem: Problem, device: torch.device, generator: torch.Generator | None) -> dict[str, Tensor]:
    """q, k and v at random; cores and pool_lse empty."""
    b, t, d = problem.batch, problem.seq_len, problem.head_dim
    cores = (b, problem.num_core_heads, problem.spec.num_groups(t), d)
    shapes = {"q": (b, problem.q_heads, t, d), "k": (b, problem.kv_heads, t, d), "v": (b, problem.kv_heads, t, d)}
    tensors = draw(shapes, problem, device, generator)
    for name in ("k_core", "v_core"):
        tensors[name] = torch.empty(cores, dtype=tensors["k"].dtype, device=device)
    tensors["pool_lse"] = torch.empty(cores[:3], dtype=accumulator_dtype(tensors["q"].dtype), device=device)
    return tensors


def allocate_backward(problem: Problem, device: torch.device, generator: torch.Generator | None) -> dict[str, Tensor]:
    """The forward's tensors, filled by it, and random gradients of the cores."""
    tensors = allocate(problem, device, generator)
    if device.type != "meta":
        launch(problem, tensors, default_config(problem, "any"))
    dq, wide = torch.empty_like(tensors["q"]), tensors["pool_lse"].dtype
    grads = core_gradients_in(dq, tensors["k_core"], problem.group_size, wide)
    for name, grad in zip(("dk_core", "dv_core"), grads, strict=True):
        drawn = draw({name: tensors["k_core"].shape}, problem, device, generator)[name]
        tensors[name] = grad.copy_(drawn.view(grad.shape))
    return tensors | {"pool_delta": torch.empty_like(tensors["pool_lse"]), "dq": dq}


def launch(problem: Problem, tensors: dict[str, Tensor], config: PoolingConfig) -> None:
    """One forward launch on what `allocate` made."""
    launch_pooling(**tensors, spec=problem.spec, sequences=Sequences.dense(problem.batch), config=config)


def launch_backward(problem: Problem, tensors: dict[str, Tensor], config: PoolingConfig) -> None:
    """One backward launch on what `allocate_backward` made."""
    launch_pooling_backward(**tensors, spec=problem.spec, sequences=Sequences.dense(problem.batch), config=config)


POOLING = Tunable("pooling", PoolingConfig, SPACE, default_config, allocate, launch, work, (pooling_kernel,))
POOLING_BACKWARD = Tunable(
    "pooling_backward",
    PoolingConfig,
    SPACE,
    default_config,
    allocate_backward,
    launch_backward,
    backward_work,
    (pooling_backward_kernel,),
)
