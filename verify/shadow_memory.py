"""The shadow of memory: what is known of each byte, and which accesses of a launch are ordered before which."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Access = Literal["load", "store", "atomic"]
Array = NDArray[Any]

KNOWN, INITIALISED, WRITTEN, INPUT, WRITABLE = 1, 2, 4, 8, 16
"""Flags of a byte: part of a tensor seen so far; has contents; written in this watch; declared an input; declared an
output or scratch."""


def sentinel(itemsize: int) -> NDArray[np.uint8]:
    """The bytes of an element that nothing wrote: NaN in every float type, and a large number as an integer."""
    head = {1: b"", 2: b"\x7f"}.get(itemsize, b"\xff\x7f")
    return np.frombuffer(b"\xa5" * (itemsize - len(head)) + head, np.uint8)


class Storage:
    """The shadow of one torch storage, which it keeps alive so that no other tensor gets the same addresses.

    While all accesses are whole elements of one size, the first byte of an element stands for all of it.
    """

    def __init__(self, name: str, tensor: Tensor) -> None:
        memory = tensor.untyped_storage()
        self.name, self.whole = name, torch.tensor([], dtype=tensor.dtype).set_(memory)
        self.start, self.nbytes = memory.data_ptr(), memory.nbytes()
        self.content = torch.tensor([], dtype=torch.uint8).set_(memory).numpy()
        self.element = tensor.itemsize
        room = (self.nbytes // 16 + 1) * 16
        self.flags: Array = np.full(room, INITIALISED, np.uint8)
        self.lanes: Array = np.zeros(room, np.int32)
        self.stamps: dict[Access, Array] = {}
        self.filled: list[Tensor] = []

    def has_moved(self) -> bool:
        """Whether torch has resized the storage since, which frees these addresses."""
        return self.whole.untyped_storage().data_ptr() != self.start

    def spread(self) -> None:
        """From now on every byte has its own shadow."""
        for shadow in (self.flags, *self.stamps.values()):
            elements = shadow.reshape(-1, self.element)
            elements[:] = elements[:, :1]
        self.element = 1

    def elements(self, shadow: Array, tensor: Tensor) -> Array:
        """The part of `shadow` (an array of this storage's bytes) under a tensor, writable: [*shape, itemsize]."""
        size, first = tensor.itemsize, tensor.data_ptr() - self.start
        if size != self.element:
            self.spread()
        strides = (*(size * stride for stride in tensor.stride()), 1)
        return np.lib.stride_tricks.as_strided(shadow[first:], (*tensor.shape, size), strides)

    def bytes_of(self, offsets: Array, size: int) -> Array:
        """Where the shadow of `size` bytes at each of `offsets` is: [lanes, 1 or size]."""
        if size != self.element or (offsets & (size - 1)).any():
            self.spread()
        return offsets[:, None] + np.arange(1 if size == self.element else size)

    def declare_input(self, tensor: Tensor) -> None:
        """Nobody may write to `tensor` unless it is declared writable too."""
        self.elements(self.flags, tensor)[...] |= KNOWN | INPUT

    def declare_writable(self, tensor: Tensor) -> None:
        """Nobody may read from `tensor` before it is written, where it is not an input too.

        It is filled, so that what the host writes to it can be noticed.
        """
        flags = self.elements(self.flags, tensor)
        flags |= KNOWN | WRITABLE
        empty = (flags[..., 0] & INPUT) == 0
        flags[empty] &= ~np.uint8(INITIALISED)
        self.elements(self.content, tensor)[empty] = sentinel(tensor.itemsize)
        self.filled.append(tensor)

    def notice_host_writes(self) -> None:
        """Elements that lost their sentinel, but not to a kernel, have been written by torch."""
        for tensor in [] if self.has_moved() else self.filled:
            flags = self.elements(self.flags, tensor)
            changed = (self.elements(self.content, tensor) != sentinel(tensor.itemsize)).any(axis=-1)
            flags[changed & ((flags & INITIALISED) == 0).all(axis=-1)] |= INITIALISED | WRITTEN


@dataclass(frozen=True, slots=True, eq=False)
class View:
    """A tensor as a launch got it. `footprint` says which bytes of its storage a kernel may touch through it."""

    name: str
    storage: Storage
    tensor: Tensor
    footprint: NDArray[np.bool_]

    def describe(self) -> str:
        """The tensor in words."""
        dtype = str(self.tensor.dtype).removeprefix("torch.")
        return f"{dtype}{list(self.tensor.shape)} with strides {self.tensor.stride()}"

    def element(self, offset: int) -> int:
        """How many elements after the tensor's first byte `offset` of the storage is."""
        return (offset - (self.tensor.data_ptr() - self.storage.start)) // self.tensor.itemsize

    def index(self, offset: int) -> tuple[int, ...]:
        """The indices of the element there."""
        index, rest, strides = [0] * self.tensor.dim(), self.element(offset), self.tensor.stride()
        for axis in sorted(range(len(index)), key=lambda axis: -strides[axis]):
            if strides[axis] and self.tensor.shape[axis] > 1:
                index[axis], rest = divmod(rest, strides[axis])
        return tuple(index)


class HappensBefore:
    """Which accesses of the launch so far are ordered before the running program.

    Programs are cut into segments, numbered over the launch. A segment is known to the program that it belongs to, and
    to one that acquires, by an atomic on a single cell, what the other released there: a lock, or a counter of
    arrivals.
    """

    def __init__(self) -> None:
        self.programs: list[tuple[int, ...]] = [()]  # of each segment; segment 0 is before the launch
        self.known: NDArray[np.bool_] = np.ones(1, np.bool_)
        self.released: dict[int, NDArray[np.bool_]] = {}

    @property
    def segment(self) -> int:
        """The segment that runs."""
        return len(self.programs) - 1

    @property
    def program(self) -> tuple[int, ...]:
        """The program that runs."""
        return self.programs[-1]

    def start(self, program: tuple[int, ...]) -> None:
        """The next program begins; it knows nothing of the others."""
        self.known = np.zeros(len(self.programs), np.bool_)
        self.known[0] = True
        self._cut(program)

    def synchronise(self, address: int, *, acquire: bool, release: bool) -> None:
        """The running program does an atomic access to the one cell at `address`."""
        others = self.released.get(address, np.zeros(0, np.bool_))
        if acquire:
            self.known[: len(others)] |= others
        if release:
            mine = self.known.copy()
            mine[: len(others)] |= others
            self.released[address] = mine
            self._cut(self.program)

    def _cut(self, program: tuple[int, ...]) -> None:
        self.programs.append(program)
        self.known = np.append(self.known, True)
