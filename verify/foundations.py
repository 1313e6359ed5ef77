"""What everything else rests on, in integers and in the oracles: no kernel takes part."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any, get_args

import torch
from torch.autograd import gradcheck

from ..attention import cca_attention
from ..kernels import reference
from ..problem import Problem
from ..spec import CCASpec, CoreHeads, Pooling
from .cases import Case
from .inputs import make_inputs
from .rounding import Bounded, ErrorModel
from .tolerance import Comparison, compare, compare_bitwise

Foundation = Callable[[], Iterator[tuple[Case | None, list[Comparison]]]]
POOLINGS: tuple[tuple[CoreHeads, Pooling], ...] = tuple(product(get_args(CoreHeads), get_args(Pooling)))


def partition_of_the_past() -> Iterator[tuple[Case | None, list[Comparison]]]:
    """P1 in integers: cores and raw tokens cover 0..i exactly once, at least `w` of them raw, for all small sizes."""
    for g, w in product(range(1, 10), range(1, 20)):
        spec, found = CCASpec(g, w), []
        for i in range(60):
            raw = list(spec.local_range(i))
            cores = [t for core in range(spec.visible_cores(i)) for t in range(core * g, core * g + g)]
            found.append([cores + raw == list(range(i + 1)), w <= len(raw) < w + g if i + 1 >= w else not cores])
        right = torch.tensor(found)
        yield None, [compare_bitwise(f"rows of g={g}, w={w}", right, torch.ones_like(right))]


def two_oracles_agree() -> Iterator[tuple[Case | None, list[Comparison]]]:
    """The oracle as a dense mask and as a loop over rows, written apart, in float64."""
    for (core_heads, pooling), tokens in product(POOLINGS, (1, 2, 13, 30)):
        for g, w in ((1, 3), (3, 7), (4, 4), (5, 2)):
            problem = Problem(
                batch=2, q_heads=4, kv_heads=2, seq_len=tokens, head_dim=16, group_size=g, window_size=w,
                core_heads=core_heads, pooling=pooling, dtype="float64",
            )  # fmt: skip
            case = Case(problem=problem, family="rising", seed=tokens)
            q, k, v = make_inputs(case)[:3]
            options: dict[str, Any] = {"group_size": g, "window_size": w, "core_heads": core_heads, "pooling": pooling}
            dense, rows = reference.attention_dense(q, k, v, **options), reference.attention_rowwise(q, k, v, **options)
            model = ErrorModel(q, k, v, case.spec, torch.float64)
            bounds = (model.out.bound, model.lse.bound)
            yield (
                case,
                [
                    compare(name, row, Bounded(right, bound))
                    for name, row, right, bound in zip(("out", "lse"), rows, dense, bounds, strict=True)
                ],
            )


def cache_bookkeeping() -> Iterator[tuple[Case | None, list[Comparison]]]:
    """Spec section 6 in integers: the bytes of a cache, counted token by token."""
    for g, w, (core_heads, _) in product((1, 3, 16), (1, 5, 40), POOLINGS[::2]):
        spec, sizes = CCASpec(g, w, core_heads), {"q_heads": 6, "kv_heads": 2, "head_dim": 24, "element_bytes": 2}
        heads = {"query": 6, "kv": 2}[core_heads]
        held = torch.tensor([spec.cache_bytes(t, batch=3, **sizes) for t in range(100)])
        right = torch.tensor([2 * 2 * 3 * (heads * (t // g) + 2 * (w + g - 1)) * 24 for t in range(100)])
        yield None, [compare_bitwise(f"bytes of g={g}, w={w}, {core_heads}", held, right)]


def oracle_gradcheck() -> Iterator[tuple[Case | None, list[Comparison]]]:
    """P41: the oracle's gradients, and those of the eager path, against finite differences in float64."""
    for core_heads, pooling in POOLINGS:
        problem = Problem(
            batch=1, q_heads=4, kv_heads=2, seq_len=9, head_dim=16, group_size=2, window_size=3,
            core_heads=core_heads, pooling=pooling, dtype="float64",
        )  # fmt: skip
        case = Case(problem=problem, backend="eager")
        tensors = [x.detach().requires_grad_() for x in make_inputs(case)[:3]]
        options: dict[str, Any] = {"group_size": 2, "window_size": 3, "core_heads": core_heads, "pooling": pooling}
        for name, function, given in (
            ("oracle", reference.attention_dense, options),
            ("eager", cca_attention, {**case.arguments(), "return_lse": True}),
        ):
            right = gradcheck(lambda *x, f=function, o=given: f(*x, **o), tensors, fast_mode=True)
            yield case, [compare_bitwise(f"gradcheck of {name}", torch.tensor(right), torch.tensor(True))]


FOUNDATIONS: dict[str, Foundation] = {
    function.__name__: function
    for function in (partition_of_the_past, two_oracles_agree, cache_bookkeeping, oracle_gradcheck)
}
