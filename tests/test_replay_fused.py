"""What `replay` does again, shown without a GPU: forward, backward and decode; and what goes past the operators."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cca_attention import attention, cca_attention

PRELUDE = """
import json, sys
import torch
from triton.runtime import driver
from triton.runtime.jit import JITFunction

launches = []

class Compiled:
    def __init__(self, kernel):
        self.name = kernel.fn.__name__
    def __getitem__(self, grid):
        return lambda *args, stream=None: launches.append((self.name, grid, args))

def run(kernel, *args, grid, warmup, **options):
    values = dict(zip(kernel.arg_names, args)) | options
    launches.append((kernel.fn.__name__, grid, tuple(values[name] for name in kernel.arg_names)))
    return Compiled(kernel)

class Target:
    backend, arch = "cuda", 90

class Driver:
    get_current_stream = get_current_device = staticmethod(lambda *_: 0)
    get_current_target = Target

JITFunction.run = run
driver.set_active(Driver())
torch.cuda.current_device = lambda: 0
from cca_attention import attention, cca_attention, replay
attention.choose_backend = lambda backend, q: "triton"
"""
ATTENTION = """
options = json.loads(sys.argv[1])
heads, kv_heads, batch, tokens = (options.pop(name) for name in ("heads", "kv_heads", "batch", "tokens"))
for name in {"cu_seqlens", "seq_bounds"} & set(options):
    options[name] = torch.tensor(options[name], dtype=torch.int32)

def call():
    q, k, v = (torch.randn(batch, h, tokens, 16, requires_grad=True) for h in (heads, kv_heads, kv_heads))
    out = cca_attention(q, k, v, group_size=16, window_size=32, **options)
    outs = out if isinstance(out, tuple) else (out,)
    dout = [torch.ones_like(x) for x in outs]
    launches_forward = len(launches)
    grads = torch.autograd.grad(outs, (q, k, v), dout)
    return (q, k, v, dout[0]), launches_forward, (*outs, *grads)

def address(x):
    return x.data_ptr() if isinstance(x, torch.Tensor) else x

seen = []
for _ in range(4):
    launches.clear()
    inputs, forward, results = call()
    held = [x.data_ptr() for x in (*inputs, *results)]
    places = [[held.index(address(x)) if address(x) in held else None for x in args] for _, _, args in launches]
    plain = [[x for x in args if not isinstance(x, (torch.Tensor, int))] for _, _, args in launches]
    names = [(name, list(grid)) for name, grid, _ in launches]
    shapes = [(list(x.shape), list(x.stride()), str(x.dtype)) for x in results]
    seen.append(json.dumps((names, places, plain, shapes, forward), default=str))
assert len(set(seen[:2])) == 1, "two calls through Python differ"
assert len(set(seen)) == 1, "what is done again differs"
assert replay.NEVER not in replay.KNOWN.values(), "a call does more than making tensors and launching kernels"
assert [len(known.launches) for known in replay.KNOWN.values()] == [forward, len(launches) - forward]
assert all(not isinstance(x, torch.Tensor) for _, _, args in launches for x in args), "nothing was done again"
print(len(launches))
"""
STEPS = """
from cca_attention import CCACache, CCASpec, cache

cache.choose_backend = attention.choose_backend
options = json.loads(sys.argv[1])
new, spec = options.pop("new", 1), CCASpec(16, 32, core_heads=options.pop("core_heads", "query"))
state = CCACache(
    spec, batch=2, q_heads=4, kv_heads=2, head_dim=16, dtype=torch.float16, device="cpu", rollback=new - 1, **options
)
state.prefill(*(torch.randn(2, h, 40, 16).half() for h in (4, 2, 2)))

def place(x, held):
    at = x.data_ptr() if isinstance(x, torch.Tensor) else x if isinstance(x, int) and x > 2**32 else None
    if at is None:
        return x
    inside = [(i, at - y.data_ptr()) for i, y in enumerate(held) if 0 <= at - y.data_ptr() < y.nbytes]
    return inside or "new"

seen = []
for _ in range(4):
    launches.clear()
    q, k, v = (torch.randn(2, new, h, 16).half().transpose(1, 2) for h in (4, 2, 2))
    out = state.decode(q, k, v)
    held = (q, k, v, out, state._state.core, state._state.raw, state._state.seen)
    steps = [(name, list(grid), [place(x, held) for x in args]) for name, grid, args in launches]
    seen.append(json.dumps((steps, list(out.shape), list(out.stride())), default=str))
assert "new" in seen[0] and len(set(seen[:2])) == 1, "two steps through Python differ"
assert len(set(seen)) == 1, "what is done again differs"
assert replay.NEVER not in replay.KNOWN.values(), "a step does more than making tensors and launching kernels"
assert all(not isinstance(x, torch.Tensor) for _, _, args in launches for x in args), "nothing was done again"
print(len(launches))
"""
CALLS: dict[str, tuple[dict[str, object], int]] = {
    "no core": ({"tokens": 40}, 4),
    "cores": ({"tokens": 100}, 7),
    "mean": ({"tokens": 100, "pooling": "mean"}, 6),
    "cores of kv heads, lse": ({"tokens": 100, "core_heads": "kv", "return_lse": True}, 7),
    "packed": ({"tokens": 100, "cu_seqlens": [0, 30, 100]}, 7),
    "padded": ({"tokens": 100, "batch": 2, "seq_bounds": [[0, 100], [20, 90]]}, 7),
}


STATES: dict[str, dict[str, object]] = {
    "growing": {},
    "of a fixed size": {"max_tokens": 200},
    "cores of kv heads": {"core_heads": "kv"},
    "three tokens": {"new": 3},
}


def printed(script: str, options: dict[str, object]) -> list[str]:
    """What the script prints, in a process without a GPU and without the interpreter."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", PRELUDE + script, json.dumps(options)]
    child = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    return child.stdout.split()


@pytest.mark.parametrize("name", CALLS)
def test_attention_can_be_done_again(name: str) -> None:
    options, count = CALLS[name]
    assert printed(ATTENTION, {"heads": 4, "kv_heads": 2, "batch": 1} | options) == [str(count)]


@pytest.mark.parametrize("name", STATES)
def test_a_decode_step_can_be_done_again(name: str) -> None:
    assert printed(STEPS, STATES[name]) == ["2"]


class Seen(TorchDispatchMode):
    """Notes the operators of ours that PyTorch is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "cca_attention":
            self.names.append(func._opname)
        return func(*args, **(kwargs or {}))


def test_who_looks_on_sees_the_operators_that_others_go_past() -> None:
    q = torch.randn(1, 1, 16, 16, requires_grad=True)
    with Seen() as seen:
        cca_attention(q, q, q, group_size=4, window_size=4, backend="eager").sum().backward()
    assert seen.names == ["forward", "backward"]
    called: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "forward_op", lambda *_: called.append("forward"))
        patch.setattr(attention, "backward_op", lambda *_: called.append("backward"))
        cca_attention(q, q, q, group_size=4, window_size=4, backend="eager").sum().backward()
    assert not called
