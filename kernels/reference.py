"""The oracles: CCA attention by its definition (docs/spec.md sections 1 to 5), twice, in float64.

`attention_dense` draws the whole visibility mask and takes one softmax; `attention_rowwise` walks over
sequences, heads and rows and lists what each row sees. They share the reading of the layout arguments and
nothing else, and neither uses any kernel's host code. Both are differentiable by autograd, which makes them
the oracle of every backward.

Axes: B batch, Hq query heads, Hkv key/value heads, Hc core heads (Hq or Hkv), T tokens, C core tokens, D head
dimension. Sequences lie in (B, H, T, D) tensors in one of three ways: dense (each row is a sequence of T
tokens), packed (`cu_seqlens` (N + 1,), B = 1) or padded (`seq_bounds` (B, 2): row b is its tokens
`seq_bounds[b, 0]` up to `seq_bounds[b, 1] - 1`).
"""

from __future__ import annotations

import math
from itertools import pairwise, product

import torch
from torch import Tensor

NEG_INF = -math.inf


def pool(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    group_size: int,
    core_heads: str = "query",
    pooling: str = "last_query",
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Core tokens of the complete groups of dense sequences (spec.md section 1).

    Args:
        q: [B, Hq, T, D]. k, v: [B, Hkv, T, D].
        group_size, core_heads, pooling, scale: as in `attention_dense`.

    Returns:
        k_core, v_core: [B, Hc, T // group_size, D] float64.
    """
    q, k, v = q.double(), k.double(), v.double()
    weights = _pooling_logits(q, k, group_size, core_heads, pooling, _scale(q, scale)).softmax(-1)
    return _pooled(weights, k), _pooled(weights, v)


def attention_dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    group_size: int,
    window_size: int,
    core_heads: str = "query",
    pooling: str = "last_query",
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    seq_bounds: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """CCA attention with a dense visibility mask over [cores; raw] keys and one softmax.

    Args:
        q: [B, Hq, T, D]. k, v: [B, Hkv, T, D], with Hq a multiple of Hkv. Any float dtype.
        group_size, window_size, core_heads, pooling: the semantics, spec.md sections 1 and 2.
        scale: softmax scale of attention and pooling; None means ``1 / sqrt(D)``.
        cu_seqlens: (N + 1,) boundaries of packed sequences (B = 1), empty ones allowed.
        seq_bounds: (B, 2) first and one-past-last real token of each row of a padded batch.

    Returns:
        out [B, Hq, T, D] and natural-log lse [B, Hq, T], float64; 0 and -inf in padding rows.

    Raises:
        ValueError: for an unknown core_heads or pooling, or a layout that contradicts the shapes.
    """
    q, k, v = q.double(), k.double(), v.double()
    factor = _scale(q, scale)
    out, lse = _blank(q)
    for rows, first, end in _sequences(q, cu_seqlens, seq_bounds):
        part = slice(rows.start, rows.stop), slice(None), slice(first, end)
        weights = _pooling_logits(q[part], k[part], group_size, core_heads, pooling, factor).softmax(-1)
        keys, values = (_concatenated(_pooled(weights, x[part]), x[part], q.shape[1]) for x in (k, v))
        visible = _visible(end - first, group_size, window_size).to(q.device)
        scores = (factor * q[part] @ keys.mT).masked_fill(~visible, NEG_INF)
        out[part] = scores.softmax(-1) @ values
        lse[part] = scores.logsumexp(-1)
    return out, lse


def attention_rowwise(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    group_size: int,
    window_size: int,
    core_heads: str = "query",
    pooling: str = "last_query",
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    seq_bounds: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The same function as `attention_dense`, arguments and results alike, one row at a time. Slow."""
    _check_choice("core_heads", core_heads, ("query", "kv"))
    _check_choice("pooling", pooling, ("last_query", "mean"))
    q, k, v = q.double(), k.double(), v.double()
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    team = q.shape[1] // k.shape[1]  # query heads that share one key/value head
    out, lse = _blank(q)
    for rows, first, end in _sequences(q, cu_seqlens, seq_bounds):
        for b, h in product(rows, range(q.shape[1])):
            mates = [h] if core_heads == "query" else [m for m in range(q.shape[1]) if m // team == h // team]
            scorer = q[b, mates, first:end].mean(0) * factor
            scorer = torch.zeros_like(scorer) if pooling == "mean" else scorer
            keys, values = k[b, h // team, first:end], v[b, h // team, first:end]
            starts = range(0, end - first - group_size + 1, group_size)
            groups = [slice(start, start + group_size) for start in starts]
            cores = [_core_token(scorer[group.stop - 1], keys[group], values[group]) for group in groups]
            for i in range(end - first):
                # a core stands in for its group once the whole group is older than the w newest tokens
                old = [c for c in range(len(cores)) if (c + 1) * group_size <= i + 1 - window_size]
                raw = [t for t in range(i + 1) if t // group_size not in old]
                seen_keys = torch.stack([cores[c][0] for c in old] + [keys[t] for t in raw])
                seen_values = torch.stack([cores[c][1] for c in old] + [values[t] for t in raw])
                logits = seen_keys @ q[b, h, first + i] * factor
                out[b, h, first + i] = torch.softmax(logits, 0) @ seen_values
                lse[b, h, first + i] = torch.logsumexp(logits, 0)
    return out, lse


def _core_token(scorer: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Key and value [D] of one group's core token; keys, values [g, D]; scorer [D] carries the scale."""
    share = torch.softmax(keys @ scorer, 0)
    return share @ keys, share @ values


def _check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {allowed}, got {value!r}")


def _scale(q: Tensor, scale: float | None) -> float:
    return 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale


def _blank(q: Tensor) -> tuple[Tensor, Tensor]:
    """Zeros [B, Hq, T, D] and -inf [B, Hq, T] in q's graph: a batch of no tokens has gradients too."""
    everywhere = torch.ones((), dtype=torch.bool, device=q.device)
    return q.masked_fill(everywhere, 0.0), q.sum(-1).masked_fill(everywhere, NEG_INF)


def _sequences(q: Tensor, cu_seqlens: Tensor | None, seq_bounds: Tensor | None) -> list[tuple[range, int, int]]:
    """Batch rows, first token and one-past-last token of every sequence; dense rows go together."""
    batch, tokens = q.shape[0], q.shape[2]
    if cu_seqlens is not None and seq_bounds is not None:
        raise ValueError("cu_seqlens and seq_bounds are two layouts: give at most one")
    if cu_seqlens is not None:
        edges = [int(edge) for edge in cu_seqlens]
        if batch != 1 or edges[:1] != [0] or edges[-1:] != [tokens] or sorted(edges) != edges:
            raise ValueError(f"cu_seqlens must rise from 0 to T={tokens} with B=1, got {edges} with B={batch}")
        return [(range(1), first, end) for first, end in pairwise(edges)]
    if seq_bounds is None:
        return [(range(batch), 0, tokens)]
    bounds = [(int(first), int(end)) for first, end in seq_bounds]
    if len(bounds) != batch or any(not 0 <= first <= end <= tokens for first, end in bounds):
        raise ValueError(f"seq_bounds must be B={batch} rows with 0 <= first <= end <= T={tokens}, got {bounds}")
    return [(range(b, b + 1), first, end) for b, (first, end) in enumerate(bounds)]


def _visible(seq_len: int, group_size: int, window_size: int) -> Tensor:
    """Which of the keys [cores; raw] each query sees: [T, C + T] bool (spec.md section 2)."""
    position = torch.arange(seq_len)[:, None]
    cores = (position + 1 - window_size).clamp(min=0) // group_size  # [T, 1]
    core, token = torch.arange(seq_len // group_size), torch.arange(seq_len)
    return torch.cat([core < cores, (token >= cores * group_size) & (token <= position)], dim=1)


def _pooling_logits(q: Tensor, k: Tensor, group_size: int, core_heads: str, pooling: str, scale: float) -> Tensor:
    """Logits of the pooling weights, [B, Hc, C, g]; "mean" is "last_query" with equal ones."""
    _check_choice("core_heads", core_heads, ("query", "kv"))
    _check_choice("pooling", pooling, ("last_query", "mean"))
    groups = q.shape[2] // group_size
    q_score = q[:, :, group_size - 1 :: group_size]  # [B, Hq, C, D]
    if core_heads == "kv":
        q_score = torch.stack([team.mean(1) for team in q_score.chunk(k.shape[1], dim=1)], dim=1)
    if pooling == "mean":
        return q.new_zeros(q.shape[0], q_score.shape[1], groups, group_size)
    members = _per_query_head(_groups(k, group_size), q_score.shape[1])
    return scale * torch.einsum("bhcd,bhcgd->bhcg", q_score, members)


def _pooled(weights: Tensor, x: Tensor) -> Tensor:
    """Weighted sums [B, Hc, C, D] of the groups of x [B, Hkv, T, D]; weights [B, Hc, C, g]."""
    members = _per_query_head(_groups(x, weights.shape[3]), weights.shape[1])
    return torch.einsum("bhcg,bhcgd->bhcd", weights, members)


def _groups(x: Tensor, group_size: int) -> Tensor:
    """The complete groups of x [B, H, T, D]: [B, H, C, g, D]."""
    batch, heads, tokens, dim = x.shape
    groups = tokens // group_size
    return x[:, :, : groups * group_size].reshape(batch, heads, groups, group_size, dim)


def _concatenated(core: Tensor, raw: Tensor, heads: int) -> Tensor:
    """[cores; raw] rows for every query head: [B, Hq, C + T, D]."""
    return torch.cat([_per_query_head(core, heads), _per_query_head(raw, heads)], dim=2)


def _per_query_head(x: Tensor, heads: int) -> Tensor:
    """x [B, H, ...] with head h of the result the head ``h // (heads // H)`` of x."""
    return x.repeat_interleave(heads // x.shape[1], dim=1)
