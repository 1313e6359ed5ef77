"""How far CCA attention is from full attention: proxies of quality, on generated data or on a model's own activations.

They are proxies: what a model makes of the difference is for its own evaluation to say. Random vectors alone would
flatter pooling, since attention over them is nearly uniform; the generators have structures that real attention has.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels import reference
from ..spec import CCASpec

ROWS = 64
"""Queries that are looked at, evenly from the second half of the sequence."""
NEEDLE_LOGIT, SINK_LOGIT, SINKS = 14.0, 8.0, 4
MEMORY = 0.98
"""How much a token's vector has of its predecessor's, in locally correlated data."""


@dataclass(frozen=True, slots=True)
class Activations:
    """q [Hq, T, D] and k, v [Hkv, T, D], rotated if the model rotates, in float32 or more.

    `needles` [Hq, R]: the position that each looked-at query asks for; None if it asks for none.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    needles: Tensor | None = None

    @property
    def rows(self) -> Tensor:
        """The queries that are looked at."""
        return rows_of(self.q.shape[1])


@dataclass(frozen=True, slots=True)
class Quality:
    """Relative L2 distance of the outputs, attention mass that arrives where it belongs, needles found (or None)."""

    error: float
    reached: float
    recall: float | None


def rows_of(tokens: int) -> Tensor:
    """Positions of the looked-at queries of a sequence."""
    return torch.linspace(tokens // 2, tokens - 1, min(ROWS, tokens)).long()


def quality(data: Activations, spec: CCASpec) -> Quality:
    """The proxies of `spec` on some activations.

    The mass that reaches its place: what full attention gives to a raw token or to a group, as far as CCA gives as
    much to the same token or to the group's core. A needle is found if its token or its core gets the largest weight.
    """
    q, k, v = (x.double() for x in (data.q, data.k, data.v))
    scale, rows, g = spec.softmax_scale(q.shape[-1]), data.rows, spec.group_size
    heads, tokens = q.shape[0], q.shape[1]
    asked, positions = q[:, rows], torch.arange(tokens)
    cores = reference.pool(
        q[None], k[None], v[None], group_size=g, core_heads=spec.core_heads, pooling=spec.pooling, scale=spec.scale
    )
    k_core, v_core = (_for_heads(x[0], heads) for x in cores)
    k, v = _for_heads(k, heads), _for_heads(v, heads)
    logits = (asked @ k.mT * scale).masked_fill(positions > rows[:, None], -math.inf)
    full = logits.softmax(-1)
    visible = ((rows + 1 - spec.window_size).clamp(min=0) // g)[:, None]
    core_logits = (asked @ k_core.mT * scale).masked_fill(torch.arange(k_core.shape[1]) >= visible, -math.inf)
    raw_logits = logits.masked_fill(positions < visible * g, -math.inf)
    weights = torch.cat((core_logits, raw_logits), -1).softmax(-1)
    core, raw = weights.split((k_core.shape[1], tokens), -1)
    out, expected = core @ v_core + raw @ v, full @ v
    grouped = full[..., : k_core.shape[1] * g].unflatten(-1, (-1, g)).sum(-1)
    reached = torch.minimum(raw, full).sum(-1) + torch.minimum(core, grouped).sum(-1)
    recall = None if data.needles is None else _recall(weights, data.needles, visible, g, k_core.shape[1])
    return Quality(float((out - expected).norm() / expected.norm()), float(reached.mean()), recall)


def _for_heads(x: Tensor, heads: int) -> Tensor:
    return x.repeat_interleave(heads // x.shape[0], 0)


def _recall(weights: Tensor, needles: Tensor, visible: Tensor, group_size: int, cores: int) -> float:
    """The share of needles whose own slot, among [cores; raw tokens], has the largest weight."""
    in_core = needles < visible[:, 0] * group_size
    slot = torch.where(in_core, needles // group_size, cores + needles)
    return float((weights.argmax(-1) == slot).double().mean())


# --- data with the structures of real attention --------------------------------------------------------------------

Generate = Callable[[int, int, int, int, torch.Generator], Activations]


def _normal(heads: int, kv_heads: int, tokens: int, dim: int, generator: torch.Generator) -> list[Tensor]:
    return [torch.randn(n, tokens, dim, generator=generator) for n in (heads, kv_heads, kv_heads)]


def gaussian(heads: int, kv_heads: int, tokens: int, dim: int, generator: torch.Generator) -> Activations:
    """No structure at all: attention is nearly uniform."""
    return Activations(*_normal(heads, kv_heads, tokens, dim, generator))


def needles(heads: int, kv_heads: int, tokens: int, dim: int, generator: torch.Generator) -> Activations:
    """Every looked-at query asks for one token somewhere in its past."""
    q, k, v = _normal(heads, kv_heads, tokens, dim, generator)
    rows = rows_of(tokens)
    wanted = (torch.rand(heads, len(rows), generator=generator) * (rows + 1)).long()
    keys = _for_heads(k, heads).gather(1, wanted[..., None].expand(-1, -1, dim))
    q[:, rows] = NEEDLE_LOGIT * math.sqrt(dim) * keys / keys.square().sum(-1, keepdim=True)
    return Activations(q, k, v, wanted)


def sinks(heads: int, kv_heads: int, tokens: int, dim: int, generator: torch.Generator) -> Activations:
    """Every query gives much of its attention to the first tokens, whose values are small."""
    q, k, v = _normal(heads, kv_heads, tokens, dim, generator)
    direction = torch.nn.functional.normalize(torch.randn(dim, generator=generator), dim=0)
    strength = math.sqrt(SINK_LOGIT * math.sqrt(dim))
    q += strength * direction
    k[:, :SINKS] = strength * direction
    v[:, :SINKS] *= 0.1
    return Activations(q, k, v)


def local(heads: int, kv_heads: int, tokens: int, dim: int, generator: torch.Generator) -> Activations:
    """Neighbours are alike, and queries ask for what is like them."""
    _, steps, values = _normal(heads, kv_heads, tokens, dim, generator)
    k = torch.empty_like(steps)
    k[:, 0] = steps[:, 0]
    for t in range(1, tokens):
        k[:, t] = MEMORY * k[:, t - 1] + math.sqrt(1 - MEMORY**2) * steps[:, t]
    return Activations(_for_heads(k, heads) + 0.5 * torch.randn(heads, tokens, dim, generator=generator), k, values)


def heavy_tails(heads: int, kv_heads: int, tokens: int, dim: int, generator: torch.Generator) -> Activations:
    """A few channels are many times larger than the others, in keys and values."""
    q, k, v = _normal(heads, kv_heads, tokens, dim, generator)
    k_scale, v_scale = (torch.randn(dim, generator=generator).exp() for _ in range(2))
    return Activations(q, k * k_scale, v * v_scale)


GENERATORS: dict[str, Generate] = {
    generate.__name__: generate for generate in (gaussian, needles, sinks, local, heavy_tails)
}
"""Every generator by name."""
