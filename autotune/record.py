"""A finished session as a file: every config's fate, and every round, to be explained, compared, shown and replayed."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from .. import __version__
from ..problem import Problem
from ..profiles.configs import as_config
from .devices import find_device
from .front import Point
from .keys import config_fields
from .progress import Progress
from .search import Trial
from .session import Session

SCHEMA = "cca-run/1"
FOLDER = "runs"


Fields = dict[str, int]
"""A config's."""


class RecordError(ValueError):
    """A file that is no record of a run; the message says what is wrong."""


class _Trial(BaseModel):
    config: Fields
    time_us: float | None
    predicted_us: float | None
    parts: dict[str, float]
    registers: int
    shared_bytes: int
    spill_bytes: int
    refusal: str | None


class _Lost(BaseModel):
    config: Fields
    outcome: str
    message: str


class _Kernel(BaseModel):
    legal: int
    refused: int
    compiled: int
    timed: int
    ruled_out: dict[str, int]
    dropped: dict[str, int]
    failed: dict[str, int]
    quarantined: list[_Lost]
    chosen: Fields | None
    time_us: float | None
    default: Fields
    default_time_us: float | None
    measurement: dict[str, Any] | None
    trouble: str | None
    trials: list[_Trial]
    rounds: list[dict[str, float | None]]


class _Run(BaseModel):
    problem: dict[str, int | str]
    kernels: dict[str, _Kernel]


class _Front(BaseModel):
    points: list[Point]
    front: list[Point]
    knee: Point
    preferred: Point
    data: str


class _Peer(BaseModel):
    what: str
    system: str
    problem: dict[str, int | str]
    status: str
    ms: float | None
    note: str


class _Record(BaseModel):
    """What the readers of a record rely on; more may be in it."""

    created: str
    version: str
    device: str
    evidence: str
    profile: str | None
    semantics: _Front | None
    runs: list[_Run]
    peers: list[_Peer] = []

    def check(self) -> None:
        """Raise ValueError or LookupError for a GPU, problem, kernel or config that this version has not."""
        find_device(self.device)
        for run in self.runs:
            Problem(**run.problem)  # type: ignore[arg-type]
            for name, kernel in run.kernels.items():
                tried = [trial.config for trial in kernel.trials] + [lost.config for lost in kernel.quarantined]
                for config in (kernel.default, *filter(None, [kernel.chosen]), *tried):
                    as_config(name, config)


def record_of(session: Session) -> dict[str, Any]:
    """All of a session that has run."""
    record = {"schema": SCHEMA, "created": _now(), "version": __version__, **session.summary()}
    for run, (_, kernels) in zip(record["runs"], session.runs, strict=True):
        for kernel in kernels:
            run["kernels"][kernel.name] |= {
                "trials": [_trial(trial) for trial in kernel.trials.values()],
                "rounds": [_round(kernel, number) for number in range(len(kernel.rounds))],
            }
    return record


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _trial(trial: Trial) -> dict[str, Any]:
    prediction = trial.prediction
    return {
        "config": asdict(trial.config),
        "time_us": None if trial.timing is None else trial.timing.median_us,
        "predicted_us": None if prediction is None else prediction.total_us,
        "parts": {} if prediction is None else prediction.parts,
        "registers": max((used.registers for used in trial.resources), default=0),
        "shared_bytes": max((used.shared_bytes for used in trial.resources), default=0),
        "spill_bytes": max((used.spill_bytes for used in trial.resources), default=0),
        "refusal": trial.refusal,
    }


def _round(kernel: Progress, number: int) -> dict[str, float | None]:
    return {config_fields(config): time_us for config, time_us in kernel.rounds[number].items()}


def write_record(record: Mapping[str, Any], folder: Path) -> Path:
    """Keep a record under `folder`, whole or not at all; the path of its file, whose name begins with its time."""
    runs = folder / FOLDER
    runs.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=runs, prefix=".", suffix=".json")
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        json.dump(record, file)
    stamp = "".join(c for c in record["created"] if c.isdigit())[:14]
    path = runs / f"{stamp}-{record['device']}-{Path(temporary).stem.lstrip('.')}.json"
    os.replace(temporary, path)
    return path


def read_record(path: Path, *, known: bool = True) -> dict[str, Any]:
    """The record in a file. `known`: whether its GPU, kernels and configs must be those of this version.

    Raises:
        RecordError: for a file that cannot be read, or is something else.
    """
    try:
        record: Any = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecordError(f"{path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise RecordError(f"{path} is no record of cca-tune: {error}") from error
    if not isinstance(record, dict) or record.get("schema") != SCHEMA:
        raise RecordError(f"{path} is no record of cca-tune, or one of another version: it has no schema {SCHEMA!r}")
    try:
        found = _Record.model_validate(record)
        if known:
            found.check()
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise RecordError(f"{path} is damaged: {where}: {first['msg']}") from error
    except (ValueError, LookupError, TypeError) as error:
        raise RecordError(f"{path} is of another version: {error.args[0]}") from error
    return record


def latest(folder: Path) -> Path:
    """The file of the last session that was kept under `folder`.

    Raises:
        RecordError: if there is none.
    """
    found = sorted((folder / FOLDER).glob("*.json"))
    if not found:
        raise RecordError(f"no run is kept in {folder / FOLDER}; cca-tune keeps one whenever it comes to its end")
    return found[-1]
