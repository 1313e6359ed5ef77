"""The JSON file of a run: a header that says where the figures come from, and a row for each of them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from ..problem import Problem
from ..verify.record import write as write_text

Status = Literal["measured", "wrong", "failed", "refused", "out of memory", "skipped", "not offered"]


class RecordError(ValueError):
    """A file that is not a record; the message names it and says what is wrong."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Evidence(_Part):
    """One thing that was held against float64: what, how many samples or cases, the worst error over its bound."""

    check: str
    count: int
    worst: float
    detail: str = ""


class Row(_Part):
    """One system on one case.

    `ms` is the median of one call. `flops` and `bytes` are those of useful work (`bench.work`), `tflops`, `tbps` their
    rates. `extra_bytes` is the peak of allocated memory over inputs, outputs and gradients; `held_bytes` what CCA needs
    of it by formula. `keys` is the number of keys of a decode step, `card` how the GPU was right after: clocks, power,
    what held them back. Only a row that is "measured" has figures, and one of CCA only with its `evidence`.
    """

    suite: str
    what: str
    system: str
    problem: dict[str, int | str]
    status: Status
    keys: int | None = None
    ms: float | None = None
    flops: float | None = None
    bytes: float | None = None
    tflops: float | None = None
    tbps: float | None = None
    extra_bytes: int | None = None
    held_bytes: int | None = None
    card: dict[str, Any] = {}
    note: str = ""
    evidence: tuple[Evidence, ...] = ()

    @property
    def ctx(self) -> int:
        """Context length."""
        return int(self.problem["seq_len"])

    def same_case(self, other: Row) -> bool:
        """Whether `other` is of the same tensors."""
        return self.suite == other.suite and self.problem == other.problem


class Ceilings(_Part):
    """Rates of the GPU: as the vendor states them (None if the table of devices lacks it), and as measured here."""

    vendor_tflops: float | None = None
    vendor_tbps: float | None = None
    tflops: float
    tbps: float


class Header(_Part):
    """Where, with what, when and by which command; `card` has the GPU's limits and modes, and its state at first."""

    device: str
    versions: dict[str, str]
    commit: str
    date: str
    command: str
    card: dict[str, Any]
    ceilings: Ceilings


class Record(_Part):
    """A run; not `complete` if it was interrupted, and then `missing` names the cases that it did not finish."""

    schema_version: Literal["cca-bench/1"] = "cca-bench/1"
    header: Header
    rows: tuple[Row, ...]
    complete: bool
    missing: tuple[str, ...] = ()

    def find(self, **wanted: Any) -> Row | None:
        """The first measured row with these attributes, or fields of its problem."""
        return next(iter(matching(self.rows, **wanted)), None)


def matching(rows: Iterable[Row], **wanted: Any) -> list[Row]:
    """The measured rows with these attributes, or fields of their problems."""
    fields = set(Problem.__dataclass_fields__)
    return [
        row
        for row in rows
        if row.status == "measured"
        and all((row.problem[name] if name in fields else getattr(row, name)) == x for name, x in wanted.items())
    ]


def write(path: Path, record: Record) -> None:
    """Write the file whole or not at all."""
    write_text(path, record.model_dump_json(indent=1) + "\n")


def read(path: Path) -> Record:
    """The record in a file.

    Raises:
        RecordError: if there is none.
    """
    try:
        return Record.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise RecordError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise RecordError(f"{path} is not a record of cca-bench: {where or 'the file'}: {first['msg']}") from error
