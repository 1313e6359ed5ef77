"""Where the gradients of the cores lie: in dq until it is filled, so that the backward needs next to no memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cca_attention import CCASpec, Problem, fused
from cca_attention.bench.work import held_bytes
from cca_attention.configs import Configs, problem_of
from cca_attention.kernels.layout import Sequences, core_gradients_in
from cca_attention.kernels.tunable import Schedule
from cca_attention.verify.cases import Case, same_tiles
from cca_attention.verify.checks import run
from cca_attention.verify.inputs import make_inputs
from cca_attention.verify.tolerance import compare_bitwise

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LAUNCHES = ("pooling", "forward", "delta", "backward_dcore", "pooling_backward", "backward_dkv", "backward_dq")
LAYOUTS: dict[str, dict[str, Any]] = {
    "dense": {},
    "transposed": {"layout": "transposed"},
    "packed": {"lengths": (9, 0, 15, 13)},
    "padded": {"bounds": ((3, 37), (0, 29))},
}


def own_memory(dq: Tensor, k_core: Tensor, group_size: int, wide: torch.dtype) -> tuple[Tensor, Tensor]:
    return torch.empty_like(k_core, dtype=wide), torch.empty_like(k_core, dtype=wide)


@pytest.mark.parametrize(("dtype", "core_heads"), [("float16", "query"), ("float32", "kv")])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_bit_depends_on_where_they_lie(
    layout: str, dtype: str, core_heads: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = Problem(
        batch=1 if layout == "packed" else 2, q_heads=4, kv_heads=2, seq_len=37, head_dim=20, group_size=6,
        window_size=5, core_heads=core_heads, dtype=dtype,
    )  # fmt: skip
    case = Case(problem=problem, schedule=same_tiles(16, 16), device=DEVICE, **LAYOUTS[layout])
    inputs = make_inputs(case)
    dims: list[int] = []

    def watched(*args: Any) -> tuple[Tensor, Tensor]:
        found = core_gradients_in(*args)
        dims.append(found[0].dim())
        return found

    monkeypatch.setattr(fused, "core_gradients_in", watched)
    found = run(case, inputs, grads=True)
    monkeypatch.setattr(fused, "core_gradients_in", own_memory)
    expected = run(case, inputs, grads=True)
    assert dims == [5 if layout in ("dense", "transposed") else 4]  # in dq, or not
    assert all(compare_bitwise(name, found[name], expected[name]).ok for name in ("dq", "dk", "dv"))


@pytest.mark.parametrize(("group_size", "dtype"), [(4, torch.float16), (2, torch.float32), (16, torch.float16)])
def test_the_last_query_of_a_group_keeps_its_row(group_size: int, dtype: torch.dtype) -> None:
    dq = torch.zeros(1, 2, 35, 18, dtype=dtype)
    k_core = torch.zeros(1, 2, 35 // group_size, 18, dtype=dtype)
    dk_core, dv_core = core_gradients_in(dq, k_core, group_size, torch.float32)
    dk_core.fill_(1.0), dv_core.fill_(2.0)
    assert (dk_core == 1.0).all() and (dv_core == 2.0).all()
    assert not dq[:, :, group_size - 1 :: group_size].any()
    assert bool(dq.any()) == (group_size == 16)


def test_rows_that_cannot_hold_float32_are_left_alone() -> None:
    dq = torch.zeros(1, 2, 40, 17, dtype=torch.float16)
    dk_core, _ = core_gradients_in(dq, torch.zeros(1, 2, 2, 17, dtype=torch.float16), 16, torch.float32)
    assert dk_core.shape == (1, 2, 2, 17)


class Allocated(TorchDispatchMode):
    """Bytes of the storages that operations made while this is active, none of them given back."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, tuple[Any, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            memory = result.untyped_storage()
            self.storages[memory._cdata] = memory, memory.nbytes()
        return result

    @property
    def total(self) -> int:
        return sum(size for _, size in self.storages.values())


@pytest.mark.parametrize(("kv_heads", "core_heads"), [(32, "query"), (8, "query"), (8, "kv")])
@pytest.mark.parametrize("transposed", [False, True])
def test_memory_is_what_the_backward_cannot_do_without(
    transposed: bool, kv_heads: int, core_heads: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Issue 5: cores, log-sum-exps and delta, and at most 10 % more, over inputs, outputs and gradients."""
    for name in LAUNCHES:
        monkeypatch.setattr(fused, f"launch_{name}", lambda *args, **kwargs: None)
    problem = Problem(q_heads=32, kv_heads=kv_heads, seq_len=131072, head_dim=128, core_heads=core_heads)

    def empty(heads: int) -> Tensor:
        shape = (1, 131072, heads, 128) if transposed else (1, heads, 131072, 128)
        found = torch.empty(shape, dtype=torch.float16, device="meta")
        return found.transpose(1, 2) if transposed else found

    q, k, v, dout = empty(32), empty(kv_heads), empty(kv_heads), empty(32)
    spec, sequences = CCASpec(core_heads=core_heads), Sequences.dense(1)
    configs = Configs(Schedule(), problem_of(q, k, spec), "sm_90")
    with Allocated() as allocated:
        saved = fused.forward(q, k, v, spec, sequences, configs)
        grads = fused.backward(dout, None, q, k, v, *saved, spec, sequences, configs)
    returned = sum(x.untyped_storage().nbytes() for x in (saved[0], *grads))
    assert held_bytes(problem) <= allocated.total - returned <= 1.1 * held_bytes(problem)
