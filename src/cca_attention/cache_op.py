"""`append`: a `CacheState` as an op of torch.library, so that decoding into fixed storage compiles whole."""

from __future__ import annotations

from copy import copy
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .attention import choose_backend
from .cache_state import CacheState
from .spec import CCASpec


def new_storage(spec: CCASpec, shape: tuple[int, int, int, int], like: Tensor, max_tokens: int) -> list[Tensor]:
    """All tensors of an empty state for `max_tokens` tokens; `shape` is (batch, q_heads, kv_heads, head_dim)."""
    state = CacheState(
        spec, shape, like.dtype, like.device,
        ring=spec.max_local_tokens(), max_tokens=max_tokens, backend=choose_backend("auto", like), profile="",
    )  # fmt: skip
    return list(_tensors(state).values())


def state_on(
    storage: list[Tensor], spec: CCASpec, shape: tuple[int, int, int, int], dtype: torch.dtype,
    *, max_tokens: int, profile: str,
) -> CacheState:  # fmt: skip
    """The state whose tensors are those of `new_storage`; the other arguments are those of `append`."""
    backend = choose_backend("auto", storage[0])
    state = copy(_without_storage(spec, shape, dtype, backend, profile))
    vars(state).update(zip(_tensors(state), storage, strict=True))
    state.max_tokens, state.may_overflow = max_tokens, True
    return state


def advance(
    state: CacheState, q: Tensor, k: Tensor, v: Tensor, bounds: Tensor | None = None, *, empty: bool = False
) -> Tensor:
    """`append` to a state of `state_on`, without an op: one takes 0.26 ms of the host's time."""
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        raise ValueError("q, k and v must not require grad: a cache is not differentiable, use torch.no_grad()")
    dtype = q.dtype
    if not dtype == k.dtype == v.dtype == state.dtype:
        q, k, v = q.to(state.dtype), k.to(state.dtype), v.to(state.dtype)
    fits = state.max_tokens is None or q.shape[2] <= state.max_tokens
    with torch.cuda.device_of(q):  # Triton launches on the current GPU
        if bounds is not None:
            out = state.extend(q, k, v, bounds)
        elif state.takes_in_one_step(q, k):
            out = state.step(q, k, v)
        elif empty and fits and not (q.is_cuda and torch.cuda.is_current_stream_capturing()):
            out = state.begin(q, k, v)  # a captured call may be replayed on rows that hold tokens
        else:
            out = state.extend(q, k, v)
        return out if out.dtype == dtype else out.to(dtype)


def append(
    q: Tensor, k: Tensor, v: Tensor, bounds: Tensor | None, storage: list[Tensor], spec: CCASpec,
    *, max_tokens: int, profile: str, empty: bool = False,
) -> Tensor:  # fmt: skip
    """Append tokens and return what their queries see, (B, Hq, T, D); nothing is read back to the host on CUDA.

    Args:
        q: (B, Hq, T, D). k, v: (B, Hkv, T, D). q and k rotated, last dimensions contiguous.
        bounds: (B, 2) int32: first and one past the last real token of each row; None: all are real.
        storage: of `new_storage`; changed. A token past `max_tokens` is not stored, and its output is NaN.
        profile: a handle of `register_profile`.
        empty: the host knows that no row holds a token yet; whole sequences are then faster.

    A ValueError says that q, k or v requires grad.
    """
    numbers = [spec.group_size, spec.window_size, max_tokens]
    scale = spec.softmax_scale(q.shape[3])
    out: Tensor = _append(q, k, v, bounds, storage, numbers, spec.core_heads, spec.pooling, scale, profile, empty)
    return out


def reorder(storage: list[Tensor], index: Tensor) -> None:
    """Row b becomes a copy of row ``index[b]``; nothing moves. The batch is the first axis of what all heads share."""
    for tensor in storage:
        tensor.copy_(tensor.index_select(0 if tensor.dim() < 5 else 1, index))


def _tensors(state: CacheState) -> dict[str, Tensor]:
    return {name: x for name, x in vars(state).items() if isinstance(x, Tensor)}


@lru_cache(maxsize=256)
def _without_storage(
    spec: CCASpec, shape: tuple[int, int, int, int], dtype: torch.dtype, backend: str, profile: str
) -> CacheState:
    """A state without memory of its own."""
    return CacheState(spec, shape, dtype, "meta", ring=0, max_tokens=None, backend=backend, profile=profile)


_spec = lru_cache(maxsize=1024)(CCASpec)


def _run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bounds: Tensor | None,
    storage: list[Tensor],
    numbers: list[int],
    core_heads: str,
    pooling: str,
    scale: float,
    profile: str,
    empty: bool,
) -> Tensor:
    group_size, window_size, max_tokens = numbers
    spec = _spec(group_size, window_size, core_heads, pooling, scale)
    shape = q.shape[0], q.shape[1], k.shape[1], q.shape[3]
    state = state_on(storage, spec, shape, q.dtype, max_tokens=max_tokens, profile=profile)
    return advance(state, q, k, v, bounds, empty=empty)


_append = torch.library.custom_op("cca_attention::append", _run, mutates_args=("storage",))


@_append.register_fake
def _append_fake(q: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(q)
