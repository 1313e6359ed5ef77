"""`cca_attention()`: argument checks, choice of backend and configs, torch.library ops and their autograd."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from . import fused
from .arguments import check_sequences, check_tensors
from .configs import configs_for, register_profile
from .kernels import eager
from .kernels.layout import Sequences
from .kernels.tunable import Schedule, accumulator_dtype
from .spec import CCASpec, CoreHeads, Pooling, check_choice

if TYPE_CHECKING:
    from .profiles.schema import Profile

Backend = Literal["auto", "triton", "eager"]

LIBRARY = torch.library.Library("cca_attention", "FRAGMENT")


def _operator(function: Callable[..., Any]) -> Any:
    """`function` as an op of torch.library that takes a call in 16 us; one of `torch.library.custom_op` takes 60."""
    name = function.__name__.removeprefix("_")
    LIBRARY.define(name + torch.library.infer_schema(function, mutates_args=()))
    LIBRARY.impl(name, function, "CompositeExplicitAutograd")
    return getattr(torch.ops.cca_attention, name).default


def choose_backend(backend: str, q: Tensor) -> str:
    """ "triton" or "eager" for `q`; "auto" never falls back to eager on CUDA."""
    check_choice("backend", backend, ("auto", "triton", "eager"))
    on_triton = q.is_cuda or (fused.INTERPRETED and q.device.type == "cpu")
    if backend == "auto":
        return "triton" if on_triton else "eager"
    if backend == "triton" and not on_triton:
        raise ValueError(
            f"backend='triton' needs CUDA tensors, or CPU tensors with TRITON_INTERPRET=1, got q on {q.device}"
        )
    return backend


def _sequences(bounds: Tensor | None, packed: bool, q: Tensor) -> Sequences:
    if bounds is None:
        return Sequences.dense(q.shape[0])
    if packed:
        return Sequences.packed(bounds)
    return Sequences.padded(bounds.clamp(0, q.shape[2]))


def _empty_results(
    q: Tensor, k: Tensor, v: Tensor, spec: CCASpec, num_cores: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    lse = q.new_empty(q.shape[:3], dtype=accumulator_dtype(q.dtype))
    core = (q.shape[0], spec.num_core_heads(q.shape[1], k.shape[1]), num_cores, q.shape[3])
    return torch.empty_like(q), lse, k.new_empty(core), v.new_empty(core), lse.new_empty(core[:3])


_spec = lru_cache(maxsize=1024)(CCASpec)  # of values that were checked before


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bounds: Tensor | None,
    packed: bool,
    group_size: int,
    window_size: int,
    core_heads: str,
    pooling: str,
    scale: float,
    backend: str,
    profile: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    spec = _spec(group_size, window_size, core_heads, pooling, scale)
    if backend == "eager":
        out, lse, k_core, v_core = eager.forward(q, k, v, spec, bounds=bounds, packed=packed)
        return out, lse, k_core, v_core, lse.new_zeros(k_core.shape[:3])
    if 0 in q.shape:
        return _empty_results(q, k, v, spec, fused.groups_to_pool(spec, q.shape[2]))
    return fused.forward(q, k, v, spec, _sequences(bounds, packed, q), configs_for(profile, q, k, spec))


forward_op = _operator(_forward)


def _forward_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bounds: Tensor | None,
    packed: bool,
    group_size: int,
    window_size: int,
    core_heads: str,
    pooling: str,
    scale: float,
    backend: str,
    profile: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    spec = CCASpec(group_size, window_size, core_heads, pooling, scale)  # type: ignore[arg-type]
    pooled = spec.num_groups if backend == "eager" else partial(fused.groups_to_pool, spec)
    return _empty_results(q, k, v, spec, pooled(q.shape[2]))


def _backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    k_core: Tensor,
    v_core: Tensor,
    pool_lse: Tensor,
    bounds: Tensor | None,
    packed: bool,
    group_size: int,
    window_size: int,
    core_heads: str,
    pooling: str,
    scale: float,
    backend: str,
    profile: str,
) -> tuple[Tensor, Tensor, Tensor]:
    spec = _spec(group_size, window_size, core_heads, pooling, scale)
    if 0 in q.shape:
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    dout = dout if dout.stride(3) == 1 else dout.contiguous()
    if backend == "eager":
        return eager.backward(dout, dlse, q, k, v, out, lse, k_core, v_core, spec, bounds=bounds, packed=packed)
    sequences, configs = _sequences(bounds, packed, q), configs_for(profile, q, k, spec)
    return fused.backward(dout, dlse, q, k, v, out, lse, k_core, v_core, pool_lse, spec, sequences, configs)


backward_op = _operator(_backward)


def _backward_fake(dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Any:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


PLAIN = (Tensor, torch.nn.Parameter)


def _direct(function: Callable[..., Any], op: Any, inputs: tuple[Any, ...]) -> Callable[..., Any]:
    """`function`, or the `op` made of it where there is somebody who is to see an op; it takes 30 us and more."""
    plain = all(type(x) in PLAIN for x in inputs if isinstance(x, Tensor))
    return function if plain and not is_in_torch_dispatch_mode() else op


class _Backward(torch.autograd.Function):
    """The backward where its result is to be differentiated again, which is refused instead of left out."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Any:
        return _direct(_backward, backward_op, inputs)(*inputs)

    @staticmethod
    def backward(ctx: Any, *unused: Any) -> Any:
        raise RuntimeError("cca_attention has no second derivative: its backward cannot be differentiated")


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, bounds, *ctx.options = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, bounds, *output)


def _differentiate(ctx: Any, dout: Tensor | None, dlse: Tensor | None, *unused: None) -> tuple[Any, ...]:
    q, k, v, bounds, out, lse, k_core, v_core, pool_lse = ctx.saved_tensors
    dout = torch.zeros_like(out) if dout is None else dout
    inputs = (dout, dlse, q, k, v, out, lse, k_core, v_core, pool_lse, bounds, *ctx.options)
    derive: Callable[..., Any] = _direct(_backward, backward_op, inputs)
    if torch.is_grad_enabled():
        derive = _Backward.apply
    grads = derive(*inputs)
    return (*grads, None, *(None for _ in ctx.options))


torch.library.register_fake("cca_attention::forward", _forward_fake, lib=LIBRARY)
torch.library.register_fake("cca_attention::backward", _backward_fake, lib=LIBRARY)
torch.library.register_autograd("cca_attention::forward", _differentiate, setup_context=_save, lib=LIBRARY)


class _Attention(torch.autograd.Function):
    """The op with the same gradient, for eager code: what the op has of its own costs 60 us more."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Any:
        output = _direct(_forward, forward_op, inputs)(*inputs)
        _save(ctx, inputs, output)
        return output

    backward = staticmethod(_differentiate)


def _records(q: Tensor, k: Tensor, v: Tensor) -> bool:
    return torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)


def cca_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    group_size: int,
    window_size: int,
    core_heads: CoreHeads = "query",
    pooling: Pooling = "last_query",
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    seq_bounds: Tensor | None = None,
    profile: str | Profile | Schedule | None = None,
    backend: Backend = "auto",
    deterministic: bool = True,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal CCA attention: one softmax over the core tokens of the far past and the raw tokens of a recent window.

    Differentiable in q, k and v (the pooling weights included), in out and in lse; works under ``torch.compile``.

    Args:
        q: (B, Hq, T, D), rotated, float16, bfloat16 or float32 (float64 under Triton's interpreter and with
            "eager"); any strides with a contiguous last dimension; D from 16 to 256.
        k, v: (B, Hkv, T, D), k rotated; Hq a multiple of Hkv.
        group_size: tokens per core token, at least 1. window_size: raw tokens each query sees at least.
        core_heads: "query" (every query head pools for itself) or "kv" (one set of cores per key/value head).
        pooling: "last_query" (softmax by the group's last query) or "mean".
        scale: softmax scale, default ``1 / sqrt(D)``.
        cu_seqlens: (documents + 1,) int32, from 0 to T: packed documents in a batch of one; nothing crosses them.
        seq_bounds: (B, 2) int32: first and one past the last real token of each row of a padded batch. Groups and
            positions start at the first real token; padding rows are zero (lse -inf) and get zero gradient.
        profile: where the launch configs come from: a name or path that `load_profile` takes, a Profile, a Schedule,
            "auto" for the best that there is for this GPU, None for the built-in ones. Never changes what is computed.
        backend: "triton", "eager" (blocked PyTorch), or "auto": triton on CUDA and under the interpreter, else eager.
            Where no query sees a core token (T < window_size + group_size), this is causal attention: there "auto"
            leaves float16 and bfloat16 on CUDA to ``scaled_dot_product_attention``, unless sequences are packed or
            padded, or lse or deterministic gradients are wanted.
        deterministic: gradients have the same bits from run to run; PyTorch's, of such short calls, have not.
        return_lse: also return the log-sum-exp of each query's logits.

    Returns:
        out (B, Hq, T, D) in q's dtype, and with `return_lse` lse (B, Hq, T), natural logarithm, float32 (float64
        for float64).

    Raises:
        TypeError, ValueError: naming the argument, its value and what is allowed, before anything is launched.
    """
    check_tensors(q, k, v)
    check_sequences(q, cu_seqlens, seq_bounds)
    spec = CCASpec(group_size, window_size, core_heads, pooling, scale)
    if not isinstance(deterministic, bool):
        raise TypeError(f"deterministic must be True or False, got {deterministic!r}")
    chosen = choose_backend(backend, q)
    if q.dtype == torch.float64 and chosen == "triton" and q.is_cuda:
        raise TypeError("q must be float16, bfloat16 or float32 on CUDA, got torch.float64")
    packed = cu_seqlens is not None
    handle, records = register_profile(profile), _records(q, k, v)
    bounds, factor = cu_seqlens if packed else seq_bounds, spec.softmax_scale(q.shape[3])
    if backend == "auto" and bounds is None and not (return_lse or (records and deterministic)) and is_dense(q, spec):
        return causal_attention(q, k, v, factor)
    attend = _Attention.apply if records and not torch.compiler.is_compiling() else forward_op
    out, lse, *_ = attend(q, k, v, bounds, packed, group_size, window_size, core_heads, pooling, factor, chosen, handle)
    return (out, lse) if return_lse else out


def is_dense(q: Tensor, spec: CCASpec) -> bool:
    """Whether PyTorch's own kernels are to take queries (B, Hq, T, D) that see raw tokens only."""
    return q.is_cuda and q.element_size() == 2 and q.numel() > 0 and not fused.groups_to_pool(spec, q.shape[2])


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """CCA attention of sequences in which no query sees a core token (spec section 2), by PyTorch."""
    return scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
