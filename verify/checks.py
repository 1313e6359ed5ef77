"""The checks that everything else rests on: equal to the oracle, causal, complete, repeatable; and the cache's."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from .calls import claim, compare_all, dense, feed, make_cache, one_by_one, oracle, run, same_bits
from .cases import Case
from .inputs import Inputs, make_inputs
from .registry import check
from .rounding import Bounded, ErrorModel, exact_weights
from .tolerance import Comparison, compare, compare_bitwise


@check("forward")
def forward_equals_oracle(case: Case) -> list[Comparison]:
    """out and lse, of dense, packed and padded cases alike."""
    inputs = make_inputs(case)
    return compare_all(run(case, inputs), oracle(case, inputs))


@check("backward", "P44")
def backward_equals_oracle(case: Case) -> list[Comparison]:
    """out, lse, dq, dk and dv, for a gradient of both out and lse that spans six decades from row to row."""
    inputs = make_inputs(case)
    return compare_all(run(case, inputs, grads=True), oracle(case, inputs, grads=True))


@check("backward", "P29", "P31")
def sequences_equal_alone(case: Case) -> list[Comparison]:
    """Each packed document, and row of a batch, padded or not, has the bits of a call with that sequence alone."""
    inputs = make_inputs(case)
    together, found = run(case, inputs, grads=True), []
    for number, (rows, tokens) in enumerate(one_by_one(case)):
        alone = dense(case, batch=1, seq_len=tokens.stop - tokens.start)
        part = {name: x[rows, :, tokens] for name, x in together.items()}
        found += same_bits(part, run(alone, inputs.part(rows, tokens), grads=True), f" of sequence {number}")
    return found


@check("forward", "P2")
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
        found += same_bits(rows[0], rows[1], f" before {t}")
    return found


@check("forward", "P1", "P5", "P12")
def partition(case: Case) -> list[Comparison]:
    """With q = 0 and one-hot values the output is the weight of every token: 1/N raw, 1/(g N) in a core, else 0.

    The expected weights are counted from the words of spec section 2, token by token; no oracle takes part.
    """
    inputs, p = make_inputs(case), case.problem
    weights = torch.zeros(p.batch, 1, p.seq_len, p.seq_len, dtype=torch.float64)
    for rows, tokens in case.sequences():
        for i in range(tokens.stop - tokens.start):
            weights[rows, :, tokens.start + i, tokens] = _weights_of_row(
                i, tokens.stop - tokens.start, p.group_size, p.window_size
            )
    found = []
    for first in range(0, p.seq_len, p.head_dim):
        v = torch.zeros_like(inputs.v)
        columns = torch.arange(first, min(first + p.head_dim, p.seq_len))
        v[:, :, columns, columns - first] = 1.0
        out = run(case, inputs._replace(q=torch.zeros_like(inputs.q), v=v))["out"]
        expected = weights[..., columns].expand(-1, p.q_heads, -1, -1)
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


@check("backward", "P33", "P35")
def bitwise_repeat(case: Case) -> list[Comparison]:
    """A second call gives the same bits whatever became of the first one's results, and no call changes its inputs."""
    inputs = make_inputs(case)
    kept = {name: x.clone() for name, x in inputs._asdict().items()}
    first = run(case, inputs, grads=True)
    as_returned = {name: x.clone() for name, x in first.items()}
    for x in first.values():
        x.fill_(math.nan)  # the next call must not depend on what the first one returned
    found = same_bits(run(case, inputs, grads=True), as_returned, " again")
    return found + same_bits(inputs._asdict(), kept, " as it was")


@check("backward", "P6")
def isolation(case: Case) -> list[Comparison]:
    """NaN in one (batch, key/value head) reaches the query heads that read it, all of them, and no other."""
    case = replace(case, bounds=None)  # padding has no output that NaN could reach
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


@check("backward", "P32")
def schedule_is_used(case: Case) -> list[Comparison]:
    """With the case's schedule and without, the results are right, and not all bits are the same."""
    inputs, found = make_inputs(case), []
    results = [run(each, inputs, grads=True) for each in (case, replace(case, schedule=None))]
    expected = oracle(case, inputs, grads=True)
    for each in results:
        found += compare_all(each, expected)
    same = all(comparison.ok for comparison in same_bits(results[0], results[1]))
    return [*found, claim("schedule", not same, "the schedule changes no bit")]


# --- the cache --------------------------------------------------------------------------------------------------------


def chunk_sizes(tokens: int) -> list[int]:
    """A prefill, single tokens, several tokens a step, an empty chunk, and a second prefill before the last tokens."""
    sizes, left = [], tokens
    for size in (tokens // 3, 1, 1, 1, 1, 2, 0, 3, 1, 1):
        sizes.append(min(size, left))
        left -= sizes[-1]
    return [*sizes, max(0, left - 4), 1, 3] if left >= 4 else [*sizes, *[1] * left]


@check("decode", "P27", "P28")
def decode_equals_prefill(case: Case) -> list[Comparison]:
    """A cache fed in chunks and single tokens gives the rows that one call gives, and holds its core tokens."""
    inputs, p, cache = make_inputs(case), case.problem, make_cache(case, rollback=3)
    out = feed(cache, inputs, 0, chunk_sizes(p.seq_len))
    model, expected = ErrorModel(*inputs[:3], case.spec, case.dtype), oracle(case, inputs)["out"]
    found = [compare("out", out, expected), compare("out of one call", run(case, inputs)["out"], expected)]
    found += [compare("k_core", cache.k_core, model.k_core), compare("v_core", cache.v_core, model.v_core)]
    sizes = {"q_heads": p.q_heads, "kv_heads": p.kv_heads, "head_dim": p.head_dim, "element_bytes": p.element_bytes}
    held = torch.tensor([cache.seen, cache.nbytes])
    right = torch.tensor([p.seq_len, case.spec.cache_bytes(p.seq_len, batch=p.batch, **sizes)])
    return [*found, compare_bitwise("seen and nbytes", held, right)]


@check("decode", "P28")
def crop_equals_fresh(case: Case) -> list[Comparison]:
    """Tokens that were appended and cropped again leave no trace: the rows after them are the oracle's."""
    inputs, p, cache = make_inputs(case), case.problem, make_cache(case, rollback=3)
    wrong = Inputs(*(x.flip(2) for x in inputs))
    kept, found = p.seq_len // 2, []
    feed(cache, inputs, 0, [kept])
    expected = oracle(case, inputs)["out"]
    for first in range(kept, p.seq_len):
        feed(cache, wrong, 0, [4])
        cache.crop(first)
        out = feed(cache, inputs, first, [1])
        rows = slice(first, first + 1)
        found.append(compare(f"out of row {first}", out, Bounded(*(x[:, :, rows] for x in expected))))
    return found


@check("decode", "P28")
def reorder_equals_fresh(case: Case) -> list[Comparison]:
    """After a reorder every row goes on as the sequence that it became a copy of."""
    inputs, p, cache = make_inputs(case), case.problem, make_cache(case)
    half, index = p.seq_len // 2, torch.arange(p.batch, device=case.device).flip(0)
    feed(cache, inputs, 0, [half])
    cache.reorder(index)
    joined = Inputs(*(torch.cat([x[index, :, :half], x[:, :, half:]], dim=2) for x in inputs))
    out = feed(cache, joined, half, chunk_sizes(p.seq_len - half))
    expected = oracle(case, joined)["out"]
    return [compare("out", out, Bounded(*(x[:, :, half:] for x in expected)))]
