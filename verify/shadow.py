"""A checker of memory and order for any Triton kernel, on top of Triton's interpreter; docs/shadow.md explains it.

It needs TRITON_INTERPRET=1 before triton is imported, and CPU tensors. It knows nothing of this project's kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import triton
from torch import Tensor

from .shadow_interpreter import POISONS, Instrument, kernel_line
from .shadow_memory import INITIALISED, WRITTEN
from .shadow_record import Fault, Kind, Record, identity

__all__ = ["Fault", "Kind", "Report", "ShadowError", "check", "watch"]

Tensors = Mapping[str, Tensor]

_running = False


class ShadowError(AssertionError):
    """Kernels broke a rule; `faults` says which."""

    def __init__(self, faults: Sequence[Fault]) -> None:
        super().__init__("\n".join(map(str, faults)))
        self.faults = list(faults)


class Report:
    """What a watch found so far."""

    def __init__(self, record: Record, instrument: Instrument) -> None:
        self._record, self._instrument = record, instrument

    @property
    def faults(self) -> list[Fault]:
        """One fault of each kind for each line and tensor, in the order of their discovery."""
        return list(self._record.faults.values())

    @property
    def masked_lines(self) -> list[str]:
        """The loads that had masked lanes and no `other`: nobody may use these lanes."""
        return sorted(self._instrument.masked_lines)

    def require_contents(self, **tensors: Tensor) -> None:
        """A fault for each tensor, allocated inside of the watch, with an element that nobody wrote."""
        for name, tensor in tensors.items():
            self._record.require(INITIALISED, name, tensor)

    def raise_if_any(self) -> None:
        """Raise ShadowError if there is a fault."""
        if self.faults:
            raise ShadowError(self.faults)


@contextmanager
def watch(
    *,
    inputs: Tensors | None = None,
    outputs: Tensors | None = None,
    scratch: Tensors | None = None,
    order: int = 0,
    poison: int = 0,
) -> Iterator[Report]:
    """Check every kernel launched in the body of the `with`.

    Args:
        inputs: tensors that have contents. No kernel may write to one that is not in `outputs` or `scratch` as well.
        outputs: tensors of which every element must have been written at the end.
        scratch: tensors that may be written. What is in `outputs` or `scratch`, and not in `inputs`, has no contents
            yet: it is filled with a sentinel, and must not be read before it is written.
        order: in which order the programs of a launch run: 0 as launched, 1 backwards, else shuffled by this seed.
        poison: which of three values a masked lane without `other` gets, 0 (NaN in floats), 1 or 2.

    Other tensors that a kernel gets have contents and may be written; those that torch.empty and its relatives make
    inside of the body are scratch. An address outside of all the tensors that a kernel got is a fault, never run.

    Raises:
        RuntimeError: outside of the interpreter, inside of another watch, or when the body launched no kernel.
        TypeError, ValueError: an argument that cannot be watched, by name.
    """
    global _running
    _refuse(order, poison, inputs=inputs, outputs=outputs, scratch=scratch)
    record = Record(kernel_line)
    instrument = Instrument(record, order, poison)
    for name, tensor in (inputs or {}).items():
        record.names[identity(tensor)] = name
        record.storage(name, tensor).declare_input(tensor)
    for name, tensor in {**(outputs or {}), **(scratch or {})}.items():
        record.names[identity(tensor)] = name
        record.storage(name, tensor).declare_writable(tensor)
    _running = True
    try:
        with instrument.installed():
            yield Report(record, instrument)
    finally:
        _running = False
    if not instrument.launches:
        raise RuntimeError("no kernel was launched in the interpreter inside of this watch, so nothing was checked")
    for name, tensor in (outputs or {}).items():
        record.require(WRITTEN, name, tensor)


def _refuse(order: int, poison: int, **groups: Tensors | None) -> None:
    """Raise unless a watch of these tensors can begin."""
    if _running:
        raise RuntimeError("a watch does not nest: one is running already")
    if not triton.knobs.runtime.interpret:
        raise RuntimeError("shadow needs Triton's interpreter: set TRITON_INTERPRET=1 before triton is imported")
    if order < 0:
        raise ValueError(f"order must be at least 0, got {order}")
    if poison not in range(POISONS):
        raise ValueError(f"poison must be 0, 1 or 2, got {poison}")
    for group, tensors in groups.items():
        for name, tensor in (tensors or {}).items():
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{group}[{name!r}] must be a torch.Tensor, got {type(tensor).__name__}")
            if tensor.device.type != "cpu" or tensor.layout != torch.strided:
                raise ValueError(
                    f"{group}[{name!r}] must be a strided CPU tensor, got {tensor.layout} on {tensor.device}"
                )


def check(
    launch: Callable[[], Any],
    *,
    inputs: Tensors | None = None,
    outputs: Tensors | None = None,
    scratch: Tensors | None = None,
    orders: int = 3,
) -> list[Fault]:
    """All faults of what `launch` does, which is called several times and must do the same each time.

    The program order is changed from call to call (as launched, backwards, shuffled), and then what masked lanes
    without `other` hold. The bits of `outputs`, and of the tensors that `launch` returns (one, or a sequence or mapping
    of them), must stay the same; the returned ones must have been written completely.

    Args:
        launch: launches kernels; may return the tensors that it allocated for their results.
        inputs, outputs, scratch: see `watch`. Tensors in any of them are as they were before each call.
        orders: how many program orders to compare. 1 for kernels that add floating-point numbers by atomics, whose
            results depend on the order.

    Raises what `watch` and `launch` raise.
    """
    if orders < 1:
        raise ValueError(f"orders must be at least 1, got {orders}")
    groups = {"inputs": inputs or {}, "outputs": outputs or {}, "scratch": scratch or {}}
    _refuse(0, 0, **groups)
    named = [tensor for group in groups.values() for tensor in group.values()]
    before = [(memory, memory.clone()) for memory in (tensor.untyped_storage() for tensor in named)]
    faults: dict[Any, Fault] = {}

    def run(order: int, poison: int) -> tuple[dict[str, Tensor], list[str]]:
        for memory, contents in before:
            memory.copy_(contents)
        with watch(**groups, order=order, poison=poison) as report:
            returned = _by_name(launch())
            report.require_contents(**returned)
            results = {name: x.detach().clone() for name, x in {**groups["outputs"], **returned}.items()}
        for fault in report.faults:
            faults.setdefault((fault.kind, fault.kernel, fault.tensor, fault.line), fault)
        return results, report.masked_lines

    first, lines = run(0, 0)
    for order in range(1, orders):
        _compare("order", f"other bits in program order {order}", first, run(order, 0)[0], faults)
    for poison in range(1, POISONS if lines else 1):
        detail = f"depends on masked lanes of a load without other: {'; '.join(lines)}"
        _compare("masked_lane", detail, first, run(0, poison)[0], faults)
    return list(faults.values())


def _by_name(returned: Any) -> dict[str, Tensor]:
    """The tensors that a launch returned."""
    if returned is None or isinstance(returned, Tensor):
        named = {} if returned is None else {"returned": returned}
    elif isinstance(returned, Mapping):
        named = dict(returned)
    else:
        named = {f"returned[{i}]": value for i, value in enumerate(returned)}
    for name, value in named.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"launch must return tensors or nothing, got {type(value).__name__} as {name}")
    return named


def _compare(
    kind: Kind, detail: str, first: dict[str, Tensor], second: dict[str, Tensor], faults: dict[Any, Fault]
) -> None:
    """Add a fault for each tensor whose bits differ."""
    for name, expected in first.items():
        bits = [x.contiguous().reshape(*x.shape, 1).view(torch.uint8) for x in (expected, second[name])]
        different = (bits[0] != bits[1]).any(-1)
        if different.any():
            index = tuple(different.nonzero()[0].tolist())
            fault = Fault(kind, "", name, (), index, detail, count=int(different.sum()))
            faults.setdefault((kind, name), fault)
