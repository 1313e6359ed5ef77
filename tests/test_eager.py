"""The CPU path against the float64 oracle: forward, log-sum-exp, backward, and the parts that the cache calls."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cca_attention.kernels import eager
from cca_attention.problem import Problem
from cca_attention.spec import CCASpec
from cca_attention.verify.checks import oracle
from cca_attention.verify.inputs import FAMILIES, Case, Inputs, make_inputs, poisoned_memory
from cca_attention.verify.rounding import Bounded, ErrorModel
from cca_attention.verify.tolerance import compare, compare_bitwise

BASE = Problem(batch=2, q_heads=6, kv_heads=2, seq_len=41, head_dim=16, group_size=4, window_size=6, dtype="float32")
OWN = ("family", "layout", "lengths", "bounds", "scale", "seed")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 8 queries, so that small sequences have many; tests of the true size set it back."""
    monkeypatch.setattr(eager, "BLOCK_Q", 8)


def case(**changes: Any) -> Case:
    """`BASE` with changes, those of the case itself among them."""
    own = {name: changes.pop(name) for name in OWN if name in changes}
    return Case(problem=replace(BASE, **changes), backend="eager", **own)


def label(case: Case) -> str:
    extras = (case.family, case.layout, case.lengths, case.bounds, case.scale)
    return "-".join(
        [str(case.problem), *(str(extra) for extra in extras if extra not in ("randn", "contiguous", None))]
    )


def run(case: Case, inputs: Inputs) -> dict[str, Tensor]:
    """Forward and backward of the CPU path, on memory full of NaN."""
    q, k, v, dout, dlse = inputs
    layout = {"bounds": next(iter(case.layout_arguments().values()), None), "packed": case.lengths is not None}
    with poisoned_memory():
        out, lse, k_core, v_core = eager.forward(q, k, v, case.spec, **layout)
        dq, dk, dv = eager.backward(dout, dlse, q, k, v, out, lse, k_core, v_core, case.spec, **layout)
    return {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv}


def check(case: Case) -> None:
    """Everything within what rounding in the case's dtype explains, and in the dtypes that were promised."""
    inputs = make_inputs(case)
    actual, expected = run(case, inputs), oracle(case, inputs, grads=True)
    for name, bounded in expected.items():
        comparison = compare(name, actual[name], bounded)
        assert comparison.ok, str(comparison)
    wide = torch.float64 if case.dtype == torch.float64 else torch.float32
    assert {name: x.dtype for name, x in actual.items()} == dict.fromkeys(expected, case.dtype) | {"lse": wide}


G, W = BASE.group_size, BASE.window_size
LENGTHS = sorted(
    {1, 2, G - 1, G, G + 1, W - 1, W, W + 1, W + G - 1, W + G, W + G + 1, 2 * W + 3 * G, 7, 8, 9, 16, 17, 40}
)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("seq_len", LENGTHS)
def test_lengths(seq_len: int, dtype: str) -> None:
    check(case(seq_len=seq_len, dtype=dtype))


CASES = [
    case(core_heads="kv"),
    case(pooling="mean"),
    case(pooling="mean", core_heads="kv"),
    case(scale=0.7, core_heads="kv"),
    case(q_heads=2),
    case(q_heads=7, kv_heads=1),
    case(q_heads=7, kv_heads=1, core_heads="kv"),
    case(q_heads=16, kv_heads=1, head_dim=17, batch=1),
    case(group_size=1, window_size=5),
    case(window_size=1),
    case(group_size=7, window_size=2),  # w < g - 1
    case(group_size=11, window_size=3),  # a group is wider than a block
    case(window_size=20),  # the window is wider than two blocks
    case(window_size=41),
    case(group_size=50),
    case(layout="transposed"),
    case(layout="slab", core_heads="kv"),
    case(layout="different"),
    case(layout="expanded"),
    case(batch=1, lengths=(0, 9, 0, 1, 31, 0)),
    case(batch=1, lengths=(3, 4, 5, 8, 21), core_heads="kv", layout="different"),
    case(batch=1, lengths=(3, 3, 3, 3, 29), dtype="float64"),  # documents shorter than a group
    case(bounds=((2, 41), (0, 33))),  # left and right padding, full of NaN
    case(bounds=((11, 41), (40, 41)), core_heads="kv", dtype="float64", layout="transposed"),
    case(bounds=((7, 7), (3, 20)), pooling="mean"),  # a row of nothing but padding
    *(case(family=family, dtype=dtype) for family in FAMILIES for dtype in ("float64", "float32", "bfloat16")),
    case(dtype="float16"),
    case(dtype="float16", core_heads="kv", lengths=(20, 21), batch=1),
]


@pytest.mark.parametrize("case", CASES, ids=label)
def test_cases(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("seq_len", [255, 256, 257, 513])
def test_true_block_size(monkeypatch: pytest.MonkeyPatch, seq_len: int) -> None:
    monkeypatch.undo()
    assert eager.BLOCK_Q == 256
    check(case(batch=1, q_heads=2, kv_heads=1, seq_len=seq_len, window_size=37))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Small float32 or float64 cases, dense and packed."""
    kv_heads, tokens = draw(st.integers(1, 2)), draw(st.integers(1, 60))
    cuts = sorted(draw(st.lists(st.integers(0, tokens), max_size=3)))
    lengths = tuple(end - first for first, end in pairwise([0, *cuts, tokens]))
    return case(
        batch=1,
        kv_heads=kv_heads,
        q_heads=kv_heads * draw(st.sampled_from((1, 2, 3))),
        seq_len=tokens,
        group_size=draw(st.integers(1, 12)),
        window_size=draw(st.integers(1, 40)),
        core_heads=draw(st.sampled_from(("query", "kv"))),
        pooling=draw(st.sampled_from(("last_query", "mean"))),
        dtype=draw(st.sampled_from(("float32", "float64"))),
        lengths=lengths if cuts else None,
        seed=draw(st.integers(0, 2**32 - 1)),
    )


@settings(max_examples=40, deadline=None)
@given(cases())
def test_whatever_is_drawn(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_no_tokens(dtype: torch.dtype, packed: bool) -> None:
    q, k, v = (torch.zeros(1, heads, 0, 16, dtype=dtype) for heads in (6, 2, 2))
    layout = {"bounds": torch.zeros(3, dtype=torch.int32) if packed else None, "packed": packed}
    out, lse, k_core, v_core = eager.forward(q, k, v, CCASpec(4, 6), **layout)
    assert (out.shape, lse.shape, k_core.shape, v_core.shape) == (q.shape, (1, 6, 0), q.shape, q.shape)
    grads = eager.backward(out, lse, q, k, v, out, lse, k_core, v_core, CCASpec(4, 6), **layout)
    assert [grad.shape for grad in grads] == [q.shape, k.shape, v.shape]


@pytest.mark.parametrize("core_heads", ["query", "kv"])
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_cores(core_heads: str, dtype: str) -> None:
    """`pool_groups` on its own, and the slots in which `forward` leaves the cores of packed and padded sequences."""
    whole = case(core_heads=core_heads, dtype=dtype, layout="different")
    q, k, v, *_ = make_inputs(whole)
    model = ErrorModel(q, k, v, whole.spec, whole.dtype)
    pooled = eager.pool_groups(q[:, :, G - 1 :: G], k[:, :, :40], v[:, :, :40], whole.spec)
    for name, actual, expected in zip(("k_core", "v_core"), pooled, (model.k_core, model.v_core), strict=True):
        comparison = compare(name, actual, expected)
        assert comparison.ok, str(comparison)
        assert actual.dtype == whole.dtype
    edges, bounds = torch.tensor([0, 10, 11, 30, 41]), torch.tensor([[5, 41], [0, 13]])
    packed = eager.forward(q[:1], k[:1], v[:1], whole.spec, bounds=edges, packed=True)[2]
    padded = eager.forward(q, k, v, whole.spec, bounds=bounds)[2]
    sequences = [(packed, 0, first // G, first, end) for first, end in pairwise(edges.tolist())]
    sequences += [(padded, row, 0, first, end) for row, (first, end) in enumerate(bounds.tolist())]
    for stored, row, slot, first, end in sequences:
        alone = eager.forward(*(x[row : row + 1, :, first:end] for x in (q, k, v)), whole.spec)[2]
        comparison = compare_bitwise("k_core", stored[row : row + 1, :, slot : slot + alone.shape[2]], alone)
        assert comparison.ok, str(comparison)


@pytest.mark.parametrize("core_heads", ["query", "kv"])
@pytest.mark.parametrize(("group_size", "window_size"), [(4, 6), (1, 3), (9, 2), (5, 50)])
@pytest.mark.parametrize("spare", [0, 3])
def test_attend_gives_the_rows_of_the_whole(core_heads: str, group_size: int, window_size: int, spare: int) -> None:
    """Any rows, with no more keys than they see or with some to spare on either side."""
    whole = case(core_heads=core_heads, group_size=group_size, window_size=window_size)
    inputs, spec = make_inputs(whole), whole.spec
    q, k, v, *_ = inputs
    _, _, k_core, v_core = eager.forward(q, k, v, spec)
    expected = oracle(whole, inputs)
    for first, stop in [(0, 1), (0, 41), (3, 4), (13, 14), (7, 24), (20, 41), (40, 41), (17, 17)]:
        k_first = max(0, spec.local_range(first).start - spare)
        cores = slice(0, spec.visible_cores(stop - 1) + spare)
        raw = slice(k_first, stop + spare)
        found = eager.attend(
            q[:, :, first:stop], k_core[:, :, cores], v_core[:, :, cores], k[:, :, raw], v[:, :, raw], spec,
            q_first=first, k_first=k_first,
        )  # fmt: skip
        for name, actual in zip(("out", "lse"), found, strict=True):
            comparison = compare(
                f"{name} {first}..{stop}", actual, Bounded(*(x[:, :, first:stop] for x in expected[name]))
            )
            assert comparison.ok, str(comparison)
            assert comparison.empty == (first == stop)


ATTEND_REFUSALS = [
    ({"k_first": 13, "raw": 8}, r"k must hold positions 12\.\.20, got 8 from k_first=13 on"),
    ({"k_first": 12, "raw": 8}, r"k must hold positions 12\.\.20, got 8 from k_first=12 on"),
    ({"k_first": 0, "raw": 20}, r"k must hold positions 12\.\.20, got 20 from k_first=0 on"),
    ({"cores": 2}, "k_core must hold the 3 cores that position 20 sees, got 2"),
]


@pytest.mark.parametrize(("changes", "message"), ATTEND_REFUSALS, ids=str)
def test_attend_refuses_missing_keys(changes: dict[str, int], message: str) -> None:
    given = {"k_first": 12, "raw": 9, "cores": 3} | changes
    q, core, raw = torch.zeros(1, 2, 3, 16), torch.zeros(1, 2, given["cores"], 16), torch.zeros(1, 1, given["raw"], 16)
    with pytest.raises(ValueError, match=f"^{message}$"):
        eager.attend(q, core, core, raw, raw, CCASpec(4, 6), q_first=18, k_first=given["k_first"])


def test_no_gradient_of_lse_is_a_zero_one() -> None:
    dense = case()
    q, k, v, dout, dlse = make_inputs(dense)
    saved = (q, k, v, *eager.forward(q, k, v, dense.spec))
    without = eager.backward(dout, None, *saved, dense.spec)
    zero = eager.backward(dout, torch.zeros_like(dlse), *saved, dense.spec)
    assert all(compare_bitwise("gradient", x, y).ok for x, y in zip(without, zero, strict=True))


@pytest.mark.parametrize("layout", [{}, {"batch": 1, "lengths": (20, 21)}, {"bounds": ((2, 41), (0, 33))}], ids=str)
def test_repeats_bit_for_bit_and_leaves_its_inputs_alone(layout: dict[str, Any]) -> None:
    again = case(**layout)
    inputs = make_inputs(again)
    kept = [x.clone() for x in inputs]
    first, second = run(again, inputs), run(again, inputs)
    assert all(compare_bitwise(name, second[name], first[name]).ok for name in first)
    assert all(compare_bitwise("input", x, y).ok for x, y in zip(inputs, kept, strict=True))


def test_nan_stays_in_its_head() -> None:
    """NaN in one key head reaches the query heads that read it and no other, forward and backward."""
    dense = case()
    inputs = make_inputs(dense)
    k = inputs.k.clone()
    k[1, 1, 3] = torch.nan
    before, after = run(dense, inputs), run(dense, inputs._replace(k=k))
    for name, x in after.items():
        heads = slice(1, 2) if name in ("dk", "dv") else slice(3, 6)
        assert bool(x[1, heads].isnan().any()), name
        x[1, heads] = before[name][1, heads]
        assert compare_bitwise(name, x, before[name]).ok, name


class LargestTensor(TorchDispatchMode):
    """Records the most elements that any result of an operation holds in memory."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        owned: Iterator[Tensor] = (x for x in tree_leaves(result) if isinstance(x, Tensor))
        self.elements = max([self.elements, *(x.untyped_storage().nbytes() // x.element_size() for x in owned)])
        return result


def test_memory_is_that_of_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is larger than q itself, neither T x T scores nor those of a block and the whole past."""
    monkeypatch.setattr(eager, "BLOCK_Q", 32)
    long = case(batch=1, q_heads=8, kv_heads=1, seq_len=1024, group_size=16, window_size=24)
    inputs = make_inputs(long)
    with LargestTensor() as largest:
        run(long, inputs)
    assert largest.elements == inputs.q.numel() < 8 * 32 * 1024
