"""What is checked: each check takes a `Case`, runs the public functions on it and returns its `Comparison`s.

Tests, the gate of a candidate config and the mutants all call these; a check never judges, prints or skips.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from ..attention import cca_attention
from ..kernels import reference
from .inputs import Case, Inputs, make_inputs
from .rounding import Bounded, ErrorModel, exact_weights
from .rounding_backward import gradients
from .tolerance import Comparison, compare, compare_bitwise

Results = dict[str, Tensor]


def run(case: Case, inputs: Inputs, *, grads: bool = False) -> Results:
    """out and lse of `case`, and with `grads` dq, dk and dv for its dout and dlse."""
    q, k, v = (x.detach().requires_grad_(grads) for x in inputs[:3])
    out, lse = cca_attention(q, k, v, return_lse=True, **case.arguments(), **case.layout_arguments())
    results = {"out": out.detach(), "lse": lse.detach()}
    if grads:
        found = torch.autograd.grad([out, lse], [q, k, v], [inputs.dout, inputs.dlse])
        results |= dict(zip(("dq", "dk", "dv"), found, strict=True))
    return results


def oracle(case: Case, inputs: Inputs, *, grads: bool = False) -> dict[str, Bounded]:
    """The same from the oracle, each sequence on its own; outside of all sequences 0, and -inf for lse, exactly."""
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
        for name, part in _oracle_of_one(case, inputs.part(rows, tokens), grads).items():
            for full, piece in zip(whole[name], part, strict=True):
                full[rows, :, tokens] = piece
    return whole


def _oracle_of_one(case: Case, inputs: Inputs, grads: bool) -> dict[str, Bounded]:
    spec = case.spec
    q, k, v = (x.detach().double().requires_grad_(grads) for x in inputs[:3])
    out, lse = reference.attention_dense(
        q, k, v, group_size=spec.group_size, window_size=spec.window_size,
        core_heads=spec.core_heads, pooling=spec.pooling, scale=spec.scale,
    )  # fmt: skip
    model = ErrorModel(q, k, v, spec, case.dtype)
    found = {"out": Bounded(out.detach(), model.out.bound), "lse": Bounded(lse.detach(), model.lse.bound)}
    if grads:
        values = torch.autograd.grad([out, lse], [q, k, v], [inputs.dout.double(), inputs.dlse.double()])
        bounds = gradients(model, inputs.dout, inputs.dlse)
        found |= {name: Bounded(x, getattr(bounds, name).bound) for name, x in zip(bounds._fields, values, strict=True)}
    return found


def _compare_all(actual: Results, expected: dict[str, Bounded]) -> list[Comparison]:
    return [compare(name, actual[name], bounded) for name, bounded in expected.items()]


def _same_bits(actual: Results, expected: Results, note: str = "") -> list[Comparison]:
    return [compare_bitwise(f"{name}{note}", actual[name], expected[name]) for name in expected]


def forward_equals_oracle(case: Case) -> list[Comparison]:
    """out and lse, of dense, packed and padded cases alike."""
    inputs = make_inputs(case)
    return _compare_all(run(case, inputs), oracle(case, inputs))


def backward_equals_oracle(case: Case) -> list[Comparison]:
    """out, lse, dq, dk and dv, for a gradient of both out and lse."""
    inputs = make_inputs(case)
    return _compare_all(run(case, inputs, grads=True), oracle(case, inputs, grads=True))


def sequences_equal_alone(case: Case) -> list[Comparison]:
    """Each packed document, or row of a padded batch, has the bits of a call with that sequence alone."""
    inputs = make_inputs(case)
    together, found = run(case, inputs, grads=True), []
    for number, (rows, tokens) in enumerate(case.sequences()):
        if tokens.start == tokens.stop:
            continue
        size = replace(case.problem, batch=1, seq_len=tokens.stop - tokens.start)
        alone = replace(case, problem=size, lengths=None, bounds=None)
        part = {name: x[rows, :, tokens] for name, x in together.items()}
        found += _same_bits(part, run(alone, inputs.part(rows, tokens), grads=True), f" of sequence {number}")
    return found


def causality(case: Case) -> list[Comparison]:
    """Rows before t keep their bits when every q, k and v from t on changes; for t at all edges of the visibility."""
    inputs, p = make_inputs(case), case.problem
    before = run(case, inputs)
    g, w, end = p.group_size, p.window_size, p.seq_len
    edges = {1, g - 1, g, g + 1, w - 1, w, w + 1, w + g - 1, w + g, end // 2, end - 1}
    found = []
    for t in sorted(edge for edge in edges if 0 < edge < end):
        changed = [x.clone() for x in inputs[:3]]
        for x in changed:
            x[:, :, t:] = x[:, :, t:].neg() * 16 + 8
        after = run(case, inputs._replace(q=changed[0], k=changed[1], v=changed[2]))
        rows = [{name: x[:, :, :t] for name, x in results.items()} for results in (after, before)]
        found += _same_bits(rows[0], rows[1], f" before {t}")
    return found


def partition(case: Case) -> list[Comparison]:
    """With q = 0 and one-hot values the output is the weight of every token: 1/N raw, 1/(g N) in a core, else 0.

    The expected weights are counted from the words of spec section 2, token by token; no oracle takes part.
    """
    inputs, p = make_inputs(case), case.problem
    weights = torch.zeros(p.seq_len, p.seq_len, dtype=torch.float64)
    for _, tokens in case.sequences():
        for i in range(tokens.stop - tokens.start):
            weights[tokens.start + i, tokens] = _weights_of_row(
                i, tokens.stop - tokens.start, p.group_size, p.window_size
            )
    found = []
    for first in range(0, p.seq_len, p.head_dim):
        v = torch.zeros_like(inputs.v)
        columns = torch.arange(first, min(first + p.head_dim, p.seq_len))
        v[:, :, columns, columns - first] = 1.0
        out = run(case, inputs._replace(q=torch.zeros_like(inputs.q), v=v))["out"]
        expected = weights[:, columns].expand(p.batch, p.q_heads, -1, -1)
        name = f"weights of tokens {first}..{int(columns[-1])}"
        found.append(compare(name, out[..., : len(columns)], exact_weights(expected, case.dtype)))
    return found


def _weights_of_row(i: int, tokens: int, g: int, w: int) -> Tensor:
    """Weight [T] of each token of a sequence for the query at position `i`."""
    cores = 0
    while (cores + 1) * g <= i + 1 - w:
        cores += 1
    keys = cores + (i + 1 - cores * g)
    weights = torch.zeros(tokens, dtype=torch.float64)
    weights[cores * g : i + 1] = 1 / keys
    weights[: cores * g] = 1 / (g * keys)
    return weights


def bitwise_repeat(case: Case) -> list[Comparison]:
    """A second call gives the same bits, forward and backward, and no call changes its inputs."""
    inputs = make_inputs(case)
    kept = {name: x.clone() for name, x in inputs._asdict().items()}
    first = run(case, inputs, grads=True)
    found = _same_bits(run(case, inputs, grads=True), first, " again")
    return found + _same_bits(inputs._asdict(), kept, " as it was")


def isolation(case: Case) -> list[Comparison]:
    """NaN in one (batch, key/value head) reaches the query heads that read it, all of them, and no other."""
    inputs, p = make_inputs(case), case.problem
    before, team = run(case, inputs, grads=True), p.q_heads // p.kv_heads
    batch, head = p.batch - 1, p.kv_heads - 1
    k = inputs.k.clone()
    k[batch, head] = math.nan
    after = run(case, inputs._replace(k=k), grads=True)
    found = []
    for name, x in after.items():
        heads = slice(head, head + 1) if name in ("dk", "dv") else slice(head * team, None)
        touched = x[batch, heads].isnan().double()
        found.append(compare(f"NaN in {name}", touched, Bounded(torch.ones_like(touched), torch.zeros_like(touched))))
        others = [y.clone() for y in (x, before[name])]
        for y in others:
            y[batch, heads] = 0.0
        found.append(compare_bitwise(f"{name} elsewhere", *others))
    return found


def configs_matter(case: Case, other: Case) -> list[Comparison]:
    """Two schedules for the same numbers are both right and are not the same launch: some bits must differ."""
    inputs = make_inputs(case)
    results = [run(each, inputs, grads=True) for each in (case, other)]
    expected = oracle(case, inputs, grads=True)
    found = [comparison for each in results for comparison in _compare_all(each, expected)]
    for name in expected:
        same = compare_bitwise(name, results[0][name], results[1][name])
        found.append(Comparison(f"{name} depends on the config", float(same.ok), (), not same.ok, detail="bits differ"))
    return found
