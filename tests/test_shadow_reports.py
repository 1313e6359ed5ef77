"""Which accesses race for the shadow checker, what it says of a fault, what it leaves behind and what it refuses."""

from __future__ import annotations

import linecache
import re
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter
from triton.tools.tensor_descriptor import TensorDescriptor

from cca_attention import cca_attention
from cca_attention.verify import shadow

pytestmark = pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="shadow works in the interpreter only")
PAGE = Path(__file__).parents[1] / "docs" / "shadow.md"


@triton.jit
def copy_kernel(x_ptr, out_ptr, n, MASK_STORE: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < n, other=0)
    tl.store(out_ptr + offs, x, mask=(offs < n) | (not MASK_STORE))


@triton.jit
def load_row(ptr, n, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    return tl.load(ptr + offs, mask=offs < n)


@triton.jit
def sum_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    tl.store(out_ptr, tl.sum(load_row(x_ptr, n, BLOCK), axis=0))


@triton.jit
def touch(ptr, ACCESS: tl.constexpr):
    if ACCESS == "load":
        tl.load(ptr)
    elif ACCESS == "store":
        tl.store(ptr, 1.0)
    elif ACCESS == "atomic":
        tl.atomic_add(ptr, 1.0)


@triton.jit
def meet_kernel(ptr, FIRST: tl.constexpr, SECOND: tl.constexpr, THIRD: tl.constexpr):
    """Program 0 does one access to the cell, program 1 the others."""
    if tl.program_id(0) == 0:
        touch(ptr, FIRST)
    else:
        touch(ptr, SECOND)
        touch(ptr, THIRD)


@triton.jit
def publish_kernel(x_ptr, flag_ptr, out_ptr):
    """Program 0 publishes a value, which the others read after the flag."""
    if tl.program_id(0) == 0:
        tl.store(out_ptr, tl.load(x_ptr))
        tl.atomic_store(flag_ptr, 1, sem="release")
    elif tl.atomic_load(flag_ptr, sem="acquire") == 1:
        tl.store(out_ptr + tl.program_id(0), tl.load(out_ptr))


@triton.jit
def mean_kernel(pair, third, out_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    total = tl.load(pair[0] + offs) + tl.load(pair[1] + offs) + third.load([0, 0])
    tl.store(out_ptr + offs, total / 3)


@triton.jit
def relay_kernel(x_ptr, count_ptr, out_ptr):
    """Programs 0 and 1 publish a value each and only release, program 2 only acquires."""
    program = tl.program_id(0)
    if program < 2:
        tl.store(out_ptr + program, tl.load(x_ptr))
        tl.atomic_add(count_ptr, 1, sem="release")
    else:
        tl.atomic_add(count_ptr, 0, sem="acquire")
        tl.store(out_ptr + 2, tl.load(out_ptr) + tl.load(out_ptr + 1))


def copy(n: int = 70, mask_store: bool = True) -> Callable[[], Tensor]:
    x, out = torch.randn(n), torch.empty(n)

    def launch() -> Tensor:
        copy_kernel[3,](x, out, n, mask_store, 32)
        return out

    return launch


# --- what it sees -----------------------------------------------------------------------------------------------------


ACCESSES = ("load", "store", "atomic")


@pytest.mark.parametrize("first", ACCESSES)
@pytest.mark.parametrize("others", [*((access, "") for access in ACCESSES), ("load", "store")], ids="-".join)
def test_two_programs_meet_in_one_cell(first: str, others: tuple[str, str]) -> None:
    cell = torch.zeros(1)
    with shadow.watch(inputs={"cell": cell}, scratch={"cell": cell}) as report:
        meet_kernel[2,](cell, first, *others)
    harmless = {(first, *others)} <= {("load", "load", ""), ("atomic", "atomic", "")}
    assert [fault.kind for fault in report.faults][:1] == ([] if harmless else ["race"])


def test_who_acquires_sees_all_that_released_before() -> None:
    x, count = torch.ones(1), torch.zeros(1, dtype=torch.int32)
    out = torch.empty(3)
    with shadow.watch(inputs={"x": x}, outputs={"out": out}) as report:
        relay_kernel[3,](x, count, out)
    assert report.faults == []


def test_our_kernels_raise_no_alarm() -> None:
    q, k, v, dout = (torch.randn(1, heads, 37, 16) for heads in (2, 1, 1, 2))
    dlse = torch.randn(1, 2, 37)

    def launch() -> dict[str, Tensor]:
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out, lse = cca_attention(*leaves, group_size=4, window_size=8, backend="triton", return_lse=True)
        grads = torch.autograd.grad([out, lse], leaves, [dout, dlse])
        return {"out": out, "lse": lse, "dq": grads[0], "dk": grads[1], "dv": grads[2]}

    assert shadow.check(launch, inputs={"q": q, "k": k, "v": v, "dout": dout, "dlse": dlse}) == []


# --- what it says -----------------------------------------------------------------------------------------------------


def test_a_fault_says_where_it_is() -> None:
    out = torch.empty(70)
    launch = lambda: copy_kernel[3,](torch.ones(70), out, 70, False, 32)  # noqa: E731
    (fault,) = shadow.check(launch, outputs={"out": out})
    assert (fault.kernel, fault.tensor, fault.program, fault.index) == ("copy_kernel", "out", (2, 0, 0), (70,))
    assert fault.count == 26
    file, line = fault.line.split(":")
    assert file == Path(__file__).name and "tl.store(out_ptr" in linecache.getline(__file__, int(line))
    words = "out_of_bounds: out[70]: store outside of float32[70] with strides (1,) (26 times); in copy_kernel, program"
    assert str(fault).startswith(words)


@pytest.mark.parametrize(
    ("scratch", "index"),
    [
        (torch.empty(3, 4).t(), (2, 0)),
        (torch.empty(9)[3:], (2,)),
        (torch.empty(4, 1).t(), (0, 2)),
        (torch.empty(6, 1).expand(6, 5), (2, 0)),
    ],
    ids=["transposed", "offset", "one row", "expanded"],
)
def test_an_element_of_a_view_is_told_by_its_indices(scratch: Tensor, index: tuple[int, ...]) -> None:
    x = torch.ones(4)
    with shadow.watch(scratch={"scratch": scratch}) as report:
        copy_kernel[1,](x, scratch, 2, True, 4)
        copy_kernel[1,](scratch, x, 4, True, 4)
    (fault,) = report.faults
    assert (fault.kind, fault.tensor, fault.index, fault.count) == ("uninitialised", "scratch", index, 2)


def test_lanes_out_of_bounds_are_not_run() -> None:
    slab = torch.zeros(96)
    with shadow.watch() as report:
        copy_kernel[3,](torch.ones(70), slab[:70], 70, False, 32)
    assert [fault.kind for fault in report.faults] == ["out_of_bounds"]
    assert slab.sum() == 70
    with pytest.raises(shadow.ShadowError, match=r"out_of_bounds: out_ptr\[70\]") as error:
        report.raise_if_any()
    assert error.value.faults == report.faults


def test_masked_lanes_are_named_and_hold_nan() -> None:
    x, out = torch.ones(5), torch.empty(1)
    with shadow.watch(inputs={"x": x}, outputs={"out": out}) as report:
        sum_kernel[1,](x, out, 5, 8)
    assert report.faults == [] and out.isnan().all()
    (line,) = report.masked_lines
    place = re.fullmatch(r"sum_kernel, test_shadow_reports.py:(\d+) > test_shadow_reports.py:(\d+)", line)
    assert place is not None
    assert "load_row(x_ptr" in linecache.getline(__file__, int(place[1]))
    assert "tl.load(ptr" in linecache.getline(__file__, int(place[2]))


def test_tensors_without_a_name_are_called_as_the_kernel_calls_them() -> None:
    with shadow.watch() as report:
        full, empty = torch.ones(4, 4), torch.empty(4, 4)
        mean_kernel[1,]((full, empty), TensorDescriptor.from_tensor(torch.empty(4, 4), [4, 4]), full, 4)
    found = [(fault.kind, fault.tensor) for fault in report.faults]
    assert found == [("uninitialised", "pair[1]"), ("uninitialised", "third")]


def test_every_call_of_check_finds_the_tensors_as_they_were() -> None:
    x, seen = torch.zeros(6), []

    def launch() -> None:
        seen.append(x.sum().item())
        copy_kernel[1,](torch.ones(6), x, 6, True, 8)

    assert shadow.check(launch, inputs={"x": x}, outputs={"x": x}, orders=2) == []
    assert seen == [0.0, 0.0]


@pytest.mark.parametrize("order", range(4))
def test_every_order_runs_every_program_once(order: int) -> None:
    program = torch.zeros(2, 3, 4, dtype=torch.int32)
    seen: list[tuple[int, ...]] = []

    def note(*index: int) -> None:
        seen.append(index)
        set_grid_idx(*index)

    set_grid_idx = interpreter.interpreter_builder.set_grid_idx
    interpreter.interpreter_builder.set_grid_idx = note
    try:
        with shadow.watch(order=order):
            copy_kernel[2, 3, 4](program, program, 0, True, 32)
    finally:
        del interpreter.interpreter_builder.set_grid_idx
    launched = [tuple(index) for index in (program == 0).nonzero().tolist()]
    assert sorted(seen) == launched
    assert (seen == launched, seen == launched[::-1]) == (order == 0, order == 1)


# --- what it leaves behind, and what it refuses -----------------------------------------------------------------------


def hooked() -> list[Any]:
    """What a watch replaces, as it is now."""
    builder = interpreter.interpreter_builder
    own = {
        name: value for name, value in vars(builder).items() if not name.startswith("grid_")
    }  # a launch leaves these
    functions = [torch.empty, torch.empty_like, torch.empty_strided, torch.Tensor.new_empty]
    return [*functions, interpreter._implicit_cvt, interpreter.GridExecutor.__call__, own]


def test_everything_is_restored_also_after_an_exception() -> None:
    before = hooked()
    with pytest.raises(ZeroDivisionError), shadow.watch():
        assert all(now != then for now, then in zip(hooked(), before, strict=True))
        raise ZeroDivisionError
    assert hooked() == before
    with pytest.raises(interpreter.InterpreterError):
        shadow.check(lambda: copy_kernel[1,](None, torch.empty(3), 3, True, 4))
    assert hooked() == before
    assert shadow.check(copy()) == []


def test_a_watch_does_not_nest() -> None:
    def launch() -> None:
        with shadow.watch():
            pass

    with pytest.raises(RuntimeError, match="does not nest"):
        shadow.check(launch)
    assert shadow.check(copy()) == []


def test_a_watch_without_a_launch_has_checked_nothing() -> None:
    with pytest.raises(RuntimeError, match="no kernel was launched"), shadow.watch():
        pass


def test_outside_of_the_interpreter_it_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"):
        shadow.check(copy())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"inputs": {"x": 1.0}}, TypeError, r"inputs\['x'\] must be a torch.Tensor, got float"),
        ({"outputs": {"x": torch.empty(1, device="meta")}}, ValueError, r"outputs\['x'\] must be a strided CPU tensor"),
        ({"scratch": {"x": torch.eye(2).to_sparse()}}, ValueError, r"scratch\['x'\] must be a strided CPU tensor"),
        ({"orders": 0}, ValueError, "orders must be at least 1, got 0"),
    ],
)
def test_bad_arguments_are_refused_by_name(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        shadow.check(copy(), **arguments)


@pytest.mark.parametrize(("arguments", "name"), [({"order": -1}, "order"), ({"poison": 3}, "poison")])
def test_bad_options_of_watch_are_refused(arguments: dict[str, int], name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be"), shadow.watch(**arguments):  # type: ignore[arg-type]
        pass


def test_a_launch_returns_tensors() -> None:
    launch = copy()
    with pytest.raises(TypeError, match=r"got float as returned\[1\]"):
        shadow.check(lambda: (launch(), 1.0))


# --- newer Triton, and the page ---------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(tl, "atomic_load"), reason="this Triton has no atomic loads and stores")
def test_atomic_loads_and_stores_order_programs() -> None:
    x, flag, out = torch.ones(1), torch.zeros(1, dtype=torch.int32), torch.zeros(3)
    state = {"flag": flag, "out": out}
    launch = lambda: publish_kernel[3,](x, flag, out)  # noqa: E731
    faults = shadow.check(launch, inputs={"x": x, **state}, scratch=state, orders=1)
    assert faults == []


def test_the_example_of_the_page_prints_what_the_page_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    example, said = re.findall(r"```(?:python|text)\n(.*?)```", PAGE.read_text(), re.DOTALL)
    script = tmp_path / "example.py"
    script.write_text(example)
    runpy.run_path(str(script))
    assert capsys.readouterr().out == said
