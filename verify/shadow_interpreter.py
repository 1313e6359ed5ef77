"""Where `shadow` takes hold of Triton's interpreter: arguments, program order, memory operations and assertions."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter

from .shadow_memory import Access, Array
from .shadow_record import ADDRESS, Kind, Record, identity

NOT_KERNELS = (str(Path(triton.__file__).parent), str(Path(__file__).with_name("shadow")))
ALLOCATORS = {
    torch: ("empty", "empty_like", "empty_strided", "empty_permuted"),
    torch.Tensor: ("new_empty", "new_empty_strided"),
}


def kernel_line() -> str:
    """The line that the running kernel is at, and the lines of the device functions that it is in."""
    lines: list[str] = []
    frame: FrameType | None = sys._getframe(1)
    while frame and not isinstance(frame.f_locals.get("self"), interpreter.GridExecutor):
        if not frame.f_code.co_filename.startswith(NOT_KERNELS):
            lines.insert(0, f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}")
        frame = frame.f_back
    return " > ".join(lines)


def poison(dtype: np.dtype[Any], variant: int) -> Any:
    """What a masked lane without `other` holds. Integers are small, so that an unused address does not overflow."""
    if dtype.kind == "f":
        large = 2.0 ** (np.finfo(dtype).maxexp // 2 - 1)  # so that its square is finite
        return (np.nan, large, -large / 2)[variant]
    number = (0x5A5A, 0x2545, 3)[variant]
    return number & {"b": 1}.get(dtype.kind, 0x7F if dtype.itemsize == 1 else 0xFFFF)


POISONS = 3
"""Values that `poison` has: what does not depend on masked lanes is the same for all."""


class Instrument:
    """The interpreter under watch. `order`: programs as launched (0), backwards (1), else shuffled by this seed."""

    def __init__(self, record: Record, order: int, variant: int) -> None:
        self.record, self.order, self.variant = record, order, variant
        self.random = np.random.default_rng(order)
        self.launches = 0
        self.masked_lines: set[str] = set()
        self._arguments: dict[Any, str] = {}
        self._access: Access | None = None

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Put in every hook, and take all of them out again whatever happens."""
        builder = interpreter.interpreter_builder
        hooks: dict[str, Callable[..., Any]] = {
            "set_grid_dim": self._grid, "set_grid_idx": self._program,
            "create_masked_load": self._load, "create_masked_store": self._store,
            "create_atomic_rmw": self._rmw, "create_atomic_cas": self._cas,
            "create_assert": self._assert, "create_assume": self._assume,
        }  # fmt: skip
        later = ("create_atomic_load", "create_atomic_store", "create_atomic_poll")  # from Triton 3.8 on
        hooks |= {name: self._atomically for name in later if hasattr(builder, name)}
        with ExitStack() as stack:
            for name, hook in hooks.items():
                stack.enter_context(_wrapped(builder, name, hook))
            stack.enter_context(_wrapped(interpreter, "_implicit_cvt", self._argument))
            stack.enter_context(_wrapped(interpreter.GridExecutor, "__call__", self._launch))
            for owner, names in ALLOCATORS.items():
                for name in names:
                    stack.enter_context(_wrapped(owner, name, self._allocate))
            # device_assert and the overflow checks of integer arithmetic are silent without
            loud = dataclasses.replace(builder.options, debug=True, sanitize_overflow=True)
            stack.enter_context(_replaced(builder, "options", loud))
            yield

    # --- launches -----------------------------------------------------------------------------------------------------

    def _launch(self, original: Callable[..., Any], executor: Any, *args: Any, **kwargs: Any) -> Any:
        arguments = dict(zip(executor.arg_names, args, strict=False)) | kwargs
        tensors = [pair for name, argument in arguments.items() for pair in _tensors(name, argument)]
        for name, tensor in tensors:
            if tensor.device.type != "cpu":
                raise ValueError(f"{name} must be a CPU tensor to be watched, got one on {tensor.device}")
        self._arguments = {identity(tensor): name for name, tensor in tensors}
        self.record.start_launch(executor.fn.__name__)
        self.launches += 1
        with np.errstate(invalid="ignore", over="ignore"):  # of poisoned lanes
            return original(executor, *args, **kwargs)

    def _argument(self, original: Callable[..., Any], argument: Any) -> Any:
        value = original(argument)
        if hasattr(argument, "data_ptr"):
            tensor = interpreter._unwrap_tensor(argument)
            tag = self.record.tag(tensor, self._arguments.get(identity(tensor), "an argument"))
            value.handle.data = value.handle.data + np.uint64(tag)
        return value

    def _grid(self, original: Callable[..., Any], *grid: int) -> None:
        original(*grid)
        programs = np.arange(np.prod(grid))
        order = {0: programs, 1: programs[::-1]}.get(self.order)
        order = self.random.permutation(programs) if order is None else order
        self._programs = np.stack(np.unravel_index(order, grid), axis=1).reshape(*grid, 3).tolist()

    def _program(self, original: Callable[..., Any], x: int, y: int, z: int) -> None:
        program = tuple(self._programs[x][y][z])
        self.record.order.start(program)
        original(*program)

    def _allocate(self, original: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        tensor = original(*args, **kwargs)
        if type(tensor) is Tensor and tensor.device.type == "cpu" and tensor.numel():
            self.record.storage("allocated memory", tensor).declare_writable(tensor)
        return tensor

    # --- memory -------------------------------------------------------------------------------------------------------

    def _check(self, access: Access, pointers: Any, mask: Any, *, reads: bool = True) -> tuple[Any, Any]:
        """The real pointers, and the mask without the lanes that are out of bounds."""
        size = interpreter._get_np_dtype(pointers.get_element_ty()).itemsize
        lanes = np.asarray(mask.data)  # that of a tensor descriptor is no TensorHandle before Triton 3.8
        allowed = self.record.access(self._access or access, pointers.data, lanes, size, reads=reads)
        real = interpreter.TensorHandle(pointers.data & ADDRESS, pointers.dtype)
        return real, interpreter.TensorHandle(allowed, tl.int1)

    def _load(self, original: Callable[..., Any], ptrs: Any, mask: Any, other: Any, *args: Any, **kwargs: Any) -> Any:
        real, allowed = self._check("load", ptrs, mask)
        if other is None:
            element = ptrs.get_element_ty()
            dtype = interpreter._get_np_dtype(element)
            other = interpreter.TensorHandle(np.full(ptrs.data.shape, poison(dtype, self.variant), dtype), element)
            if not np.asarray(mask.data).all():
                self.masked_lines.add(f"{self.record.kernel}, {kernel_line()}")
        return original(real, allowed, other, *args, **kwargs)

    def _store(self, original: Callable[..., Any], ptrs: Any, value: Any, mask: Any, *args: Any, **kwargs: Any) -> Any:
        real, allowed = self._check("store", ptrs, mask, reads=False)
        return original(real, value, allowed, *args, **kwargs)

    def _rmw(self, original: Callable[..., Any], op: Any, ptr: Any, val: Any, mask: Any, sem: Any, scope: Any) -> Any:
        real, allowed = self._check("atomic", ptr, mask, reads=op.name != "XCHG")
        result = original(op, real, val, allowed, sem, scope)
        self._synchronise(real, allowed.data, sem)
        return result

    def _cas(self, original: Callable[..., Any], ptr: Any, cmp: Any, val: Any, sem: Any, scope: Any) -> Any:
        everywhere = interpreter.TensorHandle(np.ones(ptr.data.shape, np.bool_), tl.int1)
        real, allowed = self._check("atomic", ptr, everywhere)
        spare = np.zeros(ptr.data.shape, np.uint64)  # there is no mask: other lanes get memory of ours
        places = np.uint64(spare.ctypes.data) + np.uint64(8) * np.arange(spare.size, dtype=np.uint64)
        real.data = np.where(allowed.data, real.data, places.reshape(spare.shape))
        result = original(real, cmp, val, sem, scope)
        self._synchronise(real, allowed.data, sem)
        return result

    def _atomically(self, original: Callable[..., Any], ptr: Any, *args: Any) -> Any:
        self._access = "atomic"
        try:
            result = original(ptr, *args)
        finally:
            self._access = None
        self._synchronise(ptr, np.ones(1, np.bool_), args[-2])
        return result

    def _synchronise(self, ptr: Any, allowed: Array, sem: Any) -> None:
        if ptr.data.size == 1 and allowed.all():
            address = int(ptr.data.item()) & int(ADDRESS)
            acquire, release = (word in sem.name for word in ("ACQUIRE", "RELEASE"))
            self.record.order.synchronise(address, acquire=acquire, release=release)

    # --- assertions ---------------------------------------------------------------------------------------------------

    def _assert(self, original: Callable[..., Any], condition: Any, message: Any) -> None:
        failed = int((~np.asarray(condition.data, np.bool_)).sum())
        if failed:
            kind: Kind = "overflow" if "overflow detected" in str(message) else "assertion"
            self.record.add_here(kind, str(message) or "device_assert failed", count=failed)

    def _assume(self, original: Callable[..., Any], condition: Any) -> None:
        self._assert(original, condition, "what tl.assume says is false")


def _tensors(name: str, argument: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a kernel's argument, each with its name."""
    if isinstance(argument, tuple):
        for i, part in enumerate(argument):
            yield from _tensors(f"{name}[{i}]", part)
    elif isinstance(argument, interpreter.TensorDescriptor):
        yield from _tensors(name, argument.base)
    elif hasattr(argument, "data_ptr"):
        yield name, interpreter._unwrap_tensor(argument)


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    own = {name: vars(owner)[name]} if name in vars(owner) else {}
    setattr(owner, name, value)
    try:
        yield
    finally:
        delattr(owner, name)
        for value in own.values():
            setattr(owner, name, value)


def _wrapped(owner: Any, name: str, hook: Callable[..., Any]) -> Any:
    """Call `hook` with what was there before as its first argument."""
    original = getattr(owner, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        return hook(original, *args, **kwargs)

    return _replaced(owner, name, call)
