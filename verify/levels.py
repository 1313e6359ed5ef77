"""One case judged by every rule of docs/verification.md: rigorous, statistical, relative to a peer, and for bias.

`every_level` is what a gate runs where suspicion is enough to stop; `without_bias` needs the elements of a large case.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..spec import CCASpec, check_choice
from . import statistics
from .bias import compare_bias, compare_constant
from .calls import Expected, Results, compare_all, oracle, run
from .canary import CanaryError
from .cases import Case
from .inputs import Inputs, make_inputs
from .peer import Peer, compare_to_peer
from .rounding import Bounded, ErrorModel
from .rounding_backward import gradients
from .tolerance import Comparison, compare

HALF = (torch.float16, torch.bfloat16)
INDEPENDENT = ("randn", "sharp", "offset_values", "sparse_values", "small_values")
"""Families in which every row has logits of its own, so that a mean over rows is one of independent errors."""


def every_level(case: Case) -> list[Comparison]:
    """out, lse, dq, dk and dv by the rigorous bounds, all but lse by the statistical ones, and in half precision out
    and dv relative to the peer; of dense, packed and padded cases."""
    inputs = make_inputs(case)
    actual, expected = run(case, inputs, grads=True), oracle(case, inputs, grads=True)
    found = compare_all(actual, expected)
    for rows, tokens in case.sequences():
        if tokens.start < tokens.stop:
            at = slice(rows.start, rows.stop), slice(None), tokens
            part = {name: x[at] for name, x in actual.items()}
            values = {name: x.value[at] for name, x in expected.items()}
            found += _of_one(case, inputs.part(rows, tokens), part, values)
    return found


def _of_one(case: Case, inputs: Inputs, actual: Results, values: dict[str, Tensor]) -> list[Comparison]:
    found = []
    for name, bounded in statistical(case, inputs).items():
        expected = Bounded(values[name], bounded.bound)
        found.append(compare(name, actual[name], expected, level="statistical"))
    if case.dtype in HALF:
        peer = Peer(*inputs[:3], case.spec)
        near = {"out": peer.out, "dv": peer.gradients(inputs.dout, inputs.dlse)["dv"]}
        found += [compare_to_peer(name, actual[name], values[name], x) for name, x in near.items()]
    return found


def statistical(case: Case, inputs: Inputs) -> Expected:
    """out, dq, dk and dv of one dense sequence or batch with their statistical bounds."""
    model = ErrorModel(*inputs[:3], case.spec, case.dtype)
    return {"out": statistics.out(model), **statistics.gradients(model, inputs.dout, inputs.dlse)._asdict()}


def without_bias(case: Case) -> list[Comparison]:
    """The output of a dense case in half precision has no bias, and equal values come out as they are.

    Raises:
        ValueError: for another dtype, fewer than 100 000 elements, or a family whose rows all have the same logits.
    """
    check_choice("family", case.family, INDEPENDENT)
    inputs = make_inputs(case)
    found = [compare_bias("out", run(case, inputs)["out"], oracle(case, inputs)["out"])]
    one = inputs.v[:, :, :1]
    equal = torch.where(one == 0, torch.ones_like(one), one)
    out = run(case, inputs._replace(v=equal.expand_as(inputs.v)))["out"]
    constant = equal.repeat_interleave(out.shape[1] // equal.shape[1], dim=1).expand_as(out)
    return [*found, compare_constant("out of equal values", out, constant)]


def prove_bounds() -> None:
    """The canary of `rounding`, `rounding_backward` and `statistics`, on one small call in float32.

    Raises:
        CanaryError: if a bound refuses the right values, rounded, or accepts those of a wrong scale: one too large by
            5 10^-5 is 1.5 to 8 times the rigorous bounds, by 5 10^-6 it is 1.4 to 2 times the statistical ones.
    """
    generator = torch.Generator().manual_seed(0)
    q, dout, k, v = (torch.randn(1, heads, 33, 16, generator=generator) for heads in (2, 2, 1, 1))

    def model(factor: float) -> ErrorModel:
        return ErrorModel(q, k, v, CCASpec(4, 6, scale=0.25 * factor), torch.float32)

    def rigorous(model: ErrorModel) -> Expected:
        return {"out": model.out, **gradients(model, dout, None)._asdict()}

    right = model(1.0)
    suspicious = {"out": statistics.out(right), **statistics.gradients(right, dout, None)._asdict()}
    trials = {
        "rigorous": (rigorous(right), rigorous(model(1.00005))),
        "statistical": (suspicious, rigorous(model(1.000005))),
    }
    for level, (bounds, others) in trials.items():
        for name, expected in bounds.items():
            if not compare(name, expected.value.float(), expected).ok:
                raise CanaryError(f"the {level} bounds of {name} refuse what is right")
            if compare(name, others[name].value, expected).ok:
                raise CanaryError(f"the {level} bounds of {name} accept a wrong scale")
