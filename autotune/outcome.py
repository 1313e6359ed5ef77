"""What became of a config that is out: one of a few kinds, never the end of a run."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from .journal import Phase
from .worker import Failed

Outcome = Literal[
    "compile error", "compile timeout", "refused", "oom", "illegal access", "crash", "hang", "wrong"
]  # fmt: skip
"""The kinds. "oom" is a lack of memory of any kind, "illegal access" an error after which a GPU context is lost."""

NO_ROOM_FOR_TENSORS = "NoRoomError: "
"""In the message of a job that could not even allocate the tensors: no config is to blame."""
NO_ROOM = re.compile(r"OutOfMemoryError|OutOfResources|out of memory", re.IGNORECASE)
STICKY = re.compile(
    r"illegal memory access|misaligned address|illegal (instruction|address)|launch failure|device-side assert"
    r"|CUDA_ERROR_(ILLEGAL|MISALIGNED|LAUNCH_FAILED|ASSERT)",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class Quarantined:
    """Why a config that compiled and fits is out, and in which phase that was seen."""

    outcome: Outcome
    message: str
    phase: Phase


def outcome_of(failed: Failed, phase: Phase) -> Outcome:
    """The kind of a job that returned nothing."""
    compiling = phase in ("sketch", "compile")
    if failed.kind == "timeout":
        return "compile timeout" if compiling else "hang"
    if compiling:
        return "compile error"
    return "crash" if failed.kind == "crashed" else _of_message(failed.message)


def record_of(failed: Failed, phase: Phase) -> dict[str, Any]:
    """What the journal keeps of it."""
    return {"failed": outcome_of(failed, phase), "message": failed.message}


def _of_message(message: str) -> Outcome:
    if NO_ROOM.search(message):
        return "oom"
    return "illegal access" if STICKY.search(message) else "crash"


def against(record: Mapping[str, Any], phase: Phase) -> Quarantined:
    """What a record of `phase` that is not in favour of a config says: a failed job, or evidence of the gate."""
    outcome = record.get("failed") or record.get("outcome", "wrong")
    if outcome == "crash":
        outcome = _of_message(record["message"])
    return Quarantined(outcome, record["message"], phase)


def speaks_against(record: Mapping[str, Any]) -> bool:
    """Whether a trial's record puts its config out: a failed job, or evidence of the gate against it."""
    return record.get("failed") is not None or record.get("ok") is False
