"""What a correct kernel's rounding can amount to, derived from the magnitudes of the terms that it adds up.

`ErrorModel` follows one forward through spec.md sections 1 to 3 in float64 and carries, beside every
value, a bound on the rounding error that a kernel of the given `Precision` can have made there. The bounds are
elementwise and rigorous to first order (rule T1 of docs/verification.md): exceeding one is a defect, never bad
luck. Three things keep them close:
an error of a softmax weight moves a result only as far as the values are spread, so values enter by their distance
from a centre; an error of a pooling weight moves a logit by the spread of the group's logits; and the error of each
logit is its own, not the row's largest.

Axes: B batch, Hq query heads, Hkv key/value heads, Hc core heads, T tokens (at least 1), C core tokens,
N = C + T keys, g group size, D head dimension. A model is of one dense batch; packed and padded calls are taken
apart first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..spec import CCASpec

EXP_ULPS = 4.0
"""Error of one hardware base-2 exponential in units of roundoff."""

ROUNDOFF = {
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
    torch.float32: 2.0**-24,
    torch.float64: 2.0**-53,
}


@dataclass(frozen=True, slots=True)
class Precision:
    """Unit roundoffs along a kernel's path.

    Args:
        wide: of the accumulators and the softmax statistics.
        store: of outputs and stored core tokens.
        cast: of probabilities and score gradients as operands of a matrix product; 0 where nothing is cast.
        floor: absolute error of one such cast or store, half the smallest subnormal.
        flush: below it an exponential or a product may be 0, the smallest normal number of the accumulators' type.
    """

    wide: float
    store: float
    cast: float
    floor: float
    flush: float

    @classmethod
    def of(cls, dtype: torch.dtype) -> Precision:
        """The kernels' path for inputs of `dtype`."""
        unit = ROUNDOFF[dtype]
        floor = float(torch.finfo(dtype).smallest_normal) * unit
        flush = float(torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).smallest_normal)
        if dtype in (torch.float32, torch.float64):
            return cls(wide=unit, store=unit, cast=0.0, floor=floor, flush=flush)
        # tensor cores may truncate where they add: one unit more than rounding to nearest
        return cls(wide=2 * ROUNDOFF[torch.float32], store=unit, cast=unit, floor=floor, flush=flush)

    @property
    def second_order(self) -> float:
        """Factor that covers the products of two roundings, which a first-order bound leaves out."""
        return 1.0 + 16 * (self.store + self.cast)

    def dot(self, terms: int) -> float:
        """Error of a sum of `terms` products, relative to the sum of their magnitudes."""
        return terms * self.wide / (1 - terms * self.wide)

    def summing(self, terms: Tensor | int) -> Tensor:
        """Relative error of adding up weighted values tile by tile, each tile rescaling what came before."""
        return (2 * torch.as_tensor(terms).double() + 32) * self.wide


class Bounded(NamedTuple):
    """A float64 value and how far from it, elementwise, a correct result may be."""

    value: Tensor
    bound: Tensor


def exact_weights(weights: Tensor, dtype: torch.dtype) -> Bounded:
    """Softmax weights of equal logits, 1/N or 1/(g N), as an output: a zero has no error at all."""
    p = Precision.of(dtype)
    relative = 8 * p.wide + 2 * p.store + p.cast
    return Bounded(weights, (relative * weights + p.floor * (weights > 0)) * p.second_order)


def repeat_heads(x: Tensor, heads: int) -> Tensor:
    """x [B, H, ...] for `heads` heads, of which ``heads // H`` share each of x's."""
    return x.repeat_interleave(heads // x.shape[1], dim=1)


class ErrorModel:
    """Values and error bounds of one dense forward.

    Args:
        q: [B, Hq, T, D]. k, v: [B, Hkv, T, D]. The inputs as the kernel got them; taken to float64 here.
        spec: what is computed.
        dtype: the kernel's dtype, which decides the `Precision`.
    """

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, spec: CCASpec, dtype: torch.dtype) -> None:
        self.q, self.k, self.v = (x.detach().double() for x in (q, k, v))
        self.spec, self.precision = spec, Precision.of(dtype)
        self.scale = spec.softmax_scale(q.shape[-1])
        self.heads, self.tokens, self.head_dim = q.shape[1:]
        self.core_heads = spec.num_core_heads(q.shape[1], k.shape[1])
        self.cores = spec.num_groups(self.tokens)
        self._pool()
        self._score()
        self._attend()

    # --- results ---------------------------------------------------------------------------------------------------

    @property
    def out(self) -> Bounded:
        """[B, Hq, T, D]."""
        return Bounded(self._out, self._out_error * self.precision.second_order)

    @property
    def lse(self) -> Bounded:
        """[B, Hq, T], kept in the accumulators' type."""
        return Bounded(self._lse, self._lse_error * self.precision.second_order)

    @property
    def k_core(self) -> Bounded:
        """[B, Hc, C, D]."""
        return Bounded(self._k_core, self._core_error(self._k_members) * self.precision.second_order)

    @property
    def v_core(self) -> Bounded:
        """[B, Hc, C, D]."""
        return Bounded(self._v_core, self._core_error(self._v_members) * self.precision.second_order)

    # --- spec section 1 ---------------------------------------------------------------------------------------------

    def members(self, x: Tensor) -> Tensor:
        """The complete groups of x [B, H, T, D], for every core head: [B, Hc, C, g, D]."""
        g = self.spec.group_size
        return repeat_heads(x[:, :, : self.cores * g].unflatten(2, (self.cores, g)), self.core_heads)

    def _pool(self) -> None:
        g, p = self.spec.group_size, self.precision
        teams = self.q[:, :, g - 1 :: g].unflatten(1, (self.core_heads, self.heads // self.core_heads))
        self.uses_query = float(self.spec.pooling == "last_query")
        self.q_score, self.q_score_size = teams.mean(2) * self.uses_query, teams.abs().mean(2) * self.uses_query
        self._k_members, self._v_members = self.member_rows = self.members(self.k), self.members(self.v)
        scores = self.scale * (self._k_members @ self.q_score[..., None])[..., 0]  # [B, Hc, C, g]
        size = self.scale * (self._k_members.abs() @ self.q_score_size[..., None])[..., 0]
        error = self._logit_error(scores, size, scores.abs().amax(-1, keepdim=True), terms=teams.shape[2])
        self.weights = scores.softmax(-1)
        # relative error of a weight: within the pooled sums, and as the backward recomputes it from the log-sum-exp
        self.weight_error = torch.expm1(error) / (self.weights * (-error).exp()).sum(-1, True)
        lse_error = (self.weights * error.exp()).sum(-1, True).log() + p.summing(g)
        self.weight_error_again = torch.expm1(error + lse_error + 4 * p.wide * scores.logsumexp(-1, True).abs())
        self._k_core = (self.weights[..., None] * self._k_members).sum(-2)
        self._v_core = (self.weights[..., None] * self._v_members).sum(-2)

    def _logit_error(self, scores: Tensor, size: Tensor, pivot: Tensor, terms: int = 0) -> Tensor:
        """Absolute error of logits that are sums of D products, and of the exponential of their distance to `pivot`."""
        p = self.precision
        return p.dot(self.head_dim + 2 + terms) * size + p.wide * (2 * EXP_ULPS + 4 * scores.abs() + 4 * pivot.abs())

    def _core_rounding(self, members: Tensor) -> Tensor:
        """Error of adding up and storing core tokens, without that of the weights: [B, Hc, C, D]."""
        p, weights = self.precision, self.weights[..., None]
        size, core = (weights * members.abs()).sum(-2), (weights * members).sum(-2)
        total: Tensor = p.summing(self.spec.group_size) * size + p.store * core.abs() + p.floor
        return total + p.flush * (members.abs() + 1).sum(-2)

    def _core_error(self, members: Tensor) -> Tensor:
        """Error of stored core tokens [B, Hc, C, D]; that of the weights moves them within their members' spread."""
        weights = self.weights[..., None]
        spread = (members - (weights * members).sum(-2, keepdim=True)).abs()
        moved: Tensor = (weights * self.weight_error[..., None] * spread).sum(-2)
        return moved + self._core_rounding(members)

    # --- spec sections 2 and 3 --------------------------------------------------------------------------------------

    def _score(self) -> None:
        g, w, device = self.spec.group_size, self.spec.window_size, self.q.device
        position = torch.arange(self.tokens, device=device)[:, None]
        cores_seen = (position + 1 - w).clamp(min=0) // g
        raw = (position.mT >= cores_seen * g) & (position.mT <= position)
        self.visible = torch.cat([torch.arange(self.cores, device=device) < cores_seen, raw], dim=1)  # [T, N]
        self.keys, self.values = self.concat(self._k_core, self.k), self.concat(self._v_core, self.v)
        nothing = torch.zeros_like(self.k)
        self.key_rounding = self.concat(self._core_rounding(self._k_members), nothing)
        self.value_rounding = self.concat(self._core_rounding(self._v_members), nothing)
        self.key_error = self.concat(self._core_error(self._k_members), nothing)
        self.value_error = self.concat(self._core_error(self._v_members), nothing)
        self.scores = self.scale * self.q @ self.keys.mT  # [B, Hq, T, N]
        size = self.scale * self.q.abs() @ self.keys.abs().mT
        pivot = (self.scores.abs() * self.visible).amax(-1, keepdim=True)
        moved = self.core_product_error(self.scores, self.scale * self.q, self.key_rounding)
        self.score_error = (self._logit_error(self.scores, size, pivot) + moved) * self.visible

    def concat(self, core: Tensor, raw: Tensor) -> Tensor:
        """[cores; raw tokens] for every query head: [B, Hq, N, D]."""
        return torch.cat([repeat_heads(core, self.heads), repeat_heads(raw, self.heads)], dim=2)

    def of_members(self, products: Tensor) -> Tensor:
        """The columns of `products` [B, Hq, T, N] that belong to the members of the groups: [B, Hq, T, C, g]."""
        c, g = self.cores, self.spec.group_size
        columns: Tensor = products[..., c : c + c * g].unflatten(-1, (c, g))
        return columns

    def core_product_error(self, products: Tensor, x: Tensor, rounding: Tensor) -> Tensor:
        """Error of ``products = x @ rows.mT`` [B, Hq, T, N] that comes from the rows which are stored core tokens."""
        spread = (self.of_members(products) - products[..., : self.cores, None]).abs()
        weights = repeat_heads(self.weights * self.weight_error, self.heads)
        moved = (spread * weights[:, :, None]).sum(-1)
        return torch.cat([moved, torch.zeros_like(products[..., self.cores :])], dim=-1) + x.abs() @ rounding.mT

    def _attend(self) -> None:
        p, count = self.precision, self.visible.sum(-1, keepdim=True)
        seen = self.scores.masked_fill(~self.visible, -math.inf)
        self.probs, self._lse = seen.softmax(-1), seen.logsumexp(-1)
        self._out = self.probs @ self.values
        shrunk = (self.probs * (-self.score_error).exp()).sum(-1, keepdim=True)
        self.prob_error = self.probs * torch.expm1(self.score_error) / shrunk + p.flush * self.visible
        centre = self.values.mean(2, keepdim=True)
        moved = self.prob_error @ (self.values - centre).abs()
        moved += self.prob_error.sum(-1, True) * (self._out - centre).abs()
        self.out_rounding = p.summing(count) * (self.probs @ self.values.abs()) + 2 * p.floor + count * p.flush
        self.out_rounding += p.floor * (self.visible.double() @ self.values.abs()) + p.store * self._out.abs()
        cast = p.cast * (self.probs @ self.values.abs())
        self._out_error = moved + cast + (self.probs + self.prob_error) @ self.value_error + self.out_rounding
        self._lse_error = (
            (self.probs * self.score_error.exp()).sum(-1).log() + p.summing(count)[:, 0] + 4 * p.wide * self._lse.abs()
        )
