"""When other projects take an attention kernel for right: their acceptance rules, applied to the same results.

They are here to be measured (docs/mutants.md), never to accept anything of ours. Each is written from what the named
file of its project does, for the dtypes that the interpreter runs, float16 and float32. Where a project has a rule for
bfloat16 only, it is applied to float16, which is kinder to it: the rounding of a right kernel is smaller there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..spec import CCASpec
from .calls import Results
from .cases import Case
from .inputs import Inputs
from .rounding import Bounded
from .tolerance import compare


class Judged(NamedTuple):
    """One tensor that a rule is asked about.

    `actual` what the kernel gave, `expected` the float64 oracle's with its bound, `eager` what plain PyTorch gives in
    the dtype of `actual`, `gradient` whether it is dq, dk or dv.
    """

    actual: Tensor
    expected: Bounded
    eager: Tensor
    gradient: bool

    @property
    def half(self) -> bool:
        """Whether it is in half precision."""
        return self.actual.dtype == torch.float16

    @property
    def error(self) -> Tensor:
        """|actual - expected| in float64."""
        return (self.actual.double() - self.expected.value).abs()

    @property
    def eager_error(self) -> Tensor:
        """|eager - expected| in float64."""
        return (self.eager.double() - self.expected.value).abs()


@dataclass(frozen=True, slots=True)
class Rule:
    """A rule: `accepts` says whether it takes a tensor for right; `words` what it asks; `source` where it is from."""

    words: str
    source: str
    accepts: Callable[[Judged], bool]
    dtypes: tuple[str, ...] = ("float16", "float32")


def close(half: tuple[float, float], single: tuple[float, float]) -> Callable[[Judged], bool]:
    """``|error| <= atol + rtol |expected|``, of pairs (atol, rtol) for float16 and for float32."""

    def accepts(x: Judged) -> bool:
        atol, rtol = half if x.half else single
        return bool((x.error <= atol + rtol * x.expected.value.abs()).all())

    return accepts


def _flash_attention(x: Judged) -> bool:
    return bool(x.error.max() <= (3 if x.gradient else 2) * x.eager_error.max())


def _flex_attention(x: Judged) -> bool:
    factor = 1.1 if x.half else 10.0
    return bool(x.actual.isfinite().all() and x.error.mean() <= factor * x.eager_error.mean())


def _rms_ratio(x: Judged) -> float:
    return float(x.error.square().mean().sqrt() / (x.expected.value.square().mean().sqrt() + 1e-8))


def _flash_linear_attention(x: Judged) -> bool:
    return bool(x.error.max() <= 1e-6) or _rms_ratio(x) < 0.005


def _flash_linear_attention_ci(x: Judged) -> bool:
    return _flash_linear_attention(x) or _rms_ratio(x) < 0.01 or bool(x.error.max() <= 0.3)


RULES: dict[str, Rule] = {
    "flash-attention": Rule(
        "largest error at most 2 times eager's (gradients: 3 times)", "tests/test_flash_attn.py", _flash_attention
    ),
    "FlexAttention": Rule(
        "mean error at most 1.1 times eager's (float32: 10 times), all finite",
        "PyTorch, test/inductor/test_flex_attention.py",
        _flex_attention,
    ),
    "flash-linear-attention": Rule(
        "RMS of the error below 0.005 of the RMS", "fla/utils/_testing.py, assert_close", _flash_linear_attention
    ),
    "flash-linear-attention in CI": Rule(
        "the same, but only a warning where that is below 0.01 or the largest error at most 0.3",
        "fla/utils/_testing.py with FLA_CI_ENV=1",
        _flash_linear_attention_ci,
    ),
    "KernelBench": Rule(
        "atol = rtol = 1e-2 (float32: 1e-4)", "src/eval.py", close(half=(1e-2, 1e-2), single=(1e-4, 1e-4))
    ),
    "TransformerEngine": Rule(
        "atol = rtol = 1.5e-2, its rule for bfloat16 (float32: 1e-5, 1.3e-6)",
        "tests/pytorch/utils.py",
        close(half=(1.5e-2, 1.5e-2), single=(1e-5, 1.3e-6)),
    ),
    "Liger": Rule(
        "atol = rtol = 2e-2 (float32: atol 1e-4, rtol 1e-5)",
        "test/transformers, multi-token attention",
        close(half=(2e-2, 2e-2), single=(1e-4, 1e-5)),
    ),
    "Liger at its widest": Rule(
        "atol 2e-1, rtol 2e-2, its rule for bfloat16",
        "test/transformers, rotary embedding",
        close(half=(2e-1, 2e-2), single=(2e-1, 2e-2)),
        ("float16",),
    ),
    "torch.testing": Rule(
        "atol 1e-5, rtol 1e-3 (float32: 1.3e-6), the defaults of assert_close",
        "torch/testing/_comparison.py",
        close(half=(1e-5, 1e-3), single=(1e-5, 1.3e-6)),
    ),
    "ours": Rule(
        "every element within the bound that rounding can explain (T1)",
        "docs/verification.md",
        lambda x: compare("x", x.actual, x.expected).ok,
    ),
}
"""By the name that the table gives them. The last is this project's own, on the results alone."""


# --- the comparison that some of them make ----------------------------------------------------------------------------


def eager(case: Case, inputs: Inputs, *, grads: bool = False) -> Results:
    """out, and with `grads` dq, dk and dv, as PyTorch computes them in the inputs' dtype, operation by operation."""
    q, k, v = (x.detach().clone().requires_grad_(grads) for x in inputs[:3])
    out, lse = torch.zeros_like(q), torch.zeros_like(inputs.dlse)
    for rows, tokens in case.sequences():
        if tokens.stop > tokens.start:
            part = (rows, slice(None), tokens)
            out, lse = out.clone(), lse.clone()
            out[part], lse[part] = _attention(q[part], k[part], v[part], case.spec)
    results = {"out": out.detach()}
    if grads:
        real = (inputs.dout.nan_to_num(0.0), inputs.dlse.nan_to_num(0.0))
        found = torch.autograd.grad([out, lse], [q, k, v], real, allow_unused=True, materialize_grads=True)
        results |= dict(zip(("dq", "dk", "dv"), found, strict=True))
    return results


def _attention(q: Tensor, k: Tensor, v: Tensor, spec: CCASpec) -> tuple[Tensor, Tensor]:
    """(out, lse) of one dense batch."""
    team, tokens, g = q.shape[1] // k.shape[1], q.shape[2], spec.group_size
    scale, whole = spec.softmax_scale(q.shape[3]), tokens // g * g
    k, v = k.repeat_interleave(team, 1), v.repeat_interleave(team, 1)
    scorer = q[:, :, :whole].unflatten(2, (-1, g))[:, :, :, -1:]  # [B, Hq, C, 1, D]
    if spec.core_heads == "kv":
        scorer = scorer.unflatten(1, (-1, team)).mean(2).repeat_interleave(team, 1)
    members = [x[:, :, :whole].unflatten(2, (-1, g)) for x in (k, v)]
    logits = scorer @ members[0].mT * (scale if spec.pooling == "last_query" else 0.0)
    cores = [(logits.softmax(-1) @ x).squeeze(3) for x in members]
    keys, values = (torch.cat(pair, dim=2) for pair in zip(cores, (k, v), strict=True))
    hidden = torch.ones(tokens, keys.shape[2], dtype=torch.bool, device=q.device)
    for row in range(tokens):
        seen = spec.local_range(row)
        hidden[row, : spec.visible_cores(row)] = False
        hidden[row, whole // g + seen.start : whole // g + seen.stop] = False
    scores = (q @ keys.mT * scale).masked_fill(hidden, -math.inf)
    return scores.softmax(-1) @ values, scores.to(torch.promote_types(q.dtype, torch.float32)).logsumexp(-1)
