"""First token, next token, cache and memory of a whole model: CCA beside SDPA, in one process.

    python benchmarks/whole_model.py --json docs/data/models-h200.json     # one H200, about 190 s
    python benchmarks/whole_model.py --show docs/data/models-h200.json     # the table of docs/models.md

The model has the shape of Llama-3.1-8B and random weights, bfloat16, batch 1. Times of the first token are medians
after a call that compiles, but SDPA's, which are of one call; times of a next token are means of STEPS, beside the
slowest of them.

Static caches: `error` is the relative L2 distance of the logits of STEPS steps, all given the same tokens, from those
of the same steps in float32: the weights and the cache that the prompt left, widened without loss. `from_eager` is the
distance from the eager step's logits. A decoding that errs more than 1.25 times as much as the eager step has failed.
Where a measurement fails, its row says so, and the command ends with 1.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
import triton
from decode_steps import DECODINGS, Step, timed
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig

from cca_attention.models import CCADynamicCache, CCAStaticCache, disable, enable

STEPS = 32
SHAPE = {
    "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"},
}  # fmt: skip
TINY = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip
Row = dict[str, Any]


def without_attention(module: Any, query: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
    """The bound: what a model takes whose attention costs nothing."""
    return query.transpose(1, 2), None


transformers.AttentionInterface.register("removed", without_attention)


class Bench:
    """One model, and how it is timed.

    Args:
        shape: of the config. longest: the most tokens of a prompt. device: "cpu" only shows that the script runs.
    """

    def __init__(self, shape: dict[str, Any], longest: int, device: str) -> None:
        self.device, self.rows = torch.device(device), list[Row]()
        config = LlamaConfig(**shape, max_position_embeddings=longest + 4 * STEPS, pad_token_id=0, eos_token_id=None)
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        with self.device:
            self.model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()

    def clock(self, call: Callable[[], Any]) -> tuple[float, Any]:
        """Milliseconds of one call, and its result."""
        wait = torch.cuda.synchronize if self.device.type == "cuda" else lambda: None
        wait()
        start = time.perf_counter()
        result = call()
        wait()
        return (time.perf_counter() - start) * 1e3, result

    def prompt(self, tokens: int) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.randint(self.model.config.vocab_size, (1, tokens), generator=generator).to(self.device)

    def first(self, ids: Tensor, make: Callable[[], Any], repeats: int) -> tuple[Row, Any, Tensor]:
        """Read the prompt into a new cache: the figures, the cache and the first token."""
        self.read(ids if repeats > 1 else ids[:, :2048], make())  # compiles
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        times = []
        for _ in range(repeats):
            cache = None  # the one before is freed
            cache = make()
            ms, token = self.clock(lambda cache=cache: self.read(ids, cache))
            times.append(ms)
        peak = torch.cuda.max_memory_allocated() if self.device.type == "cuda" else 0
        return {"first_ms": statistics.median(times), "peak_bytes": peak}, cache, token

    def read(self, ids: Tensor, cache: Any) -> Tensor:
        options = {"past_key_values": cache, "use_cache": cache is not None, "logits_to_keep": 1}
        return self.model(ids, **options).logits.argmax(-1)

    def next(self, step: Step, token: Tensor) -> tuple[Row, Tensor]:
        """The figures of STEPS steps, and the tokens (STEPS,) that went into them."""
        times, tokens = timed(step, token, STEPS)
        return {"next_ms": statistics.fmean(times), "slowest_ms": max(times)}, tokens

    def step(self, cache: Any) -> Step:
        return lambda token: self.model(token, past_key_values=cache, use_cache=True).logits

    def report(self, tokens: int, attention: str, decoding: str, **figures: Any) -> None:
        self.rows.append({"tokens": tokens, "attention": attention, "decoding": decoding, **figures})
        sys.stderr.write(json.dumps(self.rows[-1]) + "\n")


def cache_bytes(cache: Any) -> int:
    """Bytes of keys and values."""
    return cache.nbytes if hasattr(cache, "nbytes") else sum(x.keys.nbytes + x.values.nbytes for x in cache.layers)


def state(cache: Any) -> list[Tensor]:
    """All tensors of a static cache."""
    return [x for layer in cache.layers for x in (*layer.storage, layer.length)]


def logits_of(step: Step, tokens: Tensor) -> Tensor:
    """(T, V): the logits after each of the tokens."""
    return torch.cat([step(token.view(1, 1))[0].double() for token in tokens])


def exact_logits(bench: Bench, cache: CCAStaticCache, tokens: Tensor) -> Tensor:
    """`logits_of` a step from `cache` as it is now, computed in a wider type from the same numbers."""
    dtype = torch.float32 if bench.model.dtype == torch.bfloat16 else torch.float64
    model, config = copy.deepcopy(bench.model).to(dtype), bench.model.config
    wide = CCAStaticCache(config, cache.layers[0].max_cache_len)
    for layer in wide.layers:
        like = torch.empty(1, config.num_key_value_heads, 1, config.head_dim, dtype=dtype, device=bench.device)
        layer.lazy_initialization(like, like)
        layer.empty = False
    for into, x in zip(state(wide), state(cache), strict=True):
        into.copy_(x)
    return logits_of(lambda token: model(token, past_key_values=wide, use_cache=True).logits, tokens)


def distance(x: Tensor, reference: Tensor) -> float:
    """Relative, in the L2 norm."""
    return float((x - reference).norm() / reference.norm())


def removed(bench: Bench, tokens: int) -> None:
    """The model without its attention."""
    bench.model.set_attn_implementation("removed")
    figures, _, _ = bench.first(bench.prompt(tokens), lambda: None, repeats=2)
    bench.report(tokens, "none (the bound)", "", **figures)


def sdpa(bench: Bench, tokens: int, name: str) -> None:
    """Full attention with one of PyTorch's backends, as transformers runs it."""
    backend = {"flash": SDPBackend.FLASH_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION}[name]
    bench.model.set_attn_implementation("sdpa")
    with sdpa_kernel(backend) if bench.device.type == "cuda" else nullcontext():
        first, cache, token = bench.first(bench.prompt(tokens), DynamicCache, repeats=1)
        bench.step(cache)(token)
        figures, _ = bench.next(bench.step(cache), token)
    bench.report(tokens, f"SDPA {name}", "eager", **first, **figures, cache_bytes=cache_bytes(cache))


def cca_dynamic(bench: Bench, tokens: int, core_heads: Any) -> None:
    """CCA with the cache that `generate` makes."""
    enable(bench.model, core_heads=core_heads)
    make = partial(CCADynamicCache, bench.model.config)
    first, cache, token = bench.first(bench.prompt(tokens), make, repeats=2)
    bench.step(cache)(token)
    figures, _ = bench.next(bench.step(cache), token)
    bench.report(tokens, f"CCA, {core_heads}", "eager", **first, **figures, cache_bytes=cache_bytes(cache))


def cca_static(bench: Bench, tokens: int, core_heads: Any, decodings: list[str]) -> None:
    """CCA with fixed buffers, read once and decoded from in several ways."""
    enable(bench.model, core_heads=core_heads)
    make = partial(CCAStaticCache, bench.model.config, tokens + 2 * STEPS)
    first, cache, token = bench.first(bench.prompt(tokens), make, repeats=2)
    after_prompt = [x.clone() for x in state(cache)]

    def rewound(step: Step) -> Step:
        """`step`, and the cache as the prompt left it."""
        for tensor, before in zip(state(cache), after_prompt, strict=True):
            tensor.copy_(before)
        return step

    eager = bench.step(cache)
    _, given = bench.next(eager, token)
    logits_of_eager = logits_of(rewound(eager), given)
    rewound(eager)
    exact = exact_logits(bench, cache, given)
    bound = 1.25 * distance(logits_of_eager, exact)
    for decoding in decodings:
        begun = time.perf_counter()
        step = DECODINGS[decoding](eager, token)
        step(token)
        first["ready_s"] = time.perf_counter() - begun
        figures, _ = bench.next(rewound(step), token)
        logits = logits_of(rewound(step), given)
        figures |= {"error": distance(logits, exact), "from_eager": distance(logits, logits_of_eager)}
        bench.report(
            tokens, f"CCA, {core_heads}", f"static cache, {decoding}",
            **first, **figures, cache_bytes=cache_bytes(cache),
        )  # fmt: skip
        if figures["error"] > bound:
            raise ValueError(f"{decoding}: error {figures['error']} is above {bound}")


def plan(options: argparse.Namespace) -> Iterator[tuple[Callable[..., None], tuple[Any, ...]]]:
    """What is measured, the most telling first; the steps are compiled at the longest context alone."""
    for tokens in options.contexts:
        short = [name for name in options.decodings if tokens == max(options.contexts) or "compile" not in name]
        yield removed, (tokens,)
        yield cca_dynamic, (tokens, "kv")
        yield cca_static, (tokens, "kv", short)
        yield cca_static, (tokens, "query", [name for name in short if "compile" not in name][-1:] or short[:1])
        yield sdpa, (tokens, "cuDNN")
        yield sdpa, (tokens, "flash")


def measure(options: argparse.Namespace) -> int:
    """Run the plan and write the rows after each measurement."""
    cuda = torch.cuda.is_available()
    bench = Bench(SHAPE if cuda else TINY, max(options.contexts), "cuda" if cuda else "cpu")
    started, failed = time.perf_counter(), 0
    about = {"device": torch.cuda.get_device_name() if cuda else "CPU", "shape": SHAPE if cuda else TINY}
    about["versions"] = {x.__name__: x.__version__ for x in (torch, triton, transformers)}
    for call, arguments in filter(lambda entry: entry[0].__name__ in options.only, plan(options)):
        if time.perf_counter() - started > options.seconds:
            bench.report(*arguments[:1], f"{call.__name__} {arguments[1:]}", "not measured: out of time")
            continue
        try:
            with torch.no_grad():
                call(bench, *arguments)
        except Exception as error:
            failed += 1
            traceback.print_exc()
            bench.report(*arguments[:1], f"{call.__name__} {arguments[1:]}", f"failed: {type(error).__name__}")
        disable(bench.model)
        if cuda:
            torch.cuda.empty_cache()
        options.json.write_text(json.dumps({**about, "rows": bench.rows}, indent=1) + "\n", encoding="utf-8")
    return 1 if failed else 0


COLUMNS = {
    "first_ms": ("first token, s", 1e3, "2f"),
    "next_ms": ("next token, ms", 1, "2f"),
    "slowest_ms": ("slowest", 1, "1f"),
    "error": ("error", 1, "2%"),
    "from_eager": ("from eager", 1, "2%"),
    "cache_bytes": ("cache, MB", 1e6, "1f"),
    "peak_bytes": ("peak, GB", 1e9, "1f"),
}
"""Of a figure: its heading, how much is one unit, digits."""


def table(record: dict[str, Any]) -> Iterator[str]:
    """The rows as Markdown."""
    columns = {name: how for name, how in COLUMNS.items() if any(name in row for row in record["rows"])}
    yield f"| tokens | attention | decoding | {' | '.join(how[0] for how in columns.values())} |"
    yield "|---:|---|---|" + "---:|" * len(columns)
    for row in sorted(record["rows"], key=lambda row: row["tokens"]):
        cells = [f"{row[name] / unit:.{form}}" if name in row else "" for name, (_, unit, form) in columns.items()]
        yield f"| {' | '.join((str(row['tokens']), row['attention'], row['decoding'], *cells))} |"


def main() -> int:
    """Measure and print the table, or print that of a record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=Path("models.json"), help="where to (default: %(default)s)")
    parser.add_argument("--show", type=Path, help="print the table of this record, measure nothing")
    parser.add_argument("--contexts", nargs="+", type=int, default=[32768, 131072], metavar="TOKENS")
    parser.add_argument("--decodings", nargs="+", choices=DECODINGS, default=list(DECODINGS), help="static caches")
    parts = [call.__name__ for call in (removed, cca_dynamic, cca_static, sdpa)]
    parser.add_argument("--only", nargs="+", choices=parts, default=parts, help="measure these (default: all)")
    parser.add_argument("--seconds", type=float, default=600, help="after these, nothing new is begun")
    options = parser.parse_args()
    failed = 0 if options.show else measure(options)
    record = json.loads((options.show or options.json).read_text(encoding="utf-8"))
    sys.stdout.write("\n".join(table(record)) + "\n")
    return failed


if __name__ == "__main__":
    sys.exit(main())
