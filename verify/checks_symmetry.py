"""What may be exchanged, repeated, padded or rotated (properties P22 to P26)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..attention import cca_attention
from ..kernels.tunable import padded_dim
from ..problem import MAX_HEAD_DIM
from .calls import Expected, Results, agree, agree_all, generator_of, is_zero, of, oracle, refused, run, same_bits
from .cases import Case
from .inputs import Inputs, make_inputs
from .registry import check
from .rounding import Bounded, repeat_heads
from .tolerance import Comparison


@check("backward", "P22")
def batch_permutation(case: Case) -> list[Comparison]:
    """Batch rows in another order give the same bits in that order."""
    inputs, batch = make_inputs(case), case.problem.batch
    order = torch.randperm(batch, generator=generator_of(case, 0))
    order = order.flip(0) if order.equal(torch.arange(batch)) else order
    bounds = None if case.bounds is None else tuple(case.bounds[row] for row in order)
    moved = run(replace(case, bounds=bounds), Inputs(*(x[order] for x in inputs)), grads=True)
    first = run(case, inputs, grads=True)
    return same_bits(moved, {name: x[order] for name, x in first.items()})


@check("backward", "P23")
def head_permutation(case: Case) -> list[Comparison]:
    """Key/value heads in another order, their query heads with them, give the same bits in that order.

    With core_heads="query" the query heads of one key/value head may change places, too: dk and dv, which add them
    up, then agree to rounding.
    """
    inputs, p = make_inputs(case), case.problem
    team, kv_heads = torch.arange(p.q_heads // p.kv_heads), torch.arange(p.kv_heads)
    order = torch.randperm(p.kv_heads, generator=generator_of(case, 0)).flip(0)
    first = run(case, inputs, grads=True)
    heads = (order[:, None] * len(team) + team).flatten()
    moved = run(case, _permuted(inputs, heads, order), grads=True)
    found = same_bits(moved, _permuted_results(first, heads, order), " of other key/value heads")
    if p.core_heads == "query" and len(team) > 1:
        heads = (kv_heads[:, None] * len(team) + team.roll(1)).flatten()
        moved = run(case, _permuted(inputs, heads, kv_heads), grads=True)
        first, bounds = _permuted_results(first, heads, kv_heads), oracle(case, inputs, grads=True)
        found += same_bits(_own(moved), _own(first), " of other query heads")
        found += [agree(name, moved[name], first[name], *[bounds[name].bound] * 2) for name in ("dk", "dv")]
    return found


def _permuted(inputs: Inputs, heads: Tensor, kv_heads: Tensor) -> Inputs:
    q, k, v, dout, dlse = inputs
    return Inputs(q[:, heads], k[:, kv_heads], v[:, kv_heads], dout[:, heads], dlse[:, heads])


def _permuted_results(results: Results, heads: Tensor, kv_heads: Tensor) -> Results:
    return {name: x[:, kv_heads if name in ("dk", "dv") else heads] for name, x in results.items()}


def _own(results: Results) -> Results:
    """Those of each query head alone."""
    return {name: results[name] for name in ("out", "lse", "dq")}


@check("backward", "P24")
def shared_keys_are_repeated_keys(case: Case) -> list[Comparison]:
    """Query heads that share keys give the bits of query heads with a copy each; dk and dv are the copies' sums.

    Where nothing is shared the two kinds of core heads are one, and where all query heads of a key/value head are
    equal they agree to rounding.
    """
    case = of(case, core_heads="query")
    inputs, p = make_inputs(case), case.problem
    apart = of(case, kv_heads=p.q_heads)
    copies = inputs._replace(k=repeat_heads(inputs.k, p.q_heads), v=repeat_heads(inputs.v, p.q_heads))
    shared, own = run(case, inputs, grads=True), run(apart, copies, grads=True)
    found = same_bits(_own(shared), _own(own))
    bounds, bounds_apart = oracle(case, inputs, grads=True), oracle(apart, copies, grads=True)
    for name in ("dk", "dv"):
        total, bound = (_sum_of_team(x, p.kv_heads) for x in (own[name].double(), bounds_apart[name].bound))
        found.append(agree(name, shared[name], total, bounds[name].bound, bound))
    found += same_bits(run(of(apart, core_heads="kv"), copies, grads=True), own, " of cores of key/value heads")
    equal = inputs._replace(q=repeat_heads(inputs.q[:, :: p.q_heads // p.kv_heads], p.q_heads))
    both = [of(case, core_heads=core_heads) for core_heads in ("query", "kv")]
    results, rounding = zip(*((run(each, equal), oracle(each, equal)) for each in both), strict=True)
    return found + agree_all(results[1], results[0], *rounding, note=" of equal queries")


def _sum_of_team(x: Tensor, kv_heads: int) -> Tensor:
    total: Tensor = x.unflatten(1, (kv_heads, x.shape[1] // kv_heads)).sum(2)
    return total


@check("backward", "P25")
def padded_head_dim(case: Case) -> list[Comparison]:
    """Zeros behind the head dimension change nothing and come out as zeros; v of another head dimension is refused."""
    if case.problem.head_dim == MAX_HEAD_DIM:
        case = of(case, head_dim=MAX_HEAD_DIM - 1)
    dim = case.problem.head_dim
    larger = padded_dim(dim) if padded_dim(dim) > dim else min(2 * dim, MAX_HEAD_DIM)
    case = replace(case, scale=case.spec.softmax_scale(dim))
    inputs, wider = make_inputs(case), of(case, head_dim=larger)
    q, k, v, dout = (pad(x, (0, larger - dim)) for x in inputs[:4])
    padded = Inputs(q, k, v, dout, inputs.dlse)
    small, large = run(case, inputs, grads=True), run(wider, padded, grads=True)
    bounds = oracle(case, inputs, grads=True), oracle(wider, padded, grads=True)
    cut: list[Any] = [{name: x[..., :dim] for name, x in each.items() if name != "lse"} for each in (large, small)]
    rounding: list[Expected] = [
        {name: Bounded(*(y[..., :dim] if name != "lse" else y for y in x)) for name, x in each.items()}
        for each in bounds
    ]
    found = agree_all(cut[0] | {"lse": large["lse"]}, cut[1] | {"lse": small["lse"]}, *rounding)
    found += [is_zero(f"{name} behind", x[..., dim:]) for name, x in large.items() if name != "lse"]
    arguments = case.arguments() | case.layout_arguments()
    q, k, v = inputs[:3]
    short = refused("v", lambda: cca_attention(q, k, v[..., :-1], **arguments), ValueError, r"^v must have shape")
    return [*found, short]


@check("forward", "P26")
def rotation_shift(case: Case) -> list[Comparison]:
    """Queries and keys rotated by their positions plus any constant give the same results: only distances count.

    The operator takes q and k as they are after the rotation. Quarter turns are exact in every dtype.
    """
    inputs = make_inputs(case)
    shift = int(torch.randint(1, 4, (), generator=generator_of(case, 0)))
    given = [
        inputs._replace(q=quarter_turns(inputs.q, start), k=quarter_turns(inputs.k, start)) for start in (0, shift)
    ]
    results, rounding = zip(*((run(case, each), oracle(case, each)) for each in given), strict=True)
    return agree_all(results[1], results[0], *rounding)


def quarter_turns(x: Tensor, start: int) -> Tensor:
    """x [..., T, D] with pair m of its axes turned by ``(start + position) * (m + 1)`` quarter turns."""
    half = x.shape[-1] // 2
    position, pair = torch.arange(x.shape[-2], device=x.device), torch.arange(half, device=x.device)
    quarter = (start + position)[:, None] * (pair + 1) % 4
    cos = (1 - quarter) * (quarter % 2 == 0)
    sin = (2 - quarter) * (quarter % 2 == 1)
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([a * cos - b * sin, a * sin + b * cos, rest], dim=-1)
