"""The wrapper with its kernels compiled: the tests beside this one show the same, and more, on PyTorch's own path."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from cca_attention.models import CCAStaticCache, enable

pytestmark = pytest.mark.gpu
G, W = 4, 8
DOCUMENTS = torch.cat((torch.arange(12), torch.arange(17)))[None].expand(2, -1)


def build(device: str = "cuda", **changes: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, initializer_range=0.3, pad_token_id=0, bos_token_id=1, eos_token_id=None,
        **changes,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    enable(model, G, W)
    return model.to(device)


def prompt(*lengths: int) -> dict[str, Tensor]:
    """Rows of these lengths, padded on the left."""
    most = max(lengths)
    ids = torch.randint(1, 97, (len(lengths), most), generator=torch.Generator().manual_seed(0))
    real = torch.arange(most) >= most - torch.tensor(lengths)[:, None]
    return {"input_ids": (ids * real).cuda(), "attention_mask": real.long().cuda()}


def generate(model: Any, inputs: dict[str, Tensor], **options: Any) -> Any:
    defaults = {"max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    return model.generate(**inputs, **{**defaults, "disable_compile": True, **options})


def assert_same(found: Any, recomputed: Any) -> None:
    """The same tokens, and logits that differ by rounding."""
    assert torch.equal(found.sequences, recomputed.sequences)
    torch.testing.assert_close(found.logits, recomputed.logits, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}, {"prefill_chunk_size": 7}])
def test_generation_is_the_recompute(options: dict[str, Any]) -> None:
    model, inputs = build(), prompt(30, 23, 11)
    assert_same(generate(model, inputs, **options), generate(model, inputs, use_cache=False))


def test_beams_and_rejected_drafts() -> None:
    model, inputs = build(), prompt(21, 21)
    beams = (generate(model, inputs, use_cache=cached, num_beams=3) for cached in (True, False))
    assert torch.equal(*(found.sequences for found in beams))
    repeated = {name: x[:1].repeat(1, 3) for name, x in prompt(12).items()}
    options = {"max_new_tokens": 24, "eos_token_id": 96}
    found = generate(model, repeated, prompt_lookup_num_tokens=5, **options)
    assert torch.equal(found.sequences, generate(model, repeated, **options).sequences)


@pytest.mark.timeout(300)
def test_generate_compiles_its_steps_by_itself() -> None:
    model, inputs = build(), prompt(18, 11)
    whole = generate(model, inputs)
    torch._dynamo.utils.counters.clear()
    found = generate(model, inputs, cache_implementation="static", disable_compile=False)
    assert isinstance(found.past_key_values, CCAStaticCache)
    assert (
        torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1 and not torch._dynamo.utils.counters["graph_break"]
    )
    assert_same(found, whole)


def train(model: Any, call: Any = None, **options: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and every gradient of one step."""
    ids = torch.randint(1, 97, (2, 29), generator=torch.Generator().manual_seed(0)).to(model.device)
    options = {name: x.to(model.device) for name, x in options.items()}
    logits = (model.train() if call is None else call)(ids, **options).logits
    loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    return loss.detach().cpu(), {name: x.grad.cpu() for name, x in model.named_parameters()}


@pytest.mark.parametrize("options", [{}, {"position_ids": DOCUMENTS}], ids=["rows", "packed"])
def test_gradients_are_those_of_the_cpu(options: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    found = train(build(), **options)
    monkeypatch.setattr("cca_attention.fused.INTERPRETED", False)
    torch.testing.assert_close(found, train(build("cpu"), **options), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_no_bit(reentrant: bool) -> None:
    model = build()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    torch.testing.assert_close(train(model), train(build()), rtol=0, atol=0)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("options", [{}, {"position_ids": DOCUMENTS}], ids=["rows", "packed"])
def test_training_compiles_whole(options: dict[str, Tensor]) -> None:
    model = build()
    compiled = torch.compile(model.train(), fullgraph=True)
    torch.testing.assert_close(train(model, compiled, **options), train(build(), **options), rtol=1e-3, atol=1e-4)
