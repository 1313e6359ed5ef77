"""How the sequences of a call lie in its tensors, as the kernels' `locate` reads it, and the gradients of its cores."""

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


def core_gradients_in(dq: Tensor, k_core: Tensor, group_size: int, wide: torch.dtype) -> tuple[Tensor, Tensor]:
    """Memory for dk_core and dv_core of `k_core` (B, Hc, C, D), in dtype `wide`: rows of `dq` (B, Hq, T, D), or new.

    Until the last kernel fills dq, only the row of each group's last query is in use: the first rows of a group hold
    its core's gradients, a row of them in P rows of dq where `wide` is P times as wide: (B, Hc, C, P, D / P). Groups
    that are too small for that, or rows that cannot be looked at as `wide`, get tensors (B, Hc, C, D).
    """
    core_heads, num_cores, head_dim = k_core.shape[1:]
    parts = wide.itemsize // dq.itemsize
    aligned = all(size % parts == 0 for size in (head_dim, *dq.stride()[:3]))
    if 2 * parts >= group_size or not aligned or 0 in k_core.shape:
        return torch.empty_like(k_core, dtype=wide), torch.empty_like(k_core, dtype=wide)
    rows = dq.view(wide)
    batch_stride, head_stride, row_stride, _ = rows.stride()
    shape = (dq.shape[0], core_heads, num_cores, parts, head_dim // parts)
    strides = (batch_stride, dq.shape[1] // core_heads * head_stride, group_size * row_stride, row_stride, 1)
    first = rows.storage_offset()
    return rows.as_strided(shape, strides, first), rows.as_strided(shape, strides, first + parts * row_stride)


def core_gradient_layout(dk_core: Tensor, dv_core: Tensor) -> tuple[tuple[int, ...], int]:
    """What kernels are told of tensors from `core_gradients_in`: strides, the last one of dq's rows, and PART.

    PART is how much of a row of dk_core lies in one row of dq, 0 if they do not lie in dq.
    """
    if dk_core.stride() != dv_core.stride():
        raise ValueError("dk_core and dv_core must share their strides")
    if dk_core.dim() == 5:
        return dk_core.stride()[:-1], dk_core.shape[-1]
    return (*dk_core.stride()[:-1], 0), 0
