"""`cca_attention()`: argument checks, choice of backend and configs, torch.library ops and their autograd."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor

from . import fused
from .kernels import eager
from .kernels.layout import Sequences
from .kernels.tunable import Schedule
from .problem import check_heads
from .spec import CCASpec, CoreHeads, Pooling, check_choice

if TYPE_CHECKING:
    from .profiles.schema import Profile

Backend = Literal["auto", "triton", "eager"]
ProfileLike = "str | Profile | Schedule | None"
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# what a custom op's string argument stands for; the ops look their configs up when they run
_PROFILES: dict[str, Any] = {"": Schedule()}


def register_profile(profile: str | Profile | Schedule | None) -> str:
    """The handle under which the ops find `profile`: None, a name or path, a Profile or a Schedule.

    A name or path is loaded once per process. Raises what `load_profile` raises.
    """
    if profile is None:
        return ""
    handle = profile if isinstance(profile, str) else f"{type(profile).__name__}:{hash(profile):x}"
    if handle not in _PROFILES:
        if isinstance(profile, str):
            from .profiles.store import load_profile

            profile = load_profile(profile)
        _PROFILES[handle] = profile
    return handle


def configs_for(handle: str, q: Tensor, k: Tensor, spec: CCASpec) -> fused.Configs:
    """The configs that a registered profile gives for these tensors."""
    problem = fused.problem_of(q, k, spec)
    profile = _PROFILES[handle]
    schedule = profile if isinstance(profile, Schedule) else profile.schedule(problem)
    return fused.Configs(schedule, problem, fused.architecture(q.device))


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


def check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise unless q (B, Hq, T, D), k and v (B, Hkv, T, D) fit together and the kernels take them."""
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
        if tensor.dim() != 4:
            raise ValueError(
                f"{name} must have 4 dimensions (batch, heads, tokens, head_dim), got {tuple(tensor.shape)}"
            )
        if tensor.dtype not in DTYPES:
            raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}")
        if tensor.dtype != q.dtype:
            raise TypeError(f"{name} must have the dtype of q, {q.dtype}, got {tensor.dtype}")
        if tensor.device != q.device:
            raise ValueError(f"{name} must be on the device of q, {q.device}, got {tensor.device}")
        if tensor.stride(3) != 1 and tensor.numel():
            raise ValueError(
                f"{name} must be contiguous in its last dimension (stride 1), got strides {tensor.stride()}; "
                f"call {name}.contiguous()"
            )
    batch, q_heads, tokens, head_dim = q.shape
    if k.shape[1] < 1 or q_heads < 1:
        raise ValueError(f"q and k must have at least one head, got {q_heads} and {k.shape[1]}")
    check_heads(q_heads, k.shape[1], head_dim)
    expected = (batch, k.shape[1], tokens, head_dim)
    for name, tensor in (("k", k), ("v", v)):
        if tensor.shape != expected:
            raise ValueError(
                f"{name} must have shape {expected} (batch, kv_heads, tokens, head_dim), got {tuple(tensor.shape)}"
            )


def check_sequences(q: Tensor, cu_seqlens: Tensor | None, seq_bounds: Tensor | None) -> None:
    """Raise unless the sequence arguments fit q. Values are read on the CPU only: on CUDA that would synchronise."""
    if cu_seqlens is not None and seq_bounds is not None:
        raise ValueError("cu_seqlens and seq_bounds exclude each other: give one of them")
    for name, tensor in (("cu_seqlens", cu_seqlens), ("seq_bounds", seq_bounds)):
        if tensor is not None and (tensor.dtype != torch.int32 or tensor.device != q.device):
            raise TypeError(f"{name} must be int32 on {q.device}, got {tensor.dtype} on {tensor.device}")
    batch, tokens = q.shape[0], q.shape[2]
    if cu_seqlens is not None:
        if batch != 1:
            raise ValueError(f"cu_seqlens needs a batch of 1 with the documents one after another, got batch {batch}")
        if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2 or not cu_seqlens.is_contiguous():
            raise ValueError(f"cu_seqlens must be contiguous, of shape (documents + 1,), got {tuple(cu_seqlens.shape)}")
        if _readable(cu_seqlens):
            starts = cu_seqlens.tolist()
            if starts[0] != 0 or starts[-1] != tokens or starts != sorted(starts):
                raise ValueError(f"cu_seqlens must rise from 0 to the number of tokens, {tokens}, got {starts}")
    if seq_bounds is not None:
        if seq_bounds.shape != (batch, 2):
            raise ValueError(f"seq_bounds must have shape ({batch}, 2), got {tuple(seq_bounds.shape)}")
        if _readable(seq_bounds) and not all(0 <= first <= end <= tokens for first, end in seq_bounds.tolist()):
            raise ValueError(
                f"seq_bounds must hold 0 <= first <= end <= {tokens} in each row, got {seq_bounds.tolist()}"
            )


def _readable(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling() and type(tensor) is Tensor


def _sequences(bounds: Tensor | None, packed: bool, q: Tensor) -> Sequences:
    if bounds is None:
        return Sequences.dense(q.shape[0])
    if packed:
        return Sequences.packed(bounds)
    return Sequences.padded(bounds.clamp(0, q.shape[2]))


@torch.library.custom_op("cca_attention::forward", mutates_args=())
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
    spec = CCASpec(group_size, window_size, core_heads, pooling, scale)  # type: ignore[arg-type]
    if backend == "eager":
        out, lse, k_core, v_core = eager.forward(q, k, v, spec, bounds=bounds, packed=packed)
        return out, lse, k_core, v_core, lse.new_empty(k_core.shape[:3])
    if 0 in q.shape:
        return _forward_fake(
            q, k, v, bounds, packed, group_size, window_size, core_heads, pooling, scale, backend, profile
        )
    return fused.forward(q, k, v, spec, _sequences(bounds, packed, q), configs_for(profile, q, k, spec))


@_forward.register_fake
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
    heads = q.shape[1] if core_heads == "query" else k.shape[1]
    core = (q.shape[0], heads, q.shape[2] // group_size, q.shape[3])
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    lse = q.new_empty(q.shape[:3], dtype=wide)
    return torch.empty_like(q), lse, k.new_empty(core), v.new_empty(core), q.new_empty(core[:3], dtype=wide)


@torch.library.custom_op("cca_attention::backward", mutates_args=())
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
    spec = CCASpec(group_size, window_size, core_heads, pooling, scale)  # type: ignore[arg-type]
    if 0 in q.shape:
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    dout = dout if dout.stride(3) == 1 else dout.contiguous()
    if backend == "eager":
        return eager.backward(dout, dlse, q, k, v, out, lse, k_core, v_core, spec, bounds=bounds, packed=packed)
    sequences, configs = _sequences(bounds, packed, q), configs_for(profile, q, k, spec)
    return fused.backward(dout, dlse, q, k, v, out, lse, k_core, v_core, pool_lse, spec, sequences, configs)


@_backward.register_fake
def _backward_fake(dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Any:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, bounds, *ctx.options = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, bounds, *output)


def _differentiate(ctx: Any, dout: Tensor | None, dlse: Tensor | None, *unused: None) -> tuple[Any, ...]:
    q, k, v, bounds, out, lse, k_core, v_core, pool_lse = ctx.saved_tensors
    dout = torch.zeros_like(out) if dout is None else dout
    grads = _backward(dout, dlse, q, k, v, out, lse, k_core, v_core, pool_lse, bounds, *ctx.options)
    return (*grads, None, *(None for _ in ctx.options))


_forward.register_autograd(_differentiate, setup_context=_save)


@overload
def cca_attention(q: Tensor, k: Tensor, v: Tensor, *, return_lse: Literal[False] = False, **options: Any) -> Tensor: ...


@overload
def cca_attention(
    q: Tensor, k: Tensor, v: Tensor, *, return_lse: Literal[True], **options: Any
) -> tuple[Tensor, Tensor]: ...


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
        profile: where the launch configs come from: a name or path that `load_profile` takes, a Profile, a
            Schedule, or None for the built-in ones. Never changes what is computed.
        backend: "triton", "eager" (blocked PyTorch), or "auto": triton on CUDA and under the interpreter, else eager.
        deterministic: True promises the same bits from run to run; at present both values run the same kernels.
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
    backend = choose_backend(backend, q)
    if q.dtype == torch.float64 and backend == "triton" and q.is_cuda:
        raise TypeError("q must be float16, bfloat16 or float32 on CUDA, got torch.float64")
    packed = cu_seqlens is not None
    out, lse, *_ = _forward(
        q, k, v, cu_seqlens if packed else seq_bounds, packed, group_size, window_size, core_heads, pooling,
        spec.softmax_scale(q.shape[3]), backend, register_profile(profile),
    )  # fmt: skip
    return (out, lse) if return_lse else out
