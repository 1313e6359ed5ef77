"""The backward with respect to the queries, and the delta that all of the backward needs (spec section 4).

`delta_kernel` prepares rowsum(out * dout) - dlse. `backward_dq_kernel` walks over the keys in the forward's order and
adds what pooling_backward_kernel (pooling.py) left in the rows of each group's last query. No atomics.
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
from .layout import Sequences
from .primitives import (
    LOG2_E,
    PACKED,
    key_of_tile,
    key_tiles,
    load_rows,
    locate,
    offset,
    row_pointers,
    store_rows,
    tiles_to_launch,
    visibility,
    visible_pairs,
)
from .tunable import Config, Tunable, Work, accumulator_dtype, draw, padded_dim, smallest_block_refusal


# fmt: off
@triton.jit
def delta_kernel(
    out_ptr, dout_ptr, dlse_ptr, delta_ptr, out_strides, dout_strides, dlse_strides, delta_strides, seq_len,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, HAS_DLSE: tl.constexpr, BLOCK_Q: tl.constexpr,
):
    # fmt: on
    """delta = rowsum(out * dout) - dlse for one tile of queries, in the accumulators' type."""
    head, batch = tl.program_id(1), tl.program_id(2)
    offs_q = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    mask_q = offs_q < seq_len
    offs_d = tl.arange(0, BLOCK_D)
    mask = mask_q[:, None] & (offs_d < HEAD_DIM)[None, :]
    wide = delta_ptr.dtype.element_ty
    out_offs = offset((batch, head, offs_q), out_strides)[:, None] + offs_d[None, :]
    dout_offs = offset((batch, head, offs_q), dout_strides)[:, None] + offs_d[None, :]
    out = tl.load(out_ptr + out_offs, mask=mask, other=0.0).to(wide)
    delta = tl.sum(out * tl.load(dout_ptr + dout_offs, mask=mask, other=0.0).to(wide), axis=1)
    if HAS_DLSE:
        delta -= tl.load(dlse_ptr + offset((batch, head, offs_q), dlse_strides), mask=mask_q, other=0.0)
    tl.store(delta_ptr + offset((batch, head, offs_q), delta_strides), delta, mask=mask_q)


@triton.jit
def sweep_keys(
    q, dout, k_core, v_core, core_stride, k, v, k_stride, v_stride, dq, lse2, delta, offs_q, end_q, tiles,
    SCALE_LOG2: tl.constexpr, GROUP_SIZE: tl.constexpr, WINDOW_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add to dq [Q, D] (without the scale) what key tiles give: those seen whole, or (MASKED) all the others."""
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
        scores = tl.dot(q, tl.trans(k_rows), input_precision="ieee", out_dtype=dq.dtype)
        probs = tl.exp2(scores * SCALE_LOG2 - lse2[:, None])
        if MASKED:
            probs = tl.where(visible, probs, 0.0)
        dprobs = tl.dot(dout, tl.trans(v_rows), input_precision="ieee", out_dtype=dq.dtype)
        ds = probs * (dprobs - delta[:, None])
        dq = tl.dot(ds.to(k_rows.dtype), k_rows, acc=dq, input_precision="ieee", out_dtype=dq.dtype)
    return dq


# fmt: off
@triton.jit
def backward_dq_kernel(
    q_ptr, k_ptr, v_ptr, k_core_ptr, v_core_ptr, dout_ptr, lse_ptr, delta_ptr, dq_ptr, table_ptr,
    q_strides, k_strides, v_strides, core_strides, dout_strides, lse_strides, dq_strides,
    sizes,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, GROUP_SIZE: tl.constexpr, WINDOW_SIZE: tl.constexpr,
    SCALE: tl.constexpr, MEAN: tl.constexpr, LAYOUT: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):
    # fmt: on
    """dq of one tile of queries: the keys in the forward's order, then the pooling's part, which is in dq already."""
    head, batch = tl.program_id(1), tl.program_id(2)
    num_seqs, seq_len, q_per_kv, q_per_core = sizes
    q_base, k_base, _, length, tile = locate(
        tl.num_programs(0) - 1 - tl.program_id(0), batch, table_ptr, num_seqs, seq_len, BLOCK_Q, LAYOUT
    )
    first_q = tile * BLOCK_Q
    if first_q >= length:
        return
    end_q = tl.minimum(first_q + BLOCK_Q, length)
    offs_q = first_q + tl.arange(0, BLOCK_Q)
    mask_q = offs_q < length
    SCALE_LOG2: tl.constexpr = SCALE * LOG2_E
    wide = delta_ptr.dtype.element_ty

    q_tile = row_pointers(q_ptr + offset((batch, head, q_base + first_q), q_strides), BLOCK_Q, BLOCK_D, q_strides[2])
    q = load_rows(q_tile, mask_q, HEAD_DIM, BLOCK_D, True)
    dout_at = offset((batch, head, q_base + first_q), dout_strides)
    dout_tile = row_pointers(dout_ptr + dout_at, BLOCK_Q, BLOCK_D, dout_strides[2])
    dout = load_rows(dout_tile, mask_q, HEAD_DIM, BLOCK_D, True)
    stat_offs = offset((batch, head, q_base + offs_q), lse_strides)
    lse2 = tl.load(lse_ptr + stat_offs, mask=mask_q, other=0.0) * LOG2_E
    delta = tl.load(delta_ptr + stat_offs, mask=mask_q, other=0.0)
    dq = tl.zeros([BLOCK_Q, BLOCK_D], wide)

    core_base = q_base // GROUP_SIZE if LAYOUT == PACKED else 0
    core_at = offset((batch, head // q_per_core, core_base + tl.zeros((), tl.int32)), core_strides)
    k_at = offset((batch, head // q_per_kv, k_base), k_strides)
    v_at = offset((batch, head // q_per_kv, k_base), v_strides)
    core_stride = tl.zeros((), tl.int64) + core_strides[2]
    k_stride = tl.zeros((), tl.int64) + k_strides[2]
    v_stride = tl.zeros((), tl.int64) + v_strides[2]
    tiles = key_tiles(first_q, end_q, GROUP_SIZE, WINDOW_SIZE, BLOCK_K)
    for masked in tl.static_range(2):
        dq = sweep_keys(
            q, dout, k_core_ptr + core_at, v_core_ptr + core_at, core_stride, k_ptr + k_at, v_ptr + v_at,
            k_stride, v_stride, dq, lse2, delta, offs_q, end_q, tiles,
            SCALE_LOG2, GROUP_SIZE, WINDOW_SIZE, HEAD_DIM, BLOCK_D, BLOCK_K, masked == 1,
        )  # fmt: skip

    dq = dq * SCALE
    dq_at = offset((batch, head, q_base + first_q), dq_strides)
    dq_tile = row_pointers(dq_ptr + dq_at, BLOCK_Q, BLOCK_D, dq_strides[2])
    if not MEAN:
        scored = mask_q & ((offs_q + 1) % GROUP_SIZE == 0)
        dq += load_rows(dq_tile, scored, HEAD_DIM, BLOCK_D, True).to(wide)
    store_rows(dq_tile, dq, mask_q, HEAD_DIM, BLOCK_D)


@dataclass(frozen=True, slots=True, kw_only=True)
class BackwardDqConfig(Config):
    """Launch choices of `backward_dq_kernel`: queries, and keys (core or raw tokens), of a tile."""

    block_q: int = 64
    block_k: int = 32

    def refusal(self, problem: Problem) -> str | None:
        """Why this config cannot run `problem`, or None."""
        return smallest_block_refusal(self, problem)


SPACE = {
    "block_q": (64, 128),
    "block_k": (32, 64, 128),
    "num_warps": (4, 8),
    "num_stages": (1, 2, 3),
}
DELTA_BLOCK_Q = 32  # memory-bound and short: not worth a search


def default_config(problem: Problem, arch: str) -> BackwardDqConfig:
    """A config that runs `problem` on every supported GPU."""
    if problem.element_bytes > 2 or problem.head_dim > 128:
        return BackwardDqConfig(block_q=32, block_k=32, num_warps=4, num_stages=1)
    if arch in ("sm_90", "sm_100", "sm_103"):
        return BackwardDqConfig(block_q=64, block_k=64, num_warps=4, num_stages=2)
    return BackwardDqConfig(block_q=64, block_k=32, num_warps=4, num_stages=2)


def launch_delta(out: Tensor, dout: Tensor, dlse: Tensor | None, delta: Tensor) -> None:
    """Fill `delta` (B, Hq, T) with rowsum(out * dout) - dlse; out, dout (B, Hq, T, D), dlse (B, Hq, T) or None."""
    batch, heads, tokens, head_dim = out.shape
    if 0 in out.shape:
        return
    enqueue(
        delta_kernel, (-(-tokens // DELTA_BLOCK_Q), heads, batch),
        out, dout, dlse, delta,
        out.stride(), dout.stride(), delta.stride() if dlse is None else dlse.stride(), delta.stride(),
        tokens,
        HEAD_DIM=head_dim,
        BLOCK_D=padded_dim(head_dim),
        HAS_DLSE=dlse is not None,
        BLOCK_Q=DELTA_BLOCK_Q,
    )  # fmt: skip


def launch_backward_dq(
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
    sequences: Sequences,
    config: BackwardDqConfig,
) -> None:
    """Fill `dq`, whose rows at each complete group's last query hold the pooling's part (unless pooling is "mean").

    Args:
        q, dout, dq: (B, Hq, T, D); k, v: (B, Hkv, T, D); any strides, last one 1.
        k_core, v_core: (B, Hc, C, D) with the same strides.
        lse, delta: (B, Hq, T) with the same strides; their dtype is the accumulators'.
    """
    batch, q_heads, tokens, head_dim = q.shape
    if 0 in q.shape:
        return
    if k_core.stride() != v_core.stride() or lse.stride() != delta.stride():
        raise ValueError("k_core and v_core, and lse and delta, must share their strides")
    tiles = tiles_to_launch(tokens, sequences.count, config.block_q, sequences.is_packed)
    enqueue(
        backward_dq_kernel, (tiles, q_heads, batch),
        q, k, v, k_core, v_core, dout, lse, delta, dq, sequences.table,
        q.stride(), k.stride(), v.stride(), k_core.stride(), dout.stride(), lse.stride(), dq.stride(),
        (sequences.count, tokens, q_heads // k.shape[1], q_heads // k_core.shape[1]),
        HEAD_DIM=head_dim,
        BLOCK_D=padded_dim(head_dim),
        GROUP_SIZE=spec.group_size,
        WINDOW_SIZE=spec.window_size,
        SCALE=spec.softmax_scale(head_dim),
        MEAN=spec.pooling == "mean",
        LAYOUT=sequences.layout,
        **config.launch_args(),
    )  # fmt: skip


def work(problem: Problem, config: Config) -> Work:
    """Three products of the visible pairs; q, k, v, cores, dout, lse, delta read once, dq written once."""
    pairs = problem.batch * problem.q_heads * sum(visible_pairs(problem))
    t, d = problem.seq_len, problem.head_dim
    rows = (3 * problem.q_heads + 2 * problem.kv_heads) * t + 2 * problem.num_core_heads * problem.spec.num_groups(t)
    traffic = problem.batch * (rows * d * problem.element_bytes + problem.q_heads * t * 8)
    return Work(flops=6.0 * pairs * d, bytes=float(traffic), exp2=pairs)


def allocate(problem: Problem, device: torch.device, generator: torch.Generator | None) -> dict[str, Tensor]:
    """Random q, k, v, cores, dout and delta, an lse of plausible size, and dq zero."""
    b, t, d = problem.batch, problem.seq_len, problem.head_dim
    q, kv = (b, problem.q_heads, t, d), (b, problem.kv_heads, t, d)
    core = (b, problem.num_core_heads, problem.spec.num_groups(t), d)
    shapes = {"q": q, "k": kv, "v": kv, "k_core": core, "v_core": core, "dout": q}
    tensors = draw(shapes, problem, device, generator)
    wide = accumulator_dtype(tensors["q"].dtype)
    lse = torch.log(torch.arange(1, t + 1, device=device, dtype=wide)) + 0.5
    delta = torch.zeros(q[:3], dtype=wide, device=device)
    return tensors | {"lse": lse.expand(q[:3]).contiguous(), "delta": delta, "dq": torch.zeros_like(tensors["q"])}


def launch(problem: Problem, tensors: dict[str, Tensor], config: BackwardDqConfig) -> None:
    """One launch on what `allocate` made."""
    launch_backward_dq(**tensors, spec=problem.spec, sequences=Sequences.dense(problem.batch), config=config)


BACKWARD_DQ = Tunable(
    "backward_dq", BackwardDqConfig, SPACE, default_config, allocate, launch, work, (backward_dq_kernel, delta_kernel)
)
