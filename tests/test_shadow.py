"""The shadow checker finds planted faults as what they are, and raises no alarm at correct kernels."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from cca_attention.verify import shadow

pytestmark = pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="shadow works in the interpreter only")
check = partial(shadow.check, orders=4)
as_int16 = partial(triton.reinterpret, dtype=tl.int16)
Faults = list[shadow.Fault]


@triton.jit
def copy_kernel(
    x_ptr, out_ptr, n, FIRST: tl.constexpr, MASK_LOAD: tl.constexpr, MASK_STORE: tl.constexpr, BLOCK: tl.constexpr
):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = offs < n
    x = tl.load(x_ptr + offs, mask=inside | (not MASK_LOAD), other=0)
    tl.store(out_ptr + offs, x, mask=(inside | (not MASK_STORE)) & (tl.arange(0, BLOCK) >= FIRST))


@triton.jit
def add_kernel(x_ptr, y_ptr, out_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = offs < n
    x = tl.load(x_ptr + offs, mask=inside)  # without other, but the masked lanes are not used
    y = tl.load(y_ptr + offs, mask=inside, other=0)
    tl.store(out_ptr + offs, x + y, mask=inside)


@triton.jit
def transpose_kernel(x_ptr, out_ptr, x_strides, out_strides, rows, columns, BLOCK: tl.constexpr):
    r = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[:, None]
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = (r < rows) & (c < columns)
    x = tl.load(x_ptr + r * x_strides[0] + c * x_strides[1], mask=inside, other=0)
    tl.store(out_ptr + c * out_strides[0] + r * out_strides[1], x, mask=inside)


@triton.jit
def reduce_kernel(x_ptr, out_ptr, n, OP: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + tl.program_id(0) * n + offs, mask=offs < n)
    if OP == "max":
        result = tl.max(x, axis=0)
    elif OP == "min":
        result = tl.min(x, axis=0)
    else:
        result = tl.sum(x, axis=0)
    tl.store(out_ptr + tl.program_id(0), result)


@triton.jit
def softmax_kernel(x_ptr, out_ptr, x_stride, out_stride, columns, BLOCK: tl.constexpr):
    offs, row = tl.arange(0, BLOCK), tl.program_id(0)
    x = tl.load(x_ptr + row * x_stride + offs, mask=offs < columns, other=-float("inf"))
    weights = tl.exp(x - tl.max(x, axis=0))
    tl.store(out_ptr + row * out_stride + offs, weights / tl.sum(weights, axis=0), mask=offs < columns)


@triton.jit
def matmul_kernel(x_ptr, y_ptr, out_ptr, x_strides, y_strides, rows, columns, inner, BLOCK: tl.constexpr):
    r = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[:, None]
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    total = tl.zeros([BLOCK, BLOCK], tl.float32)
    for start in range(0, inner, BLOCK):
        down, right = start + tl.arange(0, BLOCK)[:, None], start + tl.arange(0, BLOCK)[None, :]
        x = tl.load(x_ptr + r * x_strides[0] + right * x_strides[1], mask=(r < rows) & (right < inner), other=0.0)
        y = tl.load(y_ptr + down * y_strides[0] + c * y_strides[1], mask=(down < inner) & (c < columns), other=0.0)
        total = tl.dot(x, y, total, input_precision="ieee")
    tl.store(out_ptr + r * columns + c, total, mask=(r < rows) & (c < columns))


@triton.jit
def accumulate_kernel(x_ptr, out_ptr, lock_ptr, HOW: tl.constexpr, BLOCK: tl.constexpr):
    """The sum of all of x into one cell, by plain accesses, by an atomic, or under a lock."""
    total = tl.sum(tl.load(x_ptr + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)), axis=0)
    if HOW == "atomic":
        tl.atomic_add(out_ptr, total)
    elif HOW == "unlocked":
        while tl.atomic_cas(lock_ptr, 0, 1) == 1:
            pass
        tl.atomic_xchg(lock_ptr, 0)
        tl.store(out_ptr, tl.load(out_ptr) + total)
    elif HOW == "lock":
        while tl.atomic_cas(lock_ptr, 0, 1) == 1:
            pass
        tl.store(out_ptr, tl.load(out_ptr) + total)
        tl.atomic_xchg(lock_ptr, 0)
    else:
        tl.store(out_ptr, tl.load(out_ptr) + total)


@triton.jit
def last_sums_kernel(x_ptr, part_ptr, count_ptr, out_ptr, SEM: tl.constexpr, PROGRAMS: tl.constexpr):
    """Every program stores a part; the one that arrives last adds all of them."""
    program = tl.program_id(0)
    tl.store(part_ptr + program, tl.load(x_ptr + program) * 2)
    if tl.atomic_add(count_ptr, 1, sem=SEM) == PROGRAMS - 1:
        tl.store(out_ptr, tl.sum(tl.load(part_ptr + tl.arange(0, PROGRAMS)), axis=0))


@triton.jit
def shift_kernel(x_ptr, BY: tl.constexpr):
    """x[i] = x[i + BY], in place, one program an element."""
    here = tl.program_id(0)
    tl.store(x_ptr + here, tl.load(x_ptr + here + BY))


@triton.jit
def scatter_kernel(x_ptr, out_ptr, PER_PROGRAM: tl.constexpr, PER_LANE: tl.constexpr, BLOCK: tl.constexpr):
    """Blocks of x to out, with PER_PROGRAM programs a block and PER_LANE lanes an element."""
    offs = tl.program_id(0) // PER_PROGRAM * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + offs // PER_LANE, tl.load(x_ptr + offs))


@triton.jit
def wide_index_kernel(x_ptr, out_ptr, FACTOR: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(out_ptr + offs, tl.load(x_ptr + ((offs * FACTOR) & (BLOCK - 1))))


@triton.jit
def asserting_kernel(x_ptr, out_ptr, limit, ASSUME: tl.constexpr):
    x = tl.load(x_ptr + tl.program_id(0))
    if ASSUME:
        tl.assume(x < limit)
    else:
        tl.device_assert(x < limit, "x is too large")
    tl.store(out_ptr + tl.program_id(0), x)


@triton.jit
def through_table_kernel(table_ptr, out_ptr, BLOCK: tl.constexpr):
    """One tensor a program, found by its address in a table."""
    row = tl.load(table_ptr + tl.program_id(0)).to(tl.pointer_type(tl.float32))
    offs = tl.arange(0, BLOCK)
    tl.store(out_ptr + tl.program_id(0) * BLOCK + offs, tl.load(row + offs))


@triton.jit
def pick_kernel(x_ptr, y_ptr, out_ptr, BLOCK: tl.constexpr):
    """The first half of x and the second half of y, in one load."""
    offs = tl.arange(0, BLOCK)
    tl.store(out_ptr + offs, tl.load(tl.where(offs < BLOCK // 2, x_ptr, y_ptr) + offs))


@triton.jit
def descriptor_kernel(x, out, BLOCK: tl.constexpr):
    tile = x.load([tl.program_id(0) * BLOCK, 0])
    out.store([tl.program_id(0) * BLOCK, 0], tile)


@triton.jit
def last_wins_kernel(out_ptr):
    tl.atomic_xchg(out_ptr, tl.program_id(0))


# --- the faults -------------------------------------------------------------------------------------------------------


def copy(n: int = 70, grid: int = 3, first: int = 0, mask_load: bool = True, mask_store: bool = True) -> Faults:
    x, out = torch.randn(n), torch.empty(n)
    return check(
        lambda: copy_kernel[grid,](x, out, n, first, mask_load, mask_store, 32), inputs={"x": x}, outputs={"out": out}
    )


def reduction(op: str, dtype: torch.dtype = torch.float32, n: int = 5) -> Faults:
    x, out = torch.arange(3 * n).reshape(3, n).sub(7).to(dtype), torch.empty(3, dtype=dtype)
    return check(lambda: reduce_kernel[3,](x, out, n, op, 8), inputs={"x": x}, outputs={"out": out})


def transpose(x: Tensor, x_strides: tuple[int, ...] | None = None) -> Faults:
    out = torch.empty(x.shape[0] + 3, x.shape[1] + 2).t()[: x.shape[1], : x.shape[0]]
    strides = (x_strides or x.stride(), out.stride())
    return check(lambda: transpose_kernel[2, 3](x, out, *strides, *x.shape, 16), inputs={"x": x}, outputs={"out": out})


def accumulate(how: str, orders: int = 4, x: Tensor | None = None, locks: int = 1) -> Faults:
    x, out, lock = torch.arange(64.0) if x is None else x, torch.zeros(1), torch.zeros(1, dtype=torch.int32)[:locks]

    def launch() -> Tensor:
        accumulate_kernel[4,](x, out, lock, how, 16)
        return out

    state = {"out": out, "lock": lock}
    return check(launch, orders=orders, inputs={"x": x, **state}, scratch=state)


def last_sums(sem: str, clear: bool = True) -> Faults:
    x = torch.arange(8.0)

    def launch() -> Tensor:
        parts, count, out = x.new_empty(8), torch.empty(1, dtype=torch.int32), torch.empty(())
        if clear:
            count.zero_()
        last_sums_kernel[8,](x, parts, count, out, sem, 8)
        return out

    return check(launch, inputs={"x": x})


def shift(by: int) -> Faults:
    x = torch.randn(7)
    return check(lambda: shift_kernel[6,](x, by), inputs={"x": x}, scratch={"x": x})


def scatter(per_program: int, per_lane: int) -> Faults:
    x, out = torch.ones(64), torch.empty(64 // per_program // per_lane)
    return check(lambda: scatter_kernel[4,](x, out, per_program, per_lane, 16), inputs={"x": x}, outputs={"out": out})


def wide_index(factor: int) -> Faults:
    x, out = torch.randn(16), torch.empty(16)
    return check(lambda: wide_index_kernel[1,](x, out, factor, 16), inputs={"x": x}, outputs={"out": out})


def asserting(limit: int, assume: bool = False) -> Faults:
    x, out = torch.arange(5), torch.empty(5, dtype=torch.int64)
    return check(lambda: asserting_kernel[5,](x, out, limit, assume), inputs={"x": x}, outputs={"out": out})


def through_table(beyond: int = 0) -> Faults:
    """Rows of 16 that lie 20 apart, by their addresses; the gaps belong to no tensor."""
    rows, out = torch.randn(3, 20)[:, :16], torch.empty(3, 16)
    table = torch.tensor([row.data_ptr() + beyond for row in rows])
    inputs = {"table": table, "rows": rows}
    return check(lambda: through_table_kernel[3,](table, out, 16), inputs=inputs, outputs={"out": out})


def pick(y_length: int) -> Faults:
    x, y, out = torch.randn(8), torch.randn(16)[:y_length], torch.empty(16)
    return check(lambda: pick_kernel[1,](x, y, out, 16), inputs={"x": x, "y": y}, outputs={"out": out})


def neighbour() -> Faults:
    """The lanes past x are elements of y, in the same allocation."""
    x, y = torch.randn(140).split(70)
    out = torch.empty(70)
    return check(lambda: copy_kernel[3,](x, out, 70, 0, False, True, 32), inputs={"x": x, "y": y}, outputs={"out": out})


def handed_over(written: int, registered: bool) -> Faults:
    """Two launches; the second reads what the first wrote to a scratch."""
    x, out, own = torch.randn(64), torch.empty(64), torch.empty(64)

    def launch() -> None:
        between = own if registered else torch.empty_like(x)
        copy_kernel[2,](x, between, written, 0, True, True, 32)
        copy_kernel[2,](between, out, 64, 0, True, True, 32)

    return check(launch, inputs={"x": x}, outputs={"out": out}, scratch={"own": own} if registered else {})


def returned(n: int) -> Faults:
    x = torch.randn(64)

    def launch() -> tuple[Tensor]:
        out = torch.empty_like(x)
        copy_kernel[2,](x, out, n, 0, True, True, 32)
        return (out,)

    return check(launch, inputs={"x": x})


def to_input() -> Faults:
    x, y = torch.randn(32), torch.randn(32)
    return check(lambda: copy_kernel[1,](x, y, 32, 0, True, True, 32), inputs={"x": x, "y": y})


def in_place(n: int) -> Faults:
    x = torch.randn(64)
    return check(lambda: copy_kernel[2,](x, x, n, 0, True, True, 32), inputs={"x": x}, outputs={"x": x})


def last_wins() -> Faults:
    out = torch.empty(1, dtype=torch.int32)
    return check(lambda: last_wins_kernel[3,](out), outputs={"out": out})


def add(dtype: torch.dtype = torch.float32) -> Faults:
    x, y, out = torch.arange(70).to(dtype), torch.ones(70).to(dtype), torch.empty(70, dtype=dtype)
    return check(lambda: add_kernel[3,](x, y, out, 70, 32), inputs={"x": x, "y": y}, outputs={"out": out})


def halves(written: int, view: Callable[[Tensor], object] = lambda x: x.view(torch.int16)) -> Faults:
    """Float32 elements, `written` halves of them as int16, and then read whole."""
    x, out = torch.randn(35), torch.empty(35)

    def launch() -> None:
        copy_kernel[3,](view(x), view(out), written, 0, True, True, 32)
        add_kernel[2,](out, x, out, 35, 32)

    return check(launch, inputs={"x": x}, outputs={"out": out})


def host_fills(first: int) -> Faults:
    """A kernel writes a half, torch what comes from `first` on."""
    x, out = torch.randn(64), torch.empty(64)

    def launch() -> None:
        copy_kernel[1,](x, out, 32, 0, True, True, 32)
        out[first:] = 1.0

    return check(launch, inputs={"x": x}, outputs={"out": out})


def softmax() -> Faults:
    x, out = torch.randn(4, 13)[:, 2:9], torch.empty(4, 7)
    return check(lambda: softmax_kernel[4,](x, out, 13, 7, 7, 16), inputs={"x": x}, outputs={"out": out})


def matmul() -> Faults:
    x, y, out = torch.randn(20, 37), torch.randn(23, 37).t(), torch.empty(20, 23)
    return check(
        lambda: matmul_kernel[2, 2](x, y, out, x.stride(), y.stride(), 20, 23, 37, 16),
        inputs={"x": x, "y": y},
        outputs={"out": out},
    )


def descriptor(rows: int, grid: int = 2) -> Faults:
    x, out = torch.randn(rows, 8), torch.empty(rows, 8)
    made = [TensorDescriptor.from_tensor(tensor, [8, 8]) for tensor in (x, out)]
    return check(lambda: descriptor_kernel[grid,](*made, 8), inputs={"x": x}, outputs={"out": out})


PLANTED: dict[str, tuple[Callable[[], Faults], str]] = {
    "the tail is loaded unmasked": (lambda: copy(mask_load=False), "out_of_bounds"),
    "the tail is stored unmasked": (lambda: copy(mask_store=False), "out_of_bounds"),
    "the tail is in another tensor": (neighbour, "out_of_bounds"),
    "a stride is ignored": (lambda: transpose(torch.randn(21, 66)[:, ::2], (66, 1)), "out_of_bounds"),
    "an address in no tensor": (lambda: through_table(beyond=1 << 40), "out_of_bounds"),
    "an address that is off": (lambda: through_table(beyond=4), "out_of_bounds"),
    "the second of two tensors is too short": (lambda: pick(15), "out_of_bounds"),
    "the first lanes are not written": (lambda: copy(first=2), "unwritten"),
    "the last program is missing": (lambda: copy(grid=2), "unwritten"),
    "half of a tensor updated in place": (lambda: in_place(32), "unwritten"),
    "half of a returned tensor": (lambda: returned(32), "unwritten"),
    "a descriptor's last tile is missing": (lambda: descriptor(20), "unwritten"),
    "a registered scratch is half empty": (lambda: handed_over(32, registered=True), "uninitialised"),
    "a scratch of the launcher is half empty": (lambda: handed_over(32, registered=False), "uninitialised"),
    "half an element is empty": (lambda: halves(69), "uninitialised"),
    "half an element is empty, reinterpreted": (lambda: halves(69, as_int16), "uninitialised"),
    "the host leaves an element empty": (lambda: host_fills(33), "unwritten"),
    "a counter starts from nothing": (lambda: last_sums("acq_rel", clear=False), "uninitialised unwritten"),
    "an input is written": (to_input, "read_only"),
    "a sum without other": (lambda: reduction("sum"), "masked_lane"),
    "a maximum without other": (lambda: reduction("max"), "masked_lane"),
    "a minimum without other": (lambda: reduction("min"), "masked_lane"),
    "a sum of integers without other": (lambda: reduction("sum", torch.int64), "masked_lane"),
    "a sum in half precision without other": (lambda: reduction("sum", torch.float16), "masked_lane"),
    "read, add, write without an atomic": (lambda: accumulate("plain"), "race"),
    "read, add, write after a lock is released": (lambda: accumulate("unlocked"), "race"),
    "a relaxed counter orders nothing": (lambda: last_sums("relaxed"), "race"),
    "a counter that releases only": (lambda: last_sums("release"), "race"),
    "a counter that acquires only": (lambda: last_sums("acquire"), "race"),
    "a lock out of bounds": (lambda: accumulate("lock", locks=0), "out_of_bounds race"),
    "two programs store one tile": (lambda: scatter(2, 1), "race"),
    "a program reads what the next one writes": (lambda: shift(1), "race"),
    "two lanes store one element": (lambda: scatter(1, 2), "duplicate"),
    "int32 overflow": (lambda: wide_index(1 << 28), "overflow"),
    "device_assert": (lambda: asserting(4), "assertion"),
    "assume": (lambda: asserting(4, assume=True), "assertion"),
    "the last program wins": (last_wins, "order"),
    "an atomic sum of any numbers": (lambda: accumulate("atomic", x=torch.logspace(-4, 4, 64)), "order"),
}

CORRECT: dict[str, Callable[[], Faults]] = {
    "vector add": add,
    "vector add, float16": lambda: add(torch.float16),
    "vector add, int8": lambda: add(torch.int8),
    "vector add, float64": lambda: add(torch.float64),
    "elements of two sizes": lambda: halves(70),
    "elements of two sizes, reinterpreted": lambda: halves(70, as_int16),
    "the host writes the rest": lambda: host_fills(32),
    "copy": copy,
    "no program": lambda: copy(n=0, grid=0),
    "strided copy": lambda: transpose(torch.randn(21, 66)[:, ::2]),
    "tiles of a transposed view": lambda: transpose(torch.randn(33, 21).t()),
    "tiles of an expanded view": lambda: transpose(torch.randn(21, 1).expand(21, 33)),
    "softmax": softmax,
    "matmul": matmul,
    "an atomic sum": lambda: accumulate("atomic"),
    "an atomic sum of any numbers, bits not compared": lambda: accumulate("atomic", 1, torch.logspace(-4, 4, 64)),
    "a sum under a lock": lambda: accumulate("lock"),
    "the last arrival reads all": lambda: last_sums("acq_rel"),
    "no masked lane": lambda: reduction("sum", n=8),
    "in place": lambda: in_place(64),
    "in part": lambda: shift(0),
    "one store an element": lambda: scatter(1, 1),
    "no int32 overflow": lambda: wide_index(1 << 8),
    "device_assert holds": lambda: asserting(5),
    "a table of addresses": through_table,
    "two tensors in one load": lambda: pick(16),
    "a registered scratch": lambda: handed_over(64, registered=True),
    "a scratch of the launcher": lambda: handed_over(64, registered=False),
    "a returned tensor": lambda: returned(64),
    "tensor descriptors": lambda: descriptor(20, grid=3),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_fault_is_found_as_what_it_is(name: str) -> None:
    run, kinds = PLANTED[name]
    faults = run()
    assert {fault.kind for fault in faults} == set(kinds.split()), "\n".join(map(str, faults))


@pytest.mark.parametrize("name", CORRECT)
def test_a_correct_kernel_raises_no_alarm(name: str) -> None:
    assert CORRECT[name]() == []
