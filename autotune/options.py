"""What the command line says, as values: contexts, models, phases, budgets. Every refusal is a `ValueError` in words.

Nothing heavy is imported here: a mistyped option is answered at once.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

PHASES: dict[str, tuple[str, ...]] = {
    "prefill": ("forward",),
    "train": ("forward", "backward"),
    "decode": ("decode",),
}
"""The directions whose kernels each phase of a model's life runs."""
UNITS = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0}
MOST_CONTEXT = 2**31
MOST_BUCKETS = 32


@dataclass(frozen=True, slots=True)
class Effort:
    """How much is tried: configs compiled for each kernel (0: all), to be timed or, `unseen`, for a GPU that is not
    here; and how often the best are timed."""

    candidates: int
    unseen: int
    rounds: int


EFFORTS = {"quick": Effort(6, 2, 8), "standard": Effort(24, 24, 12), "exhaustive": Effort(0, 0, 24)}


@dataclass(frozen=True, slots=True)
class Bucket:
    """A context length to tune for, and the shortest that it stands for."""

    ctx: int
    least: int


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Heads of a model's attention, and their dimension."""

    q_heads: int
    kv_heads: int
    head_dim: int

    def as_dict(self) -> dict[str, int]:
        """As arguments of a `Problem`."""
        return asdict(self)


def buckets(text: str) -> tuple[Bucket, ...]:
    """Contexts from text: "131072", "8192,131072", or "4096..131072".

    A range is cut into buckets at every doubling; each is tuned at its longest context and stands for all of it.
    """
    found: dict[int, Bucket] = {}
    for part in text.split(","):
        first, dots, last = part.strip().partition("..")
        for bucket in _range(_whole(first, text), _whole(last, text)) if dots else [_single(_whole(part, text))]:
            found[bucket.ctx] = bucket
    if len(found) > MOST_BUCKETS:
        raise ValueError(f"--ctx {text} has {len(found)} contexts, more than {MOST_BUCKETS}")
    return tuple(found[ctx] for ctx in sorted(found))


def _single(ctx: int) -> Bucket:
    return Bucket(ctx, ctx)


def _whole(text: str, all_of_it: str) -> int:
    try:
        value = int(text)
    except ValueError:
        message = f"--ctx {all_of_it}: {text.strip()!r} is not a whole number"
        raise ValueError(f"{message}; it takes one (131072), several (8192,131072) or a range (4096..131072)") from None
    if not 1 <= value <= MOST_CONTEXT:
        raise ValueError(f"--ctx must be in 1..{MOST_CONTEXT}, got {value}")
    return value


def _range(first: int, last: int) -> Iterable[Bucket]:
    if first > last:
        raise ValueError(f"--ctx {first}..{last} is empty: it begins above its end")
    yield Bucket(first, first)
    least = first
    while least < last:
        ctx = min(2 * least, last)
        yield Bucket(ctx, least + 1)
        least = ctx


def seconds(text: str) -> float:
    """A time from text: "90s", "10m", "1.5h", or a number of seconds."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text.strip())
    value = float(match.group(1)) * UNITS[match.group(2)] if match else 0.0
    if not 0 < value < math.inf:
        raise ValueError(f"--budget must be a time such as 90s, 10m or 1h, got {text!r}")
    return value


def sizes(option: str, text: str) -> tuple[int, ...]:
    """Whole numbers above 0 with commas between, each once, ascending."""
    try:
        found = sorted({int(part) for part in text.split(",")})
    except ValueError:
        raise ValueError(f"{option} must be whole numbers with commas between, got {text!r}") from None
    if found[0] < 1:
        raise ValueError(f"{option} must be at least 1, got {found[0]}")
    return tuple(found)


def limit(option: str, value: float | None) -> float | None:
    """A limit: a finite number above 0, or None."""
    if value is not None and not 0 < value < math.inf:
        raise ValueError(f"{option} must be a number above 0, got {value:g}")
    return value


def directions(text: str) -> tuple[str, ...]:
    """The directions of some phases, with commas between: "prefill,decode"."""
    names = [name.strip() for name in text.split(",")]
    if wrong := [name for name in names if name not in PHASES]:
        raise ValueError(f"--phase must be of {', '.join(PHASES)}, got {wrong[0]!r}{suggestion(wrong[0], PHASES)}")
    return tuple(dict.fromkeys(direction for name in names for direction in PHASES[name]))


def effort(name: str) -> Effort:
    """The effort of a name."""
    if name not in EFFORTS:
        raise ValueError(f"--effort must be one of {', '.join(EFFORTS)}, got {name!r}{suggestion(name, EFFORTS)}")
    return EFFORTS[name]


def suggestion(name: str, known: Iterable[str]) -> str:
    """ "; did you mean ...?" with the nearest known names, or nothing."""
    near = difflib.get_close_matches(name.lower(), list(known), n=3)
    return f"; did you mean {' or '.join(near)}?" if near else ""


@cache
def model_table() -> dict[str, ModelShape]:
    """Well-known models by name."""
    text = resources.files(__package__).joinpath("models.yaml").read_text(encoding="utf-8")
    return {name: ModelShape(*row) for name, row in yaml.safe_load(text)["models"].items()}


def model_shape(name: str) -> ModelShape:
    """The shape of a model from the table, or from a config.json: its path, or that of its folder."""
    path = Path(name)
    if path.is_dir():
        path = path / "config.json"
    if path.suffix == ".json":
        return _shape_of_file(path)
    table = model_table()
    plain = re.sub(r"[^a-z0-9.]+", "-", name.lower().rpartition("/")[2]).removesuffix("-instruct")
    if plain not in table:
        hint = suggestion(plain, table) or f"; known: {', '.join(table)}"
        raise ValueError(f"--model {name!r} is neither known nor a config.json here{hint}")
    return table[plain]


def _shape_of_file(path: Path) -> ModelShape:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"--model {path} cannot be read: {error}") from error
    config = config.get("text_config", config) if isinstance(config, dict) else {}
    q_heads = _size(config, "num_attention_heads", path)
    kv_heads = _size(config, "num_key_value_heads", path) if config.get("num_key_value_heads") else q_heads
    if config.get("head_dim"):
        return ModelShape(q_heads, kv_heads, _size(config, "head_dim", path))
    return ModelShape(q_heads, kv_heads, _size(config, "hidden_size", path) // q_heads)


def _size(config: dict[str, Any], name: str, path: Path) -> int:
    value = config.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"--model {path}: {name} must be a whole number above 0, got {value!r}")
    return value
