"""What the gradients must satisfy by themselves (properties P37 to P45; P44 is in `checks`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import gradcheck

from ..attention import cca_attention
from .calls import (
    Results,
    agree,
    agree_all,
    cca,
    claim,
    dense,
    generator_of,
    is_zero,
    one_by_one,
    oracle,
    refused,
    run,
    same_bits,
    wide,
)
from .cases import Case
from .identities import directional_derivative
from .inputs import Inputs, make_inputs
from .registry import check
from .rounding import Bounded
from .tolerance import Comparison, compare, compare_bitwise

GRADS = ("dq", "dk", "dv")


def _gradients(case: Case, inputs: Inputs) -> Results:
    results = run(case, inputs, grads=True)
    return {name: results[name] for name in GRADS}


def _upstream(inputs: Inputs, factor: float | Tensor) -> Inputs:
    """`inputs` with dout and dlse times `factor`, a number or one for each token [T]."""
    rows = torch.as_tensor(factor)
    return inputs._replace(dout=inputs.dout * rows.to(inputs.dout)[..., None], dlse=inputs.dlse * rows.to(inputs.dlse))


@check("backward", "P37")
def linear_in_upstream(case: Case) -> list[Comparison]:
    """The gradients of 0 are 0, of the negative the negative and of the double the double; those of parts add up."""
    inputs = make_inputs(case)
    first, found = _gradients(case, inputs), []
    nothing = inputs._replace(dout=torch.zeros_like(inputs.dout), dlse=torch.zeros_like(inputs.dlse))
    found += [is_zero(f"{name} of 0", x) for name, x in _gradients(case, nothing).items()]
    negative = _gradients(case, _upstream(inputs, -1.0))
    found += same_bits({n: 0.0 - x for n, x in negative.items()}, {n: x + 0.0 for n, x in first.items()}, " of -1")
    even = torch.arange(case.problem.seq_len) % 2
    parts = [_upstream(inputs, rows) for rows in (even, 1 - even)]
    halves = [_gradients(case, part) for part in parts]
    bounds = [{n: oracle(case, each, grads=True)[n] for n in GRADS} for each in (inputs, *parts)]
    total = {name: halves[0][name].double() + halves[1][name].double() for name in GRADS}
    found += agree_all(first, total, *bounds, note=" of two parts")
    exact = wide(case)
    inputs = make_inputs(exact)
    one, two = (_gradients(exact, _upstream(inputs, factor)) for factor in (1.0, 2.0))
    return found + same_bits(two, {name: 2 * x for name, x in one.items()}, " of 2")


def _of_key_heads(case: Case, x: Tensor) -> Tensor:
    """x [B, Hq, ...] summed over the query heads of each key/value head, in float64."""
    total: Tensor = x.double().unflatten(1, (case.problem.kv_heads, -1)).sum(2)
    return total


@check("backward", "P38", "P39")
def gradient_sums(case: Case) -> list[Comparison]:
    """Over a sequence dv adds up to dout, and dk to ``scale * dlse . q``: softmax weights add up to one."""
    inputs = make_inputs(case)
    grads, bounds, found = _gradients(case, inputs), oracle(case, inputs, grads=True), []
    for number, (rows, tokens) in enumerate(one_by_one(case)):
        part = inputs.part(rows, tokens)
        shift = case.spec.softmax_scale(part.q.shape[-1]) * part.q.double() * part.dlse.double()[..., None]
        for name, expected in (("dv", _of_key_heads(case, part.dout)), ("dk", _of_key_heads(case, shift))):
            bound = bounds[name].bound[rows, :, tokens].sum(2)
            total = grads[name][rows, :, tokens].double().sum(2)
            found.append(compare(f"sum of {name} of sequence {number}", total, Bounded(expected.sum(2), bound)))
    return found


@check("backward", "P40")
def gauge_of_gradients(case: Case) -> list[Comparison]:
    """On every axis of the head dimension <q, dq> = <k, dk>: logits do not know how a product is shared out."""
    inputs = make_inputs(case)
    grads, bounds, found = _gradients(case, inputs), oracle(case, inputs, grads=True), []
    for number, (rows, tokens) in enumerate(one_by_one(case)):
        part, sums = inputs.part(rows, tokens), []
        for x, name in ((part.q, "dq"), (part.k, "dk")):
            grad, bound = grads[name][rows, :, tokens].double(), bounds[name].bound[rows, :, tokens]
            sums.append(
                (_of_key_heads(case, x.double() * grad).sum(2), _of_key_heads(case, x.double().abs() * bound).sum(2))
            )
        (left, left_bound), (right, right_bound) = sums
        found.append(agree(f"<q, dq> of sequence {number}", left, right, left_bound, right_bound))
    return found


@check("backward", "P41")
def finite_differences(case: Case) -> list[Comparison]:
    """PyTorch's own gradcheck in float64, of the kernels in the interpreter and of the oracle; no second derivative.

    Compiled kernels take no float64: on a GPU this is a check of the eager backend.
    """
    p = case.problem
    case = replace(case, family="randn", layout="contiguous")
    sizes = {"batch": 1, "q_heads": min(2, p.q_heads // p.kv_heads), "kv_heads": 1, "seq_len": min(p.seq_len, 5)}
    seen = {"group_size": min(p.group_size, 2), "window_size": 1 + p.window_size % 2}  # the last of 5 tokens see cores
    case = dense(case, dtype="float64", head_dim=16, **sizes, **seen)
    case = case if case.device == "cpu" else replace(case, backend="eager")
    tensors = [x.detach().requires_grad_() for x in make_inputs(case)[:3]]
    ours = partial(cca_attention, return_lse=True, **case.arguments())
    found = []
    for name, both in (("kernels", ours), ("oracle", partial(cca, case))):

        def function(*qkv: Tensor, both: Callable[..., Any] = both) -> Tensor:
            return torch.cat([x.flatten() for x in both(*qkv)])

        right = gradcheck(function, tensors, fast_mode=True, check_undefined_grad=False, raise_exception=False)
        found.append(claim(f"gradcheck of the {name}", right, "the gradients are not those of finite differences"))
    (dq,) = torch.autograd.grad(ours(*tensors)[0].sum(), tensors[0], create_graph=True)
    second = refused("a second derivative", lambda: torch.autograd.grad(dq.sum(), tensors[1]), RuntimeError, "backward")
    return [*found, second]


@check("backward", "P42")
def directional_derivatives(case: Case) -> list[Comparison]:
    """Along random directions of q, of k and of v the gradients give the oracle's central differences."""
    inputs, generator = make_inputs(case), generator_of(case, 0)
    grads, bounds, found = _gradients(case, inputs), oracle(case, inputs, grads=True), []
    for name, x in zip("qkv", inputs[:3], strict=True):
        along = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.device)
        expected = directional_derivative(case, inputs, {name: along})
        slope = (grads[f"d{name}"].double() * along).sum()
        bound = (bounds[f"d{name}"].bound * along.abs()).sum()
        found.append(compare(f"along {name}", slope, Bounded(expected.value, expected.bound + bound.cpu())))
    return found


@check("backward", "P43")
def pooling_reaches_the_last_query(case: Case) -> list[Comparison]:
    """With a loss on the last row alone dq is not zero there and where a visible core was scored; elsewhere it is."""
    tokens = max(3, case.problem.seq_len)
    g = min(max(2, case.problem.group_size), tokens - 1)
    case = dense(replace(case, family="randn"), seq_len=tokens, group_size=g)
    case = dense(case, window_size=min(case.problem.window_size, tokens - g))
    inputs = make_inputs(case)
    dout = torch.zeros_like(inputs.dout)
    dout[:, :, -1] = torch.randn(dout[:, :, -1].shape, generator=generator_of(case, 0)).to(dout)
    dq = _gradients(case, Inputs(inputs.q / 2, inputs.k, inputs.v, dout, torch.zeros_like(inputs.dlse)))["dq"]
    expected = torch.zeros(tokens, dtype=torch.bool)
    expected[-1] = True
    if case.problem.pooling == "last_query":
        expected[[core * g + g - 1 for core in range(case.spec.visible_cores(tokens - 1))]] = True
    reached = (dq != 0).any(-1).cpu()
    return [compare_bitwise("rows with a gradient", reached, expected.expand_as(reached))]


@check("backward", "P45")
def gradients_accumulate(case: Case) -> list[Comparison]:
    """Two backward calls leave the sum of their gradients, bit for bit, as PyTorch adds it up."""
    inputs, other = make_inputs(case), make_inputs(replace(case, seed=case.seed + 1))
    both = [inputs, inputs._replace(dout=other.dout, dlse=other.dlse)]
    alone = [_gradients(case, each) for each in both]
    q, k, v = leaves = [x.detach().clone().requires_grad_() for x in inputs[:3]]
    for each in both:
        results = cca_attention(q, k, v, return_lse=True, **case.arguments(), **case.layout_arguments())
        torch.autograd.backward(results, [each.dout, each.dlse])
    total = {name: alone[0][name] + alone[1][name] for name in GRADS}
    return same_bits({name: x.grad for name, x in zip(GRADS, leaves, strict=True) if x.grad is not None}, total)
