"""CCA attention where it is something simpler: full attention, one token, uniform means (properties P7 to P12)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from .calls import compare_all, cores_of, dense, of, oracle, run, same_bits
from .cases import Case
from .inputs import Inputs, make_inputs
from .registry import check
from .rounding import Bounded, ErrorModel, repeat_heads
from .tolerance import Comparison, compare, compare_bitwise


def full_attention(case: Case, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """(out, lse) of full causal attention by PyTorch, q [B, Hq, T, D], k and v [B, Hkv, T, D] in float64."""
    scale, heads = case.spec.softmax_scale(q.shape[-1]), q.shape[1]
    k, v = repeat_heads(k, heads), repeat_heads(v, heads)
    future = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).triu(1)
    lse = (scale * q @ k.mT).masked_fill(future, -torch.inf).logsumexp(-1)
    return scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale), lse


def _is_full_attention(case: Case) -> list[Comparison]:
    inputs = make_inputs(case)
    expected = oracle(case, inputs, grads=True, attend=full_attention)
    return compare_all(run(case, inputs, grads=True), expected)


@check("backward", "P7")
def groups_of_one_are_full_attention(case: Case) -> list[Comparison]:
    """With g = 1 a core is its token: results and gradients are those of full causal attention, whatever w is."""
    return _is_full_attention(of(case, group_size=1))


@check("backward", "P8")
def wide_window_is_full_attention(case: Case) -> list[Comparison]:
    """With w >= T no core is seen: results and gradients are those of full causal attention, whatever g is."""
    return _is_full_attention(of(case, window_size=max(case.problem.window_size, case.problem.seq_len)))


@check("forward", "P9")
def single_token(case: Case) -> list[Comparison]:
    """A sequence of one token has its value as the output, bit for bit but for the sign of zeros, and its logit as lse.

    A compiled kernel may fuse the logit's scaling with the subtraction of the maximum: there the bits of float32 may
    differ by the rounding of that, and half precision rounds it away.
    """
    case = dense(case, seq_len=1)
    inputs, heads = make_inputs(case), case.problem.q_heads
    results, expected = run(case, inputs), oracle(case, inputs, attend=full_attention)
    value = repeat_heads(inputs.v, heads) + 0.0
    if case.device != "cpu" and case.dtype == torch.float32:
        found = compare("out", results["out"], Bounded(value.double(), expected["out"].bound))
    else:
        found = compare_bitwise("out", results["out"] + 0.0, value)
    return [found, compare("lse", results["lse"], expected["lse"])]


@check("forward", "P10")
def hidden_cores_have_no_effect(case: Case) -> list[Comparison]:
    """While T < w + g no row sees a core: full attention, and how and for whom cores are pooled changes no bit."""
    p = case.problem
    case = of(case, window_size=max(p.window_size, p.seq_len - p.group_size + 1))
    inputs = make_inputs(case)
    results = run(case, inputs)
    found = compare_all(results, oracle(case, inputs, attend=full_attention))
    for other in (
        of(case, pooling="mean" if p.pooling == "last_query" else "last_query"),
        of(case, core_heads="kv" if p.core_heads == "query" else "query"),
    ):
        found += same_bits(run(other, inputs), results, f" of {other.problem.pooling}, {other.problem.core_heads}")
    return found


@check("forward", "P11")
def groups_of_equal_tokens(case: Case) -> list[Comparison]:
    """Where all tokens of a group are equal its core is that token, and the whole group weighs as one key."""
    inputs = _equal_in_groups(case, make_inputs(case))
    found = compare_all(run(case, inputs), oracle(case, inputs, attend=_one_key_a_group))
    case = dense(case)
    inputs = _equal_in_groups(case, make_inputs(case))
    g, groups = case.problem.group_size, case.spec.num_groups(case.problem.seq_len)
    model, cores = ErrorModel(*inputs[:3], case.spec, case.dtype), cores_of(case, inputs)
    for name, x, bound in (("k_core", inputs.k, model.k_core.bound), ("v_core", inputs.v, model.v_core.bound)):
        token = repeat_heads(x[:, :, : groups * g : g].double(), cores[name].shape[1])
        found.append(compare(name, cores[name], Bounded(token, bound)))
    return found


def _equal_in_groups(case: Case, inputs: Inputs) -> Inputs:
    """`inputs` with the first k and v of each group in all places of it."""
    k, v = inputs.k.clone(), inputs.v.clone()
    for rows, tokens in case.sequences():
        position = torch.arange(tokens.stop - tokens.start)
        first = tokens.start + position // case.problem.group_size * case.problem.group_size
        for x in (k, v):
            x[rows, :, tokens] = x[rows][:, :, first]
    return inputs._replace(k=k, v=v)


def _one_key_a_group(case: Case, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """(out, lse) of attention to the first token of each group that is far enough in the past, and to all after."""
    g, heads = case.problem.group_size, q.shape[1]
    visible = torch.zeros(q.shape[2], q.shape[2], dtype=torch.bool)
    for i in range(q.shape[2]):
        far = [t for t in range(0, i + 1, g) if t + g <= i + 1 - case.problem.window_size]
        visible[i, far] = True
        visible[i, len(far) * g : i + 1] = True
    scores = case.spec.softmax_scale(q.shape[-1]) * q @ repeat_heads(k, heads).mT
    scores = scores.masked_fill(~visible.to(q.device), -torch.inf)
    return scores.softmax(-1) @ repeat_heads(v, heads), scores.logsumexp(-1)


@check("forward", "P12")
def zero_queries_pool_the_mean(case: Case) -> list[Comparison]:
    """With q = 0 the weights of pooling are uniform: the bits of pooling="mean", and the oracle's values."""
    inputs = make_inputs(case)
    inputs = inputs._replace(q=torch.zeros_like(inputs.q))
    results = {pooling: run(of(case, pooling=pooling), inputs) for pooling in ("last_query", "mean")}
    found = same_bits(results["last_query"], results["mean"])
    return found + compare_all(results["mean"], oracle(of(case, pooling="mean"), inputs))
