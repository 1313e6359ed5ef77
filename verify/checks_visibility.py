"""What a query can see, and what can reach it (properties P1 to P6; P2 and P5 start in `checks`)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..configs import configs_for, register_profile
from .calls import dense, feed, is_zero, make_cache, one_by_one, run, same_bits
from .cases import Case
from .inputs import Inputs, make_inputs
from .registry import check
from .tolerance import Comparison, compare_bitwise


@check("forward", "P1")
def integer_partition(case: Case) -> list[Comparison]:
    """By the integers of the specification every row has each past token once, in a core or raw, and at least w raw."""
    spec, g, tokens = case.spec, case.problem.group_size, case.problem.seq_len
    times = torch.zeros(tokens, tokens, dtype=torch.int64)
    raw = torch.zeros(tokens, dtype=torch.int64)
    for i in range(tokens):
        for core in range(spec.visible_cores(i)):
            times[i, core * g : (core + 1) * g] += 1
        for token in spec.local_range(i):
            times[i, token] += 1
        raw[i] = len(spec.local_range(i))
    seen = torch.arange(1, tokens + 1)
    enough = (raw >= seen.clamp(max=case.problem.window_size)) & (raw <= spec.max_local_tokens())
    return [
        compare_bitwise("times that a token is seen", times, torch.ones_like(times).tril()),
        compare_bitwise("between w and w + g - 1 raw tokens", enough, torch.ones_like(enough)),
    ]


def _visible(case: Case) -> Tensor:
    """Which token [T] each query [T] may know of: those of its own sequence up to itself."""
    tokens = case.problem.seq_len
    visible = torch.zeros(tokens, tokens, dtype=torch.bool)
    for _, part in case.sequences():
        visible[part, part] = True
    return visible.tril()


@check("backward", "P3")
def reachability(case: Case) -> list[Comparison]:
    """Row i moves the gradient of v at j exactly where j <= i: everything past is reached and nothing else.

    With q = 0 no weight can underflow; row i's upstream gradient is a one-hot vector, so that the columns of dv are
    the rows' weights.
    """
    case = dense(case) if case.bounds is not None else case
    inputs, p = make_inputs(case), case.problem
    visible, found = _visible(case), []
    for first in range(0, p.seq_len, p.head_dim):
        rows = torch.arange(first, min(first + p.head_dim, p.seq_len))
        dout = torch.zeros_like(inputs.dout)
        dout[:, :, rows, rows - first] = 1.0
        upstream = inputs._replace(q=torch.zeros_like(inputs.q), dout=dout, dlse=torch.zeros_like(inputs.dlse))
        dv = run(case, upstream, grads=True)["dv"]
        reached = (dv[..., : len(rows)] != 0).cpu()
        expected = visible[rows].mT.expand_as(reached)
        found.append(compare_bitwise(f"tokens that rows {first}..{int(rows[-1])} reach", reached, expected))
    return found


@check("backward", "P4")
def no_gradient_from_the_future(case: Case) -> list[Comparison]:
    """With a loss on the rows before t alone, dq, dk and dv are exactly zero from t on."""
    inputs, found = make_inputs(case), []
    for t in _edges(case)[:2]:
        dout, dlse = inputs.dout.clone(), inputs.dlse.clone()
        dout[:, :, t:], dlse[:, :, t:] = 0.0, 0.0
        results = run(case, inputs._replace(dout=dout, dlse=dlse), grads=True)
        found += [is_zero(f"{name} from {t} on", results[name][:, :, t:]) for name in ("dq", "dk", "dv")]
    return found


def _edges(case: Case) -> list[int]:
    """Positions at which the visibility or a tile changes, in an order that the seed decides; at least one."""
    g, w, end = case.problem.group_size, case.problem.window_size, case.problem.seq_len
    places = {0, g - 1, g, g + 1, w - 1, w, w + 1, w + g - 1, w + g, w + g + 1, 15, 16, 17, end - 1}
    edges = sorted(place for place in places if 0 <= place < end)
    start = case.seed % len(edges)
    return edges[start:] + edges[:start]


def _query_tile(case: Case, inputs: Inputs) -> int:
    """Queries that share a tile of the forward kernel; all of them in eager PyTorch."""
    if case.backend == "eager":
        return case.problem.seq_len
    configs = configs_for(register_profile(case.schedule), inputs.q, inputs.k, case.spec)
    return int(configs["forward"].block_q)


@check("forward", "P6")
def nan_of_a_token(case: Case) -> list[Comparison]:
    """NaN in k or v of token t: in every row from t on (none swallows it), in no row of a tile that ends before t.

    Rows before t in t's own tile of queries may be NaN, too: the tile's product of weights and values has 0 * NaN.
    NaN in v never reaches an lse, and that in one document or row of a batch no other.
    """
    case = dense(case)
    inputs, found = make_inputs(case), []
    before, tile = run(case, inputs), _query_tile(case, inputs)
    for name, t in zip(("k", "v"), (_edges(case) * 2)[:2], strict=True):
        after = run(case, _with_nan(inputs, name, slice(t, t + 1)))
        safe = t // tile * tile
        found.append(compare_bitwise(f"out before {safe}", after["out"][:, :, :safe], before["out"][:, :, :safe]))
        reached = after["out"][:, :, t:].isnan()
        found.append(compare_bitwise(f"NaN of {name} in out from {t} on", reached, torch.ones_like(reached)))
        if name == "v":
            found.append(compare_bitwise("lse", after["lse"], before["lse"]))
        else:
            found.append(compare_bitwise(f"lse before {safe}", after["lse"][:, :, :safe], before["lse"][:, :, :safe]))
    return found


def _with_nan(inputs: Inputs, name: str, tokens: slice, rows: slice = slice(None)) -> Inputs:
    x = getattr(inputs, name).clone()
    x[rows, :, tokens] = math.nan
    return inputs._replace(**{name: x})


@check("backward", "P6")
def nan_of_a_sequence(case: Case) -> list[Comparison]:
    """NaN in q, k and v of one sequence changes no bit of another, forward or backward."""
    case = case if len(one_by_one(case)) > 1 else dense(case, batch=2)
    inputs, sequences, found = make_inputs(case), one_by_one(case), []
    before = run(case, inputs, grads=True)
    rows, tokens = sequences[case.seed % len(sequences)]
    poisoned = inputs
    for name in ("q", "k", "v"):
        poisoned = _with_nan(poisoned, name, tokens, rows)
    after = run(case, poisoned, grads=True)
    for other in sequences:
        if other != (rows, tokens):
            parts = [{name: x[other[0], :, other[1]] for name, x in results.items()} for results in (after, before)]
            found += same_bits(parts[0], parts[1], f" of {other}")
    return found


@check("decode", "P6")
def dropped_tokens_leave_no_nan(case: Case) -> list[Comparison]:
    """What lies in the cache behind its tokens has no effect: NaN tokens, appended and cropped, change no later bit."""
    case = dense(case)
    inputs, tokens = make_inputs(case), case.problem.seq_len
    caches = [make_cache(case, rollback=3) for _ in range(2)]
    nothing = Inputs(*(torch.full_like(x[:, :, :1].expand(-1, -1, 4, *x.shape[3:]), math.nan) for x in inputs))
    half, outs = tokens // 2, []
    for number, cache in enumerate(caches):
        cache.prefill(*(x[:, :, :half] for x in inputs[:3]))
        if number:
            feed(cache, nothing, 0, [4])
            cache.crop(half)
        outs.append(feed(cache, inputs, half, [1] * min(3, tokens - half)))
    groups = [{"k_core": cache.k_core, "v_core": cache.v_core} for cache in caches]
    return [compare_bitwise("out", outs[1], outs[0]), *same_bits(groups[1], groups[0])]
