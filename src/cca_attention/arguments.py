"""Which tensors CCA attention takes: the checks of `cca_attention()` and `CCACache`, each with its own message."""

from __future__ import annotations

import torch
from torch import Tensor

from .problem import check_heads

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


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
