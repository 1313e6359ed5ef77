"""How far rounding will move a correct result, if its roundings are independent: rule T2 of docs/verification.md.

The rigorous bounds of `rounding` add up the sizes of all errors; here their variances add up. Rounding to nearest with
unit u has a standard deviation of u / sqrt(3), adding up n terms one of u sqrt(n / 3), and a bound is SIGMAS standard
deviations, or the rigorous bound where that is less. A result beyond it is suspicious, no proof of a defect. Errors
that are one and the same for many terms, those of a stored core token or of a row's log-sum-exp, add up linearly over
these terms; errors that may be equal because the terms are, those of the casts, are there both ways.

Axes as in `rounding`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from .rounding import EXP_ULPS, Bounded, ErrorModel, repeat_heads
from .rounding_backward import Backward, Gradients, sum_heads

SIGMAS = 7.0
"""Standard deviations that a bound is: with 10^9 elements, fewer than 10^-2 false alarms of normal errors."""

CANCELLED = 2.0**-48  # of a sum of squares, that float64 leaves where they cancel
MAX_EXPONENT = 50.0  # where the bound is the rigorous one anyway, and nothing overflows


def out(model: ErrorModel) -> Bounded:
    """[B, Hq, T, D], as `ErrorModel.out` has it, with the statistical bound."""
    return _Forward(model).out()


def gradients(model: ErrorModel, dout: Tensor, dlse: Tensor | None) -> Gradients:
    """As `rounding_backward.gradients`, with the statistical bounds; dout [B, Hq, T, D], dlse [B, Hq, T]."""
    wide = None if dlse is None else dlse.detach().double()
    return _Backward(_Forward(model), Backward(model, dout.detach().double(), wide)).run()


class _Rounding:
    """Variances of the roundings of a `Precision`."""

    def __init__(self, model: ErrorModel) -> None:
        p = model.precision
        self.wide, self.store, self.cast = (x**2 / 3 for x in (p.wide, p.store, p.cast))
        self.floor, self.flush = p.floor**2 / 3 + p.flush**2, p.flush**2
        self.normal = 2 * p.floor / p.cast if p.cast else 2 * p.flush

    def is_low(self, x: Tensor, visible: Tensor) -> Tensor:
        """Where `x` is so small that a cast errs by the floor, as float64."""
        return ((x.abs() < self.normal) & visible).double()

    def adding(self, terms: Tensor | int, size: Tensor) -> Tensor:
        """Of a sum tile by tile of `terms` terms, whose magnitudes add up to `size`."""
        return (2 * torch.as_tensor(terms).double() + 32) * self.wide * size.square()

    def logit(self, terms: int, size: Tensor, scores: Tensor, pivot: Tensor) -> Tensor:
        """Of logits that are sums of `terms` products, and of the exponentials of their distance to `pivot`."""
        exponential = (2 * EXP_ULPS) ** 2 + 16 * (scores.square() + pivot.square())
        return self.wide * (terms * size.square() + exponential)


def _exponential(variance: Tensor) -> Tensor:
    """Standard deviation of exp(error), less 1, that is right at SIGMAS of the error."""
    return torch.expm1((SIGMAS * variance.sqrt()).clamp(max=MAX_EXPONENT)) / SIGMAS


class _Forward:
    """Variances beside the values of an `ErrorModel`."""

    def __init__(self, model: ErrorModel) -> None:
        self.f, self.r = model, _Rounding(model)
        self._pool()
        self._score()

    def _pool(self) -> None:
        f, g = self.f, self.f.spec.group_size
        scores = f.scale * (f.member_rows[0] @ f.q_score[..., None])[..., 0]  # [B, Hc, C, g]
        size = f.scale * (f.member_rows[0].abs() @ f.q_score_size[..., None])[..., 0]
        terms = f.head_dim + 2 + f.heads // f.core_heads
        self.weight = self.r.logit(terms, size, scores, scores.abs().amax(-1, keepdim=True))
        moved = self.weight * f.weights.square()
        self.weight_again = self.weight + moved.sum(-1, True) + 16 * self.r.wide * scores.logsumexp(-1, True).square()
        self.moved = repeat_heads(moved, f.heads)
        roundings, totals = [], []
        for members in f.member_rows:
            core = (f.weights[..., None] * members).sum(-2)
            size = (f.weights[..., None] * members.abs()).sum(-2)
            rounding = self.r.store * core.square() + self.r.adding(g, size) + self.r.floor
            rounding += self.r.flush * members.square().sum(-2)
            spread = (moved[..., None] * (members - core[..., None, :]).square()).sum(-2)
            roundings.append(rounding)
            totals.append(rounding + spread)
        nothing = torch.zeros_like(f.k)
        self.key_rounding, self.value_rounding = (f.concat(x, nothing) for x in roundings)
        self.key, self.value = (f.concat(x, nothing) for x in totals)

    def product(self, products: Tensor, x: Tensor, rounding: Tensor) -> Tensor:
        """Of ``products = x @ rows.mT`` [B, Hq, T, N], from the rows which are stored core tokens."""
        moved = (self.f.of_members(products) - products[..., : self.f.cores, None]).square() * self.moved[:, :, None]
        return pad(moved.sum(-1), (0, self.f.tokens)) + x.square() @ rounding.mT

    def _score(self) -> None:
        f = self.f
        size = f.scale * f.q.abs() @ f.keys.abs().mT
        pivot = (f.scores.abs() * f.visible).amax(-1, keepdim=True)
        variance = self.r.logit(f.head_dim + 2, size, f.scores, pivot)
        variance = (variance + self.product(f.scores, f.scale * f.q, self.key_rounding)) * f.visible
        shrunk = (f.probs * (-SIGMAS * variance.sqrt()).exp()).sum(-1, keepdim=True)
        self.relative = _exponential(variance)  # standard deviation of an exponential, relative to it
        self.prob = (f.probs * self.relative / shrunk).square()
        self.count = f.visible.sum(-1, keepdim=True)
        self.adding = self.r.adding(self.count, f.probs @ f.values.abs())
        lse = self.prob.sum(-1, True) + self.r.adding(self.count, torch.ones_like(pivot))
        self.lse = lse + 16 * self.r.wide * f.lse.value[..., None].square()
        self.parts = [f.probs[..., keys] @ f.values[:, :, keys] for keys in (slice(f.cores), slice(f.cores, None))]

    def out(self) -> Bounded:
        """The output."""
        f, r, exact = self.f, self.r, self.f.out
        centre = f.values.mean(2, keepdim=True)
        values, mean = f.values - centre, exact.value - centre
        squares = self.prob @ values.square() + self.prob.sum(-1, True) * mean.square()
        moved = (squares - 2 * mean * (self.prob @ values)).clamp(min=0) + CANCELLED * squares
        weighted = f.probs * f.scores.masked_fill(~f.visible, 0.0)
        moved += 4 * r.wide * (weighted @ values - weighted.sum(-1, True) * mean).square()
        cast = r.cast * (f.probs.square() @ f.values.square() + sum(x.square() for x in self.parts))
        cast += r.floor * (r.is_low(f.probs, f.visible) @ f.values.abs()).square()
        stored = f.probs.square() @ self.value + r.store * self.parts[0].square()
        variance = moved + cast + stored + self.adding
        return bounded(exact, f, variance, exact.value.abs())


def bounded(rigorous: Bounded, model: ErrorModel, variance: Tensor, stores: Tensor) -> Bounded:
    """`rigorous` with a bound from `variance` and one rounding of each of the magnitudes that `stores` adds up."""
    p = model.precision
    lost = 2 * p.floor + model.heads * model.visible.numel() * p.flush
    bound = (p.store * stores + lost + SIGMAS * variance.sqrt()) * p.second_order
    return Bounded(rigorous.value, torch.minimum(bound, rigorous.bound))


class _Backward:
    """Variances beside the values of a `Backward`, of the gradients before the scale is multiplied in."""

    def __init__(self, forward: _Forward, exact: Backward) -> None:
        self.s, self.b, self.f, self.r = forward, exact, forward.f, forward.r
        f, b, r = self.f, exact, self.r
        self.ds = b.ds.value
        size = b.dout.abs() @ f.values.abs().mT
        from_cores = forward.product(b.dprobs, b.dout, forward.value_rounding)
        self.dprobs = f.probs.square() * (from_cores + f.head_dim * r.wide * size.square())
        self.own, self.shared = self._delta(from_cores)
        wide = 16 * r.wide * (f.probs * (b.dprobs.abs() + b.delta.abs())).square()
        self.low, self.low_prob = (r.is_low(x, f.visible) for x in (self.ds, f.probs))
        self.cast = r.cast * self.ds.square() + wide + r.floor * self.low
        self.cast_prob = r.cast * f.probs.square() + r.floor * self.low_prob

    def _delta(self, from_cores: Tensor) -> tuple[Tensor, Tensor]:
        """Of delta [B, Hq, T, 1]: what is a row's own, and what rows share because they see the same cores."""
        f, b, s, r, c = self.f, self.b, self.s, self.r, self.f.cores
        moved = s.prob * (b.dprobs - b.mean_dprobs).square() + f.probs.square() * from_cores
        own = moved[..., c:] + r.cast * (f.probs * b.dprobs)[..., c:].square()
        parts = sum((b.dout * x).sum(-1, True).square() for x in s.parts)
        cast = r.cast * ((f.probs * b.dprobs)[..., :c].square().sum(-1, True) + parts)
        dot = b.dout.square() * (r.store * f.out.value.square() + s.adding)
        size = (b.dout * f.out.value).abs().sum(-1, True)
        wide = r.wide * (f.head_dim * size.square() + b.dlse[..., None].square())
        return own.sum(-1, True) + cast + dot.sum(-1, True) + wide, moved[..., :c].sum(-1, True)

    def run(self) -> Gradients:
        """The gradients after their last store."""
        f, exact, c, kv_heads = self.f, self.b.run(), self.f.cores, self.f.k.shape[1]
        square = f.scale**2
        dq, dkeys, dvalues = square * self._queries(), square * self._keys(), self._values()
        dk, dv = (sum_heads(x[:, :, c:], kv_heads) for x in (dkeys, dvalues))
        if c:
            cores = [sum_heads(x[:, :, :c].sqrt(), f.core_heads).square() for x in (dkeys, dvalues)]
            pooled = self._through_pooling(*cores)
            team = f.heads // f.core_heads
            dq = dq.clone()
            dq[:, :, f.spec.group_size - 1 :: f.spec.group_size] += repeat_heads(pooled[0], f.heads) / team**2
            tail = (0, 0, 0, f.tokens - c * f.spec.group_size)
            dk, dv = (
                x + pad(sum_heads(y, kv_heads).flatten(2, 3), tail) for x, y in zip((dk, dv), pooled[1:], strict=True)
            )
        parts = (f.scale * self.ds @ f.keys).abs()  # stored before the part through pooling is added
        return Gradients(
            bounded(exact.dq, f, dq, exact.dq.value.abs() + parts),
            bounded(exact.dk, f, dk, exact.dk.value.abs()),
            bounded(exact.dv, f, dv, exact.dv.value.abs()),
        )

    def _queries(self) -> Tensor:
        f, s, r = self.f, self.s, self.r
        own = (self.ds * s.relative).square() + self.dprobs + self.cast
        row = (s.lse + r.cast) * (self.ds @ f.keys).square() + (self.own + self.shared) * (f.probs @ f.keys).square()
        keys = self.ds.square() @ s.key + r.adding(s.count, self.ds.abs() @ f.keys.abs())
        keys += r.floor * (self.low @ f.keys.abs()).square()
        return own @ f.keys.square() + row + keys

    def _over_queries(self, deviation: Tensor, x: Tensor) -> Tensor:
        """Of ``deviation.mT @ x``: a core's error is the same for all queries, a raw token's another for each."""
        c = self.f.cores
        core = (deviation[..., :c].mT @ x.abs()).square()
        return torch.cat([core, deviation[..., c:].square().mT @ x.square()], dim=2)

    def _adding(self, size: Tensor) -> Tensor:
        """Of adding up what all queries of a key/value head give to each key."""
        f = self.f
        rows = f.visible.sum(0) * (f.heads // f.k.shape[1])
        return self.r.adding(rows[:, None], size)

    def _keys(self) -> Tensor:
        f, s, ds = self.f, self.s, self.ds
        own = (self.cast + f.probs.square() * self.own).mT @ f.q.square()
        shared = f.probs * self.shared.sqrt() + ds.abs() * s.lse.sqrt()
        own += self._over_queries((ds * s.relative).abs(), f.q) + self._over_queries(self.dprobs.sqrt(), f.q)
        return own + (shared.mT @ f.q.abs()).square() + self._all_keys(ds, self.low, f.q)

    def _values(self) -> Tensor:
        f, s, dout = self.f, self.s, self.b.dout
        own = self.cast_prob.mT @ dout.square() + self._over_queries(f.probs * s.relative, dout)
        return own + ((f.probs * s.lse.sqrt()).mT @ dout.abs()).square() + self._all_keys(f.probs, self.low_prob, dout)

    def _all_keys(self, left: Tensor, low: Tensor, right: Tensor) -> Tensor:
        """Of adding up ``left.mT @ right``, and of casts that err all alike; `low` where they err by the floor."""
        alike = self.r.cast * (left.mT @ right).square() + self.r.floor * (low.mT @ right.abs()).square()
        return self._adding(left.abs().mT @ right.abs()) + alike

    def _weight_gradient(self) -> Tensor:
        """Of ``da - mean(da)`` [B, Hc, C, g], from the errors of what arrives at the cores.

        An error of dS or P reaches it by way of how far the logit, or dout . v, of each member is from the core's.
        """
        f, s, b, c = self.f, self.s, self.b, self.f.cores
        logits, dprobs = ((f.of_members(x) - x[..., :c, None]).abs() for x in (f.scores, b.dprobs))
        ds = self.ds.square() * (s.relative.square() + s.lse) + self.dprobs
        ds += f.probs.square() * (self.own + self.shared)
        probs = f.probs.square() * (s.relative.square() + s.lse)
        moved, own = torch.zeros_like(logits[:, :, 0]), torch.zeros_like(logits[:, :, 0])
        for shared, cast, spread in ((ds, self.cast, logits), (probs, self.cast_prob, dprobs)):
            moved += torch.einsum("bhic,bhicg->bhcg", shared[..., :c].sqrt(), spread)
            own += torch.einsum("bhic,bhicg->bhcg", cast[..., :c], spread.square())
        return sum_heads((moved.square() + own).sqrt(), f.core_heads).square()

    def _rounded_weight_gradient(self, dk_core: Tensor, dv_core: Tensor) -> Tensor:
        """Of ``da = dk_core . k + dv_core . v`` [B, Hc, C, g], from adding up."""
        f, c, r = self.f, self.f.cores, self.r
        k, v = f.member_rows
        dk = f.scale**2 * self._adding(self.ds.abs().mT @ f.q.abs())[:, :, :c]
        dv = self._adding(f.probs.mT @ self.b.dout.abs())[:, :, :c]
        dk, dv = (sum_heads(x.sqrt(), f.core_heads).square()[..., None, :] for x in (dk, dv))
        size = ((dk_core[..., None, :] * k).abs() + (dv_core[..., None, :] * v).abs()).sum(-1)
        return (dk * k.square() + dv * v.square()).sum(-1) + 2 * f.head_dim * r.wide * size.square()

    def _through_pooling(self, dk_var: Tensor, dv_var: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What arrives at the cores [B, Hc, C, D], passed on to q_score [B, Hc, C, D] and to k, v [B, Hc, C, g, D]."""
        f, c = self.f, self.f.cores
        (k, v), weights, again = f.member_rows, f.weights, self.s.weight_again
        dk, dv = (sum_heads(x.value[:, :, :c], f.core_heads) for x in (self.b.dkeys, self.b.dvalues))
        da = (dk[..., None, :] * k + dv[..., None, :] * v).sum(-1)  # [B, Hc, C, g]
        size = (weights * da.abs()).sum(-1, True)
        moved = again * (da - (weights * da).sum(-1, True)).square()
        arrived = self._weight_gradient() + self._rounded_weight_gradient(dk, dv)
        added = self.r.adding(f.spec.group_size, da.abs() + size)
        mean_var = (weights.square() * moved).sum(-1, True)
        ds_var = weights.square() * (moved + mean_var + arrived + added) + self.r.flush * (da.square() + size.square())
        ds_var = (ds_var * f.uses_query)[..., None]
        dq = f.scale**2 * (ds_var.sqrt() * k.abs()).sum(-2).square()
        again = (again + self.r.adding(f.spec.group_size, torch.ones_like(again)))[..., None]
        dk_members, dv_members = (
            weights[..., None].square() * (again * x.square() + var) + self.r.flush * x.square()
            for x, var in ((dk[..., None, :], dk_var[..., None, :]), (dv[..., None, :], dv_var[..., None, :]))
        )
        q_size = f.q_score_size[..., None, :]
        return dq, dk_members + f.scale**2 * ds_var * q_size.square(), dv_members
