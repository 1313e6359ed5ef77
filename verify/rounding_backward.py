"""What a correct kernel's rounding can amount to in the gradients (spec section 4); continues `rounding`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from .rounding import Bounded, ErrorModel, repeat_heads


class Gradients(NamedTuple):
    """Of one call, shaped like q, k and v."""

    dq: Bounded
    dk: Bounded
    dv: Bounded


def gradients(forward: ErrorModel, dout: Tensor, dlse: Tensor | None) -> Gradients:
    """Gradients of ``(out * dout).sum() + (lse * dlse).sum()``, bounded; dout [B, Hq, T, D], dlse [B, Hq, T]."""
    return _Backward(forward, dout.detach().double(), None if dlse is None else dlse.detach().double()).run()


def sum_heads(x: Tensor, heads: int) -> Tensor:
    """The adjoint of `repeat_heads`: x [B, H, ...] summed down to `heads` heads."""
    return x.unflatten(1, (heads, x.shape[1] // heads)).sum(2)


class _Backward:
    """Spec section 4 on a finished `ErrorModel`: `Bounded` here is a value and the error it has so far."""

    def __init__(self, forward: ErrorModel, dout: Tensor, dlse: Tensor | None) -> None:
        self.f, self.p, self.dout = forward, forward.precision, dout
        self.dlse = torch.zeros_like(forward.lse.value) if dlse is None else dlse

    def run(self) -> Gradients:
        f, c, kv_heads = self.f, self.f.cores, self.f.k.shape[1]
        ds = self._score_gradient()
        dq, dkeys, dvalues = self._query_gradient(ds), self._key_gradient(ds), self._value_gradient()
        dk, dv = (self._heads(x, slice(c, None), kv_heads) for x in (dkeys, dvalues))
        stored = dq.value.abs()
        if c:
            dk_core, dv_core = (self._heads(x, slice(c), f.core_heads) for x in (dkeys, dvalues))
            dq_pool, dk_pool, dv_pool = self._through_pooling(dk_core, dv_core)
            dq, dk, dv = (
                self._at_last_queries(dq, dq_pool),
                self._at_members(dk, dk_pool),
                self._at_members(dv, dv_pool),
            )
        error = dq.bound + self.p.store * (stored + dq.value.abs())  # the two parts meet in a stored dq
        return Gradients(f.stored(dq.value, error), f.stored(*dk), f.stored(*dv))

    def _score_gradient(self) -> Bounded:
        """dS [B, Hq, T, N] as an operand of the products that follow."""
        f, p, dout = self.f, self.p, self.dout
        dprobs = dout @ f.values.mT
        dprobs_error = p.dot(f.head_dim) * (dout.abs() @ f.values.abs().mT)
        dprobs_error += f.core_product_error(dprobs, dout, f.value_rounding)
        out = f.out
        delta = (dout * out.value).sum(-1, True) - self.dlse[..., None]
        delta_error = (dout.abs() * (out.bound + p.dot(f.head_dim) * out.value.abs())).sum(-1, True)
        delta_error += p.wide * self.dlse[..., None].abs()
        again = self._weights_again()
        moved = again * (dprobs - delta).abs() + (1 + again) * (dprobs_error + delta_error)
        moved += 4 * p.wide * (dprobs.abs() + delta.abs())
        ds = f.probs * (dprobs - delta)
        return Bounded(ds, f.probs * moved + p.cast * ds.abs() + p.floor * f.visible)

    def _weights_again(self) -> Tensor:
        """Relative error of the probabilities as the backward recomputes them from the log-sum-exp."""
        return torch.expm1(self.f.score_error + self.f.lse.bound[..., None]) * self.f.visible

    def _query_gradient(self, ds: Bounded) -> Bounded:
        f, count = self.f, self.f.visible.sum(-1, keepdim=True)
        error = ds.bound @ f.keys.abs() + (ds.value.abs() + ds.bound) @ f.key_error
        error += self.p.summing(count) * (ds.value.abs() @ f.keys.abs())
        return Bounded(f.scale * ds.value @ f.keys, f.scale * error)

    def _key_gradient(self, ds: Bounded) -> Bounded:
        f = self.f
        error = (ds.bound + self._adding_rows() * ds.value.abs()).mT @ f.q.abs()
        return Bounded(f.scale * ds.value.mT @ f.q, f.scale * error)

    def _value_gradient(self) -> Bounded:
        f, p = self.f, self.p
        error = f.probs * (self._weights_again() + p.cast + self._adding_rows()) + p.floor * f.visible
        return Bounded(f.probs.mT @ self.dout, error.mT @ self.dout.abs())

    def _adding_rows(self) -> Tensor:
        """Relative error of adding up what all queries of a key/value head give to each key: [N]."""
        return torch.as_tensor(self.p.summing(self.f.visible.sum(0) * (self.f.heads // self.f.k.shape[1])))

    @staticmethod
    def _heads(x: Bounded, rows: slice, heads: int) -> Bounded:
        return Bounded(sum_heads(x.value[:, :, rows], heads), sum_heads(x.bound[:, :, rows], heads))

    def _through_pooling(self, dk_core: Bounded, dv_core: Bounded) -> tuple[Bounded, Bounded, Bounded]:
        """What arrives at the cores [B, Hc, C, D], passed on to q_score [B, Hc, C, D] and to k, v [B, Hc, C, g, D]."""
        f, p, adding = self.f, self.p, self.p.summing(self.f.spec.group_size)
        (k, v), weights, again = f.member_rows, f.weights[..., None], f.weight_error_again[..., None]
        dk, dv = (Bounded(x.value[..., None, :], x.bound[..., None, :]) for x in (dk_core, dv_core))
        da = (dk.value * k + dv.value * v).sum(-1, True)  # [B, Hc, C, g, 1]
        size = (dk.value * k).abs() + (dv.value * v).abs()
        da_error = (p.dot(2 * f.head_dim) * size + dk.bound * k.abs() + dv.bound * v.abs()).sum(-1, True)
        mean = (weights * da).sum(-2, True)
        mean_size = (weights * da.abs()).sum(-2, True)
        mean_error = (weights * (again * (da - mean).abs() + da_error)).sum(-2, True)
        ds = weights * (da - mean) * f.uses_query
        moved = again * (da - mean).abs() + da_error + mean_error + adding * (da.abs() + mean_size)
        ds_error = weights * moved * f.uses_query
        q, q_size = f.q_score[..., None, :], f.q_score_size[..., None, :]
        dq_error = ((ds_error + adding * ds.abs()) * k.abs()).sum(-2)
        dk_error = weights * ((again + adding) * dk.value.abs() + dk.bound)
        dk_error = dk_error + f.scale * (ds_error + adding * ds.abs()) * q_size
        dv_error = weights * ((again + adding) * dv.value.abs() + dv.bound)
        return (
            Bounded(f.scale * (ds * k).sum(-2), f.scale * dq_error),
            Bounded(weights * dk.value + f.scale * ds * q, dk_error),
            Bounded(weights * dv.value, dv_error),
        )

    def _at_members(self, raw: Bounded, pooled: Bounded) -> Bounded:
        """`raw` [B, Hkv, T, D] with `pooled` [B, Hc, C, g, D] added to the tokens of the complete groups."""
        kv_heads, tail = raw.value.shape[1], self.f.tokens - self.f.cores * self.f.spec.group_size
        return Bounded(
            *(x + pad(sum_heads(y, kv_heads).flatten(2, 3), (0, 0, 0, tail)) for x, y in zip(raw, pooled, strict=True))
        )

    def _at_last_queries(self, dq: Bounded, pooled: Bounded) -> Bounded:
        """`dq` [B, Hq, T, D] with each core's part [B, Hc, C, D] shared out over the queries that scored it."""
        g, team = self.f.spec.group_size, self.f.heads // self.f.core_heads
        total = Bounded(dq.value.clone(), dq.bound.clone())
        for x, y in zip(total, pooled, strict=True):
            x[:, :, g - 1 :: g] += repeat_heads(y, self.f.heads) / team
        return total
