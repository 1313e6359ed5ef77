"""What `enable` was asked for, kept as plain values in the model's config: saved and restored with it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from ..spec import CCASpec, CoreHeads, Pooling

NAME = "cca"  # of the attention in transformers, and of the settings in a model's config

Layers = Literal["full", "all"] | Iterable[int]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One model's CCA attention: the arguments of `enable`.

    `layers` are those that are CCA, `replaces` is the attention that the others keep.
    """

    group_size: int = 16
    window_size: int = 1024
    core_heads: CoreHeads = "kv"
    pooling: Pooling = "last_query"
    profile: str | None = "auto"
    layers: list[int] | Literal["all"] = "all"
    replaces: str = "sdpa"

    @classmethod
    def of(cls, config: Any) -> Settings:
        """The settings in a model's config; the defaults if there are none."""
        return cls(**(getattr(config, NAME, None) or {}))

    def save(self, config: Any) -> None:
        """Keep the settings in a model's config."""
        setattr(config, NAME, asdict(self))

    def covers(self, layer: int) -> bool:
        """Whether this layer is CCA."""
        return self.layers == "all" or layer in self.layers

    def spec(self, scale: float | None = None) -> CCASpec:
        """What a layer with this softmax scale computes."""
        return CCASpec(self.group_size, self.window_size, self.core_heads, self.pooling, scale)
