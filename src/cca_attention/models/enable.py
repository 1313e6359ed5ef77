"""`enable` and `disable`: a model of transformers attends with CCA from here on, or as it did before."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, StaticCache

from ..configs import register_profile
from ..problem import check_heads
from ..spec import CoreHeads, Pooling, check_choice
from .caches import CCADynamicCache, CCAStaticCache
from .masks import Mask
from .settings import NAME, Layers, Settings


def enable(
    model: PreTrainedModel,
    group_size: int = 16,
    window_size: int = 1024,
    core_heads: CoreHeads = "kv",
    profile: str | None = "auto",
    layers: Layers = "full",
    pooling: Pooling = "last_query",
) -> None:
    """Let `model` attend with CCA: its forward, training, `generate()` and the cache that it makes.

    No code and no weight is changed. The settings are saved in the config: `load` restores, `disable` removes them.

    Args:
        model: a decoder of transformers 5 that calls its attention interface: Llama, Qwen2, Qwen3, Mistral, Gemma, ...
        group_size: tokens that one core token stands for. window_size: raw tokens that every query sees at least.
        core_heads: "kv" (the smallest cache) or "query" (the published code). pooling: "last_query" or "mean".
        profile: where the launch configs come from: a name or path for `load_profile`, "auto" (that of the GPU at
            hand, if there is one), None (the built-in ones). Never changes what is computed.
        layers: "full": those with full attention, so that a sliding window is kept; "all"; or numbers from 0.

    A TypeError or ValueError names the argument or the model's setting that CCA cannot follow, and what to do.
    """
    decoder = _decoder(model)
    if not isinstance(profile, (str, type(None))):
        raise TypeError(f"profile must be a name, a path or None, as it is saved, got {type(profile).__name__}")
    disable(decoder)
    marks = ("layer_idx", "head_dim", "is_causal")  # of an attention module
    modules = {x.layer_idx: x for x in decoder.modules() if all(hasattr(x, mark) for mark in marks)}
    _check_model(decoder, modules)
    chosen = _chosen(layers, list(modules), decoder.config)
    for index in chosen:
        _check_layer(f"layers: {index} cannot be CCA,", modules[index], decoder.config)
    before = decoder.config._attn_implementation
    settings = Settings(
        group_size=group_size, window_size=window_size, core_heads=core_heads, pooling=pooling, profile=profile,
        layers="all" if len(chosen) == decoder.config.num_hidden_layers else chosen,
        replaces="sdpa" if before == NAME else before,
    )  # fmt: skip
    settings.spec(), register_profile(profile)  # both raise for what cannot be
    decoder.set_attn_implementation(NAME)
    settings.save(decoder.config)
    decoder.register_forward_pre_hook(prepare, with_kwargs=True)


def disable(model: PreTrainedModel) -> None:
    """Take back what `enable` did; a model without it is left as it is."""
    decoder = _decoder(model)
    if getattr(decoder.config, NAME, None) is None:
        return
    if decoder.config._attn_implementation == NAME:
        decoder.set_attn_implementation(Settings.of(decoder.config).replaces)
    delattr(decoder.config, NAME)
    for key in [key for key, hook in decoder._forward_pre_hooks.items() if hook is prepare]:
        del decoder._forward_pre_hooks[key], decoder._forward_pre_hooks_with_kwargs[key]


def load(path: str, **options: Any) -> PreTrainedModel:
    """The causal language model saved at `path`, attending with CCA as it did then; a ValueError if it did not.

    `options` are for ``AutoModelForCausalLM.from_pretrained``.
    """
    model = AutoModelForCausalLM.from_pretrained(path, **options)
    saved = getattr(_decoder(model).config, NAME, None)
    if saved is None:
        raise ValueError(f"path: the config in {path} has no {NAME!r}: load it with transformers, then enable(model)")
    enable(model, **{name: value for name, value in saved.items() if name != "replaces"})
    return model


def replace_attn_forward(group_size: int = 16, window_size: int = 1024, pool_func: str = "cca") -> Any:
    """The published code's call, for those who come from it: causal language models made from here on have CCA.

    As there, every query head pools for itself. Unlike there, no class is changed, and a sliding window is kept.

    `pool_func` is "cca" (weights of the last query) or "mean". ``remove()`` of what is returned ends it.
    """
    check_choice("pool_func", pool_func, ("cca", "mean"))

    def registered(parent: nn.Module, name: str, child: nn.Module | None) -> None:
        if isinstance(parent, PreTrainedModel) and isinstance(child, PreTrainedModel) and parent.can_generate():
            pooling: Pooling = "mean" if pool_func == "mean" else "last_query"
            enable(child, group_size, window_size, "query", pooling=pooling)

    return nn.modules.module.register_module_module_registration_hook(registered)


def prepare(decoder: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Before each forward of the decoder: refuse what cannot be, and see to it that a cache has CCA layers."""
    cache, positions = kwargs.get("past_key_values"), kwargs.get("position_ids")
    if kwargs.get("output_attentions") or decoder.config.output_attentions:
        raise ValueError("output_attentions must be false: CCA never forms the weights; disable(model) shows them")
    if cache is not None:
        return args, {**kwargs, "past_key_values": _with_cca_layers(cache, decoder.config)}
    caches = decoder.config.use_cache if kwargs.get("use_cache") is None else kwargs["use_cache"]
    if kwargs.get("attention_mask") is None:
        if positions is None and torch.compiler.is_compiling():  # transformers would take all for packed
            given = next(x for x in (*args, kwargs.get("input_ids"), kwargs.get("inputs_embeds")) if x is not None)
            kwargs = {**kwargs, "attention_mask": Mask(shape=(given.shape[1],))}
        elif positions is not None and caches and not torch.compiler.is_compiling():
            caches = bool((positions.diff(dim=-1) == 1).all())  # packed documents have no cache
    if caches and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return args, {**kwargs, "past_key_values": CCADynamicCache(decoder.config)}
    return args, {**kwargs, "use_cache": False}


def _with_cca_layers(cache: Cache, config: Any) -> Cache:
    """`cache`, or in place of an empty one that transformers made one of the same kind with CCA layers."""
    if isinstance(cache, (CCADynamicCache, CCAStaticCache)):
        return cache
    is_static = type(cache) is StaticCache
    if not (is_static or type(cache) is DynamicCache) or cache.offloading or (is_static and all(cache.is_sliding)):
        mistake = f"a {cache}"
    elif cache.get_seq_length() > 0:
        mistake = f"a {type(cache).__name__} that holds tokens"
    elif is_static:
        return CCAStaticCache(config, max(layer.max_cache_len for layer in cache.layers))
    else:
        made = CCADynamicCache(config)
        if any(getattr(layer, "record_past", False) for layer in cache.layers):  # assisted decoding asked for it
            made.activate_past_recording()
        return made
    raise ValueError(f"past_key_values must be a CCADynamicCache or a CCAStaticCache of model.config, got {mistake}")


def _decoder(model: PreTrainedModel) -> PreTrainedModel:
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model must be a transformers.PreTrainedModel, got {type(model).__name__}")
    if model.config.is_encoder_decoder:
        raise ValueError("is_encoder_decoder must be false: an encoder's mask is not causal, and CCA attention is")
    return model.get_decoder()


def _check_model(decoder: PreTrainedModel, modules: dict[Any, nn.Module]) -> None:
    """Raise unless the model's attention can be exchanged."""
    for name in ("alibi", "num_kv_shared_layers"):
        if getattr(decoder.config, name, None):
            raise ValueError(f"{name} must be off: CCA adds no bias to scores, and each layer's cache is its own")
    if not modules or not decoder._can_set_attn_implementation():
        raise ValueError(
            f"model: the attention of {type(decoder).__name__} cannot be exchanged (ALiBi, or an older form); "
            "take one that calls transformers' attention interface: Llama, Qwen2, Qwen3, Mistral, Gemma"
        )


def _check_layer(place: str, module: nn.Module, config: Any) -> None:
    """Raise unless CCA can stand in for what the layer computes."""
    if not module.is_causal:
        raise ValueError(f"{place} is_causal must be true: an encoder's mask is not (use_bidirectional_attention)")
    if getattr(module, "attn_logit_softcapping", None):
        raise ValueError(f"{place} attn_logit_softcapping is not supported: leave it out, or set it to None")
    if getattr(module, "sinks", None) is not None:
        raise ValueError(f"{place} attention sinks are not supported: leave it out")
    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    check_heads(config.num_attention_heads, kv_heads, module.head_dim)  # type: ignore[arg-type]


def _chosen(layers: Layers, present: list[int], config: Any) -> list[int]:
    """The numbers of the layers that shall be CCA."""
    if isinstance(layers, str) or not hasattr(layers, "__iter__"):
        check_choice("layers", layers, ("full", "all"))
    chosen = present if isinstance(layers, str) else sorted(set(layers))
    if layers == "full":
        kind = "sliding_attention" if getattr(config, "sliding_window", None) else "full_attention"
        kinds = getattr(config, "layer_types", None) or [kind] * (max(present) + 1)
        chosen = [index for index in present if kinds[index] == "full_attention"]
        if not chosen:
            raise ValueError("layers='full' finds none: all have a sliding window; 'all' or their numbers replace it")
    if not chosen or not set(chosen) <= set(present):
        raise ValueError(f"layers must be 'full', 'all' or some of {present}, got {chosen}")
    return chosen
