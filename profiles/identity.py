"""What a profile is for: a GPU, the software on it, a model's semantics, the source of the kernels."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from pydantic import PositiveFloat

from ..problem import Problem
from ..spec import CoreHeads, Pooling
from .evidence import Part, Size


@lru_cache(maxsize=256)
def plain(name: str) -> str:
    """A GPU's name as names are compared: letters and digits only, without the vendor."""
    return "".join(c for c in name.lower().replace("nvidia", "").replace("amd", "") if c.isalnum())


class DeviceIdentity(Part):
    """The GPU that the configs are for: its silicon, and in `names` every name that it answers to."""

    name: str
    vendor: str
    arch: str
    names: tuple[str, ...]
    sm_count: Size
    shared_bytes_per_block: Size
    l2_bytes: Size
    hbm_bytes: Size
    hbm_gbps: PositiveFloat


class Software(Part):
    """Versions, as strings: a YAML number would read "3.10" as 3.1. `fp_fusion`: what Triton was told of it."""

    cca_attention: str
    triton: str
    torch: str
    python: str
    cuda: str | None = None
    ptxas: str | None = None
    driver: str | None = None
    fp_fusion: bool | None = None


class Semantics(Part):
    """What the model computes. A profile is never applied to another model than this describes."""

    group_size: Size
    window_size: Size
    core_heads: CoreHeads
    pooling: Pooling

    @classmethod
    def of(cls, problem: Problem) -> Semantics:
        """The semantics of `problem`."""
        return Semantics(**{name: getattr(problem, name) for name in Semantics.model_fields})

    def is_of(self, problem: Problem) -> bool:
        """Whether they are those of `problem`."""
        return all(getattr(problem, name) == getattr(self, name) for name in Semantics.model_fields)


class HeadLayout(Part):
    """Heads of the queries and of the keys, and their dimension."""

    q_heads: Size
    kv_heads: Size
    head_dim: Size


class SemanticBlock(Semantics):
    """The semantics, and the dtypes and head layouts that there are entries for (nothing said: any)."""

    dtypes: tuple[str, ...] = ()
    layouts: tuple[HeadLayout, ...] = ()

    @classmethod
    def describing(cls, semantics: Semantics, problems: Sequence[Problem]) -> SemanticBlock:
        """The block of a profile with entries for these problems."""
        layouts = dict.fromkeys((p.q_heads, p.kv_heads, p.head_dim) for p in problems)
        return cls(
            **{name: getattr(semantics, name) for name in Semantics.model_fields},
            dtypes=tuple(dict.fromkeys(problem.dtype for problem in problems)),
            layouts=tuple(HeadLayout(q_heads=q, kv_heads=kv, head_dim=d) for q, kv, d in layouts),
        )

    @property
    def meaning(self) -> Semantics:
        """The semantics alone."""
        return Semantics(**{name: getattr(self, name) for name in Semantics.model_fields})

    def complaint(self, problem: Problem) -> str | None:
        """Why a profile with this block cannot have an entry for `problem`, or None."""
        if not self.is_of(problem):
            return "has other semantics than the profile"
        if self.dtypes and problem.dtype not in self.dtypes:
            return f"has the dtype {problem.dtype}, the semantic block only {', '.join(self.dtypes)}"
        layout = problem.q_heads, problem.kv_heads, problem.head_dim
        if self.layouts and layout not in ((held.q_heads, held.kv_heads, held.head_dim) for held in self.layouts):
            return "has a head layout that the semantic block does not list"
        return None


class KernelSource(Part):
    """The source that a kernel's configs were tuned and verified on; `abi` is the meaning of their fields."""

    source_hash: str
    abi: Size = 1
