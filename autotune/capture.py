"""A model's own queries, keys and values, as its attention gets them: after the rotation, one sequence of a text."""

from __future__ import annotations

import hashlib
import importlib.util
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import __version__
from .tensors_file import Heads, write_layers

LEAST_TOKENS, MOST_TOKENS, USUAL_LAYERS = 512, 8192, 4
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class CaptureError(ValueError):
    """A model or a text that cannot be captured; the message says why, and what to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What to keep. None stands for four layers, the first and the last among them; for all heads; for up to 8192
    tokens; for the checkpoint's own element type. `heads` are those of keys: each comes with the queries that share it.
    """

    layers: Sequence[int] | None = None
    heads: Sequence[int] | None = None
    tokens: int | None = None
    dtype: str | None = None


def capture(model: Path, text: Path, output: Path, wanted: Wanted, say: Callable[[str], None]) -> None:
    """Run the beginning of `text` through a model that transformers loads, and write what its attention was given.

    Args:
        model: a folder, or a file in the GGUF format; nothing is downloaded, and no code of the model's is run.
        text: in UTF-8. output: the safetensors file. say: is told what goes on.

    Raises:
        CaptureError: naming what cannot be. OSError: if `output` cannot be written.
    """
    words = _text(text)
    loaded, tokenizer = _loaded(model, wanted.dtype)
    layers = _chosen("--layers", wanted.layers, _layers(loaded), USUAL_LAYERS)
    heads = _chosen("--heads", wanted.heads, range(_decoder_config(loaded).num_key_value_heads))
    ids = _tokens(tokenizer(words, return_tensors="pt").input_ids, wanted.tokens, loaded)
    say(f"{ids.shape[1]} tokens of {text.name} through {model.name}, keeping layers {_listed(layers)}")
    found = _run(loaded, ids, layers, heads)
    about = {
        "made_by": f"cca-attention {__version__}", "model": model.name, "architecture": type(loaded).__name__,
        "config_sha256": hashlib.sha256(loaded.config.to_json_string().encode()).hexdigest(),
        "text": text.name, "text_sha256": hashlib.sha256(words.encode()).hexdigest(),
        "tokens": str(ids.shape[1]), "layers": _listed(layers), "kv_heads": _listed(heads),
        "softmax_scale": "1/sqrt(head_dim), the model's own is in q",
    }  # fmt: skip
    write_layers(output, found, about)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CaptureError(f"TEXT {path} cannot be read: {getattr(error, 'strerror', None) or error}") from error


def _loaded(path: Path, dtype: str | None) -> tuple[Any, Any]:
    """The model on the GPU, if there is one, and its tokenizer."""
    if not path.exists():
        raise CaptureError(f"MODEL {path}: there is no such folder or file; models are not downloaded")
    if importlib.util.find_spec("transformers") is None:
        raise CaptureError("capture needs transformers: pip install 'cca-attention[hf]'")
    from transformers import AutoModelForCausalLM, AutoTokenizer, logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    folder, where = path, dict[str, Any](local_files_only=True, trust_remote_code=False)
    if path.is_file():
        folder, where["gguf_file"] = path.parent, path.name
    options: dict[str, Any] = {"dtype": DTYPES[dtype] if dtype else "auto", "attn_implementation": "sdpa"}
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, **options, **where)
        tokenizer = AutoTokenizer.from_pretrained(folder, **where)
    except Exception as error:  # whatever transformers finds wrong with the files
        raise CaptureError(f"MODEL {path} cannot be loaded: {_first_line(error)}") from error
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _decoder_config(model: Any) -> Any:
    return model.config.get_text_config(decoder=True)


def _layers(model: Any) -> list[int]:
    """Layers whose whole past is attended to; the approximation has no meaning for another."""
    config = _decoder_config(model)
    usual = "sliding_attention" if getattr(config, "sliding_window", None) else "full_attention"
    kinds = getattr(config, "layer_types", None) or [usual] * config.num_hidden_layers
    return [index for index, kind in enumerate(kinds) if kind == "full_attention"]


def _chosen(option: str, asked: Sequence[int] | None, there: Sequence[int], most: int | None = None) -> list[int]:
    """Those that are asked for, or up to `most` of what is there, evenly from the first to the last."""
    if not there:
        raise CaptureError("MODEL has no layer of full attention")
    if asked is None:
        count = min(most or len(there), len(there))
        return [there[round(i * (len(there) - 1) / max(1, count - 1))] for i in range(count)]
    if unknown := [number for number in asked if number not in there]:
        kind = " with full attention" if option == "--layers" else ""
        raise CaptureError(f"{option}: the model has no {unknown[0]}{kind}; it has {_listed(there)}")
    return sorted(set(asked))


def _listed(numbers: Sequence[int]) -> str:
    return ",".join(map(str, numbers))


def _tokens(ids: Tensor, asked: int | None, model: Any) -> Tensor:
    """(1, T): the beginning of the text."""
    most = getattr(_decoder_config(model), "max_position_embeddings", None) or MOST_TOKENS
    if asked is not None and not LEAST_TOKENS <= asked <= most:
        raise CaptureError(f"--tokens must be from {LEAST_TOKENS} to {most}, the model's longest sequence, got {asked}")
    least, kept = asked or LEAST_TOKENS, asked or min(most, MOST_TOKENS)
    if ids.shape[1] < least:
        raise CaptureError(f"TEXT is too short: it has {ids.shape[1]} tokens, and {least} are needed")
    return ids[:, :kept]


def _run(model: Any, ids: Tensor, layers: Sequence[int], heads: Sequence[int]) -> dict[int, Heads]:
    found: dict[int, Heads] = {}

    def keep(module: Any, query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]) -> None:
        if module.layer_idx not in layers:
            return
        for name in ("softcap", "s_aux", "position_bias"):
            if options.get(name) is not None:
                raise CaptureError(f"--layers: {module.layer_idx} attends with {name}, which CCA attention has not")
        scale = options.get("scaling") or 1 / math.sqrt(query.shape[-1])
        q = query[0] if scale == query.shape[-1] ** -0.5 else query[0] * (scale * math.sqrt(query.shape[-1]))
        chosen = q.unflatten(0, (key.shape[1], -1))[list(heads)].flatten(0, 1)
        found[module.layer_idx] = Heads(chosen.cpu(), key[0, list(heads)].cpu(), value[0, list(heads)].cpu())

    with _watched(keep), torch.no_grad():
        try:
            model.get_decoder()(ids.to(model.device), use_cache=False)
        except torch.OutOfMemoryError as error:
            raise CaptureError(f"{ids.shape[1]} tokens do not fit into the GPU's memory: lower --tokens") from error
    if missing := [layer for layer in layers if layer not in found]:
        name = type(model).__name__
        raise CaptureError(f"{name} does not call transformers' attention interface in layers {_listed(missing)}")
    return found


@contextmanager
def _watched(keep: Callable[[Any, Tensor, Tensor, Tensor, dict[str, Any]], None]) -> Iterator[None]:
    """Within it, `keep` is told of every call of transformers' attention interface under the name "sdpa"."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as FUNCTIONS

    attend = FUNCTIONS["sdpa"]

    def watched(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> Any:
        keep(module, query, key, value, options)
        return attend(module, query, key, value, mask, **options)

    FUNCTIONS["sdpa"] = watched
    try:
        yield
    finally:
        FUNCTIONS["sdpa"] = attend
