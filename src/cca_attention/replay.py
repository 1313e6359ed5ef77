"""Doing again what a call did before, without the Python that led to its launches.

What CCA attention launches follows from shapes, strides, dtypes and alignments, never from what tensors hold. A call
like an earlier one makes the same new tensors and the same launches; only addresses differ.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from copy import copy
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import driver

from .kernels.enqueue import NOTES, Launch, is_watched
from .kernels.tunable import INTERPRETED

ATEN = torch.ops.aten
EMPTY = {ATEN.empty.memory_format, ATEN.empty_like.default, ATEN.new_empty.default, ATEN.empty_strided.default}
ZERO = {ATEN.zeros.default, ATEN.zeros_like.default}
FULL = {ATEN.full.default: 1, ATEN.new_full.default: 2}
"""Operators that fill a new tensor, and which argument says with what."""

ONCE, NEVER = object(), object()
KNOWN: dict[Any, Any] = {}
"""By what a call depends on: the Replay of what it did; ONCE after the first time, NEVER if it cannot be done again."""
REMEMBERED = 1024

_recording = threading.Lock()


def replayed(
    what: Any, function: Callable[..., tuple[Tensor, ...]], inputs: tuple[Tensor | None, ...]
) -> tuple[Tensor, ...]:
    """``function(*inputs)``, from the third like call on without calling `function`, unless kernels are interpreted.

    Args:
        what: all that `function` depends on apart from its inputs; hashable.
        function: makes new tensors and launches kernels by `enqueue` on these and on its inputs or views of them, and
            does nothing else to any tensor; what it does depends on the metadata of its inputs only. It returns some of
            the tensors that it made. Should it do anything else on a call that is recorded, it is called every time.
        inputs: CUDA tensors of one device, or None.
    """
    if INTERPRETED:
        return function(*inputs)
    key = (what, _order(inputs), inputs[0].device, *map(_described, inputs))  # type: ignore[union-attr]
    known = KNOWN.get(key)
    if isinstance(known, Replay):
        if not any(map(is_watched, known.kernels)):
            return known(inputs)
    elif known is None:  # shapes that come once are not worth recording
        if len(KNOWN) >= REMEMBERED:
            forget()
        KNOWN[key] = ONCE
    elif known is ONCE and _recording.acquire(blocking=False):
        try:
            return _record(key, function, inputs)
        finally:
            _recording.release()
    return function(*inputs)


def forget() -> None:
    """Call every function again, as those must who replace a kernel or what launches it."""
    KNOWN.clear()


def _order(inputs: tuple[Tensor | None, ...]) -> tuple[int, ...]:
    """Which inputs are one and the same tensor: for each, the first place where it stands."""
    first: dict[int, int] = {}
    return tuple([first.setdefault(id(x), i) for i, x in enumerate(inputs)])


def _described(x: Tensor | None) -> Any:
    return None if x is None else (x.shape, x.stride(), x.dtype, x.data_ptr() & 15)


def _record(
    key: Any, function: Callable[..., tuple[Tensor, ...]], inputs: tuple[Tensor | None, ...]
) -> tuple[Tensor, ...]:
    with _Allocations() as made, NOTES.noting() as launches:
        results = function(*inputs)
    if any(compiled is None for _, compiled, *_ in launches):  # watched, this time
        return results
    try:
        KNOWN[key] = Replay(inputs, made, launches, results)
    except _NotReplayable:
        KNOWN[key] = NEVER
    return results


class _NotReplayable(Exception):
    """A call did something else than making tensors and launching kernels on them."""


class _Allocations(TorchDispatchMode):
    """Notes each new tensor and what it is filled with, and whether PyTorch did anything else."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.tensors: list[tuple[Tensor, Any]] = []
        self.others: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in EMPTY:
            self.tensors.append((out, None))
        elif func in ZERO:
            self.tensors.append((out, 0))
        elif func in FULL:
            self.tensors.append((out, args[FULL[func]]))
        elif not func.is_view:
            self.others.append(func)
        return out


class _Address:
    """What a tensor descriptor asks of the tensor that it is of."""

    __slots__ = ("dtype", "value")

    def __init__(self, value: int, dtype: torch.dtype) -> None:
        self.value, self.dtype = value, dtype

    def data_ptr(self) -> int:
        return self.value


class Replay:
    """New tensors by their layout, and launches whose pointers are byte offsets from these and from the inputs."""

    def __init__(
        self,
        inputs: tuple[Tensor | None, ...],
        made: _Allocations,
        launches: list[Launch],
        results: tuple[Tensor, ...],
    ) -> None:
        if made.others:
            raise _NotReplayable(f"PyTorch was asked for {made.others}")
        self.kernels = tuple({id(kernel): kernel for kernel, *_ in launches}.values())
        places = {_place(x, [x for x, _ in made.tensors]) for x in results}
        used = [pair for i, pair in enumerate(made.tensors) if i in places or pair[0].numel()]
        new = [x for x, _ in used]
        self.layouts = [(x.shape, x.stride(), x.dtype, fill) for x, fill in used]
        self.results = tuple(_place(x, new) for x in results)
        self.launches = []
        for _, compiled, grid, args in launches:
            plain, pointers = list(args), []
            for at, arg in enumerate(args):
                tensor = getattr(arg, "base", arg)
                if isinstance(tensor, Tensor):
                    plain[at] = None
                    pointers.append((at, *_source(tensor, inputs, new), _without_tensor(arg, tensor)))
            self.launches.append((compiled, grid, plain, pointers))

    def __call__(self, inputs: tuple[Tensor | None, ...]) -> tuple[Tensor, ...]:
        """What the call did, on other inputs."""
        device = inputs[0].device  # type: ignore[union-attr]
        new = []
        for size, stride, dtype, fill in self.layouts:
            x = torch.empty_strided(size, stride, dtype=dtype, device=device)
            new.append(x if fill is None else x.fill_(fill))
        starts = [0 if x is None else x.data_ptr() for x in inputs]
        starts += [x.data_ptr() for x in new]
        starts.append(0)
        stream = driver.active.get_current_stream(device.index)
        for compiled, grid, plain, pointers in self.launches:
            args = plain.copy()
            for at, source, offset, descriptor in pointers:
                address = starts[source] + offset
                args[at] = address if descriptor is None else _at(descriptor, address)
            compiled[grid](*args, stream=stream)
        return tuple([new[i] for i in self.results])


def _place(x: Tensor, among: list[Tensor]) -> int:
    """Where the tensor `x` is among those that a call made; the objects in Python may be others."""
    wanted = (x.data_ptr(), x.shape, x.stride(), x.dtype)
    for i, other in enumerate(among):
        if (other.data_ptr(), other.shape, other.stride(), other.dtype) == wanted:
            return i
    raise _NotReplayable("a result is not a tensor that the call made")


def _source(x: Tensor, inputs: tuple[Tensor | None, ...], new: list[Tensor]) -> tuple[int, int]:
    """(number among inputs, new tensors and nothing, byte offset) of the memory of `x`."""
    for i, other in enumerate(inputs):
        if other is x:
            return i, 0
    if not x.numel():
        return -1, 0
    where = x.untyped_storage().data_ptr()
    holders = [
        (i, other) for i, other in enumerate((*inputs, *new))
        if other is not None and other.untyped_storage().data_ptr() == where
    ]  # fmt: skip
    if len(holders) != 1:  # the next call's inputs may share their memory in another way
        raise _NotReplayable(f"a kernel was launched on memory of {len(holders)} of the inputs and new tensors")
    ((i, other),) = holders
    return i, x.data_ptr() - other.data_ptr()


def _without_tensor(arg: Any, tensor: Tensor) -> Any:
    """The descriptor `arg` without its tensor, or None for a tensor."""
    return None if arg is tensor else _at(arg, _Address(0, tensor.dtype))


def _at(descriptor: Any, address: Any) -> Any:
    found = copy(descriptor)
    found.base = address if isinstance(address, _Address) else _Address(address, descriptor.base.dtype)
    return found
