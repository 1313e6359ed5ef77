"""When a result is accepted: the home of the acceptance rules, and no test passes its own numbers.

docs/verification.md says which rules there are. Here are the elementwise one, `compare`, for the rigorous bounds of
`rounding` (T1) and the statistical ones of `statistics` (T2), and `compare_bitwise` (T5); `bias` has T3 and `peer` T4.
Infinities must be where they should be before anything is subtracted, NaN is never right, and a comparison reports
how much of its budget it used and where, not only whether it passed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from .canary import guarded
from .rounding import Bounded

Level = Literal["rigorous", "statistical", "bias", "peer", "bitwise"]
"""What a failure is: proof of a defect ("rigorous", "bitwise") or strong suspicion of one (the others)."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """One tensor against what it should be.

    `budget_use` is the largest error over its bound (0 to 1 passes, infinite for NaN, a wrong infinity or a wrong
    shape), `worst_index` where that is, `empty` that there was nothing to compare, `level` the rule's,
    `max_abs_error` the largest error as it is, `terms` what was judged at `worst_index`: actual, expected, error and
    bound, or the statistics of a rule that judges a whole tensor.
    """

    name: str
    budget_use: float
    worst_index: tuple[int, ...]
    ok: bool
    empty: bool = False
    detail: str = ""
    level: Level = "rigorous"
    max_abs_error: float = 0.0
    terms: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        verdict = "ok" if self.ok else "FAILED"
        where = "nothing to compare" if self.empty else f"budget use {self.budget_use:.3g} at {self.worst_index}"
        level = "" if self.level in ("rigorous", "bitwise") else f" ({self.level})"
        return f"{self.name}{level}: {verdict}, {where}{', ' + self.detail if self.detail else ''}"


def refused(name: str, level: Level, detail: str) -> Comparison:
    """The verdict on a tensor that cannot even be compared."""
    return Comparison(name, math.inf, (), False, detail=detail, level=level, max_abs_error=math.inf)


def errors(actual: Tensor, value: Tensor) -> Tensor:
    """|actual - value| of two float64 tensors of one shape: infinite for NaN and for any infinity but the same one."""
    both = actual.isfinite() & value.isfinite()
    error = torch.where(both, actual, 0.0).sub(torch.where(both, value, 0.0)).abs()
    return torch.where(actual == value, 0.0, torch.where(both, error, math.inf))


def _pair(actual: float) -> tuple[str, Tensor, Bounded]:
    value = torch.tensor([[0.0, -1.0, 3.0]], dtype=torch.float64)
    return "canary", torch.tensor([[0.0, -1.0, actual]]), Bounded(value, torch.full_like(value, 0.5))


@guarded(
    lambda rule: rule(*_pair(3.5)),
    lambda rule: rule(*_pair(3.75)),
    lambda rule: rule(*_pair(2.25)),
    lambda rule: rule(*_pair(math.nan)),
    lambda rule: rule(*_pair(math.inf)),
    lambda rule: rule("canary", torch.zeros(1, 1), Bounded(torch.zeros(1, 2), torch.ones(1, 2))),
)
def compare(name: str, actual: Tensor, expected: Bounded, *, level: Level = "rigorous") -> Comparison:
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
        return refused(name, level, f"shape {tuple(actual.shape)}, not {tuple(value.shape)}")
    if actual.numel() == 0:
        return Comparison(name, 0.0, (), True, empty=True, level=level)
    error = errors(actual, value)
    use = torch.where(error == 0, 0.0, torch.where(bound > 0, error / bound, math.inf))
    return judge(name, actual, value, error, use, level, bound)


def _is(*bits: float) -> tuple[str, Tensor, Tensor]:
    return "canary", torch.tensor(bits), torch.tensor([1.0, 0.0])


@guarded(
    lambda rule: rule(*_is(1.0, 0.0)),
    lambda rule: rule(*_is(1.0, -0.0)),
    lambda rule: rule(*_is(1.0 + 2**-23, 0.0)),
    lambda rule: rule(*_is(math.nan, 0.0)),
    lambda rule: rule(*_is(1.0)),
    lambda rule: rule("canary", torch.zeros(1), torch.zeros(1, dtype=torch.float64)),
)
def compare_bitwise(name: str, actual: Tensor, expected: Tensor) -> Comparison:
    """The same bits: the sign of zero counts, and a NaN equals only the same NaN."""
    actual, expected = actual.detach().cpu(), expected.detach().cpu()
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        detail = f"{actual.dtype} {tuple(actual.shape)}, not {expected.dtype} {tuple(expected.shape)}"
        return refused(name, "bitwise", detail)
    if actual.numel() == 0:
        return Comparison(name, 0.0, (), True, empty=True, level="bitwise")
    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[actual.element_size()]
    differs = actual.contiguous().view(bits) != expected.contiguous().view(bits)
    error = torch.where(differs, errors(actual.double(), expected.double()), 0.0)
    return judge(name, actual, expected, error, torch.where(differs, math.inf, 0.0), "bitwise")


def judge(
    name: str, actual: Tensor, expected: Tensor, error: Tensor, use: Tensor, level: Level, bound: Tensor | None = None
) -> Comparison:
    """The verdict on elements whose errors use the part `use` of their budgets; all tensors have one shape."""
    worst = tuple(int(i) for i in torch.unravel_index(use.argmax(), use.shape))
    ok = bool((use <= 1.0).all())
    detail = "" if ok else f"{actual[worst].item():.9g} where {expected[worst].item():.9g} is right"
    at = {"actual": actual, "expected": expected, "error": error} | ({} if bound is None else {"bound": bound})
    terms = {key: float(x[worst]) for key, x in at.items()}
    return Comparison(name, float(use[worst]), worst, ok, False, detail, level, float(error.max()), terms)
