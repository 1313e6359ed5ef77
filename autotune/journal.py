"""What was found, one JSON line for each finished trial, so that no run does a trial that another has done.

Lines are only ever appended, under a lock and flushed to the disk. A line that was cut short by a power cut, a kill or
a full disk is dropped by the next that writes; any other damage is an error that says where. Runs that go on at one
time see each other's records whenever they write, and when they ask for them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from filelock import FileLock

Phase = Literal["sketch", "compile", "check", "measure", "round", "recheck", "verify", "choice"]
VERSION = 1


class JournalError(ValueError):
    """A journal that cannot be read or written; the message names the file and what is wrong."""


@dataclass(frozen=True, slots=True)
class Key:
    """What makes two trials the same.

    `device` is what the phase depends on: the architecture to compile, the GPU to measure, the GPU or the interpreter
    to verify.
    """

    phase: Phase
    kernel: str
    source_hash: str
    problem: str
    config: str
    device: str
    triton: str


class Journal:
    """The records under `folder`; a context manager that keeps the file open for appending."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "journal.jsonl"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(folder / "journal.lock")
            with self._lock:
                self._file = self.path.open("ab+", buffering=0)
        except OSError as error:
            raise JournalError(f"the cache directory {folder} cannot be written: {error.strerror or error}") from error
        self._records: dict[Key, Mapping[str, Any]] = {}
        self._forgotten: set[Key] = set()
        self._read_to = self._lines = 0
        self.refresh()

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def __len__(self) -> int:
        return len(self._records)

    def __iter__(self) -> Iterator[Key]:
        return iter(self._records)

    def get(self, key: Key) -> Mapping[str, Any] | None:
        """What was recorded last under `key`, or None."""
        return self._records.get(key)

    def forget(self, out: Callable[[Key, Mapping[str, Any]], bool]) -> int:
        """Know nothing, until it is recorded anew, of what `out` is true of; how many that are. The file keeps it."""
        gone = {key for key, value in self._records.items() if out(key, value)}
        for key in gone:
            del self._records[key]
        self._forgotten |= gone
        return len(gone)

    def forgot(self, key: Key) -> bool:
        """Whether the file has a record of `key` that was forgotten, and no later one."""
        return key in self._forgotten

    def add(self, records: Iterable[tuple[Key, Mapping[str, Any]]]) -> None:
        """Append finished trials; on return they are on the disk.

        Raises:
            JournalError: if they cannot be written, as on a full disk; what was there before is whole.
        """
        content = memoryview("".join(_line(key, value) for key, value in dict(records).items()).encode())
        with self._lock:
            try:
                self._drop_torn_line()
                while content:
                    content = content[self._file.write(content) :]
                os.fsync(self._file.fileno())
            except OSError as error:
                raise JournalError(f"{self.path} cannot be written: {error.strerror or error}") from error
            self._read()

    def refresh(self) -> None:
        """Take in what other runs have written.

        Raises:
            JournalError: for a line that is no record.
        """
        with self._lock:
            self._read()

    def _drop_torn_line(self) -> None:
        """Cut off what follows the last line end: whoever wrote it did not live to finish."""
        content_end = self._file.seek(0, os.SEEK_END)
        keep = content_end
        while keep > 0:
            start = max(0, keep - 4096)
            self._file.seek(start)
            newline = self._file.read(keep - start).rfind(b"\n")
            if newline >= 0:
                keep = start + newline + 1
                break
            keep = start
        if keep < content_end:
            self._file.truncate(keep)
        self._file.seek(0, os.SEEK_END)

    def _read(self) -> None:
        """Enter the whole lines that were not read yet."""
        self._file.seek(self._read_to)
        content = self._file.readall() or b""
        whole = content[: content.rfind(b"\n") + 1]
        for line in whole.splitlines():
            self._lines += 1
            try:
                record = json.loads(line)
                if record["version"] != VERSION:
                    raise ValueError(f"it is of version {record['version']}, this program writes {VERSION}")
                key = Key(**record["key"])
                self._records[key] = record["value"]
                self._forgotten.discard(key)
            except (ValueError, KeyError, TypeError) as error:
                message = f"{self.path}, line {self._lines}, is not a record ({error}); repair it or move the file away"
                raise JournalError(message) from error
        self._read_to += len(whole)


def _line(key: Key, value: Mapping[str, Any]) -> str:
    fields = {name: getattr(key, name) for name in Key.__dataclass_fields__}
    return json.dumps({"version": VERSION, "key": fields, "value": value}) + "\n"
