"""Errors that do not cancel: rule T3 of docs/verification.md.

Rounding to nearest is right on average. A kernel that truncates, or adds up in low precision, errs to one side, by far
less than any elementwise bound and on every element: that is what training diverges on. Both rules need many elements
in half precision, and refuse to judge others: in float32 nothing is cast, and the one rounding of a constant such as
the scale is a bias that a mean over many elements resolves.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .canary import guarded
from .rounding import ROUNDOFF, Bounded
from .tolerance import Comparison, refused

MIN_ELEMENTS = 100_000
MAX_Z = 5.0
"""Standard errors that a mean may be from 0: one correct kernel in 10^6 is further."""

MAX_MEAN = 0.05
"""Part of its bound that an error may be on average."""

SECOND_ORDER = 4.0
"""Mean error, in units of roundoff and parts of the bound, that roundings without bias make: the exponential of a logit
of magnitude B that is off by up to u B is on average u^2 B^2 / 6 too large, u B / 6 of the bound; B is up to 24."""

MIN_EXACT = 0.99
"""Part of a constant's elements that must come out exactly."""

MAX_MEAN_RELATIVE = 2e-4
"""Mean relative error that a constant may come out with."""


def _check(name: str, actual: Tensor) -> None:
    """Raise unless `actual` can be judged."""
    if actual.dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"{name}: the dtype must be float16 or bfloat16, got {actual.dtype}")
    if actual.numel() < MIN_ELEMENTS:
        raise ValueError(f"{name}: there must be at least {MIN_ELEMENTS} elements, got {actual.numel()}")


def _noise(shift: float, away: float = 0.0, spread: float = 0.0) -> tuple[str, Tensor, Bounded]:
    """Errors within 0.1 of their bounds, moved by `shift` upwards, by `away` away from 0, by `spread` with columns."""
    generator = torch.Generator().manual_seed(1)
    error = torch.rand(4, 4, 100, 64, generator=generator, dtype=torch.float64).sub(0.5).mul(0.2)
    value = torch.ones_like(error).where(torch.arange(64) % 2 == 0, -1.0)
    error += spread * torch.ones_like(error).where(torch.arange(64) % 4 < 2, -1.0)
    return "canary", (value + error + shift + away * value).half(), Bounded(value, torch.ones_like(value))


@guarded(
    lambda rule: rule(*_noise(0.0)),
    lambda rule: rule(*_noise(0.075, spread=0.8)),
    lambda rule: rule(*_noise(0.003)),
    lambda rule: rule(*_noise(0.0, away=-0.003)),
    lambda rule: rule(*_noise(math.nan)),
)
def compare_bias(name: str, actual: Tensor, expected: Bounded) -> Comparison:
    """The mean error, in parts of the bound, upwards and away from 0: within 5 standard errors and 5 % of 0.

    A mean below ``4 u`` is right, however many standard errors that is. Elements of one column (batch, head, :, d)
    share the rounding errors of their core tokens and those of one row the casts of its probabilities, so the standard
    error is that of the columns' means and of the rows'. It means nothing where all rows have the same logits: then
    their casts err alike. Where both the error and the bound are 0 there is nothing to average.

    Args:
        name: of the tensor.
        actual: [B, H, T, D], float16 or bfloat16.
        expected: its values and rigorous bounds.

    Raises:
        ValueError: for fewer than 100 000 elements, another dtype, or an expected value or bound that is not finite.
    """
    _check(name, actual)
    value, bound = expected.value.detach().double().cpu(), expected.bound.detach().double().cpu()
    if not bool(value.isfinite().all() and bound.isfinite().all() and (bound >= 0).all()):
        raise ValueError(f"{name}: the expected values and their bounds must be finite everywhere")
    if actual.shape != value.shape:
        return refused(name, "bias", f"shape {tuple(actual.shape)}, not {tuple(value.shape)}")
    error = actual.detach().double().cpu() - value
    part = torch.where((error == 0) & (bound == 0), 0.0, error / bound)
    small = SECOND_ORDER * ROUNDOFF[actual.dtype]
    terms: dict[str, float] = {}
    uses: list[float] = []
    for direction, x in (("up", part), ("away", part * value.sign())):
        mean = float(x.mean())
        deviation = math.hypot(_standard_error(x.mean(2)), _standard_error(x.mean(3)))
        z = mean / deviation if deviation else _sure(mean)
        terms |= {f"mean_{direction}": mean, f"z_{direction}": z}
        uses += [abs(mean) / MAX_MEAN, min(abs(z) / MAX_Z, abs(mean) / small)]
    return _verdict(name, uses, terms, float(error.abs().max()))


def _standard_error(means: Tensor) -> float:
    """Of the mean of independent `means`."""
    return float(means.std()) / math.sqrt(means.numel())


def _sure(mean: float) -> float:
    """The z-score of a mean without any spread."""
    return 0.0 if mean == 0 else math.copysign(math.inf, mean)


def _constant(wrong: int, factor: float = 1.25) -> tuple[str, Tensor, Tensor]:
    value = torch.full((1, 1, 1000, 100), 2.0, dtype=torch.float16)
    actual = value.clone()
    actual.flatten()[:wrong] = 2.0 * factor
    return "canary", actual, value


@guarded(
    lambda rule: rule(*_constant(900, 1 + 2**-9)),
    lambda rule: rule(*_constant(1500, 1 + 2**-10)),
    lambda rule: rule(*_constant(900, 1 + 1.5 * 0.03)),
    lambda rule: rule(*_constant(1, math.nan)),
)
def compare_constant(name: str, actual: Tensor, constant: Tensor) -> Comparison:
    """With equal values the output is that value: in 99 % of the elements exactly, and to 2e-4 on average.

    Args:
        name: of the tensor.
        actual: [B, H, T, D], float16 or bfloat16.
        constant: the same for the values; no element is 0.

    Raises:
        ValueError: for fewer than 100 000 elements, another dtype, or a constant that is 0 or not finite somewhere.
    """
    _check(name, actual)
    value = constant.detach().double().cpu()
    if not bool((value.isfinite() & (value != 0)).all()):
        raise ValueError(f"{name}: the constant must be finite and not 0 everywhere")
    if actual.shape != value.shape:
        return refused(name, "bias", f"shape {tuple(actual.shape)}, not {tuple(value.shape)}")
    error = actual.detach().double().cpu() - value
    terms = {"inexact": float((error != 0).double().mean()), "mean_relative": float((error / value).mean())}
    uses = [terms["inexact"] / (1 - MIN_EXACT), abs(terms["mean_relative"]) / MAX_MEAN_RELATIVE]
    return _verdict(name, uses, terms, float(error.abs().max()))


def _verdict(name: str, uses: list[float], terms: dict[str, float], max_abs_error: float) -> Comparison:
    """The largest of `uses` decides; a NaN among them is infinite."""
    use = max(math.inf if math.isnan(x) else x for x in uses)
    detail = ", ".join(f"{key} {x:.3g}" for key, x in terms.items())
    return Comparison(name, use, (), use <= 1, False, detail, "bias", max_abs_error, terms)
