"""When a result is accepted: the only home of acceptance rules, and no test passes its own numbers.

The bounds come from `rounding` (rule T1 of verification.md section 4) and are elementwise; `compare_bitwise` is T5.
Infinities must be where they should be before anything is subtracted, NaN is never right, and a comparison reports
how much of its budget it used and where, not only whether it passed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .rounding import Bounded


@dataclass(frozen=True, slots=True)
class Comparison:
    """One tensor against what it should be.

    `budget_use` is the largest error over its bound (0 to 1 passes, infinite for NaN, a wrong infinity or a wrong
    shape), `worst_index` where that is, `empty` that there was nothing to compare.
    """

    name: str
    budget_use: float
    worst_index: tuple[int, ...]
    ok: bool
    empty: bool = False
    detail: str = ""

    def __str__(self) -> str:
        verdict = "ok" if self.ok else "FAILED"
        where = "nothing to compare" if self.empty else f"budget use {self.budget_use:.3g} at {self.worst_index}"
        return f"{self.name}: {verdict}, {where}{', ' + self.detail if self.detail else ''}"


def compare(name: str, actual: Tensor, expected: Bounded) -> Comparison:
    """Elementwise ``|actual - value| <= bound``; infinities must be where they should be, and NaN is never right.

    Raises:
        ValueError: if a bound is not a finite number of at least 0, so that anything would pass, or if the expected
            value is NaN, so that nothing could.
    """
    value, bound = expected.value.detach().double().cpu(), expected.bound.detach().double().cpu()
    if not bool((bound.isfinite() & (bound >= 0)).all()) or bool(value.isnan().any()):
        raise ValueError(f"{name}: the bound must be finite and the expected value a number everywhere")
    actual = actual.detach().double().cpu()
    if actual.shape != value.shape:
        return Comparison(name, math.inf, (), False, detail=f"shape {tuple(actual.shape)}, not {tuple(value.shape)}")
    if actual.numel() == 0:
        return Comparison(name, 0.0, (), True, empty=True)
    same = actual == value  # where infinite, only the same infinity is right
    both = actual.isfinite() & value.isfinite()
    error = torch.where(both, actual, 0.0).sub(torch.where(both, value, 0.0)).abs()
    use = torch.where(bound > 0, error / bound, math.inf)
    use = torch.where(same, 0.0, torch.where(both, use, math.inf))
    return _verdict(name, actual, value, use)


def compare_bitwise(name: str, actual: Tensor, expected: Tensor) -> Comparison:
    """The same bits: the sign of zero counts, and a NaN equals only the same NaN."""
    actual, expected = actual.detach().cpu(), expected.detach().cpu()
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        detail = f"{actual.dtype} {tuple(actual.shape)}, not {expected.dtype} {tuple(expected.shape)}"
        return Comparison(name, math.inf, (), False, detail=detail)
    if actual.numel() == 0:
        return Comparison(name, 0.0, (), True, empty=True)
    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[actual.element_size()]
    differs = actual.contiguous().view(bits) != expected.contiguous().view(bits)
    return _verdict(name, actual, expected, torch.where(differs, math.inf, 0.0))


def _verdict(name: str, actual: Tensor, expected: Tensor, use: Tensor) -> Comparison:
    worst = tuple(int(i) for i in torch.unravel_index(use.argmax(), use.shape))
    ok = bool((use <= 1.0).all())
    detail = "" if ok else f"{actual[worst].item():.9g} where {expected[worst].item():.9g} is right"
    return Comparison(name, float(use[worst]), worst, ok, detail=detail)
