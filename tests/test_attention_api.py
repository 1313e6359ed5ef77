"""The front door: what `cca_attention` refuses and how, and that it is a well-behaved PyTorch operator."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from cca_attention import Problem, fused
from cca_attention.attention import cca_attention, choose_backend
from cca_attention.kernels.forward import ForwardConfig
from cca_attention.kernels.tunable import Schedule
from cca_attention.verify.cases import Case, same_tiles
from cca_attention.verify.checks import run
from cca_attention.verify.inputs import make_inputs
from cca_attention.verify.tolerance import compare_bitwise

HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"
SIZES = {"group_size": 4, "window_size": 6}


def make(backend: str = "triton", dtype: str = "float32", **problem: Any) -> Case:
    shape = {"batch": 2, "q_heads": 4, "kv_heads": 2, "seq_len": 13, "head_dim": 16, **SIZES, **problem}
    return Case(problem=Problem(dtype=dtype, **shape), schedule=same_tiles(16, 16), backend=backend, device=DEVICE)


def tensors(q: tuple[int, ...] = (2, 4, 13, 16), kv: tuple[int, ...] = (2, 2, 13, 16)) -> dict[str, Tensor]:
    return {
        "q": torch.zeros(q, device=DEVICE),
        "k": torch.zeros(kv, device=DEVICE),
        "v": torch.zeros(kv, device=DEVICE),
    }


def int32(*values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


# --- what is refused ---------------------------------------------------------------------------------------------

REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"q": [[1.0]]}, TypeError, "q must be a torch.Tensor, got list"),
    ({"k": torch.zeros(2, 13, 16)}, ValueError, "k must have 4 dimensions"),
    (tensors(q=(2, 4, 13, 8), kv=(2, 2, 13, 8)), ValueError, r"head_dim must be in 16\.\.256, got 8"),
    (tensors(q=(2, 4, 13, 257), kv=(2, 2, 13, 257)), ValueError, r"head_dim must be in 16\.\.256, got 257"),
    (tensors(q=(2, 3, 13, 16)), ValueError, "q_heads must be a multiple of kv_heads, got q_heads=3 and kv_heads=2"),
    (tensors(kv=(2, 0, 13, 16)), ValueError, "at least one head, got 4 and 0"),
    (tensors(kv=(2, 2, 12, 16)), ValueError, r"k must have shape \(2, 2, 13, 16\).* got \(2, 2, 12, 16\)"),
    (tensors(kv=(1, 2, 13, 16)), ValueError, "k must have shape"),
    (tensors(kv=(2, 2, 13, 32)), ValueError, "k must have shape"),
    ({"v": torch.zeros(2, 4, 13, 16, device=DEVICE)}, ValueError, r"v must have shape \(2, 2, 13, 16\)"),
    ({"q": torch.zeros(2, 4, 13, 16, dtype=torch.int32)}, TypeError, "q must be float16, .* got torch.int32"),
    ({"q": torch.zeros(2, 4, 13, 16, dtype=torch.complex64)}, TypeError, "q must be float16, .* got torch.complex64"),
    ({"k": torch.zeros(2, 2, 13, 16, dtype=torch.float16, device=DEVICE)}, TypeError, "k must have the dtype of q"),
    ({"k": torch.zeros(2, 2, 13, 16, device="meta")}, ValueError, "k must be on the device of q, .* got meta"),
    ({"v": torch.zeros(2, 2, 16, 13, device=DEVICE).mT}, ValueError, r"v must be contiguous in its last dimension"),
    ({"group_size": 0}, ValueError, "group_size must be at least 1, got 0"),
    ({"group_size": 2.0}, TypeError, "group_size must be an int"),
    ({"window_size": 0}, ValueError, "window_size must be at least 1, got 0"),
    ({"window_size": -3}, ValueError, "window_size must be at least 1, got -3"),
    ({"window_size": True}, TypeError, "window_size must be an int"),
    ({"core_heads": "all"}, ValueError, "core_heads must be one of 'query', 'kv', got 'all'"),
    ({"pooling": "max"}, ValueError, "pooling must be one of 'last_query', 'mean', got 'max'"),
    ({"scale": float("nan")}, ValueError, "scale must be a positive finite number or None, got nan"),
    ({"scale": float("inf")}, ValueError, "scale must be a positive finite number or None, got inf"),
    ({"scale": 0.0}, ValueError, "scale must be a positive finite number or None, got 0.0"),
    ({"scale": -1.0}, ValueError, "scale must be a positive finite number or None, got -1.0"),
    ({"scale": "1"}, ValueError, "scale must be a positive finite number or None, got '1'"),
    ({"backend": "cuda"}, ValueError, "backend must be one of 'auto', 'triton', 'eager', got 'cuda'"),
    ({"deterministic": None}, TypeError, "deterministic must be True or False, got None"),
    ({"cu_seqlens": int32(0, 13)}, ValueError, "cu_seqlens needs a batch of 1 .* got batch 2"),
    ({"seq_bounds": int32([0, 13])}, ValueError, r"seq_bounds must have shape \(2, 2\), got \(1, 2\)"),
    ({"seq_bounds": int32([0, 13], [0, 13]).long()}, TypeError, "seq_bounds must be int32 .* got torch.int64"),
    ({"seq_bounds": int32([0, 3], [0, 3]), "cu_seqlens": int32(0, 13)}, ValueError, "exclude each other"),
    ({"profile": Schedule({"forward": ForwardConfig(block_q=8)})}, ValueError, "forward config cannot run .*block_q 8"),
    ({"profile": Schedule({"forward": ForwardConfig(block_k=48)})}, ValueError, "block_k 48 is not a power of two"),
]  # fmt: skip
PACKED_REFUSED: list[tuple[Tensor, type[Exception], str]] = [
    (int32(0, 13).long(), TypeError, "cu_seqlens must be int32 .* got torch.int64"),
    (int32(0), ValueError, r"cu_seqlens must be contiguous, of shape \(documents \+ 1,\), got \(1,\)"),
    (int32([0, 13]), ValueError, "cu_seqlens must be contiguous, of shape"),
    (int32(0, 5, 5, 13, 13)[::2], ValueError, "cu_seqlens must be contiguous"),
]
# values that only the host can look at: not on a GPU, where reading them would synchronise
VALUES_REFUSED = [
    ("cu_seqlens", int32(0, 5, 12), r"cu_seqlens must rise from 0 to the number of tokens, 13, got \[0, 5, 12\]"),
    ("cu_seqlens", int32(1, 13), "cu_seqlens must rise from 0"),
    ("cu_seqlens", int32(0, 7, 5, 13), "cu_seqlens must rise from 0"),
    ("seq_bounds", int32([0, 14]), "seq_bounds must hold 0 <= first <= end <= 13 in each row"),
    ("seq_bounds", int32([5, 4]), "seq_bounds must hold"),
    ("seq_bounds", int32([-1, 4]), "seq_bounds must hold"),
]


@pytest.mark.parametrize(("change", "error", "message"), REFUSED, ids=[message[:40] for *_, message in REFUSED])
def test_a_bad_argument_is_refused_by_name(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        cca_attention(**{**tensors(), **SIZES, "backend": "triton", **change})


@pytest.mark.parametrize(("cu_seqlens", "error", "message"), PACKED_REFUSED, ids=[m[:40] for *_, m in PACKED_REFUSED])
def test_bad_cu_seqlens_are_refused(cu_seqlens: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        cca_attention(**tensors((1, 4, 13, 16), (1, 2, 13, 16)), **SIZES, cu_seqlens=cu_seqlens)


@pytest.mark.skipif(HAS_GPU, reason="on a GPU these values are not read")
@pytest.mark.parametrize(
    ("name", "value", "message"), VALUES_REFUSED, ids=[f"{n}{v.tolist()}" for n, v, _ in VALUES_REFUSED]
)
def test_bad_sequences_are_refused(name: str, value: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cca_attention(**tensors((1, 4, 13, 16), (1, 2, 13, 16)), **SIZES, **{name: value})


def test_tensors_and_options_are_not_mistaken_for_each_other() -> None:
    with pytest.raises(TypeError):
        cca_attention(*tensors().values(), 4, 6)  # type: ignore[misc]


# --- which backend -----------------------------------------------------------------------------------------------


def test_cuda_tensors_never_get_eager_silently() -> None:
    with FakeTensorMode():
        q = torch.empty(1, 1, 1, 16, device="cuda")
    assert choose_backend("auto", q) == "triton"
    assert choose_backend("eager", q) == "eager"


@pytest.mark.skipif(HAS_GPU, reason="the interpreter is off where there is a GPU")
def test_auto_is_triton_in_the_interpreter() -> None:
    assert choose_backend("auto", torch.empty(1, 1, 1, 16)) == "triton"


def test_auto_is_eager_on_the_cpu_outside_of_the_interpreter() -> None:
    script = (
        "import torch; from cca_attention.attention import cca_attention, choose_backend\n"
        "q = torch.ones(1, 2, 9, 16)\n"
        "print(choose_backend('auto', q), cca_attention(q, q, q, group_size=2, window_size=3).sum().item())\n"
        "try: cca_attention(q, q, q, group_size=2, window_size=3, backend='triton')\n"
        "except ValueError as error: print(error)"
    )
    child = subprocess.run(
        ["env", "-u", "TRITON_INTERPRET", sys.executable, "-c", script], capture_output=True, text=True
    )
    assert child.returncode == 0, child.stderr
    first, second = child.stdout.splitlines()
    assert first == "eager 288.0"
    assert "backend='triton' needs CUDA tensors, or CPU tensors with TRITON_INTERPRET=1" in second


# --- a well-behaved operator -------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["triton", "eager"])
@pytest.mark.parametrize("shape", [(2, 4, 0, 16), (0, 4, 5, 16)], ids=str)
def test_nothing_in_nothing_out(shape: tuple[int, ...], backend: str) -> None:
    kv = (shape[0], 2, *shape[2:])
    q, k, v = (x.requires_grad_() for x in tensors(shape, kv).values())
    out, lse = cca_attention(q, k, v, **SIZES, backend=backend, return_lse=True)
    assert (out.shape, lse.shape) == (shape, shape[:3])
    grads = torch.autograd.grad(out.sum() + lse.sum(), (q, k, v))
    assert [x.shape for x in grads] == [shape, kv, kv]


@pytest.mark.parametrize("backend", ["triton", "eager"])
@pytest.mark.parametrize(("dtype", "wide"), [("float16", torch.float32), ("float32", torch.float32)])
def test_dtypes_shapes_and_strides_of_what_comes_back(dtype: str, wide: torch.dtype, backend: str) -> None:
    case = make(backend, dtype)
    inputs = make_inputs(case)
    results = run(case, inputs, grads=True)
    assert results["out"].dtype == case.dtype and results["lse"].dtype == wide
    assert results["out"].shape == inputs.q.shape and results["lse"].shape == inputs.q.shape[:3]
    for name in "qkv":
        x = getattr(inputs, name)
        assert (results[f"d{name}"].shape, results[f"d{name}"].dtype) == (x.shape, x.dtype)


def test_out_alone_is_the_same_out() -> None:
    case = make()
    inputs = make_inputs(case)
    out = cca_attention(*inputs[:3], **case.arguments())
    assert compare_bitwise("out", out, run(case, inputs)["out"]).ok


@pytest.mark.parametrize("backend", ["triton", "eager"])
def test_the_gradient_of_lse_alone(backend: str) -> None:
    case = make(backend)
    inputs = make_inputs(case)
    q, k, v = (x.detach().requires_grad_() for x in inputs[:3])
    _, lse = cca_attention(q, k, v, return_lse=True, **case.arguments())
    alone = torch.autograd.grad(lse, (q, k, v), inputs.dlse)
    together = run(case, inputs._replace(dout=torch.zeros_like(inputs.dout)), grads=True)
    assert all(compare_bitwise(n, x, together[n]).ok for n, x in zip(("dq", "dk", "dv"), alone, strict=True))
    assert not alone[2].any()  # lse does not depend on the values


@pytest.mark.parametrize("backend", ["triton", "eager"])
def test_a_gradient_of_stride_zero(backend: str) -> None:
    """What ``out.sum().backward()`` passes on: one number, expanded over all four dimensions."""
    case = make(backend)
    inputs = make_inputs(case)
    q, k, v = (x.detach().requires_grad_() for x in inputs[:3])
    found = torch.autograd.grad(cca_attention(q, k, v, **case.arguments()).sum(), (q, k, v))
    ones = inputs._replace(dout=torch.ones_like(inputs.dout), dlse=torch.zeros_like(inputs.dlse))
    expected = run(case, ones, grads=True)
    assert all(compare_bitwise(n, x, expected[n]).ok for n, x in zip(("dq", "dk", "dv"), found, strict=True))


@pytest.mark.parametrize("needed", ["q", "k", "v"])
def test_one_gradient_at_a_time(needed: str) -> None:
    case = make()
    inputs = make_inputs(case)
    leaves = {name: getattr(inputs, name).detach().requires_grad_(name == needed) for name in "qkv"}
    (found,) = torch.autograd.grad(cca_attention(**leaves, **case.arguments()), leaves[needed], inputs.dout)
    silent = inputs._replace(dlse=torch.zeros_like(inputs.dlse))
    assert compare_bitwise(needed, found, run(case, silent, grads=True)[f"d{needed}"]).ok


@pytest.mark.parametrize("backend", ["triton", "eager"])
@pytest.mark.parametrize("layout", ["dense", "packed", "padded"])
def test_the_custom_op_passes_opcheck(layout: str, backend: str) -> None:
    batch = 1 if layout == "packed" else 2
    q, k, v = (x.detach().requires_grad_() for x in make_inputs(make(batch=batch, seq_len=9, q_heads=2))[:3])
    bounds = {"dense": None, "packed": int32(0, 4, 9), "padded": int32([0, 9], [2, 7])}[layout]
    arguments = (q, k, v, bounds, layout == "packed", 4, 6, "query", "last_query", 0.25, backend, "")
    tests = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if layout == "dense" and backend == "triton":
        tests.append("test_aot_dispatch_dynamic")  # compares all outputs: elsewhere some slots hold no core token
    torch.library.opcheck(torch.ops.cca_attention.forward.default, arguments, test_utils=tests)


COMPILERS = ["aot_eager", *(["inductor"] if HAS_GPU or shutil.which("g++") or shutil.which("clang++") else [])]


@pytest.mark.parametrize("backend", ["eager", "triton"])
@pytest.mark.parametrize("compiler", COMPILERS)
def test_compiled_in_one_graph_equals_eager(compiler: str, backend: str) -> None:
    case = make(backend)
    inputs = make_inputs(case)

    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, lse = cca_attention(q * 2, k, v, return_lse=True, **case.arguments())
        return (out * inputs.dout).sum() + (lse * inputs.dlse).sum()

    leaves = [x.detach().requires_grad_() for x in inputs[:3]]
    torch.compiler.reset()
    expected = torch.autograd.grad(loss(*leaves), leaves)
    found = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend=compiler)(*leaves), leaves)
    for name, x, y in zip(("dq", "dk", "dv"), found, expected, strict=True):
        assert compare_bitwise(name, x, y).ok, name


def test_kernels_run_on_the_gpu_of_their_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton launches on the current GPU, which need not be that of q."""
    inside: list[torch.device] = []
    seen: list[tuple[str, list[torch.device]]] = []

    @contextmanager
    def current(x: Tensor) -> Iterator[None]:
        inside.append(x.device)
        yield
        inside.pop()

    def watched(name: str, launch: Callable[..., None]) -> Callable[..., None]:
        def call(*tensors: Any, **options: Any) -> None:
            seen.append((name, list(inside)))
            launch(*tensors, **options)

        return call

    monkeypatch.setattr(torch.cuda, "device_of", current)
    for name in ("launch_pooling", "launch_forward", "launch_delta", "launch_backward_dq"):
        monkeypatch.setattr(fused, name, watched(name, getattr(fused, name)))
    q, k, v = (torch.randn(1, 2, 12, 16, device=DEVICE, requires_grad=True) for _ in range(3))
    cca_attention(q, k, v, group_size=2, window_size=4).sum().backward()
    assert [name for name, _ in seen] == ["launch_pooling", "launch_forward", "launch_delta", "launch_backward_dq"]
    assert all(devices == [q.device] for _, devices in seen)
