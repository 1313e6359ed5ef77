"""What checks have in common: a call, what it should give, the decode cache, and how two results agree."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..attention import cca_attention
from ..cache import CCACache
from ..kernels import reference
from .cases import Case
from .inputs import Inputs
from .rounding import Bounded, ErrorModel
from .rounding_backward import gradients
from .tolerance import Comparison, compare, compare_bitwise

Results = dict[str, Tensor]
Expected = dict[str, Bounded]
Attend = Callable[[Case, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""A definition: (out, lse) of one dense sequence's q, k and v in float64."""


def run(case: Case, inputs: Inputs, *, grads: bool = False) -> Results:
    """out and lse of `case`, and with `grads` dq, dk and dv for its dout and dlse."""
    q, k, v = (x.detach().requires_grad_(grads) for x in inputs[:3])
    out, lse = cca_attention(q, k, v, return_lse=True, **case.arguments(), **case.layout_arguments())
    results = {"out": out.detach(), "lse": lse.detach()}
    if grads:
        found = torch.autograd.grad([out, lse], [q, k, v], [inputs.dout, inputs.dlse])
        results |= dict(zip(("dq", "dk", "dv"), found, strict=True))
    return results


def cca(case: Case, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The oracle's definition."""
    spec = case.spec
    return reference.attention_dense(
        q, k, v, group_size=spec.group_size, window_size=spec.window_size,
        core_heads=spec.core_heads, pooling=spec.pooling, scale=spec.scale,
    )  # fmt: skip


def oracle(case: Case, inputs: Inputs, *, grads: bool = False, attend: Attend = cca) -> Expected:
    """What `run` should give, each sequence on its own; outside of all sequences 0, and -inf for lse, exactly.

    The values are those of `attend`, the bounds those of the rounding of CCA.
    """
    blank = {"out": inputs.q, "lse": inputs.dlse} | ({"dq": inputs.q, "dk": inputs.k, "dv": inputs.v} if grads else {})
    whole = {
        name: Bounded(
            torch.full_like(x, -math.inf if name == "lse" else 0.0, dtype=torch.float64),
            torch.zeros_like(x, dtype=torch.float64),
        )
        for name, x in blank.items()
    }
    for rows, tokens in case.sequences():
        if tokens.start == tokens.stop:
            continue
        for name, part in _oracle_of_one(case, inputs.part(rows, tokens), grads, attend).items():
            for full, piece in zip(whole[name], part, strict=True):
                full[rows, :, tokens] = piece
    return whole


def _oracle_of_one(case: Case, inputs: Inputs, grads: bool, attend: Attend) -> Expected:
    q, k, v = (x.detach().double().requires_grad_(grads) for x in inputs[:3])
    out, lse = attend(case, q, k, v)
    model = ErrorModel(q, k, v, case.spec, case.dtype)
    found = {"out": Bounded(out.detach(), model.out.bound), "lse": Bounded(lse.detach(), model.lse.bound)}
    if grads:
        values = torch.autograd.grad([out, lse], [q, k, v], [inputs.dout.double(), inputs.dlse.double()])
        bounds = gradients(model, inputs.dout, inputs.dlse)
        found |= {name: Bounded(x, getattr(bounds, name).bound) for name, x in zip(bounds._fields, values, strict=True)}
    return found


# --- comparisons of whole results -------------------------------------------------------------------------------------


def compare_all(actual: Results, expected: Expected, note: str = "") -> list[Comparison]:
    """Each result against what it should be."""
    return [compare(f"{name}{note}", actual[name], bounded) for name, bounded in expected.items()]


def same_bits(actual: Results, expected: Results, note: str = "") -> list[Comparison]:
    """Each result against the same bits."""
    return [compare_bitwise(f"{name}{note}", actual[name], expected[name]) for name in expected]


def agree(name: str, actual: Tensor, other: Tensor, *bounds: Tensor) -> Comparison:
    """Two results that are equal but for rounding, of which `bounds` are the bounds."""
    if bool(other.isnan().any()):
        return Comparison(name, math.inf, (), False, detail="what it has to agree with has NaN")
    return compare(name, actual, Bounded(other.double(), torch.stack(torch.broadcast_tensors(*bounds)).sum(0)))


def agree_all(actual: Results, other: Results, *rounding: Expected, note: str = "") -> list[Comparison]:
    """`agree` of each result; `rounding` are the oracles whose bounds hold for the two."""
    return [
        agree(f"{name}{note}", x, other[name], *(each[name].bound for each in rounding)) for name, x in actual.items()
    ]


def is_zero(name: str, x: Tensor) -> Comparison:
    """Zero without any error."""
    nothing = torch.zeros_like(x, dtype=torch.float64)
    return compare(name, x, Bounded(nothing, nothing))


def claim(name: str, holds: bool, detail: str) -> Comparison:
    """A statement that is true or false; `detail` says what was found if it is false."""
    return Comparison(name, 0.0 if holds else math.inf, (), holds, detail="" if holds else detail)


def refused(name: str, call: Callable[[], Any], error: type[Exception], message: str) -> Comparison:
    """That `call` raises `error` with a message in which the pattern `message` is found."""
    try:
        call()
    except error as raised:
        return claim(name, re.search(message, str(raised)) is not None, f"the message is {raised}")
    return claim(name, False, "nothing was raised")


# --- other cases ------------------------------------------------------------------------------------------------------


def of(case: Case, **problem: Any) -> Case:
    """`case` with other sizes or semantics."""
    return replace(case, problem=replace(case.problem, **problem))


def dense(case: Case, **problem: Any) -> Case:
    """`case` as rows of one sequence each, with other sizes or semantics."""
    return of(replace(case, lengths=None, bounds=None), **problem)


def wide(case: Case) -> Case:
    """`case` in float32 if it is in half precision, where a power of two can underflow, and with the default scale."""
    return of(replace(case, scale=None), dtype="float64" if case.dtype == torch.float64 else "float32")


def one_by_one(case: Case) -> list[tuple[slice, slice]]:
    """Batch row and tokens of every sequence that is not empty; `Case.sequences` takes rows that are alike as one."""
    dense_rows = [slice(row, row + 1) for row in range(case.problem.batch)]
    found = [
        (row, tokens)
        for rows, tokens in case.sequences()
        for row in (dense_rows if rows == slice(None) else [rows])
        if tokens.start < tokens.stop
    ]
    return found


def generator_of(case: Case, stream: int) -> torch.Generator:
    """For values that a check draws by itself; one `stream` for each purpose."""
    return torch.Generator().manual_seed((case.seed * 64 + stream) % 2**63)


# --- the cache --------------------------------------------------------------------------------------------------------


def make_cache(case: Case, rollback: int = 0) -> CCACache:
    """An empty cache for the case's tensors."""
    p = case.problem
    return CCACache(
        case.spec, batch=p.batch, q_heads=p.q_heads, kv_heads=p.kv_heads, head_dim=p.head_dim, dtype=case.dtype,
        device=case.device, rollback=rollback, backend=case.backend, profile=case.schedule,
    )  # fmt: skip


def feed(cache: CCACache, inputs: Inputs, first: int, sizes: Iterable[int]) -> Tensor:
    """Outputs [B, Hq, n, D] of the tokens from `first` on, in calls of `sizes`: decode up to 4 tokens, else prefill."""
    outs = []
    for size in sizes:
        chunk = [x[:, :, first : first + size] for x in inputs[:3]]
        outs.append(cache.decode(*chunk) if 0 < size <= 4 else cache.prefill(*chunk))
        first += size
    return torch.cat(outs, dim=2)


def cores_of(case: Case, inputs: Inputs) -> Results:
    """k_core and v_core [B, Hc, C, D] of dense rows, as prefill pools them."""
    cache = make_cache(case)
    cache.prefill(*inputs[:3])
    return {"k_core": cache.k_core.clone(), "v_core": cache.v_core.clone()}
