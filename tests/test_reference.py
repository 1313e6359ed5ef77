"""The two oracles against each other, against known special cases, and against the definition's consequences."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from cca_attention.kernels.reference import attention_dense, attention_rowwise, pool
from cca_attention.problem import Problem
from cca_attention.spec import CCASpec
from cca_attention.verify.checks import oracle
from cca_attention.verify.inputs import FAMILIES, Case, make_inputs
from cca_attention.verify.rounding import Bounded, exact_weights
from cca_attention.verify.tolerance import compare

BASE = Problem(batch=2, q_heads=4, kv_heads=2, seq_len=21, head_dim=16, group_size=4, window_size=6, dtype="float64")
ORACLES = [attention_dense, attention_rowwise]


def case(**changes: Any) -> Case:
    """`BASE` with changes, those of the case itself among them."""
    own = {name: changes.pop(name) for name in ("family", "layout", "lengths", "bounds", "scale") if name in changes}
    return Case(problem=replace(BASE, **changes), backend="eager", **own)


def semantics(case: Case) -> dict[str, Any]:
    """Keyword arguments of the oracles, without the layout."""
    names = ("group_size", "window_size", "core_heads", "pooling", "scale")
    return {name: case.arguments()[name] for name in names}


def as_tensors(options: dict[str, Any]) -> dict[str, Any]:
    """The lists among keyword arguments are int32 tensors."""
    return {name: torch.tensor(x, dtype=torch.int32) if isinstance(x, list) else x for name, x in options.items()}


def check_oracles(case: Case) -> None:
    """Both oracles, given the whole batch, equal the dense one on each sequence alone, to float64's rounding."""
    inputs = make_inputs(case)
    expected = oracle(case, inputs)
    for attention in ORACLES:
        out, lse = attention(*inputs[:3], **semantics(case), **case.layout_arguments())
        assert out.dtype == lse.dtype == torch.float64
        for name, actual in (("out", out), ("lse", lse)):
            comparison = compare(f"{name} of {attention.__name__}", actual, expected[name])
            assert comparison.ok, str(comparison)


CASES = [
    case(),  # g does not divide w
    case(seq_len=1),
    case(seq_len=3),  # T < g
    case(seq_len=5),  # T < w, one group that nobody sees
    case(seq_len=9),  # the last row sees the first core
    case(seq_len=24),  # no tail group
    case(window_size=1),  # the row itself is all that stays raw
    case(window_size=2, group_size=7),  # w < g - 1
    case(window_size=8),  # g divides w
    case(group_size=1, window_size=3),
    case(group_size=30),  # T < g
    case(window_size=21),
    case(q_heads=2, kv_heads=2, core_heads="kv"),
    case(q_heads=6, kv_heads=2, core_heads="kv"),
    case(q_heads=6, kv_heads=2),
    case(q_heads=7, kv_heads=1),
    case(q_heads=7, kv_heads=1, core_heads="kv"),
    case(pooling="mean"),
    case(pooling="mean", core_heads="kv"),
    case(scale=0.7),
    case(head_dim=17, scale=2.5, core_heads="kv"),
    case(layout="different"),
    case(layout="expanded", core_heads="kv"),
    case(dtype="bfloat16"),  # whatever comes in is computed in float64
    case(dtype="float32", layout="transposed"),
    case(batch=1, lengths=(0, 9, 0, 1, 11, 0)),
    case(batch=1, lengths=(3, 4, 5, 9), core_heads="kv"),
    case(batch=1, lengths=(21,), pooling="mean"),
    case(bounds=((2, 21), (0, 13))),  # left and right padding, full of NaN
    case(bounds=((5, 5), (20, 21)), core_heads="kv"),  # a row of nothing but padding, a row of one token
    *(case(family=family) for family in FAMILIES if family != "randn"),
]


def label(case: Case) -> str:
    extras = (case.family, case.layout, case.lengths, case.bounds, case.scale)
    return "-".join(
        [str(case.problem), *(str(extra) for extra in extras if extra not in ("randn", "contiguous", None))]
    )


@pytest.mark.parametrize("case", CASES, ids=label)
def test_the_oracles_agree(case: Case) -> None:
    check_oracles(case)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Small cases of every kind."""
    kv_heads, ratio = draw(st.integers(1, 2)), draw(st.sampled_from((1, 2, 3, 7)))
    sizes: dict[str, Any] = {
        "seq_len": draw(st.integers(1, 26)),
        "group_size": draw(st.integers(1, 9)),
        "window_size": draw(st.integers(1, 30)),
        "core_heads": draw(st.sampled_from(("query", "kv"))),
        "pooling": draw(st.sampled_from(("last_query", "mean"))),
    }
    tokens = sizes["seq_len"]
    layout = draw(st.sampled_from(("dense", "packed", "padded")))
    event(layout)
    if layout == "packed":
        cuts = sorted(draw(st.lists(st.integers(0, tokens), max_size=3)))
        sizes["lengths"] = tuple(end - first for first, end in pairwise([0, *cuts, tokens]))
    if layout == "padded":
        rows = [sorted(draw(st.tuples(st.integers(0, tokens), st.integers(0, tokens)))) for _ in range(2)]
        sizes["bounds"] = tuple((first, end) for first, end in rows)
    batch = 2 if layout == "padded" else 1
    family, scale = draw(st.sampled_from(sorted(FAMILIES))), draw(st.sampled_from((None, 0.05, 1.0)))
    return case(batch=batch, q_heads=kv_heads * ratio, kv_heads=kv_heads, family=family, scale=scale, **sizes)


@settings(max_examples=40, deadline=None)
@given(cases())
def test_the_oracles_agree_on_whatever_is_drawn(case: Case) -> None:
    check_oracles(case)


@pytest.mark.parametrize("attention", ORACLES)
@pytest.mark.parametrize("layout", [{}, {"cu_seqlens": [0, 0, 0]}, {"seq_bounds": [[0, 0], [0, 0]]}], ids=str)
def test_no_tokens(attention: Any, layout: dict[str, list[int]]) -> None:
    batch = 1 if "cu_seqlens" in layout else 2
    q = torch.zeros(batch, 4, 0, 8, dtype=torch.float64, requires_grad=True)
    k, v = (torch.zeros(batch, 2, 0, 8, dtype=torch.float64) for _ in range(2))
    out, lse = attention(q, k, v, group_size=4, window_size=6, **as_tensors(layout))
    assert (out.shape, lse.shape) == ((batch, 4, 0, 8), (batch, 4, 0))
    assert torch.autograd.grad(out.sum() + lse.sum(), q)[0].shape == q.shape
    assert pool(q, k, v, group_size=4)[0].shape == (batch, 4, 0, 8)


@pytest.mark.parametrize("attention", ORACLES)
@pytest.mark.parametrize("changes", [{"group_size": 1}, {"window_size": 21}, {"window_size": 50}], ids=str)
@pytest.mark.parametrize("core_heads", ["query", "kv"])
def test_full_causal_attention(attention: Any, changes: dict[str, int], core_heads: str) -> None:
    """P7 and P8: g = 1 or w >= T, against PyTorch's own."""
    full = case(q_heads=6, core_heads=core_heads, **changes)
    inputs = make_inputs(full)
    out, _ = attention(*inputs[:3], **semantics(full))
    theirs = scaled_dot_product_attention(*inputs[:3], is_causal=True, enable_gqa=True)
    comparison = compare("out", out, Bounded(theirs, oracle(full, inputs)["out"].bound))
    assert comparison.ok, str(comparison)


def counted_weights(tokens: int, group_size: int, window_size: int) -> Tensor:
    """[T, T]: weight of each token for each query when all logits are equal, counted from the words of the rule."""
    weights = torch.zeros(tokens, tokens, dtype=torch.float64)
    for i in range(tokens):
        cores = [c for c in range(tokens) if (c + 1) * group_size + window_size <= i + 1]
        for core in cores:
            weights[i, core * group_size : (core + 1) * group_size] = 1 / group_size
        weights[i, len(cores) * group_size : i + 1] = 1
        weights[i] /= len(cores) + i + 1 - len(cores) * group_size
    return weights


@pytest.mark.parametrize("attention", ORACLES)
@pytest.mark.parametrize(("group_size", "window_size"), [(4, 6), (4, 8), (7, 2), (1, 3), (5, 1), (3, 40)])
def test_counting_probe(attention: Any, group_size: int, window_size: int) -> None:
    """P5 and P12: with q = 0 and one-hot values, out is the weight of every token, and lse counts the keys."""
    tokens = 23
    q, k = torch.zeros(2, 4, tokens, tokens), torch.randn(2, 2, tokens, tokens)
    v = torch.eye(tokens).expand(2, 2, -1, -1)
    out, lse = attention(q, k, v, group_size=group_size, window_size=window_size)
    expected = exact_weights(counted_weights(tokens, group_size, window_size).expand_as(out), torch.float64)
    comparison = compare("weights", out, expected)
    assert comparison.ok, str(comparison)
    spec = CCASpec(group_size, window_size)
    keys = torch.tensor([spec.visible_cores(i) + len(spec.local_range(i)) for i in range(tokens)])
    assert torch.equal(lse.exp().round().long(), keys.expand(2, 4, -1))


@pytest.mark.parametrize("attention", ORACLES)
@pytest.mark.parametrize("pooling", ["last_query", "mean"])
def test_a_group_of_equal_tokens_counts_as_one_key(attention: Any, pooling: str) -> None:
    """P11: the core of equal tokens is that token, and all of them weigh as much as one."""
    equal = case(pooling=pooling, seq_len=24, q_heads=2)
    inputs = make_inputs(equal)
    k, v = (x[:, :, ::4].repeat_interleave(4, dim=2) for x in (inputs.k, inputs.v))
    out, _ = attention(inputs.q, k, v, **semantics(equal))
    bound = oracle(equal, inputs._replace(k=k, v=v))["out"].bound
    for i in range(24):
        seen = [4 * c for c in range(equal.spec.visible_cores(i))] + list(equal.spec.local_range(i))
        row = scaled_dot_product_attention(inputs.q[:, :, i : i + 1], k[:, :, seen], v[:, :, seen])
        comparison = compare(f"row {i}", out[:, :, i : i + 1], Bounded(row, bound[:, :, i : i + 1]))
        assert comparison.ok, str(comparison)


@pytest.mark.parametrize("attention", ORACLES)
@pytest.mark.parametrize("core_heads", ["query", "kv"])
def test_the_order_of_tokens_in_a_group(attention: Any, core_heads: str) -> None:
    """P19: a permutation of a group's q, k and v is noticed only if it moves the last token, which scores.

    Rows that see the group as a core then notice it; rows that see all of it raw never do.
    """
    permuted = case(seq_len=24, core_heads=core_heads)
    inputs = make_inputs(permuted)
    expected = oracle(permuted, inputs)["out"]
    first = permuted.problem.group_size * 2 + permuted.problem.window_size - 1  # row that sees group 1 as a core
    assert permuted.spec.visible_cores(first) == 2 == permuted.spec.visible_cores(first - 1) + 1

    def is_unchanged(order: list[int]) -> list[bool]:
        index = torch.tensor([*range(4), *order, *range(8, 24)])
        out, _ = attention(*(x[:, :, index] for x in inputs[:3]), **semantics(permuted))
        parts = slice(8, first), slice(first, None)
        return [compare("rows", out[:, :, part], Bounded(*(x[:, :, part] for x in expected))).ok for part in parts]

    assert is_unchanged([6, 4, 5, 7]) == [True, True]
    assert is_unchanged([4, 5, 7, 6]) == [True, False]


GRADIENTS: list[tuple[int, dict[str, Any]]] = [
    (1, {}),
    (1, {"core_heads": "kv"}),
    (1, {"pooling": "mean"}),
    (1, {"scale": 0.9, "core_heads": "kv", "pooling": "mean"}),
    (1, {"cu_seqlens": [0, 2, 2, 6]}),
    (2, {"seq_bounds": [[1, 6], [0, 4]]}),
]


@pytest.mark.parametrize("attention", ORACLES)
@pytest.mark.parametrize(("batch", "options"), GRADIENTS, ids=str)
def test_gradcheck(attention: Any, batch: int, options: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(batch, heads, 6, 2) for heads in (4, 2, 2)]
    q, k, v = (torch.randn(*x, generator=generator, dtype=torch.float64, requires_grad=True) for x in shapes)

    def real_rows(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = attention(*tensors, group_size=2, window_size=2, **as_tensors(options))
        return out, lse[lse.isfinite()]

    assert torch.autograd.gradcheck(real_rows, (q, k, v), fast_mode=attention is attention_rowwise)


REFUSALS: list[tuple[dict[str, Any], str]] = [
    ({"core_heads": "both"}, r"core_heads must be one of \('query', 'kv'\), got 'both'"),
    ({"pooling": "max"}, r"pooling must be one of \('last_query', 'mean'\), got 'max'"),
    ({"cu_seqlens": [0, 4], "seq_bounds": [[0, 4]]}, "cu_seqlens and seq_bounds are two layouts: give at most one"),
    ({"cu_seqlens": []}, r"cu_seqlens must rise from 0 to T=4 with B=1, got \[\]"),
    ({"cu_seqlens": [1, 4]}, r"cu_seqlens must rise from 0 to T=4 with B=1, got \[1, 4\]"),
    ({"cu_seqlens": [0, 3]}, r"cu_seqlens must rise from 0 to T=4 with B=1, got \[0, 3\]"),
    ({"cu_seqlens": [0, 3, 2, 4]}, r"cu_seqlens must rise from 0 to T=4 with B=1, got \[0, 3, 2, 4\]"),
    ({"seq_bounds": [[0, 4], [0, 4]]}, "seq_bounds must be B=1 rows with 0 <= first <= end <= T=4"),
    ({"seq_bounds": [[3, 2]]}, r"seq_bounds must be B=1 rows with 0 <= first <= end <= T=4, got \[\(3, 2\)\]"),
    ({"seq_bounds": [[0, 5]]}, r"seq_bounds must be B=1 rows with 0 <= first <= end <= T=4, got \[\(0, 5\)\]"),
]


@pytest.mark.parametrize("attention", ORACLES)
@pytest.mark.parametrize(("options", "message"), REFUSALS, ids=str)
def test_refusals(attention: Any, options: dict[str, Any], message: str) -> None:
    x = torch.zeros(1, 1, 4, 2)
    with pytest.raises(ValueError, match=message):
        attention(x, x, x, group_size=2, window_size=2, **as_tensors(options))
