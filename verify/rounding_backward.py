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
    return Backward(forward, dout.detach().double(), None if dlse is None else dlse.detach().double()).run()


def sum_heads(x: Tensor, heads: int) -> Tensor:
    """The adjoint of `repeat_heads`: x [B, H, ...] summed down to `heads` heads."""
    total: Tensor = x.unflatten(1, (heads, x.shape[1] // heads)).sum(2)
    return total


class Backward:
    """Spec section 4 on a finished `ErrorModel`: `Bounded` here is a value and the error it has so far.

    `dprobs` [B, Hq, T, N] are the gradients of the probabilities, `mean_dprobs` [B, Hq, T, 1] is ``dout . out`` and
    `delta` what the score gradients `ds` subtract, ``dout . out - dlse``; `dkeys` and `dvalues` [B, Hq, N, D] are the
    gradients of [cores; raw tokens], of one query head each.
    """

    def __init__(self, forward: ErrorModel, dout: Tensor, dlse: Tensor | None) -> None:
        self.f, self.p, self.dout = forward, forward.precision, dout
        self.dlse = torch.zeros_like(forward.lse.value) if dlse is None else dlse
        self.dprobs = dout @ forward.values.mT
        self.mean_dprobs = (forward.probs * self.dprobs).sum(-1, True)
        self.delta = self.mean_dprobs - self.dlse[..., None]
        again = torch.expm1(forward.score_error + forward.lse.bound[..., None]) * forward.visible
        # of the probabilities as the backward recomputes them
        self.prob_error = forward.probs * again + self.p.flush * forward.visible
        self.ds = self._score_gradient()
        # of adding up what all queries of a key/value head give to each key
        rows = forward.visible.sum(0) * (forward.heads // forward.k.shape[1])
        self.adding = self.p.summing(rows)[:, None]  # [N, 1]
        self.dkeys, self.dvalues = self._key_gradient(), self._value_gradient()

    def run(self) -> Gradients:
        """The gradients after their last store."""
        f, c, kv_heads = self.f, self.f.cores, self.f.k.shape[1]
        dq, dkeys, dvalues = self._query_gradient(), self.dkeys, self.dvalues
        dk, dv = (self._heads(x, slice(c, None), kv_heads) for x in (dkeys, dvalues))
        parts = dq.value.abs()
        if c:
            dk_core, dv_core = (self._heads(x, slice(c), f.core_heads) for x in (dkeys, dvalues))
            dq_pool, dk_pool, dv_pool = self._through_pooling(dk_core, dv_core)
            dq, dk, dv = (
                self._at_last_queries(dq, dq_pool),
                self._at_members(dk, dk_pool),
                self._at_members(dv, dv_pool),
            )
        parts = parts + dq.value.abs()  # one of the two parts of dq is stored before the other is added
        return Gradients(self._stored(dq, parts), self._stored(dk), self._stored(dv))

    def _stored(self, x: Bounded, parts: Tensor | float = 0.0) -> Bounded:
        p = self.p
        lost = 2 * p.floor + self.dout.shape[1] * self.f.visible.numel() * p.flush
        return Bounded(x.value, (x.bound + p.store * (x.value.abs() + parts) + lost) * p.second_order)

    def _score_gradient(self) -> Bounded:
        """dS [B, Hq, T, N] as an operand of the products that follow."""
        f, p, dout, dprobs = self.f, self.p, self.dout, self.dprobs
        core_error = f.core_product_error(dprobs, dout, f.value_rounding)
        dprobs_error = core_error + p.dot(f.head_dim) * (dout.abs() @ f.values.abs().mT)
        moved = f.prob_error * (dprobs - self.mean_dprobs).abs() + p.cast * f.probs * dprobs.abs()
        delta_error = (moved + (f.probs + f.prob_error) * core_error).sum(-1, True)
        delta_error += (dout.abs() * (f.out_rounding + p.dot(f.head_dim) * f.out.value.abs())).sum(-1, True)
        delta = self.delta
        delta_error += p.wide * self.dlse[..., None].abs()
        ds = f.probs * (dprobs - delta)
        error = self.prob_error * (dprobs - delta).abs() + (f.probs + self.prob_error) * (dprobs_error + delta_error)
        error += f.probs * 4 * p.wide * (dprobs.abs() + delta.abs())
        return Bounded(ds, error + p.cast * ds.abs() + (p.floor + p.flush) * f.visible)

    def _query_gradient(self) -> Bounded:
        f, ds, count = self.f, self.ds, self.f.visible.sum(-1, keepdim=True)
        error = ds.bound @ f.keys.abs() + (ds.value.abs() + ds.bound) @ f.key_error
        error += self.p.summing(count) * (ds.value.abs() @ f.keys.abs())
        return Bounded(f.scale * ds.value @ f.keys, f.scale * error)

    def _key_gradient(self) -> Bounded:
        f, ds = self.f, self.ds
        error = ds.bound.mT @ f.q.abs() + self._key_rounding()
        return Bounded(f.scale * ds.value.mT @ f.q, f.scale * error)

    def _key_rounding(self) -> Tensor:
        return self.adding * (self.ds.value.abs().mT @ self.f.q.abs())

    def _value_gradient(self) -> Bounded:
        error = self._value_operand_error().mT @ self.dout.abs() + self._value_rounding()
        return Bounded(self.f.probs.mT @ self.dout, error)

    def _value_operand_error(self) -> Tensor:
        return self.prob_error + self.p.cast * self.f.probs + self.p.floor * self.f.visible

    def _value_rounding(self) -> Tensor:
        return self.adding * (self.f.probs.mT @ self.dout.abs())

    @staticmethod
    def _heads(x: Bounded, rows: slice, heads: int) -> Bounded:
        return Bounded(sum_heads(x.value[:, :, rows], heads), sum_heads(x.bound[:, :, rows], heads))

    def _weight_gradient_error(self, size: Tensor) -> Tensor:
        """Error of ``da = dk_core . k + dv_core . v`` [B, Hc, C, g], whose terms' magnitudes add up to `size`.

        An error of dS or P reaches da by way of the logit, or dout . v, of the query that it belongs to.
        """
        f, c = self.f, self.f.cores
        moved = torch.einsum("bhic,bhicg->bhcg", self.ds.bound[..., :c], f.of_members(f.scores).abs())
        operand = self._value_operand_error()[..., :c]
        moved += torch.einsum("bhic,bhicg->bhcg", operand, f.of_members(self.dprobs).abs())
        k, v = f.member_rows
        dk_rounding = sum_heads(f.scale * self._key_rounding()[:, :, :c], f.core_heads)[..., None, :]
        dv_rounding = sum_heads(self._value_rounding()[:, :, :c], f.core_heads)[..., None, :]
        rounded = (dk_rounding * k.abs() + dv_rounding * v.abs()).sum(-1)
        return sum_heads(moved, f.core_heads) + rounded + self.p.dot(2 * f.head_dim) * size

    def _through_pooling(self, dk_core: Bounded, dv_core: Bounded) -> tuple[Bounded, Bounded, Bounded]:
        """What arrives at the cores [B, Hc, C, D], passed on to q_score [B, Hc, C, D] and to k, v [B, Hc, C, g, D]."""
        f, adding, lost = self.f, self.p.summing(self.f.spec.group_size), self.p.flush
        (k, v), weights, again = f.member_rows, f.weights[..., None], f.weight_error_again[..., None]
        dk, dv = (Bounded(x.value[..., None, :], x.bound[..., None, :]) for x in (dk_core, dv_core))
        da = (dk.value * k + dv.value * v).sum(-1, True)  # [B, Hc, C, g, 1]
        size = ((dk.value * k).abs() + (dv.value * v).abs()).sum(-1)
        da_error = self._weight_gradient_error(size)[..., None]
        mean, mean_size = (weights * da).sum(-2, True), (weights * da.abs()).sum(-2, True)
        mean_error = (weights * (again * (da - mean).abs() + da_error)).sum(-2, True)
        ds = weights * (da - mean) * f.uses_query
        moved = again * (da - mean).abs() + da_error + mean_error + adding * (da.abs() + mean_size)
        ds_error = (weights * moved + lost * (da - mean).abs()) * f.uses_query + adding * ds.abs()
        q, q_size = f.q_score[..., None, :], f.q_score_size[..., None, :]
        dk_error, dv_error = (
            weights * ((again + adding) * x.value.abs() + x.bound) + lost * x.value.abs() for x in (dk, dv)
        )
        dk_error = dk_error + f.scale * ds_error * q_size
        return (
            Bounded(f.scale * (ds * k).sum(-2), f.scale * (ds_error * k.abs()).sum(-2)),
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
