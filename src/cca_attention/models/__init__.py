"""CCA attention in models of transformers >= 5; importing this makes ``attn_implementation="cca"`` known there."""

from __future__ import annotations

from transformers import AttentionInterface, AttentionMaskInterface

from .attention import attention_function
from .caches import CCADynamicCache, CCAStaticCache
from .enable import disable, enable, load, replace_attn_forward
from .masks import mask_function
from .settings import NAME

__all__ = ["CCADynamicCache", "CCAStaticCache", "disable", "enable", "load", "replace_attn_forward"]

AttentionInterface.register(NAME, attention_function)
AttentionMaskInterface.register(NAME, mask_function)
