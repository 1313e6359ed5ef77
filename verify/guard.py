"""Guard pads: every tensor in a slab of its own, with a stretch on both sides that nobody may touch.

A read of a pad gives NaN (integers: -1) and is seen in the result; a write to one is seen afterwards, bit by bit.
It works on compiled kernels and in the interpreter alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from .tolerance import Comparison, compare_bitwise

PAD_BYTES = 4096
"""On each side; a multiple of every alignment that the compiler looks at, so that it makes the code of normal use."""
ALLOCATIONS = {
    torch: ("empty", "empty_like", "empty_strided", "zeros", "zeros_like", "full", "full_like"),
    torch.Tensor: ("new_empty", "new_empty_strided", "new_zeros", "new_full"),
}


class Guards:
    """The slabs of one run. `place` puts a tensor into one; inside of `allocations` every new tensor gets its own."""

    def __init__(self) -> None:
        self._slabs: list[Tensor] = []

    def __len__(self) -> int:
        return len(self._slabs)

    def place(self, x: Tensor) -> Tensor:
        """A copy of `x` between pads, with its shape and its strides."""
        if x.numel() == 0 or x.device.type == "meta":
            return x
        extent = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)) + 1
        inside = extent * x.element_size()
        slab = torch.tensor([255], dtype=torch.uint8, device=x.device).repeat(inside + 2 * PAD_BYTES)
        view = slab[PAD_BYTES : PAD_BYTES + inside].view(x.dtype)
        view = view.as_strided(x.shape, x.stride(), view.storage_offset())
        view.copy_(x.detach())
        self._slabs.append(slab)
        return view

    @contextmanager
    def allocations(self) -> Iterator[None]:
        """Guard what torch.empty, zeros, full and their relatives make inside of the `with`."""
        before = [(owner, name, getattr(owner, name)) for owner, names in ALLOCATIONS.items() for name in names]
        for owner, name, function in before:
            setattr(owner, name, self._guarded(function))
        try:
            yield
        finally:
            for owner, name, function in before:
                setattr(owner, name, function)

    def _guarded(self, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        @wraps(function)
        def allocate(*args: Any, **kwargs: Any) -> Tensor:
            return self.place(function(*args, **kwargs))

        return allocate

    def comparisons(self) -> list[Comparison]:
        """Whether all pads are as they were, those before the tensors and those behind them."""
        found = []
        for side, where in (("before", slice(0, PAD_BYTES)), ("behind", slice(-PAD_BYTES, None))):
            pads = torch.stack([slab[where].cpu() for slab in self._slabs])
            found.append(compare_bitwise(f"guard pads {side} the tensors", pads, torch.full_like(pads, 255)))
        return found
