"""`generate()` of models with CCA: every way of decoding gives the tokens of a full recompute without a cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from cca_attention import CCASpec
from cca_attention.models import CCADynamicCache, CCAStaticCache, enable

G, W = 4, 8
SIZES = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512, "initializer_range": 0.3,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip
MIXED = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
MODELS = {
    "Llama": ("Llama", {}),
    "Qwen2": ("Qwen2", {}),
    "Qwen3": ("Qwen3", {}),
    "Mistral": ("Mistral", {"sliding_window": None}),
    "Gemma2": ("Gemma2", {**MIXED, "attn_logit_softcapping": None}),
    "Gemma3": ("Gemma3", MIXED),
}


@pytest.fixture(autouse=True)
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """The PyTorch path: the interpreter would take minutes. One test below turns it on again."""
    monkeypatch.setattr("cca_attention.fused.INTERPRETED", False)


def build(name: str, **changes: Any) -> Any:
    family, options = MODELS[name]
    config = getattr(transformers, f"{family}TextConfig" if family == "Gemma3" else f"{family}Config")
    torch.manual_seed(0)
    return getattr(transformers, f"{family}ForCausalLM")(config(**{**SIZES, **options, **changes})).eval()


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> Any:
    """A tiny random model of each family, with CCA."""
    model = build(request.param)
    enable(model, G, W)
    return model


@pytest.fixture(params=["Llama", "Gemma3"])
def typical(request: pytest.FixtureRequest) -> Any:
    """One with CCA in all layers, one with sliding windows in some."""
    model = build(request.param)
    enable(model, G, W)
    return model


def prompt(rows: int, tokens: int, seed: int = 0) -> Tensor:
    return torch.randint(1, 97, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def generate(model: Any, ids: Tensor, *, seed: int = 3, **options: Any) -> Any:
    torch.manual_seed(seed)
    defaults = {"max_new_tokens": 16, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    return model.generate(ids, **{**defaults, **options})


def assert_same(found: Any, recomputed: Any) -> None:
    """The same tokens, and logits that differ by rounding."""
    assert torch.equal(found.sequences, recomputed.sequences)
    for one, other in zip(found.logits, recomputed.logits, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tokens", [1, 5])
def test_short_prompts(typical: Any, tokens: int) -> None:
    assert_same(generate(typical, prompt(1, tokens)), generate(typical, prompt(1, tokens), use_cache=False))


def test_greedy(model: Any) -> None:
    ids = prompt(1, 37)
    found = generate(model, ids)
    assert isinstance(found.past_key_values, CCADynamicCache)
    assert_same(found, generate(model, ids, use_cache=False))


def test_the_cache_holds_what_the_spec_says() -> None:
    model = build("Llama")
    enable(model, G, W)
    cache = generate(model, prompt(1, 70)).past_key_values
    layer = CCASpec(G, W, "kv").cache_bytes(85, batch=1, q_heads=4, kv_heads=2, head_dim=16, element_bytes=4)
    assert cache.get_seq_length() == 85 and cache.nbytes == 3 * layer


def padded(lengths: tuple[int, ...] = (30, 23, 11)) -> tuple[Tensor, Tensor]:
    """Rows of these lengths, padded on the left."""
    ids = prompt(len(lengths), max(lengths))
    real = torch.arange(ids.shape[1]) >= ids.shape[1] - torch.tensor(lengths)[:, None]
    return ids * real, real.long()


def test_each_row_of_a_padded_batch_equals_itself_alone(model: Any) -> None:
    ids, real = padded()
    found = generate(model, ids, attention_mask=real)
    assert_same(found, generate(model, ids, attention_mask=real, use_cache=False))
    for row in range(3):
        alone = generate(model, ids[row : row + 1, real[row] == 1])
        assert torch.equal(found.sequences[row, real[row].argmax() :], alone.sequences[0])


def test_chunked_prefill(typical: Any) -> None:
    ids, real = padded()
    whole = generate(typical, ids, attention_mask=real)
    assert_same(generate(typical, ids, attention_mask=real, prefill_chunk_size=7), whole)


@pytest.mark.parametrize(
    "options",
    [{"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}, {"num_beams": 2, "num_return_sequences": 2}],
    ids=["beams", "samples", "several beams"],
)
def test_beams_and_samples(typical: Any, options: dict[str, Any]) -> None:
    ids = prompt(2, 21)
    found, recomputed = (generate(typical, ids, use_cache=cached, **options) for cached in (True, False))
    assert torch.equal(found.sequences, recomputed.sequences)


def test_prompt_lookup_takes_rejected_tokens_back(typical: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    dropped: list[int] = []
    crop = CCADynamicCache.crop
    monkeypatch.setattr(CCADynamicCache, "crop", lambda self, n: (dropped.append(n), crop(self, n))[1])
    ids = prompt(1, 12).repeat(1, 3)
    options = {"max_new_tokens": 24, "eos_token_id": 96}  # transformers 5.0 needs one
    found = generate(typical, ids, prompt_lookup_num_tokens=5, **options)
    assert dropped, "nothing was rejected: the test shows nothing"
    assert torch.equal(found.sequences, generate(typical, ids, **options).sequences)


def test_a_draft_model(typical: Any) -> None:
    draft = build("Llama", num_hidden_layers=1)
    enable(draft, G, W)
    ids = prompt(1, 21)
    found = generate(typical, ids, assistant_model=draft)
    assert torch.equal(found.sequences, generate(typical, ids).sequences)


def test_a_second_turn_continues_the_cache(typical: Any) -> None:
    first = generate(typical, prompt(1, 21))
    ids = torch.cat((first.sequences, prompt(1, 9, seed=1)), dim=1)
    real = torch.ones_like(ids)  # the first turn may have made padding tokens
    found = generate(typical, ids, attention_mask=real, past_key_values=first.past_key_values)
    assert_same(found, generate(typical, ids, attention_mask=real, use_cache=False))


def test_a_static_cache(model: Any) -> None:
    ids, real = padded()
    whole = generate(model, ids, attention_mask=real)
    found = generate(model, ids, attention_mask=real, cache_implementation="static")
    assert isinstance(found.past_key_values, CCAStaticCache)
    assert_same(found, whole)
    mine = CCAStaticCache(model.config, 64)
    for _ in range(2):
        assert_same(generate(model, ids, attention_mask=real, past_key_values=mine), whole)
        mine.reset()


def test_decoding_with_a_static_cache_compiles_whole() -> None:
    model = build("Llama")
    enable(model, G, W)
    cache, ids = CCAStaticCache(model.config, 64), prompt(1, 21)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        found = [model(ids[:, :18], past_key_values=cache).logits[:, -1]]
        found += [compiled(ids[:, i : i + 1], past_key_values=cache).logits[:, 0] for i in range(18, 21)]
        expected = model(ids, use_cache=False).logits[0, 17:]
    torch.testing.assert_close(torch.cat(found), expected, rtol=1e-4, atol=1e-4)
    assert cache.get_seq_length() == 21


@pytest.mark.gpu
def test_a_step_with_a_static_cache_runs_in_a_cuda_graph() -> None:
    model = build("Llama").cuda()
    enable(model, G, W)
    cache, ids = CCAStaticCache(model.config, 64), prompt(1, 21).cuda()
    token = ids[:, :1].clone()
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits[0, 18:]
        for _ in range(2):  # the kernels are compiled before the capture
            model(token, past_key_values=cache)
        cache.reset()
        model(ids[:, :18], past_key_values=cache)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = model(token, past_key_values=cache).logits
        found = []
        for position in range(18, 21):
            token.copy_(ids[:, position : position + 1])
            graph.replay()
            found.append(logits[:, 0].clone())
    torch.testing.assert_close(torch.cat(found), expected, rtol=1e-3, atol=1e-3)
    assert cache.get_seq_length() == 21


@pytest.mark.gpu
@pytest.mark.parametrize("cache", [CCADynamicCache, lambda config: CCAStaticCache(config, 9000)])
def test_a_long_prompt_at_once_is_the_same_in_pieces(cache: Any) -> None:
    model = build("Llama", num_attention_heads=32, num_key_value_heads=8, head_dim=128, num_hidden_layers=2)
    model.to("cuda", torch.bfloat16)
    enable(model, 16, 1024)
    ids, parts = prompt(1, 8200).cuda(), (5000, 3199, 1)
    with torch.no_grad():
        whole, pieces = cache(model.config), cache(model.config)
        model(ids[:, :-1], past_key_values=whole, logits_to_keep=1)
        found = model(ids[:, -1:], past_key_values=whole).logits
        for part in ids.split(parts, dim=1):
            expected = model(part, past_key_values=pieces, logits_to_keep=1).logits
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)
    assert whole.get_seq_length() == pieces.get_seq_length() == 8200


def test_a_token_past_the_end_of_a_static_cache_is_nan() -> None:
    model = build("Llama")
    enable(model, G, W)
    cache, ids = CCAStaticCache(model.config, 12), prompt(1, 13)
    with torch.no_grad():
        assert model(ids[:, :12], past_key_values=cache).logits.isfinite().all()
        assert model(ids[:, 12:], past_key_values=cache).logits.isnan().all()


@pytest.mark.parametrize("cache", [CCADynamicCache, lambda config: CCAStaticCache(config, 64)])
def test_a_cache_is_not_differentiable_and_its_layers_count_alike(cache: Any) -> None:
    model = build("Llama")
    enable(model, G, W)
    with pytest.raises(ValueError, match=r"must not require grad.*no_grad"):
        model(prompt(1, 10), past_key_values=cache(model.config))
    held = cache(model.config)
    with torch.no_grad():
        for part in prompt(1, 10).split((9, 1), dim=1):
            model(part, past_key_values=held)
    assert [int(held.get_seq_length(layer)) for layer in range(3)] == [10, 10, 10]


def test_the_kernels_in_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("Llama", num_hidden_layers=1)
    enable(model, G, W)
    ids, real = padded((13, 9))
    whole = generate(model, ids, attention_mask=real, max_new_tokens=3)
    monkeypatch.setattr("cca_attention.fused.INTERPRETED", not torch.cuda.is_available())
    for cache in (None, "static"):
        found = generate(model, ids, attention_mask=real, max_new_tokens=3, cache_implementation=cache)
        assert_same(found, whole)


def test_generate_compiles_its_steps(typical: Any) -> None:
    ids, real = padded((18, 11))
    how = transformers.CompileConfig(fullgraph=True, mode=None, backend="aot_eager")
    how._compile_all_devices = True  # transformers compiles on accelerators alone, unless told
    whole = generate(typical, ids, attention_mask=real, max_new_tokens=4)
    torch._dynamo.utils.counters.clear()
    options = {"attention_mask": real, "max_new_tokens": 4, "cache_implementation": "static"}
    assert_same(generate(typical, ids, compile_config=how, **options), whole)
    # transformers' own sliding layers take a second graph, with CCA beside them or without
    expected = 1 if typical.config.cca["layers"] == "all" else 2
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == expected
