"""From the bytes of a stranger's file to a profile, or to one error that lists every mistake with its line.

YAML gives structure and text here and nothing else: there are no tags, so nothing is constructed, and no guessing of
types, so a version is the text that was written ("3.10" stays "3.10") and the schema says what is a number. The bytes,
the depth and the number of values, with what an alias repeats counted again, are bounded while it is built.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from .choice import Mode
from .identity import DeviceIdentity, SemanticBlock
from .layout import read_laid_out
from .schema import SCHEMA, Contradictions, Location, Profile, ProfileWarning

MAX_BYTES = 4 * 2**20
MAX_DEPTH = 12
MAX_VALUES = 250_000
MAX_LISTED = 200
"""Mistakes that a message lists; of more it gives the number."""

_MINOR = int(SCHEMA.rpartition(".")[2])
_PARSER = getattr(yaml, "CBaseLoader", yaml.BaseLoader)  # without libyaml the same in Python, ten times slower
_NOWHERE: Location = ("nowhere", -1)
_NULLS = ("", "~", "null", "Null", "NULL")
_UNKNOWN_FIELD = ("extra_forbidden", "unexpected_keyword_argument")


class ProfileError(ValueError):
    """A profile file that cannot be used; the message says what is wrong with it, all at once."""


class ProfileNotFound(ProfileError, LookupError):
    """No profile of that name; the message says what is there instead, or which command makes one."""


class _Stop(Exception):
    """A mistake after which the rest of the file means nothing."""

    def __init__(self, line: int, message: str) -> None:
        super().__init__(line, message)
        self.line, self.message = line, message


class _Builder:
    """Plain dicts, lists, strings and None from YAML's events, with the line of each place and the mistakes found."""

    def __init__(self, text: str) -> None:
        self._parser = _PARSER(text)
        self._values = 0
        self._anchors: dict[str, tuple[Any, int]] = {}  # what it names, and how many values that is
        self.lines: dict[Location, int] = {}
        self.mistakes: list[tuple[int, str]] = []

    def document(self) -> Any:
        """The only document of the file; None if there is none."""
        self._parser.get_event()
        if self._parser.check_event(yaml.StreamEndEvent):
            return None
        self._parser.get_event()
        value = self._value((), 0)
        self._parser.get_event()
        if not self._parser.check_event(yaml.StreamEndEvent):
            raise _Stop(self._next_line(), "a second document begins: a profile is one")
        return value

    def _next_line(self) -> int:
        return int(self._parser.peek_event().start_mark.line) + 1

    def _value(self, place: Location, depth: int) -> Any:
        event = self._parser.get_event()
        line = self.lines[place] = event.start_mark.line + 1
        if isinstance(event, yaml.AliasEvent):
            return self._repeated(str(event.anchor), line, depth)
        self._count(1, depth, line)
        before = self._values
        if event.tag is not None:
            self.mistakes.append((line, f"the tag {event.tag!r}: tags are not taken"))
        if isinstance(event, yaml.MappingStartEvent):
            value: Any = self._mapping(place, depth)
        elif isinstance(event, yaml.SequenceStartEvent):
            value = self._sequence(place, depth)
        else:
            value = self._scalar(event, line)
        if event.anchor is not None:
            self._anchors[event.anchor] = value, 1 + self._values - before
        return value

    def _count(self, values: int, depth: int, line: int) -> None:
        self._values += values
        if self._values > MAX_VALUES:
            raise _Stop(line, f"it has more than {MAX_VALUES} values")
        if depth > MAX_DEPTH:
            raise _Stop(line, f"it is nested more than {MAX_DEPTH} deep")

    def _repeated(self, anchor: str, line: int, depth: int) -> Any:
        if anchor not in self._anchors:
            self.mistakes.append((line, f"the alias *{anchor} is of nothing that ends before it"))
            return None
        value, values = self._anchors[anchor]
        self._count(values, depth + _height(value), line)
        return value

    def _scalar(self, event: yaml.ScalarEvent, line: int) -> str | None:
        if event.implicit[0] and event.value in _NULLS:
            return None
        if not event.value.isprintable():
            self.mistakes.append((line, f"the text {event.value[:40]!r} holds characters that cannot be printed"))
        return str(event.value)

    def _sequence(self, place: Location, depth: int) -> list[Any]:
        items: list[Any] = []
        while not self._parser.check_event(yaml.SequenceEndEvent):
            items.append(self._value((*place, len(items)), depth + 1))
        self._parser.get_event()
        return items

    def _mapping(self, place: Location, depth: int) -> dict[str, Any]:
        items: dict[str, Any] = {}
        while not self._parser.check_event(yaml.MappingEndEvent):
            line, key = self._key(depth)
            if key in items:
                self.mistakes.append((line, f"the key {key!r} is given twice"))
            if key is None or key in items:
                self._value(_NOWHERE, depth + 1)
            else:
                items[key] = self._value((*place, key), depth + 1)
                self.lines[(*place, key)] = line
        self._parser.get_event()
        return items

    def _key(self, depth: int) -> tuple[int, str | None]:
        """The line of a key and its text; None if it is no text."""
        line = self._next_line()
        if self._parser.check_event(yaml.ScalarEvent):
            key = self._value(_NOWHERE, depth + 1)
        else:
            self._value(_NOWHERE, depth + 1)
            key = None
        if key is None:
            self.mistakes.append((line, "a key that is no text"))
        return line, key


class _Header(BaseModel):
    """The blocks of a profile that say what it is for."""

    device: DeviceIdentity
    semantic: SemanticBlock


def parse_header(data: bytes, source: str, arch: str = "") -> tuple[DeviceIdentity, SemanticBlock] | None:
    """The GPU and the semantics that a profile is for, without reading its entries; None if it is not of `arch`.

    Raises:
        ProfileError: for a file that is no profile.
    """
    head = data[:MAX_BYTES].partition(b"\nentries:")[0]
    if arch.encode() not in head:
        return None
    try:
        text = head.decode()
        header = _Header.model_validate(read_laid_out(text, MAX_VALUES) or _Builder(text).document())
    except (UnicodeDecodeError, _Stop, yaml.YAMLError, ValidationError):
        profile = parse_profile(data, source)  # says what is wrong, unless the blocks are in another order
        return profile.device, profile.semantic
    return header.device, header.semantic


def _height(value: Any) -> int:
    """How deep it is nested; no deeper than `MAX_DEPTH`, or it would not have been built."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + max(map(_height, inner)) if inner else 0


def parse_profile(data: bytes, source: str, mode: Mode = "checked") -> Profile:
    """The profile that the bytes of the file `source` hold; its look-ups are of `mode`.

    Raises:
        ProfileError: with every mistake found, each with its line.
    """
    if len(data) > MAX_BYTES:
        raise ProfileError(f"{source} has more than {MAX_BYTES} bytes")
    try:
        text = data.decode("utf-8")
        if (profile := _quickly(text)) is not None:
            return profile.read_from(source, mode)
        builder = _Builder(text)
        content = builder.document()
    except UnicodeDecodeError as error:
        raise ProfileError(f"{source} is not text in UTF-8: byte {error.start}") from error
    except _Stop as error:
        raise ProfileError(f"{source}, line {error.line}: {error.message}") from error
    except yaml.YAMLError as error:
        raise ProfileError(f"{source}: {' '.join(str(error).split())}") from error
    version = content.get("schema") if isinstance(content, dict) else None
    if not isinstance(version, str) or not version.startswith("cca-profile/"):
        raise ProfileError(f"{source} is not a profile: it has no line 'schema: {SCHEMA}'")
    if not re.fullmatch(r"cca-profile/1\.\d{1,4}", version, re.ASCII):
        raise ProfileError(f"{source} is a {version!r}; this program reads cca-profile/1")
    try:
        profile = _validated(content, int(version.rpartition(".")[2]) > _MINOR, source)
    except ValidationError as error:
        raise _error(source, [*builder.mistakes, *_with_lines(error, builder.lines)]) from error
    if builder.mistakes:
        raise _error(source, builder.mistakes)
    return profile.read_from(source, mode)


def _quickly(text: str) -> Profile | None:
    """The profile in a text that `layout` knows, in which nothing is wrong; of any other nothing is said here."""
    content = read_laid_out(text, MAX_VALUES)
    if content is None or content.get("schema") != SCHEMA:
        return None
    try:
        return Profile.model_validate(content)
    except ValidationError:
        return None


def read_profile(path: Path, mode: Mode = "checked") -> Profile:
    """The profile in one file. Raises `ProfileError` with every mistake found, each with its line."""
    return parse_profile(read_data(path), str(path), mode)


def read_data(path: Path) -> bytes:
    """The bytes of a file, of a large one only so many that it is seen to be too large. Raises `ProfileError`."""
    try:
        if not path.is_file():
            raise ProfileNotFound(f"{path} is not a file" if path.exists() else f"there is no profile file {path}")
        with path.open("rb") as file:
            return file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ProfileError(f"{path} cannot be read: {error.strerror or error}") from error


def _validated(content: dict[str, Any], is_newer: bool, source: str) -> Profile:
    """The profile of `content`; of a newer minor version of the schema, without the fields that are new in it."""
    try:
        return Profile.model_validate(content)
    except ValidationError as error:
        unknown = [mistake["loc"] for mistake in error.errors() if mistake["type"] in _UNKNOWN_FIELD]
        if not is_newer or not unknown:
            raise
    for *parents, field in unknown:
        block: Any = content
        for step in parents:
            block = block[step]
        block.pop(field, None)
    names = ", ".join(".".join(map(str, place)) for place in unknown)
    warnings.warn(f"{source} is of {content['schema']}; not understood here: {names}", ProfileWarning, stacklevel=4)
    return Profile.model_validate(content)


def _with_lines(error: ValidationError, lines: dict[Location, int]) -> Iterable[tuple[int, str]]:
    for mistake in error.errors(include_url=False):
        reason = mistake.get("ctx", {}).get("error")
        if isinstance(reason, Contradictions):
            yield from ((_line(place, lines), message) for place, message in reason.found)
        else:
            name = ".".join(map(str, mistake["loc"])) or "profile"
            yield _line(mistake["loc"], lines), f"{name}: {mistake['msg'].removeprefix('Value error, ')}"


def _line(place: Location, lines: dict[Location, int]) -> int:
    """The line of the innermost part of `place` that the file has."""
    while place not in lines:
        place = place[:-1]
    return lines[place]


def _error(source: str, mistakes: Iterable[tuple[int, str]]) -> ProfileError:
    found = sorted(set(mistakes))
    listed = [f"  line {line}: {message}" for line, message in found[:MAX_LISTED]]
    listed += [f"  and {len(found) - MAX_LISTED} more"] if len(found) > MAX_LISTED else []
    count = "1 mistake" if len(found) == 1 else f"{len(found)} mistakes"
    return ProfileError(f"{source} has {count}:\n" + "\n".join(listed))
