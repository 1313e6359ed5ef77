"""The rules that `shadow` holds every access of an interpreted kernel to, and the record of what broke them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from .shadow_memory import INITIALISED, INPUT, KNOWN, WRITABLE, WRITTEN, Access, Array, HappensBefore, Storage, View

Kind = Literal[
    "out_of_bounds", "uninitialised", "unwritten", "read_only", "race", "duplicate", "overflow", "assertion",
    "masked_lane", "order",
]  # fmt: skip

CONFLICTS: dict[Access, tuple[Access, ...]] = {
    "load": ("store", "atomic"),
    "store": ("load", "store", "atomic"),
    "atomic": ("load", "store"),
}
"""Which accesses of another program must not meet an access, unless they are ordered."""

ADDRESS_BITS = 48
ADDRESS = np.uint64((1 << ADDRESS_BITS) - 1)
"""A kernel's pointer holds the address in its lower bits, and above them the number of the tensor it was made from."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One sort of fault at one line: where it was seen first, and in how many lanes or elements in all.

    `index` is the element of `tensor`; out of bounds it is one number, counted in elements from the tensor's first.
    """

    kind: Kind
    kernel: str
    tensor: str
    program: tuple[int, ...]
    index: tuple[int, ...]
    detail: str
    line: str = ""
    count: int = 1

    def __str__(self) -> str:
        place = f" {self.tensor}{list(self.index) if self.index else ''}:" if self.tensor else ""
        times = f" ({self.count} times)" if self.count > 1 else ""
        program = f"program {self.program}" if self.program else ""
        where = ", ".join(filter(None, [self.kernel, program, self.line]))
        return f"{self.kind}:{place} {self.detail}{times}" + (f"; in {where}" if where else "")


class Record:
    """The shadows of all tensors of one watch, and its faults. `where` says the running kernel's source line."""

    def __init__(self, where: Callable[[], str]) -> None:
        self.where = where
        self.storages: dict[int, Storage] = {}
        self.names: dict[Hashable, str] = {}
        self.faults: dict[Hashable, Fault] = {}
        self.start_launch("")

    # --- tensors ------------------------------------------------------------------------------------------------------

    def storage(self, name: str, tensor: Tensor) -> Storage:
        """The shadow of the tensor's storage; memory that is seen for the first time counts as initialised."""
        start = tensor.untyped_storage().data_ptr()
        if start not in self.storages or self.storages[start].has_moved():
            self.storages[start] = Storage(name, tensor)
        return self.storages[start]

    def start_launch(self, kernel: str) -> None:
        """Launches run one after the other: only programs of the same one can race."""
        self.kernel, self.order = kernel, HappensBefore()
        self.views: list[View] = []
        for storage in self.storages.values():
            storage.stamps = {}
            storage.notice_host_writes()

    def tag(self, tensor: Tensor, argument: str) -> int:
        """What to add to the address of a kernel's argument to tell what is reached through it."""
        name = self.names.get(identity(tensor), argument)
        storage = self.storage(name, tensor)
        storage.elements(storage.flags, tensor)[...] |= KNOWN
        footprint = np.zeros(len(storage.flags), np.bool_)
        storage.elements(footprint, tensor)[...] = True
        self.views.append(View(name, storage, tensor, footprint))
        return len(self.views) << ADDRESS_BITS

    def require(self, flag: int, name: str, tensor: Tensor) -> None:
        """A fault where a byte of `tensor` lacks `flag`: INITIALISED or WRITTEN."""
        storage = self.storage(name, tensor)
        storage.notice_host_writes()
        storage.spread()
        missing = ((storage.elements(storage.flags, tensor) & flag) == 0).any(axis=-1)
        if missing.any():
            first = tuple(int(i) for i in np.argwhere(missing)[0])
            detail = f"never written, shape {tuple(tensor.shape)}"
            self.add(Fault("unwritten", self.kernel, name, (), first, detail, count=int(missing.sum())))

    # --- faults -------------------------------------------------------------------------------------------------------

    def add(self, fault: Fault) -> None:
        """Keep the first fault of its sort at its line, and count the others."""
        key = (fault.kind, fault.kernel, fault.tensor, fault.line)
        before = self.faults.get(key)
        self.faults[key] = replace(before, count=before.count + fault.count) if before else fault

    def add_here(self, kind: Kind, detail: str, tensor: str = "", index: tuple[int, ...] = (), count: int = 1) -> None:
        """A fault of the running program at its line."""
        self.add(Fault(kind, self.kernel, tensor, self.order.program, index, detail, self.where(), count))

    def _lanes(self, kind: Kind, detail: str, view: View, offsets: Array, bad: Array) -> None:
        if bad.any():
            self.add_here(kind, detail, view.name, view.index(int(offsets[bad][0])), int(bad.sum()))

    # --- accesses -----------------------------------------------------------------------------------------------------

    def access(self, access: Access, pointers: Array, mask: Array, size: int, *, reads: bool) -> NDArray[np.bool_]:
        """Check an access of `size` bytes in each lane of `mask`; `reads` if it uses what is there.

        Returns the lanes that are inside of their tensors: only these may be run.
        """
        flat = pointers.reshape(-1)
        lanes = np.flatnonzero(np.broadcast_to(mask, pointers.shape))
        allowed = np.zeros(flat.shape, np.bool_)
        for view, some in self._by_view(flat, lanes):
            offsets = (flat[some] & ADDRESS).astype(np.int64) - view.storage.start
            allowed[some] = self._check(access, view, offsets, size, reads)
        return allowed.reshape(pointers.shape)

    def _by_view(self, pointers: Array, lanes: Array) -> Iterator[tuple[View, Array]]:
        """Split lanes by the tensor that their pointers were made from."""
        tags = pointers[lanes] >> np.uint64(ADDRESS_BITS)
        first = tags[:1]
        for tag in first if (tags == first).all() else np.unique(tags):
            some = lanes[tags == tag]
            if 0 < tag <= len(self.views):
                yield self.views[int(tag) - 1], some
            else:
                yield from self._by_address(pointers, some)

    def _by_address(self, pointers: Array, lanes: Array) -> Iterator[tuple[View, Array]]:
        """Pointers that came as integers, for instance from a table of addresses in memory."""
        for storage in self.storages.values():
            offsets = pointers[lanes].astype(np.int64) - storage.start
            inside = (offsets >= 0) & (offsets < storage.nbytes)
            if inside.any():
                yield View(storage.name, storage, storage.whole, (storage.flags & KNOWN) != 0), lanes[inside]
                lanes = lanes[~inside]
        if len(lanes):
            address = int(pointers[lanes][0])
            self.add_here("out_of_bounds", f"address {address:#x} is in no tensor", count=len(lanes))

    def _check(self, access: Access, view: View, offsets: Array, size: int, reads: bool) -> NDArray[np.bool_]:
        storage = view.storage
        inside = (offsets >= 0) & (offsets <= storage.nbytes - size)
        cells = storage.bytes_of(np.where(inside, offsets, 0), size)
        inside &= view.footprint[cells].all(axis=1)
        if not inside.all():
            outside = offsets[~inside]
            element, detail = view.element(int(outside[0])), f"{access} outside of {view.describe()}"
            self.add_here("out_of_bounds", detail, view.name, (element,), len(outside))
            offsets, cells = offsets[inside], cells[inside]
        flags = storage.flags[cells]
        if reads:
            unset = ((flags & INITIALISED) == 0).any(axis=1)
            self._lanes("uninitialised", f"{access} of what nothing wrote", view, offsets, unset)
        if access != "load":
            kept = ((flags & (INPUT | WRITABLE)) == INPUT).any(axis=1)
            self._lanes("read_only", f"{access} to an input", view, offsets, kept)
            storage.flags[cells] = flags | (INITIALISED | WRITTEN)
        if access == "store":
            number = np.arange(len(cells), dtype=np.int32)
            storage.lanes[cells[:, 0]] = number
            twice = storage.lanes[cells[:, 0]] != number
            self._lanes("duplicate", "two lanes of one store write here", view, offsets, twice)
        self._race(access, view, offsets, cells)
        return inside

    def _race(self, access: Access, view: View, offsets: Array, cells: Array) -> None:
        """Report accesses that nothing orders after another program's, then stamp the bytes with this one."""
        stamps, known = view.storage.stamps, self.order.known
        for other in CONFLICTS[access]:
            if other in stamps:
                before = stamps[other][cells]
                unordered: Array = ~known[before]
                if unordered.any():
                    program = self.order.programs[int(before[unordered][0])]
                    detail = f"{access} after a {other} by program {program}, unordered"
                    self._lanes("race", detail, view, offsets, np.asarray(unordered.any(axis=1)))
        if access not in stamps:
            stamps[access] = np.zeros(len(view.storage.flags), np.int32)
        mine = stamps[access]
        before = mine[cells]
        # the oldest unordered access stays: a later one by anybody else still meets it
        mine[cells] = np.where(known[before], self.order.segment, before)


def identity(tensor: Tensor) -> Hashable:
    """The same for two tensor objects over the same elements."""
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype
