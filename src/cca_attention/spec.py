"""The semantics of CCA attention and the integers that follow from them.

Notation: positions are 0-based, ``g`` is the group size, ``w`` the window size, ``T`` the sequence length.
Source: Core Context Aware attention, ICML 2025 (arXiv 2412.12465), section 3; where its printed window start
overlaps the last core token by one, the paper's own token count is followed, so that every past token is
represented exactly once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

CoreHeads = Literal["query", "kv"]
Pooling = Literal["last_query", "mean"]


def check_positive_int(name: str, value: object) -> None:
    """Raise unless `value` is an int of at least 1 (a bool is not an int here)."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int of at least 1, got {value!r} ({type(value).__name__})")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


def check_choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    """Raise unless `value` is one of `allowed`."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


@dataclass(frozen=True, slots=True)
class CCASpec:
    """What is computed: group size, window size, who pools, how, and the softmax scale.

    Args:
        group_size: tokens that one core token stands for (``g >= 1``).
        window_size: raw tokens every query sees at least, itself included (``w >= 1``).
        core_heads: "query": every query head pools for itself (the published code);
            "kv": one set of cores for each key/value head, scored by the mean of its query heads.
        pooling: "last_query": softmax weights from the group's last query; "mean": uniform weights.
        scale: softmax scale; None means ``1 / sqrt(head_dim)``.

    Raises:
        TypeError, ValueError: naming the argument, its value and what is allowed.
    """

    group_size: int = 16
    window_size: int = 1024
    core_heads: CoreHeads = "query"
    pooling: Pooling = "last_query"
    scale: float | None = None

    def __post_init__(self) -> None:
        check_positive_int("group_size", self.group_size)
        check_positive_int("window_size", self.window_size)
        check_choice("core_heads", self.core_heads, get_args(CoreHeads))
        check_choice("pooling", self.pooling, get_args(Pooling))
        if self.scale is not None and not (isinstance(self.scale, (int, float)) and 0 < self.scale < math.inf):
            raise ValueError(f"scale must be a positive finite number or None, got {self.scale!r}")

    def num_groups(self, seq_len: int) -> int:
        """Complete groups among `seq_len` tokens: ``floor(T / g)``. An unfinished tail has no core token."""
        return seq_len // self.group_size

    def visible_cores(self, position: int) -> int:
        """Core tokens the query at `position` sees: ``n = max(0, floor((i + 1 - w) / g))``, cores ``0 .. n-1``."""
        return max(0, (position + 1 - self.window_size) // self.group_size)

    def local_range(self, position: int) -> range:
        """Positions of the raw tokens the query at `position` sees: ``n * g .. i``."""
        return range(self.visible_cores(position) * self.group_size, position + 1)

    def max_local_tokens(self) -> int:
        """The most raw tokens any query sees, and what a cache keeps: ``w + g - 1``."""
        return self.window_size + self.group_size - 1

    def softmax_scale(self, head_dim: int) -> float:
        """`scale`, or its default ``1 / sqrt(head_dim)``."""
        return 1.0 / math.sqrt(head_dim) if self.scale is None else float(self.scale)

    def num_core_heads(self, q_heads: int, kv_heads: int) -> int:
        """Heads of the core tensors: `q_heads` for core_heads="query", `kv_heads` for "kv"."""
        return q_heads if self.core_heads == "query" else kv_heads

    def cache_bytes(
        self, seq_len: int, *, batch: int, q_heads: int, kv_heads: int, head_dim: int, element_bytes: int
    ) -> int:
        """Bytes of one layer's decode state: cores of the complete groups and ``w + g - 1`` raw tokens, k and v."""
        cores = self.num_core_heads(q_heads, kv_heads) * self.num_groups(seq_len)
        raw = kv_heads * self.max_local_tokens()
        return 2 * element_bytes * batch * (cores + raw) * head_dim
