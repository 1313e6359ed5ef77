"""The systems that CCA is measured beside: PyTorch's dense attention by backend, and FlexAttention with CCA's mask."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from ..problem import Problem

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
"""out (B, Hq, T, D) of q (B, Hq, T, D), k and v (B, Hkv, T, D)."""

CCA, FLEX, EAGER = "cca", "flex", "eager"
BACKENDS: Mapping[str, SDPBackend] = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}
TITLES = {
    CCA: "cca-attention",
    "flash": "SDPA flash",
    "cudnn": "SDPA cuDNN",
    FLEX: "FlexAttention",
    EAGER: "eager PyTorch",
}


def dense(name: str, *, is_causal: bool = True) -> Attention:
    """Full attention by the SDPA backend called `name`."""
    backend = BACKENDS[name]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(q, k, v, is_causal=is_causal, enable_gqa=q.shape[1] != k.shape[1])

    return attend


def flex(problem: Problem, k_core: Tensor, v_core: Tensor) -> Attention:
    """FlexAttention over [cores; keys] with CCA's visibility; the cores (B, Hc, C, D) are ready-made.

    Where cores belong to query heads and keys to fewer key/value heads, the keys are repeated: FlexAttention takes one
    tensor.
    """
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    spec, tokens = problem.spec, problem.seq_len
    groups, g, w = k_core.shape[2], spec.group_size, spec.window_size

    def visible(b: Tensor, h: Tensor, row: Tensor, key: Tensor) -> Tensor:
        pooled = (row + 1 - w).clamp(min=0) // g
        token = key - groups
        return torch.where(key < groups, key < pooled, (token >= pooled * g) & (token <= row))

    torch.compiler.reset()  # a shape compiles afresh, or the limit of recompilations would end in an eager run
    mask = torch.compile(create_block_mask)(visible, None, None, tokens, groups + tokens, device=k_core.device)
    compiled = torch.compile(flex_attention, dynamic=False)
    repeats = k_core.shape[1] // problem.kv_heads

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (x if repeats == 1 else x.repeat_interleave(repeats, dim=1) for x in (k, v))
        keys, values = torch.cat((k_core, k), 2), torch.cat((v_core, v), 2)
        out: Tensor = compiled(q, keys, values, block_mask=mask, enable_gqa=q.shape[1] != keys.shape[1])
        return out

    return attend
