"""Recorded budget use that may only get better.

A kernel may use the whole budget of a rigorous bound, but one that used a tenth of it and now uses a half has changed,
and somebody should know why. `measure` judges a fixed set of cases by every rule; ``ci/ratchet.json`` has what came
out, and `judge` compares. To record the numbers of correct kernels anew, after a change that is meant to cost accuracy:

    TRITON_INTERPRET=1 python -c "from cca_attention.verify import ratchet as r; r.update(r.measure(), loosen=True)"
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from ..problem import Problem
from .cases import Case
from .inputs import poisoned_memory
from .levels import every_level
from .record import write
from .registry import checks
from .tolerance import Comparison

SCHEMA = "cca-ratchet/1"
SLACK = 1.5
"""A budget use may grow to this many times the recorded one."""

FLOOR = 1 / 32
"""A budget use below this counts as this: the bound of a sum has room for 32 roundings at least, and one of them may
fall otherwise with another order of the same terms."""

Kind = Literal["worse", "new", "gone"]


@dataclass(frozen=True, slots=True)
class Regression:
    """A budget use that is not as recorded: `worse` than its `limit`, `new` (not recorded yet) or `gone`."""

    key: str
    kind: Kind
    found: float | None
    limit: float | None

    @property
    def fails(self) -> bool:
        """Whether it is a failure. What is new is reported and waits to be recorded."""
        return self.kind != "new"

    def __str__(self) -> str:
        if self.kind == "gone":
            return f"{self.key}: recorded, and not measured any more"
        limit = "not recorded yet" if self.limit is None else f"more than {self.limit:.3g}"
        return f"{self.key}: budget use {self.found:.3g}, {limit}"


def ratchet_key(check: str, name: str, dtype: str, mode: str) -> str:
    """The key of one number: `name` counts up to its first space, so that all rows or splits of a tensor are one."""
    return f"{check}/{name.split(' ')[0]}/{dtype}/{mode}"


def uses_of(check: str, dtype: str, mode: str, comparisons: Iterable[Comparison]) -> dict[str, float]:
    """The largest budget use of every tensor.

    Without bitwise and empty comparisons, which have no budget, and those of bias: a correct kernel's z-score is a
    random number, and no better for being small.
    """
    uses: dict[str, float] = {}
    for comparison in comparisons:
        if comparison.level not in ("bitwise", "bias") and not comparison.empty:
            key = ratchet_key(check, comparison.name, dtype, mode)
            uses[key] = max(uses.get(key, 0.0), comparison.budget_use)
    return uses


def default_path() -> Path:
    """The file that is part of the package."""
    return Path(str(files("cca_attention.ci") / "ratchet.json"))


def load(path: Path | None = None) -> dict[str, float]:
    """The recorded budget uses by key.

    Raises:
        ValueError: if the file is not a ratchet, or records anything but numbers from 0 to 1.
    """
    path = path or default_path()
    data = json.loads(path.read_text())
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        raise ValueError(f"{path}: the schema must be {SCHEMA}")
    uses: dict[str, float] = data["budget_use"]
    if bad := [key for key, use in uses.items() if not (isinstance(use, int | float) and 0 <= use <= 1)]:
        raise ValueError(f"{path}: a recorded budget use must be a number from 0 to 1, and is not for {', '.join(bad)}")
    return uses


def limit(recorded: float) -> float:
    """The largest budget use that is accepted where `recorded` was measured before; never more than the budget."""
    return min(1.0, SLACK * max(recorded, FLOOR))


def judge(
    uses: Mapping[str, float], recorded: Mapping[str, float] | None = None, *, complete: bool = False
) -> list[Regression]:
    """What is not as `recorded` (default: in the package's file), worst first.

    With `complete`, `uses` are all that there should be, and what is recorded but not among them is `gone`.
    """
    recorded = load() if recorded is None else recorded
    found = []
    for key, use in uses.items():
        if key not in recorded:
            found.append(Regression(key, "new", use, None))
        elif not use <= limit(recorded[key]):  # NaN is worse than anything
            found.append(Regression(key, "worse", use, limit(recorded[key])))
    gone = sorted(recorded.keys() - uses.keys()) if complete else []
    found += [Regression(key, "gone", None, limit(recorded[key])) for key in gone]
    return sorted(found, key=lambda regression: (not regression.fails, regression.kind, regression.key))


def updated(recorded: Mapping[str, float], uses: Mapping[str, float], *, loosen: bool = False) -> dict[str, float]:
    """`recorded` with `uses` entered: new keys, and lower numbers; higher ones only with `loosen`.

    Raises:
        ValueError: for a use that is not a number from 0 to 1: a failure cannot be recorded.
    """
    if bad := [f"{key} {use}" for key, use in uses.items() if not 0 <= use <= 1]:
        raise ValueError(f"a budget use to record must be a number from 0 to 1, got {', '.join(bad)}")
    # rounded up, to three digits, so that the file says no more than it means
    rounded = {key: math.ceil(use * 1000) / 1000 for key, use in uses.items()}
    lowered = {key: use if loosen else min(use, recorded.get(key, use)) for key, use in rounded.items()}
    return dict(sorted({**recorded, **lowered}.items()))


def update(uses: Mapping[str, float], path: Path | None = None, *, loosen: bool = False) -> None:
    """Enter `uses` in the file, which is replaced at once or not at all; a missing file is begun."""
    path = path or default_path()
    recorded = load(path) if path.exists() else {}
    data = {"schema": SCHEMA, "budget_use": updated(recorded, uses, loosen=loosen)}
    write(path, json.dumps(data, indent=1, allow_nan=False) + "\n")


# --- what is measured -------------------------------------------------------------------------------------------------

BASE: dict[str, Any] = {
    "batch": 2, "q_heads": 4, "kv_heads": 2, "seq_len": 61, "head_dim": 32, "group_size": 4, "window_size": 6,
}  # fmt: skip
SHAPES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("randn", {}),
    ("sharp", {"core_heads": "kv"}),
    ("old_keys", {"window_size": 3}),
    ("offset_values", {"pooling": "mean"}),
)
DTYPES = {"interpreter": ("float32", "float16"), "eager": ("float32", "float16", "bfloat16")}


def measure() -> dict[str, float]:
    """Budget uses of a fixed set of cases, with the kernels in the interpreter and on the eager path."""
    uses: dict[str, float] = {}
    with poisoned_memory():
        for check, mode, case in _cases():
            comparisons = _RUNS[check](case)
            for level in {comparison.level for comparison in comparisons}:
                of_level = [comparison for comparison in comparisons if comparison.level == level]
                for key, use in uses_of(f"{check}.{level}", case.problem.dtype, mode, of_level).items():
                    uses[key] = max(uses.get(key, 0.0), use)
    return uses


_RUNS: dict[str, Callable[[Case], list[Comparison]]] = {
    "every_level": every_level,
    "decode_equals_prefill": lambda case: checks()["decode_equals_prefill"](case),
}


def _cases() -> Iterator[tuple[str, str, Case]]:
    """(check, mode, case)."""
    for mode, dtypes in DTYPES.items():
        backend: Literal["triton", "eager"] = "triton" if mode == "interpreter" else "eager"
        for dtype in dtypes:
            for family, shape in SHAPES:
                problem = Problem(**{**BASE, **shape, "dtype": dtype})
                yield "every_level", mode, Case(problem=problem, family=family, backend=backend)
            small = Problem(**{**BASE, "dtype": dtype, "seq_len": 37})
            yield "decode_equals_prefill", mode, Case(problem=small, backend=backend)
