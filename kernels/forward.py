"""The fused forward: one softmax over visible core tokens and recent raw tokens (spec sections 2 and 3)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..problem import Problem
from ..spec import CCASpec
from .enqueue import enqueue
from .layout import Sequences
from .primitives import (
    LN_2,
    PACKED,
    attend,
    key_of_tile,
    key_tiles,
    load_rows,
    locate,
    offset,
    row_pointers,
    scale_log2,
    store_rows,
    tiles_to_launch,
    visibility,
    visible_pairs,
)
from .tunable import Config, Tunable, Work, accumulator_dtype, draw, padded_dim, smallest_block_refusal


@triton.jit
def sweep(
    q, k_core, v_core, core_stride, k, v, k_stride, v_stride, acc, row_max, row_sum, offs_q, end_q, tiles,
    SCALE_LOG2: tl.constexpr, GROUP_SIZE: tl.constexpr, WINDOW_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Attend to the key tiles that every query sees whole, or (MASKED) to all the others; `tiles` are key_tiles'."""
    core_full, core_edge, _, left, raw_full, right = tiles
    cores = core_edge if MASKED else core_full
    raws = left + right if MASKED else raw_full
    for tile in range(0, cores + raws):
        is_core, key = key_of_tile(tile, cores, tiles, BLOCK_K, MASKED)
        offs = key + tl.arange(0, BLOCK_K)
        inside, visible = visibility(offs_q, offs, end_q, is_core, GROUP_SIZE, WINDOW_SIZE)
        k_step = tl.where(is_core, core_stride, k_stride)
        v_step = tl.where(is_core, core_stride, v_stride)
        k_tile = row_pointers(tl.where(is_core, k_core, k) + key * k_step, BLOCK_K, BLOCK_D, k_step)
        v_tile = row_pointers(tl.where(is_core, v_core, v) + key * v_step, BLOCK_K, BLOCK_D, v_step)
        k_rows = load_rows(k_tile, inside, HEAD_DIM, BLOCK_D, MASKED)
        v_rows = load_rows(v_tile, inside, HEAD_DIM, BLOCK_D, MASKED)
        acc, row_max, row_sum = attend(q, k_rows, v_rows, visible, acc, row_max, row_sum, SCALE_LOG2, MASKED)
    return acc, row_max, row_sum


# fmt: off
@triton.jit
def forward_kernel(
    q_ptr, k_ptr, v_ptr, k_core_ptr, v_core_ptr, out_ptr, lse_ptr, table_ptr,
    q_strides, k_strides, v_strides, core_strides, out_strides, lse_strides,
    sizes,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, GROUP_SIZE: tl.constexpr, WINDOW_SIZE: tl.constexpr,
    SCALE_LOG2: tl.constexpr, LAYOUT: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):
    # fmt: on
    """One tile of queries of one head: the key tiles that all its rows see whole, then those at the edges."""
    head, batch = tl.program_id(1), tl.program_id(2)
    num_seqs, seq_len, q_per_kv, q_per_core = sizes
    # the last tiles see the most cores: they start first
    q_base, k_base, begin, length, tile = locate(
        tl.num_programs(0) - 1 - tl.program_id(0), batch, table_ptr, num_seqs, seq_len, BLOCK_Q, LAYOUT
    )
    first_q = begin + tile * BLOCK_Q
    if first_q >= length:
        return
    end_q = tl.minimum(first_q + BLOCK_Q, length)
    offs_q = first_q + tl.arange(0, BLOCK_Q)
    mask_q = offs_q < length
    core_base = q_base // GROUP_SIZE if LAYOUT == PACKED else 0

    q_tile = row_pointers(q_ptr + offset((batch, head, q_base + first_q), q_strides), BLOCK_Q, BLOCK_D, q_strides[2])
    q = load_rows(q_tile, mask_q, HEAD_DIM, BLOCK_D, True)
    wide = lse_ptr.dtype.element_ty
    acc = tl.zeros([BLOCK_Q, BLOCK_D], wide)
    row_max = tl.full([BLOCK_Q], -float("inf"), wide)
    row_sum = tl.zeros([BLOCK_Q], wide)

    core_at = offset((batch, head // q_per_core, core_base + tl.zeros((), tl.int32)), core_strides)
    k_at = offset((batch, head // q_per_kv, k_base), k_strides)
    v_at = offset((batch, head // q_per_kv, k_base), v_strides)
    core_stride = tl.zeros((), tl.int64) + core_strides[2]
    k_stride = tl.zeros((), tl.int64) + k_strides[2]
    v_stride = tl.zeros((), tl.int64) + v_strides[2]
    tiles = key_tiles(first_q, end_q, GROUP_SIZE, WINDOW_SIZE, BLOCK_K)
    for masked in tl.static_range(2):
        acc, row_max, row_sum = sweep(
            q, k_core_ptr + core_at, v_core_ptr + core_at, core_stride, k_ptr + k_at, v_ptr + v_at, k_stride, v_stride,
            acc, row_max, row_sum, offs_q, end_q, tiles,
            SCALE_LOG2, GROUP_SIZE, WINDOW_SIZE, HEAD_DIM, BLOCK_D, BLOCK_K, masked == 1,
        )  # fmt: skip

    row_sum = tl.where(mask_q, row_sum, 1.0)
    out_at = offset((batch, head, q_base + first_q), out_strides)
    out_tile = row_pointers(out_ptr + out_at, BLOCK_Q, BLOCK_D, out_strides[2])
    store_rows(out_tile, acc / row_sum[:, None], mask_q, HEAD_DIM, BLOCK_D)
    lse = (row_max + tl.log2(row_sum)) * LN_2
    tl.store(lse_ptr + offset((batch, head, q_base + offs_q), lse_strides), lse, mask=mask_q)


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardConfig(Config):
    """Launch choices of `forward_kernel`: queries, and keys (core or raw tokens), of a tile."""

    block_q: int = 64
    block_k: int = 64

    def refusal(self, problem: Problem) -> str | None:
        """Why this config cannot run `problem`, or None."""
        return smallest_block_refusal(self, problem)


SPACE = {
    "block_q": (64, 128, 256),
    "block_k": (32, 64, 128),
    "num_warps": (4, 8),
    "num_stages": (1, 2, 3, 4),
}


def default_config(problem: Problem, arch: str) -> ForwardConfig:
    """A config that runs `problem` on every supported GPU; `arch` is "sm_90", "gfx942", "cpu" and the like."""
    if problem.element_bytes > 2:
        return ForwardConfig(block_q=32, block_k=32, num_warps=4, num_stages=1)
    if problem.head_dim > 128:
        return ForwardConfig(block_q=64, block_k=32, num_warps=4, num_stages=2)
    if arch in ("sm_90", "sm_100", "sm_103"):
        return ForwardConfig(block_q=64, block_k=64, num_warps=4, num_stages=3)
    return ForwardConfig(block_q=128, block_k=32, num_warps=4, num_stages=2)


def launch_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_core: Tensor,
    v_core: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    spec: CCASpec,
    sequences: Sequences,
    config: ForwardConfig,
) -> None:
    """Fill `out` and `lse` for every real query.

    Args:
        q, out: (B, Hq, T, D); k, v: (B, Hkv, T', D), T' = T unless `sequences` is a chunk; any strides, last one 1.
        k_core, v_core: (B, Hc, C, D) with the same strides.
        lse: (B, Hq, T) float32 (float64 for float64), natural logarithm; its dtype is the accumulators'.
    """
    batch, q_heads, tokens, head_dim = q.shape
    if 0 in q.shape:
        return
    if k_core.stride() != v_core.stride():
        raise ValueError("k_core and v_core must share their strides")
    tiles = tiles_to_launch(tokens, sequences.count, config.block_q, sequences.is_packed)
    sizes = (sequences.count, tokens, q_heads // k.shape[1], q_heads // k_core.shape[1])
    enqueue(
        forward_kernel, (tiles, q_heads, batch),
        q, k, v, k_core, v_core, out, lse, sequences.table,
        q.stride(), k.stride(), v.stride(), k_core.stride(), out.stride(), lse.stride(),
        sizes,
        HEAD_DIM=head_dim,
        BLOCK_D=padded_dim(head_dim),
        GROUP_SIZE=spec.group_size,
        WINDOW_SIZE=spec.window_size,
        SCALE_LOG2=scale_log2(spec, head_dim),
        LAYOUT=sequences.layout,
        **config.launch_args(),
    )  # fmt: skip


def work(problem: Problem, config: Config) -> Work:
    """Two products of the visible pairs; q, k, v, cores read once, out and lse written once."""
    pairs = problem.batch * problem.q_heads * sum(visible_pairs(problem))
    t, d, size = problem.seq_len, problem.head_dim, problem.element_bytes
    core_rows = 2 * problem.num_core_heads * problem.spec.num_groups(t)
    rows = (2 * problem.q_heads + 2 * problem.kv_heads) * t + core_rows
    return Work(
        flops=4.0 * pairs * d,
        bytes=float(problem.batch * (rows * d * size + problem.q_heads * t * 4)),
        exp2=pairs,
    )


def allocate(problem: Problem, device: torch.device, generator: torch.Generator | None) -> dict[str, Tensor]:
    """q, k, v and cores at random; out and lse empty."""
    b, t, d = problem.batch, problem.seq_len, problem.head_dim
    cores = (b, problem.num_core_heads, problem.spec.num_groups(t), d)
    shapes = {"q": (b, problem.q_heads, t, d), "k": (b, problem.kv_heads, t, d), "v": (b, problem.kv_heads, t, d)}
    tensors = draw(shapes | {"k_core": cores, "v_core": cores}, problem, device, generator)
    outputs = {
        "out": torch.empty_like(tensors["q"]),
        "lse": torch.empty(b, problem.q_heads, t, dtype=accumulator_dtype(tensors["q"].dtype), device=device),
    }
    return {**tensors, **outputs}


def launch(problem: Problem, tensors: dict[str, Tensor], config: ForwardConfig) -> None:
    """One launch on what `allocate` made."""
    launch_forward(**tensors, spec=problem.spec, sequences=Sequences.dense(problem.batch), config=config)


FORWARD = Tunable(
    name="forward",
    config=ForwardConfig,
    space=SPACE,
    default=default_config,
    allocate=allocate,
    launch=launch,
    work=work,
    kernels=(forward_kernel,),
)
