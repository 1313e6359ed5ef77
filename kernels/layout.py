"""How the sequences of one call lie in its tensors, as the kernels' `locate` reads it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .primitives import DENSE, PACKED, ROWS


@dataclass(frozen=True, slots=True)
class Sequences:
    """The layout of one call: one of the constructors below.

    `table` is int32 on the tensors' device, read by the kernels only, so that no length ever reaches the host.
    """

    layout: int
    table: Tensor | None
    count: int

    @classmethod
    def dense(cls, batch: int) -> Sequences:
        """Every row is one sequence over all T tokens."""
        return cls(DENSE.value, None, batch)

    @classmethod
    def padded(cls, bounds: Tensor) -> Sequences:
        """Row b is the sequence at tokens ``bounds[b, 0] .. bounds[b, 1] - 1``; bounds (B, 2) int32."""
        first, end = bounds.unbind(1)
        table = torch.stack((first, first, torch.zeros_like(first), end - first), dim=1)
        return cls(ROWS.value, table.to(torch.int32), bounds.shape[0])

    @classmethod
    def packed(cls, cu_seqlens: Tensor) -> Sequences:
        """Sequence n is at tokens ``cu_seqlens[n] .. cu_seqlens[n + 1] - 1`` of a batch of one; (N + 1,) int32."""
        return cls(PACKED.value, cu_seqlens, cu_seqlens.shape[0] - 1)

    @classmethod
    def chunk(cls, bounds: Tensor, seen: Tensor, room: int) -> Sequences:
        """Row b continues a sequence of `seen[b]` tokens with the queries at ``bounds[b, 0] .. bounds[b, 1] - 1``.

        k and v carry `room` rows before the chunk, so that their row ``room + bounds[b, 0]`` is position
        ``seen[b]``. bounds (B, 2), seen (B,) int32.
        """
        first, end = bounds.unbind(1)
        table = torch.stack((first - seen, room + first - seen, seen, seen + end - first), dim=1)
        return cls(ROWS.value, table.to(torch.int32), bounds.shape[0])

    @property
    def is_packed(self) -> bool:
        """Whether the sequences share one row."""
        return bool(self.layout == PACKED.value)
