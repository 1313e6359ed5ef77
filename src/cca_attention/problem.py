"""The problem: the one value that a config is tuned for, checked on and stored under."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import get_args

from .spec import CCASpec, CoreHeads, Pooling, check_choice, check_positive_int

DTYPES = ("float16", "bfloat16", "float32", "float64")
MAX_HEAD_DIM = 256
MIN_HEAD_DIM = 16


def check_heads(q_heads: int, kv_heads: int, head_dim: int) -> None:
    """Raise unless `kv_heads` divides `q_heads` and `head_dim` is one the kernels take."""
    if q_heads % kv_heads:
        raise ValueError(f"q_heads must be a multiple of kv_heads, got q_heads={q_heads} and kv_heads={kv_heads}")
    if not MIN_HEAD_DIM <= head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"head_dim must be in {MIN_HEAD_DIM}..{MAX_HEAD_DIM}, got {head_dim}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One CCA attention shape. ``str(problem)`` is its name in test ids, journals and profiles.

    Args:
        batch, q_heads, kv_heads, seq_len, head_dim: sizes; `kv_heads` divides `q_heads`.
        group_size, window_size, core_heads, pooling: the semantics, see `CCASpec`.
        dtype: "float16", "bfloat16", "float32" or (interpreter only) "float64".

    Raises:
        TypeError, ValueError: naming the argument, its value and what is allowed.
    """

    batch: int = 1
    q_heads: int
    kv_heads: int
    seq_len: int
    head_dim: int
    group_size: int = 16
    window_size: int = 1024
    core_heads: CoreHeads = "query"
    pooling: Pooling = "last_query"
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        for name in ("batch", "q_heads", "kv_heads", "seq_len", "head_dim", "group_size", "window_size"):
            check_positive_int(name, getattr(self, name))
        check_heads(self.q_heads, self.kv_heads, self.head_dim)
        check_choice("core_heads", self.core_heads, get_args(CoreHeads))
        check_choice("pooling", self.pooling, get_args(Pooling))
        check_choice("dtype", self.dtype, DTYPES)

    def __str__(self) -> str:
        return (
            f"B{self.batch}-H{self.q_heads}.{self.kv_heads}-T{self.seq_len}-D{self.head_dim}"
            f"-g{self.group_size}-w{self.window_size}-{self.core_heads}-{self.pooling}-{self.dtype}"
        )

    @property
    def spec(self) -> CCASpec:
        """The semantic part alone."""
        return CCASpec(self.group_size, self.window_size, self.core_heads, self.pooling)

    @property
    def num_core_heads(self) -> int:
        """Heads of the core tensors."""
        return self.spec.num_core_heads(self.q_heads, self.kv_heads)

    @property
    def element_bytes(self) -> int:
        """Bytes of one element of q, k and v."""
        return {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}[self.dtype]

    def as_dict(self) -> dict[str, int | str]:
        """Field names and values, for JSON and YAML."""
        return {f.name: getattr(self, f.name) for f in fields(self)}
