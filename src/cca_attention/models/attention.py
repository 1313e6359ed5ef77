"""The attention function that transformers' models call under the name "cca"."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..attention import cca_attention
from ..spec import CCASpec
from .masks import Mask
from .settings import Settings

_REFUSED = {
    "dropout": "attention_dropout must be 0 in training: set config.attention_dropout",
    "softcap": "attn_logit_softcapping is not supported: leave the layer out of `layers`",
    "s_aux": "attention sinks are not supported: leave the layer out of `layers`",
    "position_bias": "position_bias is not supported: leave the layer out of `layers`",
    "output_attentions": "output_attentions must be false: CCA never forms the weights; disable(model) shows them",
}


def attention_function(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
) -> tuple[Tensor, Any]:
    """CCA attention of one layer; of a layer that is not CCA, the attention that it had before.

    Args:
        query: (B, Hq, T, D), rotated. key, value: (B, Hkv, T, D), key rotated; with a cache, the new tokens' only.
        attention_mask: what `mask_function` returned.

    Returns:
        (B, T, Hq, D) and None. A ValueError names the setting that CCA attention cannot follow.
    """
    settings, mask = Settings.of(module.config), Mask() if attention_mask is None else attention_mask
    if not isinstance(mask, Mask):
        raise ValueError(f"attention_mask must be (batch, tokens), true for real tokens, got {tuple(mask.shape)}")
    if not settings.covers(module.layer_idx):  # type: ignore[arg-type]
        own: Any = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)  # beside the class
        kept = own if settings.replaces == "eager" else ALL_ATTENTION_FUNCTIONS[settings.replaces]
        return kept(module, query, key, value, mask.kept, **options)  # type: ignore[no-any-return]
    for name, refusal in _REFUSED.items():
        if options.get(name):
            raise ValueError(refusal)
    if not getattr(module, "is_causal", True) or options.get("is_causal") is False:
        raise ValueError("is_causal must be true: CCA attention sees only the past; use another attn_implementation")
    spec, layer = settings.spec(options.get("scaling")), getattr(key, "cca_layer", None)
    if torch.is_autocast_enabled(query.device.type):  # the rotation left q and k in float32
        query, key, value = (x.to(torch.get_autocast_dtype(x.device.type)) for x in (query, key, value))
    if layer is None:
        return _stateless(query, key, value, spec, mask, settings.profile).transpose(1, 2), None
    if mask.packed and mask.sequences is not None:
        raise ValueError("position_ids restart (packed documents), which a cache cannot hold: pass use_cache=False")
    return layer.attend(query, key, value, spec, mask.sequences).transpose(1, 2), None


def _stateless(query: Tensor, key: Tensor, value: Tensor, spec: CCASpec, mask: Mask, profile: str | None) -> Tensor:
    """(B, Hq, T, D) of whole sequences."""
    batch, _, tokens, _ = query.shape
    if tokens != key.shape[2]:
        raise ValueError(
            f"past_key_values must be a CCADynamicCache or a CCAStaticCache: got {tokens} queries, {key.shape[2]} keys "
            "of another; call cca_attention.models.enable(model), or pass CCADynamicCache(model.config)"
        )
    where: dict[str, Any] = {"cu_seqlens" if mask.packed else "seq_bounds": mask.sequences}
    if mask.packed and batch > 1:
        query, key, value = (x.transpose(0, 1).flatten(1, 2)[None] for x in (query, key, value))
    out: Tensor = cca_attention(  # type: ignore[assignment]
        query, key, value, group_size=spec.group_size, window_size=spec.window_size, core_heads=spec.core_heads,
        pooling=spec.pooling, scale=spec.scale, profile=profile, **where,
    )  # fmt: skip
    return out[0].unflatten(1, (batch, tokens)).transpose(0, 1) if mask.packed and batch > 1 else out
