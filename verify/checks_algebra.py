"""What follows from the algebra of softmax and pooling, whatever the values (properties P13 to P21)."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .calls import Results, agree, agree_all, claim, cores_of, dense, generator_of, of, oracle, run, same_bits, wide
from .cases import Case
from .identities import hull_of_past, merged
from .inputs import Inputs, make_inputs
from .registry import check
from .rounding import Bounded, ErrorModel
from .tolerance import Comparison, compare, compare_bitwise


def on_grid(case: Case, x: Tensor, stream: int) -> Tensor:
    """Multiples of 1/8 up to 2 shaped like `x`: sums of a few of them are exact in every dtype."""
    steps = torch.randint(-16, 17, x.shape, generator=generator_of(case, stream))
    return (steps / 8).to(x)


def _positive_zeros(x: Tensor) -> Tensor:
    return x + 0.0


@check("forward", "P13")
def convex_hull(case: Case) -> list[Comparison]:
    """Each output component lies between the least and the largest value of the past."""
    inputs = make_inputs(case)
    out = run(case, inputs)["out"].double()
    low, high, slack = hull_of_past(case, inputs)
    return [compare("out", out, Bounded(torch.minimum(torch.maximum(out.nan_to_num(), low), high), slack))]


@check("forward", "P14")
def constant_values(case: Case) -> list[Comparison]:
    """Where all values are equal the output is that value, for any logits."""
    inputs = make_inputs(case)
    inputs = inputs._replace(v=on_grid(case, inputs.v[:, :, :1], 0).expand_as(inputs.v))
    low, _, slack = hull_of_past(case, inputs)
    return [compare("out", run(case, inputs)["out"], Bounded(low, slack))]


@check("forward", "P15")
def linear_in_values(case: Case) -> list[Comparison]:
    """out(v + u) = out(v) + out(u); out(-v) = -out(v) and out(4 v) = 4 out(v) bit for bit, and no lse moves."""
    inputs = make_inputs(case)
    v, u = (on_grid(case, inputs.v, stream) for stream in (0, 1))
    given = [inputs._replace(v=x) for x in (v, u, v + u)]
    results, expected = zip(*((run(case, x), oracle(case, x)) for x in given), strict=True)
    found = [compare_bitwise("lse of a sum", results[2]["lse"], results[0]["lse"])]
    parts = [{"out": results[0]["out"].double() + results[1]["out"].double()}, {"out": results[2]["out"]}]
    found += agree_all(parts[1], parts[0], *expected, note=" of a sum")
    negative = run(case, inputs._replace(v=-v))
    expected_bits = {"out": _positive_zeros(-results[0]["out"]), "lse": results[0]["lse"]}
    found += same_bits(negative | {"out": _positive_zeros(negative["out"])}, expected_bits, " of -v")
    exact = wide(case)
    inputs = make_inputs(exact)
    one, four = (run(exact, inputs._replace(v=factor * inputs.v)) for factor in (1, 4))
    return found + same_bits(four, one | {"out": 4 * one["out"]}, " of 4 v")


@check("backward", "P16")
def power_of_two_gauge(case: Case) -> list[Comparison]:
    """(4 q, k / 4), (4 q, scale / 4) and (-q, -k) give the same bits, and gradients that differ by the factor alone."""
    case = wide(case)
    inputs, scale = make_inputs(case), case.spec.softmax_scale(case.problem.head_dim)
    first, found = run(case, inputs._replace(q=1 * inputs.q, k=1 * inputs.k), grads=True), []
    for note, to_q, to_k, to_scale in (("4 and 1/4", 4, 0.25, 1), ("-1 and -1", -1, -1, 1), ("scale", 4, 1, 0.25)):
        other = run(
            replace(case, scale=scale * to_scale), inputs._replace(q=to_q * inputs.q, k=to_k * inputs.k), grads=True
        )
        other |= {"dq": to_q * other["dq"], "dk": to_k * other["dk"]}
        pairs = [{name: _positive_zeros(x) for name, x in results.items()} for results in (other, first)]
        found += same_bits(pairs[0], pairs[1], f" with {note}")
    return found


@check("forward", "P17")
def logit_shift(case: Case) -> list[Comparison]:
    """One vector added to every key moves each lse by its product with the query and no output, pooling included."""
    inputs = make_inputs(case)
    k = on_grid(case, inputs.k, 0)
    shift = on_grid(case, k[:, :, :1], 1)
    given = [inputs._replace(k=x) for x in (k, k + shift)]
    results, expected = zip(*((run(case, x), oracle(case, x)) for x in given), strict=True)
    team = case.problem.q_heads // case.problem.kv_heads
    moved = (inputs.q.double() @ shift.double().repeat_interleave(team, 1).mT)[..., 0]
    moved = moved.nan_to_num() * case.spec.softmax_scale(case.problem.head_dim)
    return agree_all(results[1], results[0] | {"lse": results[0]["lse"].double() + moved}, *expected)


@check("forward", "P18")
def one_softmax(case: Case) -> list[Comparison]:
    """The last row joins its cores and its raw tokens, each attended to by a call of their own, by their lse."""
    case = dense(case)
    p = case.problem
    case = of(case, window_size=max(1, min(p.window_size, p.seq_len - p.group_size)))
    inputs, last = make_inputs(case), p.seq_len - 1
    model, whole = ErrorModel(*inputs[:3], case.spec, case.dtype), run(case, inputs)
    cores, seen, raw = cores_of(case, inputs), case.spec.visible_cores(last), case.spec.local_range(last)
    segments = [(inputs.k[:, :, raw.start :], inputs.v[:, :, raw.start :])]
    if seen:
        segments.append((cores["k_core"][:, :, :seen], cores["v_core"][:, :, :seen]))
    parts, bounds = [], []
    for k, v in segments:
        full = of(case, kv_heads=k.shape[1], seq_len=k.shape[2], group_size=1, window_size=k.shape[2])
        q = inputs.q[:, :, last:].expand(-1, -1, k.shape[2], -1)
        alone = run(full, inputs._replace(q=q, k=k, v=v))
        of_part = ErrorModel(q, k, v, full.spec, case.dtype)
        parts.append((alone["out"][:, :, -1], alone["lse"][:, :, -1]))
        bounds.append((of_part.out.bound[:, :, -1], of_part.lse.bound[:, :, -1]))
    if not seen:
        parts.append((torch.zeros_like(parts[0][0]), torch.full_like(parts[0][1], -torch.inf)))
        bounds.append((torch.zeros_like(bounds[0][0]), torch.zeros_like(bounds[0][1])))
    if any(x.isnan().any() for part in parts for x in part):
        return [claim("parts", False, "a part has NaN")]
    joint = zip(("out", "lse"), merged(parts, bounds), (model.out.bound, model.lse.bound), strict=True)
    # twice the model: once for this call, once for the cores as they are stored, which the parts begin with
    return [compare(n, whole[n][:, :, -1], Bounded(x.value, x.bound + 2 * b[:, :, -1])) for n, x, b in joint]


@check("forward", "P19")
def order_within_groups(case: Case) -> list[Comparison]:
    """The order of the tokens of a group but its last is nothing to the rows at the group's end and after it.

    Which token is last decides the core of pooling="last_query": with a group's first and last token exchanged it
    has another, whose weights are all on other tokens.
    """
    case = _with_a_group(replace(case, family="randn"))
    inputs, g, tokens = make_inputs(case), case.problem.group_size, case.problem.seq_len
    end = tokens // g * g
    order = torch.arange(tokens)
    order[:end] = order[:end].view(-1, g)[:, [*range(g - 2, -1, -1), g - 1]].flatten()
    other = inputs._replace(q=inputs.q[:, :, order], k=inputs.k[:, :, order], v=inputs.v[:, :, order])
    rows = [i for i in range(tokens) if i >= end or (i + 1) % g == 0]
    bounds = [{n: Bounded(*(x[:, :, rows] for x in b)) for n, b in oracle(case, x).items()} for x in (inputs, other)]
    results = [{name: x[:, :, rows] for name, x in run(case, each).items()} for each in (other, inputs)]
    found = agree_all(results[0], results[1], *bounds)
    inputs = _first_and_last_oppose(case, inputs)
    order[:end] = torch.arange(end).view(-1, g)[:, [g - 1, *range(1, g - 1), 0]].flatten()
    other = Inputs(*(x[:, :, order] for x in inputs))
    cores = [{"v_core": cores_of(case, each)["v_core"]} for each in (other, inputs)]
    models = [{"v_core": ErrorModel(*each[:3], case.spec, case.dtype).v_core} for each in (other, inputs)]
    same = agree_all(cores[0], cores[1], *models)[0]
    decides = case.problem.pooling == "last_query"
    return [*found, claim("the last token decides", same.ok != decides, f"with {case.problem.pooling}: {same}")]


def _with_a_group(case: Case) -> Case:
    """`case` in dense rows that have a group of at least two tokens."""
    tokens = max(3, case.problem.seq_len)
    return dense(case, seq_len=tokens, group_size=min(max(2, case.problem.group_size), tokens - 1))


def _first_and_last_oppose(case: Case, inputs: Inputs) -> Inputs:
    """The last query of each group wants its first token alone, the first query all the others."""
    g = case.problem.group_size
    end = inputs.q.shape[2] // g * g
    sign = torch.full((inputs.q.shape[2], 1), -1.0).to(inputs.q)
    sign[0:end:g] = 1.0
    q, k = (torch.full_like(x, 2.0) for x in (inputs.q, inputs.k))
    return inputs._replace(q=-q * sign, k=k * sign)


@check("forward", "P20")
def group_locality(case: Case) -> list[Comparison]:
    """A token changes no core but its own group's, and no core at all by its query unless it is the group's last."""
    case = _with_a_group(case)
    inputs, g = make_inputs(case), case.problem.group_size
    groups = case.spec.num_groups(case.problem.seq_len)
    token = case.seed % (groups * g)
    before, changed = cores_of(case, inputs), [x.clone() for x in inputs[:3]]
    changed[0][:, :, token] = -2 * changed[0][:, :, token] + 1
    others = [c for c in range(groups) if c != token // g or (token + 1) % g]
    after = cores_of(case, inputs._replace(q=changed[0]))
    found = same_bits(_at(after, others), _at(before, others), " after another query")
    for x in changed[1:]:
        x[:, :, token] = -2 * x[:, :, token] + 1
    after = cores_of(case, inputs._replace(q=changed[0], k=changed[1], v=changed[2]))
    others = [c for c in range(groups) if c != token // g]
    return found + same_bits(_at(after, others), _at(before, others), " after another token")


def _at(cores: Results, which: list[int]) -> Results:
    return {name: x[:, :, which] for name, x in cores.items()}


@check("forward", "P21")
def projections_commute(case: Case) -> list[Comparison]:
    """Pooling and attention commute with an affine map of the values and a signed permutation of q's and k's axes."""
    inputs, dim = make_inputs(case), case.problem.head_dim
    generator = generator_of(case, 2)
    turns = [_signed_permutation(dim, generator) for _ in range(3)]
    weight = turns[0] + turns[1]
    v = on_grid(case, inputs.v, 0)
    bias = on_grid(case, v[:1, :1, :1], 1).double()
    q, k = ((x.double() @ turns[2].to(x.device)).to(x) for x in inputs[:2])
    mapped = inputs._replace(q=q, k=k, v=(v.double() @ weight.to(v.device) + bias).to(v))
    inputs = inputs._replace(v=v)
    here, there = (run(case, x) for x in (inputs, mapped))
    bounds = [oracle(case, x) for x in (inputs, mapped)]
    real = (here["lse"] > -torch.inf)[..., None]
    expected = here | {"out": here["out"].double() @ weight.to(v.device) + bias * real}
    bounds[0]["out"] = Bounded(bounds[0]["out"].value, bounds[0]["out"].bound @ weight.abs().to(v.device))
    found = agree_all(there, expected, *bounds)
    case = dense(case)
    inputs, mapped = (Inputs(*(y.nan_to_num() for y in x)) for x in (inputs, mapped))
    here, there = cores_of(case, inputs), cores_of(case, mapped)
    models = [ErrorModel(x.q, x.k, x.v, case.spec, case.dtype) for x in (inputs, mapped)]
    for name, matrix, shift in (("k_core", turns[2], 0.0), ("v_core", weight, bias)):
        bound = getattr(models[0], name).bound @ matrix.abs().to(v.device)
        moved = here[name].double() @ matrix.to(v.device) + shift
        found.append(agree(name, there[name], moved, bound, getattr(models[1], name).bound))
    return found


def _signed_permutation(dim: int, generator: torch.Generator) -> Tensor:
    """A matrix [dim, dim] that permutes the axes and turns about half of them round."""
    sign = torch.randint(0, 2, (dim, 1), generator=generator) * 2 - 1
    return torch.eye(dim, dtype=torch.float64)[torch.randperm(dim, generator=generator)] * sign
