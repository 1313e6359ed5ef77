"""When the kernels for Hopper take a call."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
from torch import Tensor

from ...problem import Problem
from ..layout import Sequences
from ..tunable import INTERPRETED, Config, smallest_block_refusal

ARCH = "sm_90"
HEAD_DIMS = (64, 128)
MULTIPROCESSORS = 132
"""Of an H100 or H200 with SXM, for which built-in configs are chosen."""
TESTED = triton.__version__.split(".")[:2] in (["3", "6"], ["3", "7"])
"""Whether this release of Triton is one that the kernels were tested with."""
LEAST_FLOPS = 1e11
"""Below this, what the host takes to describe the tensors to TMA, about 0.1 ms, is more than the GPU saves."""


@lru_cache
def _is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and not torch.version.hip and torch.cuda.get_device_capability(device) == (9, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class HopperConfig(Config):
    """Launch choices of a kernel whose groups of four warps compute."""

    def refusal(self, problem: Problem) -> str | None:
        """Why this config cannot run `problem`, or None."""
        if self.num_warps != 4:
            return f"num_warps {self.num_warps} is not 4, the warps of a matrix instruction"
        if self.num_stages < 2:
            return f"num_stages {self.num_stages} is below 2: a tile is still in use when the next one is"
        return smallest_block_refusal(self, problem) or refusal(problem)


def refusal(problem: Problem) -> str | None:
    """Why none of these kernels can run `problem`, or None."""
    if problem.element_bytes != 2:
        return f"dtype {problem.dtype}: the kernels for Hopper take float16 and bfloat16"
    if problem.head_dim not in HEAD_DIMS:
        return f"head_dim {problem.head_dim}: the kernels for Hopper take 64 and 128"
    return None


def usable(sequences: Sequences, flops: float, *tensors: Tensor) -> bool:
    """Whether these kernels should take a call: dense sequences on a Hopper GPU, in memory that TMA can address.

    flops: about what the call does. tensors: (B, H, T, D) of one dtype. TMA wants 16-byte aligned addresses and
    strides, and no length or stride of 0.
    """
    first = tensors[0]
    return (
        TESTED
        and not INTERPRETED
        and _is_hopper(first.device)
        and sequences.table is None
        and flops >= LEAST_FLOPS
        and first.element_size() == 2
        and first.shape[3] in HEAD_DIMS
        and all(map(_addressable, tensors))
    )


def _addressable(x: Tensor) -> bool:
    strides = [stride * x.element_size() for stride in x.stride()[:-1]]
    return x.data_ptr() % 16 == 0 and 0 not in x.shape and all(s > 0 and s % 16 == 0 for s in strides)
