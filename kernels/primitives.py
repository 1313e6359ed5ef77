"""What the kernels share: addressing, the rule of visibility, locating a tile, and one online-softmax step.

Another pair of segments (attention sinks, a sliding window, full causal attention) is another version of the four
functions under "visibility"; no kernel states the rule itself.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

LOG2_E = tl.constexpr(math.log2(math.e))
LN_2 = tl.constexpr(math.log(2.0))

# how sequences lie in a (B, H, T, D) tensor
DENSE = tl.constexpr(0)  # row b is one sequence of T tokens
PADDED = tl.constexpr(1)  # row b holds one sequence at bounds[b, 0] .. bounds[b, 1] - 1
PACKED = tl.constexpr(2)  # B = 1, and sequence n lies at bounds[n] .. bounds[n + 1] - 1


@triton.jit
def offset(index, strides):
    """Element offset of `index` in a tensor of `strides`, in 64 bits."""
    total = tl.zeros((), tl.int64)
    for axis in tl.static_range(len(strides)):
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
def locate(tile, batch, bounds_ptr, num_seqs, seq_len, BLOCK: tl.constexpr, LAYOUT: tl.constexpr):
    """Which sequence a tile of `BLOCK` tokens belongs to: (first token, length, tile within the sequence).

    Packed: sequence n owns the tiles `bounds[n] // BLOCK + n` up to the next one's first. That is never fewer than
    it needs, so the host launches `total // BLOCK + num_seqs` tiles without knowing a length.
    """
    if LAYOUT == DENSE:
        return tl.zeros((), tl.int32), seq_len, tile
    if LAYOUT == PADDED:
        first = tl.load(bounds_ptr + 2 * batch)
        return first, tl.load(bounds_ptr + 2 * batch + 1) - first, tile
    low = tl.zeros((), tl.int32)
    high = num_seqs
    while high - low > 1:
        middle = (low + high) // 2
        owns = tl.load(bounds_ptr + middle) // BLOCK + middle <= tile
        low = tl.where(owns, middle, low)
        high = tl.where(owns, high, middle)
    first = tl.load(bounds_ptr + low)
    return first, tl.load(bounds_ptr + low + 1) - first, tile - (first // BLOCK + low)


def tiles_to_launch(tokens: int, num_seqs: int, block: int, packed: bool) -> int:
    """Tiles of `block` tokens that cover `tokens`, the host's side of `locate`."""
    return tokens // block + num_seqs if packed else triton.cdiv(tokens, block)


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
def attend(q, k, v, visible, acc, row_max, row_sum, scale_log2, MASKED: tl.constexpr):
    """Fold one tile of keys into the online softmax (base 2).

    q [Q, D]; k, v [N, D]; visible [Q, N] (not looked at unless MASKED); acc [Q, D], row_max, row_sum [Q] in the
    accumulator's type. `row_max` is the maximum of `scale_log2 * q.k`, with scale_log2 > 0.
    """
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    if MASKED:
        scores = tl.where(visible, scores, -float("inf"))
    new_max = tl.maximum(row_max, tl.max(scores, axis=1) * scale_log2)
    pivot = new_max
    if MASKED:
        # a row that has seen no key yet keeps a finite pivot: -inf - -inf is NaN
        pivot = tl.where(new_max == -float("inf"), 0.0, new_max)
    probs = tl.exp2(scores * scale_log2 - pivot[:, None])
    rescale = tl.exp2(row_max - pivot)
    row_sum = row_sum * rescale + tl.sum(probs, axis=1)
    acc = acc * rescale[:, None]
    acc = tl.dot(probs.to(v.dtype), v, acc=acc, input_precision="ieee")
    return acc, new_max, row_sum
