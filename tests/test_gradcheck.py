"""The gradients of the kernels themselves against finite differences in float64: no oracle takes part.

The other checks compare with the oracle's autograd; this one would see a mistake that both share.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from cca_attention import Problem
from cca_attention.attention import cca_attention
from cca_attention.verify.cases import Case, same_tiles
from cca_attention.verify.inputs import make_inputs

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels take float64 in the interpreter only")

BASE: dict[str, Any] = {
    "batch": 1, "q_heads": 2, "kv_heads": 2, "seq_len": 8, "head_dim": 16, "group_size": 2, "window_size": 3,
    "dtype": "float64",
}  # fmt: skip

SHAPES: dict[str, dict[str, Any]] = {
    "base": {"batch": 2},
    "kv_cores": {"q_heads": 4, "core_heads": "kv"},
    "shared_keys": {"q_heads": 4},
    "mean": {"pooling": "mean"},
    "mean_kv_cores": {"q_heads": 4, "pooling": "mean", "core_heads": "kv"},
    "window_below_a_group": {"group_size": 3, "window_size": 1},
    "full_attention": {"group_size": 1},
    "padded_head_dim": {"head_dim": 18},
}


def tensors(case: Case) -> list[Tensor]:
    return [x.detach().requires_grad_() for x in make_inputs(case)[:3]]


@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernels_are_differentiated_exactly(shape: str) -> None:
    case = Case(problem=Problem(**{**BASE, **SHAPES[shape]}), schedule=same_tiles(16, 16))
    function = partial(cca_attention, return_lse=True, **case.arguments())
    assert gradcheck(function, tensors(case), fast_mode=True, check_undefined_grad=False)


@pytest.mark.parametrize("layout", [{"lengths": (5, 0, 3)}, {"bounds": ((0, 7), (2, 8))}], ids=str)
def test_packed_and_padded(layout: dict[str, Any]) -> None:
    batch = 1 if "lengths" in layout else 2
    case = Case(problem=Problem(**{**BASE, "batch": batch}), schedule=same_tiles(16, 16), **layout)
    function = partial(cca_attention, **case.arguments(), **case.layout_arguments())
    inputs = [x.nan_to_num(0.5).detach().requires_grad_() for x in tensors(case)]  # padding has no effect, but no NaN
    assert gradcheck(function, inputs, fast_mode=True, check_undefined_grad=False)


def test_a_wrong_gradient_is_seen() -> None:
    """The check can fail: the values count twice in the output and once in the gradient."""
    case = Case(problem=Problem(**{**BASE, "seq_len": 3}), backend="eager")

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return cca_attention(q, k, v + v.detach(), **case.arguments())

    assert not gradcheck(function, tensors(case), fast_mode=True, raise_exception=False)


def test_a_second_derivative_is_refused() -> None:
    case = Case(problem=Problem(**{**BASE, "seq_len": 5}), schedule=same_tiles(16, 16))
    q, k, v = tensors(case)
    (dq,) = torch.autograd.grad(cca_attention(q, k, v, **case.arguments()).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(dq.sum(), k)
