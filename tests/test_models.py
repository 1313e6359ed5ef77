"""What `enable`, `disable`, `load` and `replace_attn_forward` do to a model, and what they refuse."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from torch import Tensor
from transformers import DynamicCache

from cca_attention.kernels.reference import attention_dense
from cca_attention.models import CCADynamicCache, disable, enable, load, replace_attn_forward

G, W = 4, 8
IDS = torch.randint(1, 97, (2, 29), generator=torch.Generator().manual_seed(0))
SIZES = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "initializer_range": 0.3, "pad_token_id": 0, "eos_token_id": None,
}  # fmt: skip
MAKES_ITS_MASK = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.17"),
    reason="OPT makes a 4-D mask itself in older transformers, which is refused",
)
SLIDING = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}


@pytest.fixture(autouse=True)
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """The PyTorch path: the interpreter would take minutes."""
    monkeypatch.setattr("cca_attention.fused.INTERPRETED", False)


def build(family: str = "Llama", **changes: Any) -> Any:
    config = getattr(transformers, f"{family}TextConfig" if family == "Gemma3" else f"{family}Config")
    sizes = {name: size for name, size in {**SIZES, **changes}.items() if size != ...}
    torch.manual_seed(0)
    return getattr(transformers, f"{family}ForCausalLM")(config(**sizes)).eval()


def logits(model: Any, ids: Tensor = IDS, **options: Any) -> Tensor:
    with torch.no_grad():
        return model(ids, **options).logits


# --- what it computes --------------------------------------------------------------------------------------------


class Recorder:
    """An attention that calls another, and keeps what went in and what came out of each layer."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.calls: dict[int, tuple[Any, ...]] = {}

    def __call__(self, module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **options: Any) -> Any:
        out = self.function(module, q, k, v, mask, **options)
        self.calls[module.layer_idx] = (q, k, v, options["scaling"], out[0].transpose(1, 2))
        return out


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """Sees what CCA's attention function is given."""
    functions = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS
    recorder = Recorder(functions["cca"])
    monkeypatch.setitem(functions._global_mapping, "cca", recorder)
    return recorder


@pytest.mark.parametrize("core_heads", ["kv", "query"])
@pytest.mark.parametrize("pooling", ["last_query", "mean"])
def test_every_layer_computes_what_the_oracle_does(recorder: Recorder, core_heads: Any, pooling: Any) -> None:
    model = build()
    enable(model, G, W, core_heads, pooling=pooling)
    logits(model)
    assert sorted(recorder.calls) == [0, 1, 2]
    for q, k, v, scale, out in recorder.calls.values():
        options = {"group_size": G, "window_size": W, "core_heads": core_heads, "pooling": pooling, "scale": scale}
        expected = attention_dense(q.double(), k.double(), v.double(), **options)[0]
        torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["Qwen3", "Phi3", pytest.param("OPT", marks=MAKES_ITS_MASK)])
def test_a_window_over_everything_is_full_attention(family: str) -> None:
    model = build(family, **({"word_embed_proj_dim": 64} if family == "OPT" else {}))
    full = logits(model)
    enable(model, G, 29)
    torch.testing.assert_close(logits(model), full, rtol=1e-4, atol=1e-4)
    enable(model, G, W)
    assert (logits(model) - full).abs().max() > 0.1


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_real_token(side: str) -> None:
    model = build()
    enable(model, G, W)
    real = torch.ones_like(IDS)
    where = slice(0, 10) if side == "left" else slice(19, 29)
    real[1, where] = 0
    for cached in (True, False):
        row = logits(model, attention_mask=real, use_cache=cached)[1, real[1] == 1]
        torch.testing.assert_close(row, logits(model, IDS[1:, real[1] == 1])[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("family", "changes"), [("Llama", {}), ("Gemma3", SLIDING), ("Mistral", {"sliding_window": None})]
)
def test_packed_documents_see_nothing_of_each_other(family: str, changes: dict[str, Any]) -> None:
    model = build(family, **changes)
    enable(model, G, W)
    positions = torch.cat((torch.arange(12), torch.arange(17)))[None].expand(2, -1)
    for options in ({}, {"use_cache": False}):
        packed = logits(model, position_ids=positions, **options)
        for rows in (slice(0, 12), slice(12, 29)):
            torch.testing.assert_close(packed[:, rows], logits(model, IDS[:, rows]), rtol=1e-3, atol=1e-3)


# --- which layers ------------------------------------------------------------------------------------------------


def test_layers_that_are_not_chosen_compute_what_they_did(recorder: Recorder) -> None:
    model = build("Gemma3", **SLIDING)
    full = logits(model)
    enable(model, G, 29)
    torch.testing.assert_close(logits(model), full, rtol=1e-4, atol=1e-4)
    assert model.config.cca["layers"] == [1]
    enable(model, G, W, layers=[0, 2])
    cache = CCADynamicCache(model.config)
    assert [type(layer).__name__ for layer in cache.layers] == ["_DynamicLayer", "DynamicLayer", "_DynamicLayer"]
    enable(model, G, W, layers="all")
    assert model.config.cca["layers"] == "all" and logits(model).isfinite().all()


def test_all_layers_sliding_are_replaced_only_when_told() -> None:
    model = build("Mistral", sliding_window=6)
    with pytest.raises(ValueError, match="layers='full' finds none"):
        enable(model, G, W)
    enable(model, G, W, layers="all")
    plain = build("Mistral", sliding_window=None)
    enable(plain, G, W)
    torch.testing.assert_close(logits(model), logits(plain))


# --- taking it back, saving it -----------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_disable_restores(implementation: str) -> None:
    model = build()
    model.set_attn_implementation(implementation)
    before, config = logits(model), model.config.to_dict()
    enable(model, G, W)
    assert model.config._attn_implementation == "cca"
    enable(model, G, 2 * W)  # again, with other numbers
    disable(model)
    disable(model)  # and a model without is left alone
    assert model.config._attn_implementation == implementation and model.config.to_dict() == config
    assert torch.equal(logits(model), before) and not model.model._forward_pre_hooks


def test_the_settings_are_saved_with_the_model(tmp_path: Path) -> None:
    model = build("Gemma3", **SLIDING)
    enable(model, G, W, "query", profile=None, layers=[1, 2], pooling="mean")
    model.save_pretrained(tmp_path)
    again = load(str(tmp_path)).eval()
    assert again.config.cca == model.config.cca and torch.equal(logits(again), logits(model))
    disable(model)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no 'cca'"):
        load(str(tmp_path))


def test_the_name_alone_attends_with_the_defaults_or_what_was_saved(tmp_path: Path) -> None:
    model = build()
    enable(model, G, W)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="cca").eval()
    assert torch.equal(logits(again, use_cache=False), expected)
    cache = CCADynamicCache(again.config)
    logits(again, IDS[:, :20], past_key_values=cache)
    torch.testing.assert_close(
        logits(again, IDS[:, 20:], past_key_values=cache), expected[:, 20:], rtol=1e-4, atol=1e-4
    )
    with pytest.raises(ValueError, match="past_key_values must be a CCADynamicCache"):
        again.generate(IDS, max_new_tokens=3)
    enable(again, G, W)
    again.generate(IDS, max_new_tokens=3, use_cache=None)
    disable(again)
    assert again.config._attn_implementation == "sdpa"


def test_models_made_after_replace_attn_forward_have_it() -> None:
    handle = replace_attn_forward(G, W, "mean")
    try:
        model = build()
    finally:
        handle.remove()
    saved = model.config.cca
    assert (saved["group_size"], saved["window_size"], saved["core_heads"], saved["pooling"]) == (G, W, "query", "mean")
    other = build()
    assert not hasattr(other.config, "cca")
    enable(other, G, W, "query", pooling="mean")
    assert torch.equal(logits(model), logits(other))
    with pytest.raises(ValueError, match="pool_func must be one of 'cca', 'mean', got 'max'"):
        replace_attn_forward(pool_func="max")


# --- what is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "changes", "arguments", "message"),
    [
        ("Llama", {}, {"group_size": 0}, "group_size must be at least 1"),
        ("Llama", {}, {"core_heads": "both"}, "core_heads must be one of"),
        ("Llama", {}, {"profile": "no such GPU"}, "no such GPU"),
        ("Llama", {}, {"layers": [3]}, r"layers must be .* got \[3\]"),
        ("Llama", {}, {"layers": "none"}, "layers must be one of 'full', 'all'"),
        ("Llama", {}, {"layers": 1}, "layers must be one of 'full', 'all', got 1"),
        ("Llama", {"head_dim": 8}, {}, "head_dim"),
        ("Bloom", {"n_head": 4}, {}, "ALiBi"),
        ("Falcon", {"alibi": True, "head_dim": ...}, {}, "alibi must be off"),
        ("Llama", {"num_kv_shared_layers": 1}, {}, "num_kv_shared_layers must be off"),
        ("Gemma2", {"attn_logit_softcapping": 50.0, **SLIDING}, {}, "attn_logit_softcapping is not supported"),
        ("GptOss", {"num_local_experts": 2, "num_experts_per_tok": 1, **SLIDING}, {}, "sinks are not supported"),
        ("Gemma3", {"use_bidirectional_attention": True, **SLIDING}, {}, "use_bidirectional_attention"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_changed(
    family: str, changes: dict[str, Any], arguments: dict[str, Any], message: str
) -> None:
    model = build(family, **changes)
    before = model.config.to_dict()
    with pytest.raises(ValueError, match=message):
        enable(model, **arguments)
    assert model.config.to_dict() == before and model.config._attn_implementation != "cca"


def test_an_encoder_is_refused() -> None:
    config = transformers.T5Config(vocab_size=97, d_model=32, d_kv=16, d_ff=32, num_layers=1, num_heads=2)
    with pytest.raises(ValueError, match="is_encoder_decoder must be false"):
        enable(transformers.T5ForConditionalGeneration(config))
    with pytest.raises(TypeError, match=r"model must be a transformers\.PreTrainedModel, got Linear"):
        enable(torch.nn.Linear(1, 1))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="profile must be a name, a path or None, as it is saved, got int"):
        enable(build(), profile=3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"output_attentions": True}, "output_attentions must be false"),
        ({"attention_mask": torch.ones(2, 1, 29, 29, dtype=torch.bool)}, r"attention_mask must be \(batch, tokens\)"),
        ({"attention_mask": torch.tensor([1] * 9 + [0] + [1] * 19).repeat(2, 1)}, "padding between real tokens"),
        ({"past_key_values": transformers.DynamicCache}, "DynamicCache that holds tokens"),
    ],
)
def test_a_call_that_cannot_be_is_refused(options: dict[str, Any], message: str) -> None:
    model = build()
    if options.get("past_key_values") is DynamicCache:
        options = {"past_key_values": model(IDS, use_cache=True).past_key_values}
    enable(model, G, W)
    with pytest.raises(ValueError, match=message):
        logits(model, **options)


def test_output_attentions_of_generate_is_refused() -> None:
    model = build()
    enable(model, G, W)
    with pytest.raises(ValueError, match="output_attentions must be false"):
        model.generate(IDS, max_new_tokens=2, output_attentions=True, return_dict_in_generate=True)
    with pytest.raises(ValueError, match=r"past_key_values must be .* got a DynamicCache"):
        model.generate(IDS, max_new_tokens=2, cache_implementation="offloaded")


def test_dropout_is_refused_in_training() -> None:
    model = build(attention_dropout=0.1)
    enable(model, G, W)
    logits(model)
    with pytest.raises(ValueError, match="attention_dropout must be 0"):
        model.train()(IDS)
