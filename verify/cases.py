"""A case: one call of the operator to check, down to its seed; and schedules that force the tiles of all kernels."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch

from ..attention import Backend
from ..kernels.backward_dkv import BackwardDcoreConfig, BackwardDkvConfig
from ..kernels.backward_dq import BackwardDqConfig
from ..kernels.decode import DecodeConfig
from ..kernels.forward import ForwardConfig
from ..kernels.pooling import PoolingConfig
from ..kernels.tunable import Schedule
from ..problem import Problem
from ..spec import CCASpec


def same_tiles(queries: int, keys: int, *, groups: int = 4, members: int = 16, splits: int = 2) -> Schedule:
    """One choice of tiles for every kernel: queries and keys of a tile, groups and members that are pooled at once."""
    pooling = PoolingConfig(block_c=groups, block_t=members)
    return Schedule(
        {
            "pooling": pooling,
            "pooling_backward": pooling,
            "forward": ForwardConfig(block_q=queries, block_k=keys),
            "backward_dq": BackwardDqConfig(block_q=queries, block_k=keys),
            "backward_dkv": BackwardDkvConfig(block_k=keys, block_q=queries),
            "backward_dcore": BackwardDcoreConfig(block_c=keys, block_q=queries),
            "decode": DecodeConfig(block_k=keys, splits_core=splits, splits_raw=splits),
        }
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One call to check.

    Args:
        problem: shape, semantics and dtype.
        family: the distribution of the values, a key of `inputs.FAMILIES`.
        layout: how the tensors lie in memory, a key of `inputs.LAYOUTS`.
        lengths: of packed documents, adding up to ``problem.seq_len``; the batch is then 1.
        bounds: first and one-past-last real token of each row of a padded batch.
        scale: softmax scale, None for the default.
        schedule: configs to force.
        backend, device: passed on.
        seed: of the values.
    """

    problem: Problem
    family: str = "randn"
    layout: str = "contiguous"
    lengths: tuple[int, ...] | None = None
    bounds: tuple[tuple[int, int], ...] | None = None
    scale: float | None = None
    schedule: Schedule | None = None
    backend: Backend = "triton"
    device: str = "cpu"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.lengths is not None and (sum(self.lengths) != self.problem.seq_len or self.problem.batch != 1):
            raise ValueError(f"lengths {self.lengths} must add up to seq_len of a batch of one, got {self.problem}")
        if self.bounds is not None and len(self.bounds) != self.problem.batch:
            raise ValueError(f"bounds {self.bounds} must be one pair for each row of {self.problem}")

    @property
    def spec(self) -> CCASpec:
        """The semantics, the scale included."""
        p = self.problem
        return CCASpec(p.group_size, p.window_size, p.core_heads, p.pooling, self.scale)

    @property
    def dtype(self) -> torch.dtype:
        """Of q, k and v."""
        dtype: torch.dtype = getattr(torch, self.problem.dtype)
        return dtype

    def sequences(self) -> list[tuple[slice, slice]]:
        """Batch rows and tokens of every sequence; rows that are alike come as one."""
        if self.lengths is not None:
            edges = [0, *accumulate(self.lengths)]
            return [(slice(0, 1), slice(first, end)) for first, end in pairwise(edges)]
        if self.bounds is not None:
            return [(slice(row, row + 1), slice(*bound)) for row, bound in enumerate(self.bounds)]
        return [(slice(None), slice(0, self.problem.seq_len))]

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of `cca_attention` beside the tensors and their layout."""
        p = self.problem
        return {
            "group_size": p.group_size,
            "window_size": p.window_size,
            "core_heads": p.core_heads,
            "pooling": p.pooling,
            "scale": self.scale,
            "profile": self.schedule,
            "backend": self.backend,
        }

    def layout_arguments(self) -> dict[str, Any]:
        """`cu_seqlens` or `seq_bounds`, if the case is packed or padded."""
        if self.lengths is not None:
            edges = [0, *accumulate(self.lengths)]
            return {"cu_seqlens": torch.tensor(edges, dtype=torch.int32, device=self.device)}
        if self.bounds is not None:
            return {"seq_bounds": torch.tensor(self.bounds, dtype=torch.int32, device=self.device)}
        return {}
