"""Where no query sees a core token: nothing is pooled, and PyTorch's own attention may take the call."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from cca_attention import CCASpec, Problem, attention, cca_attention, fused
from cca_attention.verify.calls import compare_all, oracle, run
from cca_attention.verify.cases import Case, same_tiles
from cca_attention.verify.inputs import make_inputs
from cca_attention.verify.tolerance import compare

SIZES = {"group_size": 4, "window_size": 6}
SPEC = CCASpec(4, 6)
LONGEST = 9  # tokens of which no query sees a core: window_size + group_size - 1


def case_of(device: str, tokens: int, **options: Any) -> Case:
    shape = {"batch": 2, "q_heads": 4, "kv_heads": 2, "seq_len": tokens, "head_dim": 16, **SIZES, **options}
    return Case(problem=Problem(**{"dtype": "float32", **shape}), schedule=same_tiles(16, 16), device=device)


@pytest.mark.parametrize("pooling", ["last_query", "mean"])
@pytest.mark.parametrize(("tokens", "pooled"), [(LONGEST, 0), (LONGEST + 1, 2)])
def test_nothing_is_pooled_that_no_query_sees(
    device: str, tokens: int, pooled: int, pooling: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups: dict[str, int] = {}

    def counted(name: str, launch: Callable[..., None], *args: Any, **options: Any) -> None:
        groups[name] = args[3].shape[2]
        launch(*args, **options)

    for name in ("launch_pooling", "launch_pooling_backward"):
        monkeypatch.setattr(fused, name, partial(counted, name, getattr(fused, name)))
    case = case_of(device, tokens, pooling=pooling)
    inputs = make_inputs(case)
    found = run(case, inputs, grads=True)
    assert groups.pop("launch_pooling") == pooled
    assert groups == ({"launch_pooling_backward": pooled} if pooled and pooling == "last_query" else {})
    assert all(c.ok for c in compare_all(found, oracle(case, inputs, grads=True)))


@pytest.mark.parametrize("kv_heads", [1, 4])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_torch_gives_the_same_within_the_same_bounds(device: str, dtype: str, kv_heads: int) -> None:
    case = case_of(device, LONGEST, dtype=dtype, kv_heads=kv_heads)
    inputs = make_inputs(case)
    out = attention.causal_attention(*inputs[:3], SPEC.softmax_scale(16))
    assert compare("out", out, oracle(case, inputs)["out"]).ok
    late = case_of(device, LONGEST + 1, dtype=dtype, kv_heads=kv_heads)  # now a query sees a core, unknown to torch
    inputs = make_inputs(late)
    wrong = attention.causal_attention(*inputs[:3], SPEC.softmax_scale(16))
    assert not compare("out", wrong, oracle(late, inputs)["out"]).ok


CALLS: dict[str, tuple[dict[str, Any], bool]] = {
    "inference": ({}, True),
    "grouped": ({"kv_heads": 1}, True),
    "a query sees a core": ({"tokens": LONGEST + 1}, False),
    "float32": ({"dtype": torch.float32}, False),
    "on the CPU": ({"device": "cpu"}, False),
    "no tokens": ({"tokens": 0}, False),
    "lse": ({"return_lse": True}, False),
    "a backend by name": ({"backend": "triton"}, False),
    "padded": ({"seq_bounds": ((0, 9), (0, 9))}, False),
    "training": ({"grads": True}, False),
    "training, in any order": ({"grads": True, "deterministic": False}, True),
    "training, in any order, a query sees a core": (
        {"grads": True, "deterministic": False, "tokens": LONGEST + 1}, False,
    ),
}  # fmt: skip


@pytest.mark.parametrize("call", CALLS)
def test_who_takes_a_call(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options, dense = CALLS[call]
    options = {"tokens": LONGEST, "dtype": torch.bfloat16, "device": "cuda", "kv_heads": 2, "grads": False, **options}
    tokens, kv_heads = options.pop("tokens"), options.pop("kv_heads")
    made = {name: options.pop(name) for name in ("dtype", "device")} | {"requires_grad": options.pop("grads")}
    taken: list[float] = []

    def watched(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        taken.append(scale)
        return torch.empty_like(q)

    monkeypatch.setattr(attention, "causal_attention", watched)
    # a torch without CUDA aborts when it is to record an operation on fake CUDA tensors
    monkeypatch.setattr(attention._Attention, "apply", torch.no_grad()(attention.forward_op))
    with FakeTensorMode():
        if "seq_bounds" in options:
            options["seq_bounds"] = torch.tensor(options["seq_bounds"], dtype=torch.int32, device=made["device"])
        q, k, v = (torch.empty(2, heads, tokens, 16, **made) for heads in (4, kv_heads, kv_heads))
        out = cca_attention(q, k, v, **SIZES, **options)
        assert (out[0] if isinstance(out, tuple) else out).shape == q.shape
    assert taken == ([0.25] if dense else [])
