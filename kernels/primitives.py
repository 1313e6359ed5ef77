"""What the kernels share: addressing, the rule of visibility, locating a tile, and one online-softmax step.

Another pair of segments (attention sinks, a sliding window, full causal attention) is another version of the four
functions under "visibility"; no kernel states the rule itself.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

from ..problem import Problem
from ..spec import CCASpec

LOG2_E = tl.constexpr(math.log2(math.e))
LN_2 = tl.constexpr(math.log(2.0))

# how sequences lie in a (B, H, T, D) tensor; layout.py makes the table of each
DENSE = tl.constexpr(0)  # row b is one sequence of T tokens; no table
ROWS = tl.constexpr(1)  # row b holds one sequence; table (B, 4): q_base, k_base, begin, length
PACKED = tl.constexpr(2)  # B = 1, sequence n lies at table[n] .. table[n + 1] - 1


@triton.jit
def offset(index, strides):
    """Element offset of `index` (its leading axes) in a tensor of `strides`, in 64 bits."""
    total = tl.zeros((), tl.int64)
    for axis in tl.static_range(len(index)):
        total += index[axis].to(tl.int64) * strides[axis]
    return total


# --- visibility (spec section 2); arguments are positions within the sequence -----------------------------------


@triton.jit
def visible_cores(position, GROUP_SIZE: tl.constexpr, WINDOW_SIZE: tl.constexpr):
    """Core tokens the query at `position` sees: max(0, floor((i + 1 - w) / g)); clamped first, as // truncates."""
    return tl.maximum(position + 1 - WINDOW_SIZE, 0) // GROUP_SIZE


@triton.jit
def first_local(position, GROUP_SIZE: tl.constexpr, WINDOW_SIZE: tl.constexpr):
    """First raw token the query at `position` sees; it sees all from there to itself."""
    return visible_cores(position, GROUP_SIZE, WINDOW_SIZE) * GROUP_SIZE


@triton.jit
def first_query_of_core(core, GROUP_SIZE: tl.constexpr, WINDOW_SIZE: tl.constexpr):
    """First query that sees `core`; all later ones do."""
    return (core + 1) * GROUP_SIZE + WINDOW_SIZE - 1


@triton.jit
def last_query_of_token(token, GROUP_SIZE: tl.constexpr, WINDOW_SIZE: tl.constexpr):
    """Last query that sees raw `token`; all from the token itself to there do."""
    return (token // GROUP_SIZE + 1) * GROUP_SIZE + WINDOW_SIZE - 2


# --- tiles --------------------------------------------------------------------------------------------------------


@triton.jit
def locate(tile, batch, table_ptr, num_seqs, seq_len, BLOCK: tl.constexpr, LAYOUT: tl.constexpr):
    """The sequence that a tile of `BLOCK` tokens belongs to: (q_base, k_base, begin, length, tile of the sequence).

    Position p of the sequence is row q_base + p of q and k_base + p of k and v; the call brings the queries
    begin .. length - 1. Packed: sequence n owns the tiles from `table[n] // BLOCK + n` up to the next one's first;
    that is never fewer than it needs, so the host launches `tiles_to_launch` without knowing a length.
    """
    zero = tl.zeros((), tl.int32)
    if LAYOUT == DENSE:
        q_base, k_base, begin, length = zero, zero, zero, zero + seq_len
    elif LAYOUT == ROWS:
        row = table_ptr + 4 * batch
        q_base, k_base, begin, length = tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3)
    else:
        low, high = zero, zero + num_seqs
        while high - low > 1:
            middle = (low + high) // 2
            owns = tl.load(table_ptr + middle) // BLOCK + middle <= tile
            low = tl.where(owns, middle, low)
            high = tl.where(owns, high, middle)
        q_base = tl.minimum(tl.load(table_ptr + low), seq_len)
        k_base, begin, length = q_base, zero, tl.minimum(tl.load(table_ptr + low + 1), seq_len) - q_base
        tile = tile - (q_base // BLOCK + low)
    return q_base, k_base, begin, length, tile


def scale_log2(spec: CCASpec, head_dim: int) -> float:
    """The softmax scale for base-2 exponentials. A compile-time constant: Triton would round an argument to float32."""
    return spec.softmax_scale(head_dim) * math.log2(math.e)


def visible_pairs(problem: Problem) -> tuple[float, float]:
    """(query, core) and (query, raw token) pairs of one head of one sequence, in closed form."""
    t, g, w = problem.seq_len, problem.group_size, problem.window_size
    late = max(0, t - w)  # queries that see n = floor(x / g) cores, x = 1 .. late
    whole, rest = divmod(late, g)
    cores = g * whole * (whole - 1) // 2 + whole * (rest + 1)
    return float(cores), float(t * (t + 1) // 2 - g * cores)


def tiles_to_launch(tokens: int, num_seqs: int, block: int, packed: bool) -> int:
    """Tiles of `block` tokens that cover `tokens`, the host's side of `locate`."""
    return tokens // block + num_seqs if packed else -(-tokens // block)  # triton.cdiv takes 10 us


@triton.jit
def key_tiles(first_q, end_q, GROUP_SIZE: tl.constexpr, WINDOW_SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """How the keys that the queries first_q .. end_q - 1 see fall into tiles of BLOCK.

    Cores from 0: `core_full` tiles that every query sees whole, then `core_edge` more. Raw tokens from `start`:
    `left` tiles up to where every query sees, `raw_full` tiles that every query sees whole, then `right` more.
    """
    core_full = visible_cores(first_q, GROUP_SIZE, WINDOW_SIZE) // BLOCK
    core_edge = tl.cdiv(visible_cores(end_q - 1, GROUP_SIZE, WINDOW_SIZE) - core_full * BLOCK, BLOCK)
    start = first_local(first_q, GROUP_SIZE, WINDOW_SIZE)
    left = tl.cdiv(first_local(end_q - 1, GROUP_SIZE, WINDOW_SIZE) - start, BLOCK)
    raw_full = tl.maximum(first_q + 1 - start - left * BLOCK, 0) // BLOCK
    right = tl.cdiv(tl.maximum(end_q - start - (left + raw_full) * BLOCK, 0), BLOCK)
    return core_full, core_edge, start, left, raw_full, right


@triton.jit
def key_of_tile(tile, cores, tiles, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """(whether it is of cores, first key) of a tile in the walk over `cores` tiles of cores, then those of raw tokens.

    MASKED walks over the tiles at the edges, otherwise over those that every query sees whole; `tiles` are key_tiles'.
    """
    core_full, _, start, left, raw_full, _ = tiles
    raw = tile - cores
    if MASKED:
        core_key = (core_full + tile) * BLOCK
        raw_key = start + (raw + tl.where(raw >= left, raw_full, 0)) * BLOCK
    else:
        core_key = tile * BLOCK
        raw_key = start + (left + raw) * BLOCK
    is_core = tile < cores
    return is_core, tl.where(is_core, core_key, raw_key)


@triton.jit
def visibility(offs_q, offs, end_q, is_core, GROUP_SIZE: tl.constexpr, WINDOW_SIZE: tl.constexpr):
    """For keys `offs` [K], cores or raw tokens: which the tile may read [K], and which query sees which [Q, K]."""
    first_key = tl.where(is_core, 0, first_local(offs_q, GROUP_SIZE, WINDOW_SIZE))
    end_key = tl.where(is_core, visible_cores(offs_q, GROUP_SIZE, WINDOW_SIZE), offs_q + 1)
    inside = offs < tl.where(is_core, visible_cores(end_q - 1, GROUP_SIZE, WINDOW_SIZE), end_q)
    return inside, (offs[None, :] >= first_key[:, None]) & (offs[None, :] < end_key[:, None])


@triton.jit
def row_pointers(ptr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, row_stride):
    """Pointers [BLOCK, BLOCK_D] of consecutive rows from `ptr`; advance a tile with `+ start * row_stride`."""
    rows = tl.arange(0, BLOCK).to(tl.int64)
    return ptr + rows[:, None] * row_stride + tl.arange(0, BLOCK_D)[None, :]


@triton.jit
def load_rows(pointers, mask, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr):
    """Rows [N, BLOCK_D]: zero where `mask` [N] is false (not looked at unless MASKED) and past HEAD_DIM."""
    if HEAD_DIM != BLOCK_D:
        inside = tl.arange(0, BLOCK_D)[None, :] < HEAD_DIM
        if MASKED:
            return tl.load(pointers, mask=mask[:, None] & inside, other=0.0)
        return tl.load(pointers, mask=inside, other=0.0)
    if MASKED:
        return tl.load(pointers, mask=mask[:, None], other=0.0)
    return tl.load(pointers)


@triton.jit
def store_rows(pointers, value, mask, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Store `value` [N, BLOCK_D] in the pointers' dtype where `mask` [N] holds, up to HEAD_DIM."""
    inside = mask[:, None]
    if HEAD_DIM != BLOCK_D:
        inside = inside & (tl.arange(0, BLOCK_D)[None, :] < HEAD_DIM)
    tl.store(pointers, value.to(pointers.dtype.element_ty), mask=inside)


@triton.jit
def core_gradient_offsets(
    batch, core_head, q_base, cores, offs_d, strides,
    PART: tl.constexpr, GROUP_SIZE: tl.constexpr, LAYOUT: tl.constexpr,
):  # fmt: skip
    """Element offsets [C, D] of what arrives at `cores` [C] of the sequence whose queries begin at row `q_base`.

    `layout.core_gradient_layout` gives PART and `strides`.
    """
    if PART == 0:
        slots = cores + (q_base // GROUP_SIZE if LAYOUT == PACKED else 0)
        return offset((batch, core_head, slots), strides)[:, None] + offs_d[None, :]
    at = offset((batch, core_head, cores), strides) + q_base.to(tl.int64) * strides[3]
    return at[:, None] + (offs_d // PART * strides[3] + offs_d % PART)[None, :]


@triton.jit
def mean_query(q_ptr, q_strides, batch, head, heads, rows, mask, head_dim, BLOCK_D: tl.constexpr):
    """Mean over `heads` query heads from `head` on, of `rows` [C]: [C, BLOCK_D] float32 (float64 for float64)."""
    offs_d = tl.arange(0, BLOCK_D)
    inside = mask[:, None] & (offs_d[None, :] < head_dim)
    wide = tl.float64 if q_ptr.dtype.element_ty == tl.float64 else tl.float32
    total = tl.zeros([rows.shape[0], BLOCK_D], wide)
    for h in range(heads):
        row_offs = offset((batch, head + h, rows), q_strides)
        total += tl.load(q_ptr + row_offs[:, None] + offs_d[None, :], mask=inside, other=0.0).to(wide)
    return total / heads


@triton.jit
def pooled_gradient(
    k, v, q_ptr, dk_core_ptr, dv_core_ptr, pool_lse_ptr, pool_delta_ptr, q_strides, grad_strides, num_cores,
    batch, kv_head, cores_per_kv, q_per_core, q_base, offs_k, mask,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, GROUP_SIZE: tl.constexpr, SCALE: tl.constexpr, MEAN: tl.constexpr,
    LAYOUT: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """What the cores of their groups pass on to the tokens `offs_k` [K]: (dk, dv) [K, D]; none where not `mask`."""
    wide = pool_lse_ptr.dtype.element_ty
    offs_d = tl.arange(0, BLOCK_D)
    inside = mask[:, None] & (offs_d < HEAD_DIM)[None, :]
    group = offs_k // GROUP_SIZE
    dk = tl.zeros([k.shape[0], BLOCK_D], wide)
    dv = tl.zeros([k.shape[0], BLOCK_D], wide)
    for core in range(cores_per_kv):
        core_head = kv_head * cores_per_kv + core
        grad_offs = core_gradient_offsets(
            batch, core_head, q_base, group, offs_d, grad_strides, PART, GROUP_SIZE, LAYOUT
        )
        dk_core = tl.load(dk_core_ptr + grad_offs, mask=inside, other=0.0)
        dv_core = tl.load(dv_core_ptr + grad_offs, mask=inside, other=0.0)
        if MEAN:
            dk += dk_core / GROUP_SIZE
            dv += dv_core / GROUP_SIZE
        else:
            last = q_base + group * GROUP_SIZE + GROUP_SIZE - 1
            q = mean_query(q_ptr, q_strides, batch, core_head * q_per_core, q_per_core, last, mask, HEAD_DIM, BLOCK_D)
            slots = group + (q_base // GROUP_SIZE if LAYOUT == PACKED else 0)
            row = (batch * tl.num_programs(1) * cores_per_kv + core_head).to(tl.int64) * num_cores
            stat_offs = row + slots
            pool_lse = tl.load(pool_lse_ptr + stat_offs, mask=mask, other=0.0)
            pool_delta = tl.load(pool_delta_ptr + stat_offs, mask=mask, other=0.0)
            weights = tl.exp2((tl.sum(k.to(wide) * q, axis=1) * SCALE - pool_lse) * LOG2_E)
            weights = tl.where(mask, weights, 0.0)
            da = tl.sum(dk_core * k.to(wide) + dv_core * v.to(wide), axis=1)
            ds = weights * (da - pool_delta) * SCALE
            dk += weights[:, None] * dk_core + ds[:, None] * q
            dv += weights[:, None] * dv_core
    return dk, dv


@triton.jit
def attend(q, k, v, visible, acc, row_max, row_sum, SCALE_LOG2: tl.constexpr, MASKED: tl.constexpr):
    """Fold one tile of keys into the online softmax (base 2).

    q [Q, D]; k, v [N, D]; visible [Q, N] (not looked at unless MASKED); acc [Q, D], row_max, row_sum [Q] in the
    accumulator's type. `row_max` is the maximum of ``SCALE_LOG2 * q.k``, with SCALE_LOG2 > 0.
    """
    scores = tl.dot(q, tl.trans(k), input_precision="ieee", out_dtype=acc.dtype)
    if MASKED:
        scores = tl.where(visible, scores, -float("inf"))
    new_max = tl.maximum(row_max, tl.max(scores, axis=1) * SCALE_LOG2)
    pivot = new_max
    if MASKED:
        # a row that has seen no key yet keeps a finite pivot: -inf - -inf is NaN
        pivot = tl.where(new_max == -float("inf"), 0.0, new_max)
    probs = tl.exp2(scores * SCALE_LOG2 - pivot[:, None])
    rescale = tl.exp2(row_max - pivot)
    row_sum = row_sum * rescale + tl.sum(probs, axis=1)
    acc = acc * rescale[:, None]
    acc = tl.dot(probs.to(v.dtype), v, acc=acc, input_precision="ieee", out_dtype=acc.dtype)
    return acc, new_max, row_sum
