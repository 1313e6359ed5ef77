"""Sampled rows, groups and decode steps of the measured tensors themselves, against float64.

The gate decides on small shapes, with bounds derived from the numbers. What goes wrong only at the measured sizes, an
offset that overflows or a tile that is never reached, is seen here. Errors are relative to the largest entry of the row
(of the group, for gradients of keys and values), `ALLOWED` is how large one may be.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels import reference
from ..spec import CCASpec
from .record import Evidence

ROWS, GROUPS, STEPS = 16, 4, 16
ALLOWED = {torch.bfloat16: 2.0**-6, torch.float16: 2.0**-9, torch.float32: 2.0**-16}


class Pass(NamedTuple):
    """One forward, and with `grads` (dq, dk, dv) one backward of CCA: q, out, dout (B, Hq, T, D), lse (B, Hq, T)."""

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    lse: Tensor
    dout: Tensor
    grads: tuple[Tensor, ...] | None = None


def evidence(check: str, errors: Iterator[float], dtype: torch.dtype) -> Evidence:
    """The worst of the errors over what is allowed; NaN is infinitely wrong."""
    uses = [error / ALLOWED[dtype] for error in errors]
    return Evidence(check=check, count=len(uses), worst=max((u if u == u else 1e30) for u in uses))


def forward_errors(run: Pass, spec: CCASpec) -> Iterator[float]:
    """Of sampled rows of out, the last row of all among them."""
    for batch, head, row in _drawn(run.q, ROWS):
        yield _error(run.out[batch, head, row], _row(run, spec, batch, head, row).out)


def backward_errors(run: Pass, spec: CCASpec) -> Iterator[float]:
    """Of sampled rows of dq that end no group, and of dk and dv of sampled groups."""
    assert run.grads is not None
    dq, dk, dv = run.grads
    g = spec.group_size
    for batch, head, row in _drawn(run.q, ROWS):
        # the last query of a group has also the gradient of its pooling weights
        row -= int(g > 1 and row % g == g - 1)
        right = _row(run, spec, batch, head, row)
        yield _error(dq[batch, head, row], right.dq, right.by_delta)
    groups = spec.num_groups(run.q.shape[2])
    for batch, kv_head, row in _drawn(run.k[:, :, :groups], GROUPS if groups else 0):
        members = slice(row * g, (row + 1) * g)
        for actual, expected in zip((dk, dv), _group(run, spec, batch, kv_head, row), strict=True):
            yield _error(actual[batch, kv_head, members], expected)


def pooling_errors(
    q: Tensor, k: Tensor, v: Tensor, cores: tuple[Tensor, Tensor], spec: CCASpec, first: int = 0
) -> Iterator[float]:
    """Of sampled core keys and values (B, Hc, C, D) of q, k and v, whose first group is group `first` of the cores."""
    g, groups = spec.group_size, spec.num_groups(q.shape[2])
    for batch, core_head, group in _drawn(cores[0][:, :, first : first + groups], GROUPS if groups else 0):
        head = core_head * (q.shape[1] // cores[0].shape[1])
        kv_head = head * k.shape[1] // q.shape[1]
        kv = (slice(batch, batch + 1), slice(kv_head, kv_head + 1), slice(group * g, (group + 1) * g))
        pooled = reference.pool(
            q[batch : batch + 1, _team(q, k, spec, head), kv[2]], k[kv], v[kv],
            group_size=g, core_heads=spec.core_heads, pooling=spec.pooling, scale=spec.softmax_scale(q.shape[3]),
        )  # fmt: skip
        for actual, expected in zip(cores, pooled, strict=True):
            yield _error(actual[batch, core_head, first + group], expected[0, 0, 0])


def step_error(q: Tensor, keys: tuple[Tensor, Tensor], out: Tensor, scale: float) -> float:
    """Of one row of a decode step: q, out (D,), keys and values (N, D) as they are kept."""
    seen_keys, values = (x.double() for x in keys)
    return _error(out, torch.softmax(scale * seen_keys @ q.double(), 0) @ values)


def _drawn(x: Tensor, count: int) -> Iterator[tuple[int, int, int]]:
    """Indices of the three leading axes of `x`, the last ones first."""
    generator = torch.Generator().manual_seed(0)
    for number in range(count):
        drawn = (int(torch.randint(n, (), generator=generator)) for n in x.shape[:3])
        yield next(drawn), next(drawn), next(drawn) if number else x.shape[2] - 1


def _error(actual: Tensor, expected: Tensor, more: float = 0.0) -> float:
    """The largest error, relative to the largest entry and what may come on top of it."""
    size = expected.abs().max() + more
    return float((actual.double() - expected).abs().max() / size) if size else float(actual.abs().max())


def _team(q: Tensor, k: Tensor, spec: CCASpec, head: int) -> slice:
    """The query heads that score the cores which query head `head` sees."""
    if spec.core_heads == "query":
        return slice(head, head + 1)
    size = q.shape[1] // k.shape[1]
    return slice(head // size * size, (head // size + 1) * size)


class _Row(NamedTuple):
    """out and, of a row that ends no group, dq (D,).

    `by_delta`: how far delta moves dq for an out that is off by as much as itself. Where dq cancels, as in a row of two
    tokens, the rounding of out counts for more than dq's own.
    """

    out: Tensor
    dq: Tensor
    by_delta: float


def _row(run: Pass, spec: CCASpec, batch: int, head: int, row: int) -> _Row:
    q, k, v = run.q, run.k, run.v
    kv_head, scale = head * k.shape[1] // q.shape[1], spec.softmax_scale(q.shape[3])
    cores = spec.visible_cores(row)
    past = slice(0, max(cores * spec.group_size, 1))
    kv = (slice(batch, batch + 1), slice(kv_head, kv_head + 1), past)
    pooled = reference.pool(
        q[batch : batch + 1, _team(q, k, spec, head), past], k[kv], v[kv],
        group_size=spec.group_size, core_heads=spec.core_heads, pooling=spec.pooling, scale=scale,
    )  # fmt: skip
    local = slice(cores * spec.group_size, row + 1)
    keys, values = (
        torch.cat((core[0, 0, :cores], x[batch, kv_head, local].double()))
        for core, x in zip(pooled, (k, v), strict=True)
    )
    probs = torch.softmax(scale * keys @ q[batch, head, row].double(), 0)
    dout, out = run.dout[batch, head, row].double(), probs @ values
    slopes = values @ dout
    by_delta = scale * float((dout * out).abs().sum() * (probs @ keys).abs().max())
    return _Row(out, scale * (probs * (slopes - probs @ slopes)) @ keys, by_delta)


def _group(run: Pass, spec: CCASpec, batch: int, kv_head: int, group: int) -> tuple[Tensor, Tensor]:
    """dk and dv (g, D) of the members of one group: what arrives at them as raw tokens and through their core."""
    g, scale, size = spec.group_size, spec.softmax_scale(run.q.shape[3]), run.q.shape[1] // run.k.shape[1]
    first, until = group * g, min((group + 1) * g + spec.window_size - 1, run.q.shape[2])  # queries that see them raw
    keys, values = (x[batch, kv_head, first : first + g].double() for x in (run.k, run.v))
    dk, dv = torch.zeros_like(keys), torch.zeros_like(values)
    heads = range(kv_head * size, (kv_head + 1) * size)
    teams = [[head] for head in heads] if spec.core_heads == "query" else [list(heads)]
    for team in teams:
        scorer = run.q[batch, team, first + g - 1].double().mean(0) * float(spec.pooling != "mean")
        weights = torch.softmax(scale * keys @ scorer, 0)
        dk_core, dv_core = torch.zeros_like(scorer), torch.zeros_like(scorer)
        for head in team:
            raw = _arriving(run, (batch, head), slice(first, until), keys, values, scale)
            core = (weights @ keys)[None], (weights @ values)[None]
            pooled = _arriving(run, (batch, head), slice(until, None), *core, scale, causal=False)
            dk, dv = dk + raw[0], dv + raw[1]
            dk_core, dv_core = dk_core + pooled[0][0], dv_core + pooled[1][0]
        slopes = keys @ dk_core + values @ dv_core
        dscores = scale * weights * (slopes - weights @ slopes)
        dk = dk + weights[:, None] * dk_core + dscores[:, None] * scorer
        dv = dv + weights[:, None] * dv_core
    return dk, dv


def _arriving(
    run: Pass, at: tuple[int, int], rows: slice, keys: Tensor, values: Tensor, scale: float, causal: bool = True
) -> tuple[Tensor, Tensor]:
    """The gradients of `keys` and `values` (n, D) that come from the queries `rows` of one head."""
    q, out, dout, lse = (x[at][rows].double() for x in (run.q, run.out, run.dout, run.lse))
    probs = (scale * q @ keys.mT - lse[:, None]).exp()
    if causal:  # member j is the token of query j
        probs = probs.tril()
    dscores = probs * (dout @ values.mT - (dout * out).sum(-1, keepdim=True))
    return scale * dscores.mT @ q, probs.mT @ dout
