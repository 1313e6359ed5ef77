"""The CPU path: CCA attention in plain PyTorch, blocked over queries, with an explicit backward.

A block of queries takes only the keys that some row of it sees, so memory is O(block x (cores + window)) for each
head. Query heads that share a key/value head are folded into the rows of one matrix product: k and v are never
repeated. float16, bfloat16 and float32 accumulate in float32, float64 in float64 ("acc" below); core tokens are
stored in the input dtype between pooling and attention. The order of the blocks is fixed: the same bits every time.

Axes: B batch, Hq, Hkv and Hc query, key/value and core heads, T tokens, C core tokens, Q queries of a block, N keys,
D head dimension, g group size, P core heads of one key/value head.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from functools import reduce
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from ..spec import CCASpec

BLOCK_Q = 256  # queries of a block

Pair = tuple[Tensor, Tensor]
Triple = tuple[Tensor, Tensor, Tensor]
Index = tuple[slice, slice, slice]


class _Segment(NamedTuple):
    """A run of keys as one block of queries sees it: core tokens (source 0) or raw tokens (source 1).

    `hidden` [Q, N] has all its entries in the columns `ragged`; every row sees the other keys.
    """

    source: int
    keys: slice
    hidden: Tensor
    ragged: tuple[slice, ...]

    def of(self, core_and_raw: Pair) -> Tensor:
        """The view [B, H, N, D] of these keys."""
        return core_and_raw[self.source][:, :, self.keys]


@torch.no_grad()
def forward(
    q: Tensor, k: Tensor, v: Tensor, spec: CCASpec, *, bounds: Tensor | None = None, packed: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """CCA attention (spec.md sections 1 to 3 and 5).

    Args:
        q: [B, Hq, T, D]. k, v: [B, Hkv, T, D]. Any strides.
        bounds: None (each row is one sequence); with `packed`, cu_seqlens (N + 1,) and B = 1; else (B, 2), the
            first and one-past-last real token of each row.

    Returns:
        out [B, Hq, T, D] in q's dtype; lse [B, Hq, T], natural logarithm, acc dtype; k_core, v_core
        [B, Hc, T // g, D] in k's dtype. Padding rows of out are 0, of lse -inf; unused core slots are 0. The
        cores of packed sequence n are stored from slot ``cu_seqlens[n] // g`` on.
    """
    batch, q_heads, seq_len, head_dim = q.shape
    out = torch.zeros_like(q)
    lse = torch.full((batch, q_heads, seq_len), -math.inf, dtype=_acc(q), device=q.device)
    core_shape = batch, spec.num_core_heads(q_heads, k.shape[1]), spec.num_groups(seq_len), head_dim
    k_core, v_core = k.new_zeros(core_shape), v.new_zeros(core_shape)
    for tokens, slots in _sequences(spec, bounds, packed):
        q_seq, k_seq, v_seq, cores = q[tokens], k[tokens], v[tokens], (k_core[slots], v_core[slots])
        _store(cores, pool_groups(_last_queries(q_seq, spec), k_seq, v_seq, spec))
        _store((out[tokens], lse[tokens]), attend(q_seq, *cores, k_seq, v_seq, spec, q_first=0, k_first=0))
    return out, lse, k_core, v_core


@torch.no_grad()
def backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    k_core: Tensor,
    v_core: Tensor,
    spec: CCASpec,
    *,
    bounds: Tensor | None = None,
    packed: bool = False,
) -> Triple:
    """Gradients dq, dk, dv of `forward`, in the dtypes of q, k and v (spec.md section 4).

    `dout` [B, Hq, T, D] and `dlse` [B, Hq, T] (None: zero) arrive at out and lse; the other tensors are the
    arguments and results of `forward`. Padding rows get zero gradient.
    """
    grads = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    delta = (out.to(_acc(q)) * dout.to(_acc(q))).sum(-1)
    if dlse is not None:
        delta -= dlse
    for tokens, slots in _sequences(spec, bounds, packed):
        inputs, cores = (q[tokens], k[tokens], v[tokens]), (k_core[slots], v_core[slots])
        found = _sequence_backward(dout[tokens], lse[tokens], delta[tokens], inputs, cores, spec)
        _store((grad[tokens] for grad in grads), found)
    return grads


@torch.no_grad()
def attend(
    q: Tensor, k_core: Tensor, v_core: Tensor, k: Tensor, v: Tensor, spec: CCASpec, *, q_first: int, k_first: int
) -> Pair:
    """Some rows of one sequence's attention, given at least the core and raw tokens that these rows see.

    Args:
        q: [B, Hq, T, D], row i is position ``q_first + i``.
        k_core, v_core: [B, Hc, C, D], from core 0 on. k, v: [B, Hkv, N, D], row r is position ``k_first + r``.

    Returns:
        out [B, Hq, T, D] in q's dtype; lse [B, Hq, T], natural logarithm, acc dtype.

    Raises:
        ValueError: if a core or raw token that some row sees is not there.
    """
    _check_reach(spec, range(q_first, q_first + q.shape[2]), k_core.shape[2], range(k_first, k_first + k.shape[2]))
    out = torch.empty_like(q)
    lse = torch.empty(q.shape[:3], dtype=_acc(q), device=q.device)
    for rows, segments in _blocks(q, spec, q_first, k_first):
        q_block = _block(q, rows) * spec.softmax_scale(q.shape[3])
        weights = [_scores(q_block, segment, (k_core, k)) for segment in segments]
        row_max = reduce(torch.maximum, [scores.amax(-1, keepdim=True) for scores in weights])
        row_sum = reduce(torch.add, [w.sub_(row_max).exp_().sum(-1, keepdim=True) for w in weights])
        products = [_times(w, s.of((v_core, v))) for w, s in zip(weights, segments, strict=True)]
        out[:, :, rows] = reduce(torch.add, products).div_(row_sum)
        lse[:, :, rows] = (row_max + row_sum.log())[..., 0]
    return out, lse


@torch.no_grad()
def pool_groups(q_last: Tensor, k: Tensor, v: Tensor, spec: CCASpec) -> Pair:
    """Core tokens of consecutive complete groups (spec.md section 1).

    Args:
        q_last: [B, Hq, C, D], the query at each group's last position.
        k, v: [B, Hkv, T, D], the groups' tokens, ``T // g == C``; an unfinished tail is left out.

    Returns:
        k_core, v_core: [B, Hc, C, D] in the dtypes of k and v.
    """
    keys = _members(k, spec)
    weights, _ = _pooling_weights(q_last, keys, spec)
    return _by_head(weights @ keys).to(k.dtype), _by_head(weights @ _members(v, spec)).to(v.dtype)


def _acc(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _store(views: Iterable[Tensor], values: Iterable[Tensor]) -> None:
    for view, value in zip(views, values, strict=True):
        view.copy_(value)


def _sequences(spec: CCASpec, bounds: Tensor | None, packed: bool) -> Iterator[tuple[Index, Index]]:
    """Where each sequence of a batch lies in (B, H, T, ..) tensors, and where its core tokens in (B, Hc, C, D)."""
    every = slice(None)
    if bounds is None:
        yield (every, every, every), (every, every, every)
        return
    edges = bounds.tolist()
    for row, (first, end) in enumerate(pairwise(edges) if packed else edges):
        batch, slot = (0, first // spec.group_size) if packed else (row, 0)
        rows, slots = slice(batch, batch + 1), slice(slot, slot + spec.num_groups(end - first))
        yield (rows, every, slice(first, end)), (rows, every, slots)


def _check_reach(spec: CCASpec, queries: range, num_cores: int, raw: range) -> None:
    """Raise unless the cores `0 .. num_cores - 1` and the raw positions hold all that the queries' positions see."""
    if not queries:
        return
    first, last = spec.local_range(queries[0]).start, queries[-1]
    cores = spec.visible_cores(last)
    if num_cores < cores:
        raise ValueError(f"k_core must hold the {cores} cores that position {last} sees, got {num_cores}")
    if first not in raw or last not in raw:
        raise ValueError(f"k must hold positions {first}..{last}, got {len(raw)} from k_first={raw.start} on")


def _blocks(q: Tensor, spec: CCASpec, q_first: int, k_first: int) -> Iterator[tuple[slice, list[_Segment]]]:
    """Blocks of q's rows, each with the segments of keys that it sees."""
    for start in range(0, q.shape[2], BLOCK_Q):
        stop = min(start + BLOCK_Q, q.shape[2])
        first, last = q_first + start, q_first + stop - 1
        cores_of_all, cores_of_any = spec.visible_cores(first), spec.visible_cores(last)
        first_raw = cores_of_all * spec.group_size
        position = torch.arange(first, last + 1, device=q.device)[:, None]
        cores = (position + 1 - spec.window_size).clamp(min=0) // spec.group_size
        segments = []
        if cores_of_any:
            hidden = torch.arange(cores_of_any, device=q.device) >= cores
            segments.append(_Segment(0, slice(0, cores_of_any), hidden, (slice(cores_of_all, None),)))
        token = torch.arange(first_raw, last + 1, device=q.device)
        hidden = (token < cores * spec.group_size) | (token > position)
        ragged = slice(0, cores_of_any * spec.group_size - first_raw), slice(first + 1 - first_raw, None)
        segments.append(_Segment(1, slice(first_raw - k_first, last + 1 - k_first), hidden, ragged))
        yield slice(start, stop), segments


def _block(x: Tensor, rows: slice) -> Tensor:
    """Rows of x [B, H, T, D], contiguous, in the acc dtype."""
    return x[:, :, rows].to(_acc(x)).contiguous()


def _fold(x: Tensor, heads: int) -> Tensor:
    """x [B, Hq, Q, N] as [B, heads, Hq // heads * Q, N]: the queries that share a key head are one matrix."""
    batch, q_heads, rows, columns = x.shape
    return x.reshape(batch, heads, q_heads // heads * rows, columns)


def _times(x: Tensor, keys: Tensor, *, transposed: bool = False) -> Tensor:
    """x [B, Hq, Q, N] times keys [B, H, N, D], or x [B, Hq, Q, D] times their transpose, in x's dtype."""
    keys = keys.to(x.dtype)
    product = _fold(x, keys.shape[1]) @ (keys.mT if transposed else keys)
    return product.view(*x.shape[:3], product.shape[3])


def _scores(q_block: Tensor, segment: _Segment, keys: Pair) -> Tensor:
    """Scores [B, Hq, Q, N] of a segment, -inf where a row does not see a key; `q_block` carries the scale."""
    scores = _times(q_block, segment.of(keys), transposed=True)
    for columns in segment.ragged:
        scores[..., columns].masked_fill_(segment.hidden[:, columns], -math.inf)
    return scores


def _sequence_backward(dout: Tensor, lse: Tensor, delta: Tensor, inputs: Triple, cores: Pair, spec: CCASpec) -> Triple:
    """dq, dk, dv of one sequence's `inputs` q, k, v; `delta` [B, Hq, T] is ``rowsum(out * dout) - dlse``."""
    q, k, v = inputs
    keys, values = (cores[0], k), (cores[1], v)
    scale = spec.softmax_scale(q.shape[3])
    dq, dk, dv, dk_core, dv_core = (torch.zeros(x.shape, dtype=_acc(q), device=q.device) for x in (*inputs, *cores))
    for rows, segments in _blocks(q, spec, 0, 0):
        q_block, dout_block = _block(q, rows) * scale, _block(dout, rows)
        for segment in segments:
            probs = _scores(q_block, segment, keys).sub_(lse[:, :, rows, None]).exp_()
            dscores = _times(dout_block, segment.of(values), transposed=True)
            dscores.sub_(delta[:, :, rows, None]).mul_(probs)
            dq[:, :, rows] += _times(dscores, segment.of(keys)).mul_(scale)
            dkeys, dvalues = segment.of((dk_core, dk)), segment.of((dv_core, dv))
            dkeys += _fold(dscores, dkeys.shape[1]).mT @ _fold(q_block, dkeys.shape[1])
            dvalues += _fold(probs, dvalues.shape[1]).mT @ _fold(dout_block, dvalues.shape[1])
    _add_pool_backward((dq, dk, dv), inputs, (dk_core, dv_core), spec)
    return dq, dk, dv


def _last_queries(q: Tensor, spec: CCASpec) -> Tensor:
    """The view [B, Hq, C, D] of the queries at the groups' last positions."""
    return q[:, :, spec.group_size - 1 :: spec.group_size]


def _members(x: Tensor, spec: CCASpec) -> Tensor:
    """The complete groups of x [B, Hkv, T, D]: [B, Hkv, C, g, D] in the acc dtype, a view if x has it already."""
    groups, g = spec.num_groups(x.shape[2]), spec.group_size
    return x[:, :, : groups * g].view(*x.shape[:2], groups, g, x.shape[3]).to(_acc(x))


def _by_group(x: Tensor, kv_heads: int) -> Tensor:
    """x [B, H, C, D] as [B, Hkv, C, H // Hkv, D] in the acc dtype."""
    batch, heads, groups, head_dim = x.shape
    return x.to(_acc(x)).reshape(batch, kv_heads, heads // kv_heads, groups, head_dim).transpose(2, 3)


def _by_head(x: Tensor) -> Tensor:
    """The reverse of `_by_group`."""
    return x.transpose(2, 3).flatten(1, 2)


def _pooling_weights(q_last: Tensor, keys: Tensor, spec: CCASpec) -> Pair:
    """Weights [B, Hkv, C, P, g] of the tokens `keys` [B, Hkv, C, g, D], and the queries [.., P, D] that score."""
    scorers = _by_group(q_last, keys.shape[1])
    if spec.core_heads == "kv":
        scorers = scorers.mean(3, keepdim=True)
    if spec.pooling == "mean":
        return keys.new_full((*scorers.shape[:4], spec.group_size), 1.0 / spec.group_size), scorers
    return (scorers @ keys.mT * spec.softmax_scale(keys.shape[4])).softmax(-1), scorers


def _add_pool_backward(grads: Triple, inputs: Triple, core_grads: Pair, spec: CCASpec) -> None:
    """Add what arrives at the core tokens to `grads`, those of q, k and v in the acc dtype."""
    dq, dk, dv = grads
    q_last, keys, values = _last_queries(inputs[0], spec), _members(inputs[1], spec), _members(inputs[2], spec)
    dk_core, dv_core = (_by_group(x, keys.shape[1]) for x in core_grads)
    weights, scorers = _pooling_weights(q_last, keys, spec)
    _members(dk, spec).add_(weights.mT @ dk_core)
    _members(dv, spec).add_(weights.mT @ dv_core)
    if spec.pooling == "mean":
        return
    dweights = dk_core @ keys.mT + dv_core @ values.mT
    dlogits = weights * (dweights - (weights * dweights).sum(-1, keepdim=True)) * spec.softmax_scale(keys.shape[4])
    _members(dk, spec).add_(dlogits.mT @ scorers)
    mates, ratio = (q_last.shape[1] // heads for heads in (core_grads[0].shape[1], keys.shape[1]))
    _last_queries(dq, spec).add_(_by_head((dlogits @ keys / mates).expand(-1, -1, -1, ratio, -1)))
