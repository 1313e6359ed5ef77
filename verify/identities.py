"""What the identities among results may miss by: bounds for relations that no oracle states.

Each is derived from `Precision` and `ErrorModel`, like the bounds of `rounding`, or from measured bounds by the
triangle inequality; nothing here is a number that somebody chose.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .calls import cca
from .cases import Case
from .inputs import Inputs
from .rounding import ROUNDOFF, Bounded, ErrorModel, Precision, repeat_heads


def hull_of_past(case: Case, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """(lowest, highest, slack), each [B, Hq, T, D]: between which values of its past an output must lie, nearly.

    Whatever the logits, softmax weights are not negative and what they are divided by is their own sum. So an output
    leaves the hull by the rounding of the two sums, of the weights as operands, of the cores' two sums and of the
    stores alone, relative to the largest value of the past.
    """
    p = Precision.of(case.dtype)
    shape = inputs.q.shape
    low, high = (torch.zeros(shape, dtype=torch.float64, device=inputs.q.device) for _ in range(2))
    slack = torch.zeros_like(low)
    for rows, tokens in case.sequences():
        v = repeat_heads(inputs.v[rows, :, tokens].double(), shape[1])
        low[rows, :, tokens], high[rows, :, tokens] = v.cummin(2).values, v.cummax(2).values
        count = torch.arange(1, v.shape[2] + 1, device=v.device)[:, None]
        relative = 2 * p.summing(count) + p.cast + p.store
        relative = relative + 2 * p.summing(case.problem.group_size) + p.store
        largest = v.abs().cummax(2).values
        slack[rows, :, tokens] = (relative * largest + (count + 3) * p.floor * (1 + largest)) * p.second_order
    return low, high, slack


def merged(parts: list[tuple[Tensor, Tensor]], bounds: list[tuple[Tensor, Tensor]]) -> tuple[Bounded, Bounded]:
    """out [..., D] and lse [...] of two disjoint sets of keys as one softmax over both.

    Args:
        parts: (out, lse) of each set. bounds: of the errors in these.
    """
    (out_a, lse_a), (out_b, lse_b) = ((out.double(), lse.double()) for out, lse in parts)
    share = torch.sigmoid(lse_a - lse_b)
    out = share[..., None] * out_a + (1 - share)[..., None] * out_b
    lse_error = bounds[0][1] + bounds[1][1]
    error = share[..., None] * bounds[0][0] + (1 - share)[..., None] * bounds[1][0]
    error += (torch.expm1(lse_error) * share * (1 - share))[..., None] * (out_a - out_b).abs()
    return Bounded(out, error), Bounded(torch.logaddexp(lse_a, lse_b), lse_error)


def directional_derivative(case: Case, inputs: Inputs, along: dict[str, Tensor]) -> Bounded:
    """Derivative of ``(out * dout).sum() + (lse * dlse).sum()`` with respect to q, k and v, by central differences.

    Args:
        along: the direction, a tensor like q, k or v under each of these names that it changes.

    The bound is the correction that one extrapolation makes (of which its own error is a small part where the
    differences converge), and the rounding of the oracle in float64.
    """
    total = torch.zeros(2, dtype=torch.float64)
    for rows, tokens in case.sequences():
        if tokens.start < tokens.stop:
            part = inputs.part(rows, tokens)
            directions = {name: x[rows, :, tokens] for name, x in along.items()}
            total += torch.stack(_derivative_of_one(case, part, directions)).cpu()
    return Bounded(total[0], total[1])


def _derivative_of_one(case: Case, inputs: Inputs, along: dict[str, Tensor]) -> Bounded:
    dout, dlse, step = inputs.dout.double(), inputs.dlse.double(), 2.0**-13

    def loss(distance: float) -> Tensor:
        moved = [x.double() + distance * along.get(name, 0.0) for name, x in zip("qkv", inputs[:3], strict=True)]
        out, lse = cca(case, *moved)
        return (out * dout).sum() + (lse * dlse).sum()

    near, far = ((loss(h) - loss(-h)) / (2 * h) for h in (step, 2 * step))
    model = ErrorModel(*inputs[:3], case.spec, torch.float64)
    rounding = (model.out.bound * dout.abs()).sum() + (model.lse.bound * dlse.abs()).sum()
    rounding += ROUNDOFF[torch.float64] * dout.numel() * (loss(0.0).abs() + (model.out.value * dout).abs().sum())
    return Bounded((4 * near - far) / 3, (near - far).abs() + 1.5 * rounding / step)
