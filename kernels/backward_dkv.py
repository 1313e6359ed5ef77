"""The backward with respect to the keys and values, raw tokens and core tokens (spec section 4). No atomics.

`backward_dcore_kernel` gives the gradients that arrive at the cores; `backward_dkv_kernel` adds, for each raw token,
what it got as a raw key and what its core passes on through the pooling weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..problem import Problem
from ..spec import CCASpec
from .enqueue import enqueue
from .layout import Sequences, core_gradient_layout, core_gradients_in
from .primitives import (
    LOG2_E,
    PACKED,
    core_gradient_offsets,
    first_query_of_core,
    last_query_of_token,
    load_rows,
    locate,
    offset,
    pooled_gradient,
    row_pointers,
    store_rows,
    tiles_to_launch,
    visible_pairs,
)
from .tunable import Config, Tunable, Work, accumulator_dtype, draw, padded_dim, smallest_block_refusal


@triton.jit
def sweep_queries(
    k, v, q_at, dout_at, q_stride, dout_stride, lse_at, delta_at, dk, dv, tiles, first_query, last_query, length,
    SCALE_LOG2: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Add to dk (without the scale) and dv [K, D] what tiles of queries give: those that see every key, or the others.

    Key j is seen by first_query[j] .. last_query[j], and by no query from `length` on. `tiles`: the first query, and
    the numbers of tiles before, among, and after those that see every key; MASKED takes the first and last of these.
    """
    start, left, full, right = tiles
    for tile in range(0, left + right if MASKED else full):
        skipped = tl.where(tile >= left, full, 0) if MASKED else left
        query = start + (tile + skipped) * BLOCK_Q
        offs = query + tl.arange(0, BLOCK_Q)
        inside = offs < length
        q_tile = row_pointers(q_at + query * q_stride, BLOCK_Q, BLOCK_D, q_stride)
        dout_tile = row_pointers(dout_at + query * dout_stride, BLOCK_Q, BLOCK_D, dout_stride)
        q = load_rows(q_tile, inside, HEAD_DIM, BLOCK_D, MASKED)
        dout = load_rows(dout_tile, inside, HEAD_DIM, BLOCK_D, MASKED)
        lse2 = tl.load(lse_at + offs, mask=inside, other=0.0) * LOG2_E
        delta = tl.load(delta_at + offs, mask=inside, other=0.0)
        # keys by queries, so that the probabilities are a product's first operand as they come
        scores = tl.dot(k, tl.trans(q), input_precision="ieee", out_dtype=dk.dtype)
        probs = tl.exp2(scores * SCALE_LOG2 - lse2[None, :])
        if MASKED:
            visible = (offs[None, :] >= first_query[:, None]) & (offs[None, :] <= last_query[:, None])
            probs = tl.where(visible & inside[None, :], probs, 0.0)
        dv = tl.dot(probs.to(dout.dtype), dout, acc=dv, input_precision="ieee", out_dtype=dk.dtype)
        dprobs = tl.dot(v, tl.trans(dout), input_precision="ieee", out_dtype=dk.dtype)
        ds = probs * (dprobs - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, acc=dk, input_precision="ieee", out_dtype=dk.dtype)
    return dk, dv


@triton.jit
def gather_queries(
    k, v, q_ptr, dout_ptr, lse_ptr, delta_ptr, q_strides, dout_strides, lse_strides, batch, head, heads, q_base,
    start, full, full_last, stop, first_query, last_query, length,
    SCALE_LOG2: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """dk (without the scale) and dv [K, D] from the queries start .. stop - 1 of `heads` heads from `head` on.

    Every query of full .. full_last sees every key.
    """
    wide = delta_ptr.dtype.element_ty
    dk = tl.zeros([k.shape[0], BLOCK_D], wide)
    dv = tl.zeros([k.shape[0], BLOCK_D], wide)
    left = tl.cdiv(tl.maximum(tl.minimum(full, stop) - start, 0), BLOCK_Q)
    whole = tl.maximum(full_last + 1 - start - left * BLOCK_Q, 0) // BLOCK_Q
    right = tl.cdiv(tl.maximum(stop - start - (left + whole) * BLOCK_Q, 0), BLOCK_Q)
    tiles = (start, left, whole, right)
    q_stride = tl.zeros((), tl.int64) + q_strides[2]
    dout_stride = tl.zeros((), tl.int64) + dout_strides[2]
    for r in range(heads):
        q_at = q_ptr + offset((batch, head + r, q_base), q_strides)
        dout_at = dout_ptr + offset((batch, head + r, q_base), dout_strides)
        stats = offset((batch, head + r, q_base), lse_strides)
        for masked in tl.static_range(2):
            dk, dv = sweep_queries(
                k, v, q_at, dout_at, q_stride, dout_stride, lse_ptr + stats, delta_ptr + stats, dk, dv,
                tiles, first_query, last_query, length, SCALE_LOG2, HEAD_DIM, BLOCK_D, BLOCK_Q, masked == 1,
            )  # fmt: skip
    return dk, dv


# fmt: off
@triton.jit
def backward_dcore_kernel(
    q_ptr, k_core_ptr, v_core_ptr, dout_ptr, lse_ptr, delta_ptr, dk_core_ptr, dv_core_ptr, table_ptr,
    q_strides, core_strides, grad_strides, dout_strides, lse_strides,
    sizes,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, GROUP_SIZE: tl.constexpr, WINDOW_SIZE: tl.constexpr,
    SCALE: tl.constexpr, LAYOUT: tl.constexpr, PART: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_Q: tl.constexpr,
):
    # fmt: on
    """dk and dv of BLOCK_C core tokens of one core head, over all later queries of its query heads."""
    core_head, batch = tl.program_id(1), tl.program_id(2)
    num_seqs, seq_len, q_per_core = sizes
    q_base, _, _, length, tile = locate(
        tl.program_id(0), batch, table_ptr, num_seqs, seq_len, BLOCK_C * GROUP_SIZE, LAYOUT
    )
    first_c = tile * BLOCK_C
    end_c = tl.minimum(first_c + BLOCK_C, length // GROUP_SIZE)
    if first_c >= end_c:
        return
    offs_c = first_c + tl.arange(0, BLOCK_C)
    mask_c = offs_c < end_c
    core_base = q_base // GROUP_SIZE if LAYOUT == PACKED else 0
    core_at = offset((batch, core_head, core_base + first_c), core_strides)
    k_tile = row_pointers(k_core_ptr + core_at, BLOCK_C, BLOCK_D, core_strides[2])
    v_tile = row_pointers(v_core_ptr + core_at, BLOCK_C, BLOCK_D, core_strides[2])
    k_core = load_rows(k_tile, mask_c, HEAD_DIM, BLOCK_D, True)
    v_core = load_rows(v_tile, mask_c, HEAD_DIM, BLOCK_D, True)
    start = first_query_of_core(first_c, GROUP_SIZE, WINDOW_SIZE)
    full = first_query_of_core(end_c - 1, GROUP_SIZE, WINDOW_SIZE)
    first_query = first_query_of_core(offs_c, GROUP_SIZE, WINDOW_SIZE)
    last_query = tl.zeros([BLOCK_C], tl.int32) + (length - 1)
    dk, dv = gather_queries(
        k_core, v_core, q_ptr, dout_ptr, lse_ptr, delta_ptr, q_strides, dout_strides, lse_strides, batch,
        core_head * q_per_core, q_per_core, q_base, start, full, length - 1, length, first_query, last_query, length,
        SCALE * LOG2_E, HEAD_DIM, BLOCK_D, BLOCK_Q,
    )  # fmt: skip
    grad_offs = core_gradient_offsets(
        batch, core_head, q_base, offs_c, tl.arange(0, BLOCK_D), grad_strides, PART, GROUP_SIZE, LAYOUT
    )
    store_rows(dk_core_ptr + grad_offs, dk * SCALE, mask_c, HEAD_DIM, BLOCK_D)
    store_rows(dv_core_ptr + grad_offs, dv, mask_c, HEAD_DIM, BLOCK_D)


# fmt: off
@triton.jit
def backward_dkv_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, dk_core_ptr, dv_core_ptr, pool_lse_ptr, pool_delta_ptr,
    dk_ptr, dv_ptr, table_ptr,
    q_strides, k_strides, v_strides, dout_strides, lse_strides, grad_strides, dk_strides, dv_strides,
    sizes,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, GROUP_SIZE: tl.constexpr, WINDOW_SIZE: tl.constexpr,
    SCALE: tl.constexpr, MEAN: tl.constexpr, LAYOUT: tl.constexpr, PART: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_Q: tl.constexpr,
):
    # fmt: on
    """dk and dv of BLOCK_K raw tokens of one key/value head: as raw keys, and as members of their groups."""
    kv_head, batch = tl.program_id(1), tl.program_id(2)
    num_seqs, seq_len, q_per_kv, q_per_core, num_cores = sizes
    q_base, k_base, _, length, tile = locate(tl.program_id(0), batch, table_ptr, num_seqs, seq_len, BLOCK_K, LAYOUT)
    first_k = tile * BLOCK_K
    if first_k >= length:
        return
    last_k = tl.minimum(first_k + BLOCK_K, length) - 1
    offs_k = first_k + tl.arange(0, BLOCK_K)
    mask_k = offs_k < length
    k_at = offset((batch, kv_head, k_base + first_k), k_strides)
    v_at = offset((batch, kv_head, k_base + first_k), v_strides)
    k = load_rows(row_pointers(k_ptr + k_at, BLOCK_K, BLOCK_D, k_strides[2]), mask_k, HEAD_DIM, BLOCK_D, True)
    v = load_rows(row_pointers(v_ptr + v_at, BLOCK_K, BLOCK_D, v_strides[2]), mask_k, HEAD_DIM, BLOCK_D, True)
    last_query = last_query_of_token(offs_k, GROUP_SIZE, WINDOW_SIZE)
    seen_by_all = tl.minimum(last_query_of_token(first_k, GROUP_SIZE, WINDOW_SIZE), length - 1)
    stop = tl.minimum(last_query_of_token(last_k, GROUP_SIZE, WINDOW_SIZE) + 1, length)
    dk, dv = gather_queries(
        k, v, q_ptr, dout_ptr, lse_ptr, delta_ptr, q_strides, dout_strides, lse_strides, batch,
        kv_head * q_per_kv, q_per_kv, q_base, first_k, last_k, seen_by_all, stop, offs_k, last_query, length,
        SCALE * LOG2_E, HEAD_DIM, BLOCK_D, BLOCK_Q,
    )  # fmt: skip
    dk *= SCALE
    if num_cores > 0:
        grouped = offs_k < length // GROUP_SIZE * GROUP_SIZE
        dk_pooled, dv_pooled = pooled_gradient(
            k, v, q_ptr, dk_core_ptr, dv_core_ptr, pool_lse_ptr, pool_delta_ptr, q_strides, grad_strides, num_cores,
            batch, kv_head, q_per_kv // q_per_core, q_per_core, q_base, offs_k, grouped,
            HEAD_DIM, BLOCK_D, GROUP_SIZE, SCALE, MEAN, LAYOUT, PART,
        )  # fmt: skip
        dk += dk_pooled
        dv += dv_pooled
    dk_at = offset((batch, kv_head, k_base + first_k), dk_strides)
    dv_at = offset((batch, kv_head, k_base + first_k), dv_strides)
    dk_tile = row_pointers(dk_ptr + dk_at, BLOCK_K, BLOCK_D, dk_strides[2])
    dv_tile = row_pointers(dv_ptr + dv_at, BLOCK_K, BLOCK_D, dv_strides[2])
    store_rows(dk_tile, dk, mask_k, HEAD_DIM, BLOCK_D)
    store_rows(dv_tile, dv, mask_k, HEAD_DIM, BLOCK_D)


@dataclass(frozen=True, slots=True, kw_only=True)
class BackwardDcoreConfig(Config):
    """Launch choices of `backward_dcore_kernel`: core tokens and queries of a tile."""

    block_c: int = 32
    block_q: int = 32

    def refusal(self, problem: Problem) -> str | None:
        """Why this config cannot run `problem`, or None."""
        return smallest_block_refusal(self, problem)


@dataclass(frozen=True, slots=True, kw_only=True)
class BackwardDkvConfig(Config):
    """Launch choices of `backward_dkv_kernel`: raw tokens and queries of a tile."""

    block_k: int = 32
    block_q: int = 32

    def refusal(self, problem: Problem) -> str | None:
        """Why this config cannot run `problem`, or None."""
        return smallest_block_refusal(self, problem)


LAUNCHES = {"block_q": (32, 64, 128), "num_warps": (4, 8), "num_stages": (1, 2, 3)}
DCORE_SPACE = {"block_c": (32, 64, 128), **LAUNCHES}
DKV_SPACE = {"block_k": (32, 64, 128), **LAUNCHES}
ROOMY = ("sm_90", "sm_100", "sm_103")
"""Architectures with 227 KiB of shared memory; on sm_90 three stages were the fastest at every length."""


def default_dcore_config(problem: Problem, arch: str) -> BackwardDcoreConfig:
    """A config of `backward_dcore_kernel` that runs `problem` on every supported GPU."""
    if problem.element_bytes > 2 or problem.head_dim > 128:
        return BackwardDcoreConfig(block_c=32, block_q=32, num_warps=4, num_stages=1)
    return BackwardDcoreConfig(block_c=64, block_q=32, num_warps=4, num_stages=3 if arch in ROOMY else 2)


def default_dkv_config(problem: Problem, arch: str) -> BackwardDkvConfig:
    """A config of `backward_dkv_kernel` that runs `problem` on every supported GPU."""
    if problem.element_bytes > 2 or problem.head_dim > 128:
        return BackwardDkvConfig(block_k=32, block_q=32, num_warps=4, num_stages=1)
    return BackwardDkvConfig(block_k=64, block_q=32, num_warps=4, num_stages=3 if arch in ROOMY else 2)


def launch_backward_dcore(
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
    sequences: Sequences,
    config: BackwardDcoreConfig,
) -> None:
    """Fill dk_core and dv_core, in lse's dtype, (B, Hc, C, D) or as `core_gradients_in` lays them, for every group.

    q, dout: (B, Hq, T, D); k_core, v_core: (B, Hc, C, D), with the same strides; lse, delta: (B, Hq, T).
    """
    if 0 in k_core.shape or q.shape[2] == 0:
        return
    if k_core.stride() != v_core.stride():
        raise ValueError("k_core and v_core must share their strides")
    grad_strides, part = core_gradient_layout(dk_core, dv_core)
    tokens, head_dim = q.shape[2:]
    batch, core_heads = k_core.shape[:2]
    tiles = tiles_to_launch(tokens, sequences.count, config.block_c * spec.group_size, sequences.is_packed)
    enqueue(
        backward_dcore_kernel, (tiles, core_heads, batch),
        q, k_core, v_core, dout, lse, delta, dk_core, dv_core, sequences.table,
        q.stride(), k_core.stride(), grad_strides, dout.stride(), lse.stride(),
        (sequences.count, tokens, q.shape[1] // core_heads),
        HEAD_DIM=head_dim,
        BLOCK_D=padded_dim(head_dim),
        GROUP_SIZE=spec.group_size,
        WINDOW_SIZE=spec.window_size,
        SCALE=spec.softmax_scale(head_dim),
        LAYOUT=sequences.layout,
        PART=part,
        **config.launch_args(),
    )  # fmt: skip


def launch_backward_dkv(
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
    sequences: Sequences,
    config: BackwardDkvConfig,
) -> None:
    """Fill dk and dv (B, Hkv, T, D) for every real token.

    q, dout: (B, Hq, T, D); k, v: (B, Hkv, T, D); lse, delta: (B, Hq, T); dk_core, dv_core: (B, Hc, C, D), or as
    `core_gradients_in` lays them, and pool_lse, pool_delta: (B, Hc, C), contiguous, all in lse's dtype; pool_delta is
    not read when pooling is "mean". Without a core (C = 0) the tokens get what they get as raw keys.
    """
    if 0 in k.shape:
        return
    if not (pool_lse.is_contiguous() and pool_delta.is_contiguous()):
        raise ValueError("pool_lse and pool_delta must be contiguous")
    grad_strides, part = core_gradient_layout(dk_core, dv_core)
    batch, kv_heads, tokens, head_dim = k.shape
    tiles = tiles_to_launch(tokens, sequences.count, config.block_k, sequences.is_packed)
    enqueue(
        backward_dkv_kernel, (tiles, kv_heads, batch),
        q, k, v, dout, lse, delta, dk_core, dv_core, pool_lse, pool_delta, dk, dv, sequences.table,
        q.stride(), k.stride(), v.stride(), dout.stride(), lse.stride(), grad_strides, dk.stride(), dv.stride(),
        (sequences.count, tokens, q.shape[1] // kv_heads, q.shape[1] // dk_core.shape[1], dk_core.shape[2]),
        HEAD_DIM=head_dim,
        BLOCK_D=padded_dim(head_dim),
        GROUP_SIZE=spec.group_size,
        WINDOW_SIZE=spec.window_size,
        SCALE=spec.softmax_scale(head_dim),
        MEAN=spec.pooling == "mean",
        LAYOUT=sequences.layout,
        PART=part,
        **config.launch_args(),
    )  # fmt: skip


def dcore_work(problem: Problem, config: Config) -> Work:
    """Four products of the (query, core) pairs; q, dout, cores, statistics read once, core gradients written."""
    pairs = problem.batch * problem.q_heads * visible_pairs(problem)[0]
    t, d = problem.seq_len, problem.head_dim
    cores = 2 * problem.num_core_heads * problem.spec.num_groups(t)
    size = problem.element_bytes
    traffic = problem.batch * ((2 * problem.q_heads * t + cores) * d * size + cores * d * 4 + problem.q_heads * t * 8)
    return Work(flops=8.0 * pairs * d, bytes=float(traffic), exp2=pairs)


def dkv_work(problem: Problem, config: Config) -> Work:
    """Four products of the (query, raw token) pairs; everything read once, dk and dv written."""
    pairs = problem.batch * problem.q_heads * visible_pairs(problem)[1]
    t, d = problem.seq_len, problem.head_dim
    cores = 2 * problem.num_core_heads * problem.spec.num_groups(t)
    rows = (2 * problem.q_heads + 4 * problem.kv_heads) * t
    traffic = problem.batch * (rows * d * problem.element_bytes + cores * d * 4 + problem.q_heads * t * 8)
    return Work(flops=8.0 * pairs * d, bytes=float(traffic), exp2=pairs)


def allocate_dcore(problem: Problem, device: torch.device, generator: torch.Generator | None) -> dict[str, Tensor]:
    """Random q, cores and dout, an lse of plausible size; the core gradients empty."""
    b, t, d = problem.batch, problem.seq_len, problem.head_dim
    q, core = (b, problem.q_heads, t, d), (b, problem.num_core_heads, problem.spec.num_groups(t), d)
    tensors = draw({"q": q, "k_core": core, "v_core": core, "dout": q}, problem, device, generator)
    wide = accumulator_dtype(tensors["q"].dtype)
    lse = torch.log(torch.arange(1, t + 1, device=device, dtype=wide)) + 0.5
    tensors |= {"lse": lse.expand(q[:3]).contiguous(), "delta": torch.zeros(q[:3], dtype=wide, device=device)}
    grads = core_gradients_in(torch.empty_like(tensors["q"]), tensors["k_core"], problem.group_size, wide)
    return tensors | {"dk_core": grads[0], "dv_core": grads[1]}


def allocate_dkv(problem: Problem, device: torch.device, generator: torch.Generator | None) -> dict[str, Tensor]:
    """As for the cores, with random core gradients and raw k and v; dk and dv empty."""
    tensors = allocate_dcore(problem, device, generator)
    k_core, v_core = tensors.pop("k_core"), tensors.pop("v_core")
    tensors["dk_core"].copy_(k_core.view(tensors["dk_core"].shape))
    tensors["dv_core"].copy_(v_core.view(tensors["dv_core"].shape))
    kv = (problem.batch, problem.kv_heads, problem.seq_len, problem.head_dim)
    tensors |= draw({"k": kv, "v": kv}, problem, device, generator)
    pool_lse = torch.full(k_core.shape[:3], 3.0, dtype=tensors["lse"].dtype, device=device)
    tensors |= {"pool_lse": pool_lse, "pool_delta": torch.zeros_like(pool_lse)}
    return tensors | {"dk": torch.empty_like(tensors["k"]), "dv": torch.empty_like(tensors["v"])}


def launch_dcore(problem: Problem, tensors: dict[str, Tensor], config: BackwardDcoreConfig) -> None:
    """One launch on what `allocate_dcore` made."""
    launch_backward_dcore(**tensors, spec=problem.spec, sequences=Sequences.dense(problem.batch), config=config)


def launch_dkv(problem: Problem, tensors: dict[str, Tensor], config: BackwardDkvConfig) -> None:
    """One launch on what `allocate_dkv` made."""
    launch_backward_dkv(**tensors, spec=problem.spec, sequences=Sequences.dense(problem.batch), config=config)


BACKWARD_DCORE = Tunable(
    "backward_dcore", BackwardDcoreConfig, DCORE_SPACE, default_dcore_config, allocate_dcore, launch_dcore,
    dcore_work, (backward_dcore_kernel,),
)  # fmt: skip
BACKWARD_DKV = Tunable(
    "backward_dkv", BackwardDkvConfig, DKV_SPACE, default_dkv_config, allocate_dkv, launch_dkv,
    dkv_work, (backward_dkv_kernel,),
)  # fmt: skip
