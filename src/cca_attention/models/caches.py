"""Caches that transformers' models fill: core tokens and a window of raw ones in each CCA layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, StaticCache

from .. import cache_op
from ..cache import CCACache
from ..cache_state import CacheState
from ..configs import register_profile
from ..spec import CCASpec
from .settings import Settings

ROLLBACK = 64  # the longest draft that assisted decoding may try


class _Layer(CacheLayerMixin):  # type: ignore[misc]
    """What both kinds share: `update` hands the new keys on with a mark, by which the attention function finds it."""

    is_sliding, counts = False, True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.counts:
            self.length += key_states.shape[2]
        key_states.cca_layer = self  # type: ignore[attr-defined]
        return key_states, value_states

    def get_seq_length(self) -> Any:
        return self.length if self.is_initialized else 0

    def get_max_cache_shape(self) -> int:  # its name before transformers 5.17
        return int(self.get_max_length())


class _DynamicLayer(_Layer):
    is_croppable = True

    def __init__(self, settings: Settings, rollback: int) -> None:
        super().__init__()
        self.settings, self.rollback, self.length = settings, rollback, 0
        self.state: CCACache | None = None

    def attend(self, query: Tensor, key: Tensor, value: Tensor, spec: CCASpec, bounds: Tensor | None) -> Tensor:
        if self.state is None:
            self.state = CCACache(
                spec, batch=query.shape[0], q_heads=query.shape[1], kv_heads=key.shape[1], head_dim=query.shape[3],
                dtype=query.dtype, device=query.device, rollback=self.rollback, profile=self.settings.profile,
            )  # fmt: skip
        if bounds is None and self.state.seen:
            return self.state.decode(query, key, value)
        return self.state.prefill(query, key, value, bounds)

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        new = query_length.shape[0] if isinstance(query_length, Tensor) else query_length
        return self.length + new, 0

    def crop(self, tokens_to_remove: int | Tensor) -> None:
        n = int(tokens_to_remove)
        n = min(0, n - self.length) if n > 0 else n  # before transformers 5.17 a positive number is what is kept
        if n and self.state is not None:
            self.state.crop(n)
            self.length += n

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.state is not None:
            self.state.reorder(beam_idx)

    def reset(self) -> None:
        self.state, self.length, self.is_initialized = None, 0, False

    @property
    def nbytes(self) -> int:
        return self.state.nbytes if self.state else 0


class _StaticLayer(_Layer):
    is_compileable = True

    def __init__(self, settings: Settings, q_heads: int, max_cache_len: int, first: _StaticLayer | None) -> None:
        super().__init__()
        self.settings, self.q_heads, self.max_cache_len = settings, q_heads, max_cache_len
        self.first, self.counts = first, first is None  # one kernel a step that counts, in place of one a layer
        self.length, self.empty = torch.zeros((), dtype=torch.int64), True  # empty: as far as the host knows
        self.storage: list[Tensor] = []
        self.state: CacheState | None = None  # on this storage

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        shape = key_states.shape[0], self.q_heads, key_states.shape[1], key_states.shape[3]
        self.storage = cache_op.new_storage(self.settings.spec(), shape, key_states, self.max_cache_len)
        self.state = None
        self.length = self.first.length if self.first else self.length.to(key_states.device)
        if not torch.compiler.is_compiling():
            for tensor in (*self.storage, self.length):
                torch._dynamo.mark_static_address(tensor)
        super().lazy_initialization(key_states, value_states)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, spec: CCASpec, bounds: Tensor | None) -> Tensor:
        how: dict[str, Any] = {"max_tokens": self.max_cache_len, "profile": register_profile(self.settings.profile)}
        empty, self.empty = self.empty, False
        if torch.compiler.is_compiling():
            return cache_op.append(query, key, value, bounds, self.storage, spec, **how, empty=empty)
        if self.state is None or self.state.spec != spec:
            shape = query.shape[0], query.shape[1], key.shape[1], query.shape[3]
            self.state = cache_op.state_on(self.storage, spec, shape, query.dtype, **how)
        return cache_op.advance(self.state, query, key, value, bounds, empty=empty)

    def get_max_length(self) -> int:
        return self.max_cache_len

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        return self.max_cache_len, 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        cache_op.reorder(self.storage, beam_idx)

    def reset(self) -> None:
        self.empty = True
        for tensor in (*self.storage, self.length):
            tensor.zero_()

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in self.storage)


class _Cache(Cache):  # type: ignore[misc]
    @property
    def nbytes(self) -> int:
        """Bytes of keys and values: in a dynamic cache of what is held, in a static one of all buffers."""
        usual = (x for layer in self.layers if not isinstance(layer, _Layer) for x in (layer.keys, layer.values))
        own = sum(layer.nbytes for layer in self.layers if isinstance(layer, _Layer))
        return int(own + sum(x.nbytes for x in usual if x is not None))


class CCADynamicCache(_Cache):
    """The cache of a model with CCA layers, for any number of tokens; layers that are not CCA have their usual one.

    Args:
        config: the model's, as `enable` left it.
        rollback: tokens that `crop` can always take back, for assisted decoding.
    """

    def __init__(self, config: Any, rollback: int = ROLLBACK) -> None:
        config = config.get_text_config(decoder=True)
        settings, layers = Settings.of(config), DynamicCache(config=config).layers
        super().__init__([_DynamicLayer(settings, rollback) if settings.covers(i) else x for i, x in enumerate(layers)])


class CCAStaticCache(_Cache):
    """A cache in buffers that never move: decoding compiles without graph breaks and runs in a CUDA graph.

    Nothing is read back to the host. A decode step gives every row one token, whatever the mask says; a token past the
    end is not stored, and its output is NaN.

    Args:
        config: the model's, as `enable` left it.
        max_cache_len: the most tokens of a row, its padding included.
    """

    def __init__(self, config: Any, max_cache_len: int) -> None:
        config = config.get_text_config(decoder=True)
        settings, layers = Settings.of(config), StaticCache(config=config, max_cache_len=max_cache_len).layers
        first = None
        for i in filter(settings.covers, range(len(layers))):
            layers[i] = _StaticLayer(settings, config.num_attention_heads, max_cache_len, first)
            first = first or layers[i]
        super().__init__(layers)
