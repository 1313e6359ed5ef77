"""What a run of `cca-verify` found, as one versioned JSON file: a header, a result for each check, a footer.

The file is written whole or not at all. A run that was interrupted writes it with ``complete: false``, which
`ci/verdict.py` refuses. docs/cca-verify.md lists the fields.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

SCHEMA = "cca-verify/1"
Status = Literal["pass", "fail", "error", "skip", "not-run"]
Mode = Literal["host", "eager", "interpreter", "emulated-bf16", "gpu"]
Trouble = Literal["", "exception", "crash", "timeout", "stale-mutant", "environment"]
STATUSES: tuple[Status, ...] = ("pass", "fail", "error", "skip", "not-run")

PASSED, FAILED, SURVIVED, CRASHED, BROKEN, MISCONFIGURED, INTERRUPTED = 0, 1, 2, 3, 4, 5, 130
MEANINGS = {
    PASSED: "every check that ran passed",
    FAILED: "a numerical or property failure",
    SURVIVED: "a planted mistake survived",
    CRASHED: "a time-out or a crash",
    BROKEN: "the baseline or the environment is broken",
    MISCONFIGURED: "configuration: wrong usage, a check missing or not allowed to be skipped, or nothing ran",
    INTERRUPTED: "interrupted; the record is incomplete",
}


class RecordError(ValueError):
    """A file that is not a record; the message names it and says what is wrong."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One check of one kind: what ran, what came out and where the largest part of the budget went.

    `budget_use` is the largest error over its bound among all comparisons (at most 1 where the check passed, None
    where nothing was compared by a bound). The fields from `tensor` on describe that comparison, `terms` what its rule
    looked at there: actual and expected value, error and bound, or the z-score of a bias. `warnings` are statistical
    suspicions, which fail a strict run only; `trouble` says which error; `facts` is what else the check counted.
    """

    id: str
    layer: str
    check: str
    status: Status
    mode: Mode
    properties: tuple[str, ...] = ()
    direction: str = ""
    kernel: str = ""
    dtype: str = ""
    config: Mapping[str, Any] | None = None
    shape: str = ""
    case: str = ""
    seed: int = 0
    blob: str = ""
    cases: int = 0
    comparisons: int = 0
    budget_use: float | None = None
    tensor: str = ""
    max_abs_error: float | None = None
    worst_index: tuple[int, ...] = ()
    level: str = ""
    terms: Mapping[str, float] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    trouble: Trouble = ""
    message: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)
    duration_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """What was asked for and where it ran. `planned` are the ids of all results that must be there."""

    commit: str
    started: str
    versions: Mapping[str, str]
    gpu: str
    ci: bool
    layers: tuple[str, ...]
    planned: tuple[str, ...]
    expected: Mapping[str, int]
    seed: int
    examples: int | None
    budget_scale: float
    strict: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Footer:
    """What is known at the end: the verdict, classes of inputs that must have been hit, mutants and the ratchet."""

    exit_code: int
    verdict: str
    duration_s: float
    counts: Mapping[str, int]
    coverage: Mapping[str, int]
    missing_classes: tuple[str, ...]
    mutants: tuple[Mapping[str, Any], ...]
    ratchet: tuple[str, ...]
    sha256: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """A run. `complete` is False if it was interrupted."""

    header: Header
    results: tuple[Result, ...]
    footer: Footer
    complete: bool = True
    schema: str = SCHEMA

    def count(self, *statuses: Status) -> int:
        """How many results have one of these statuses."""
        return sum(result.status in statuses for result in self.results)


def counts(results: Iterable[Result]) -> dict[str, int]:
    """Results of each status, the absent ones included."""
    found = Counter(result.status for result in results)
    return {status: found[status] for status in STATUSES}


def as_json(record: Record) -> str:
    """The record as JSON; numbers that are not finite are the strings "inf", "-inf" and "nan"."""
    return json.dumps(_plain(asdict(record)), indent=1, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def write(path: Path, text: str) -> None:
    """Put `text` at `path` at once: whoever looks sees the old file or the new one, never a part."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)


def read(path: Path) -> Record:
    """The record in a file.

    Raises:
        RecordError: if it is not one, whole and of this version.
    """
    try:
        data = json.loads(path.read_text())
        if data["schema"] != SCHEMA:
            raise ValueError(f"its schema is {data['schema']!r}, this program reads {SCHEMA!r}")
        results = tuple(result_from(values) for values in data["results"])
        header, footer = Header(**_tupled(data["header"])), Footer(**_tupled(data["footer"]))
        return Record(header=header, results=results, footer=footer, complete=data["complete"])
    except OSError as error:
        raise RecordError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise RecordError(f"{path} is not a record of cca-verify: {error}") from error


def result_from(values: Mapping[str, Any]) -> Result:
    """A result from its JSON."""
    numbers = ("budget_use", "max_abs_error")
    spelt = {name: float(values[name]) for name in numbers if values[name] is not None}
    return Result(**{**_tupled(values), **spelt})


def result_as_dict(result: Result) -> dict[str, Any]:
    """The JSON of a result, for another process."""
    plain: dict[str, Any] = _plain(asdict(result))
    return plain


def _tupled(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
