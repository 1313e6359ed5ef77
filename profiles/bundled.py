"""The profiles that come with the package: what they are for is read when this is imported, their entries when needed.

They are a part of the package like its code, and its tests validate the whole of them. Files from anywhere else are
never read by this.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from ..problem import Problem
from .configs import known_kernel
from .layout import read_laid_out
from .memory import ProfileWarning
from .places import Place, bundled_folder
from .reading import MAX_VALUES, ProfileError, parse_profile, read_data, read_profile
from .schema import Entry, Head, Point
from .store import profiles_in

_ENTRIES = b"\nentries:\n- "
_REST = b',\n  "config":'
"""Where in an entry's text the point ends that it is for."""


class Unread(Point):
    """An entry of which only what it is for has been read; `text` is all of it, in JSON."""

    text: bytes

    def whole(self) -> Entry:
        """The entry, validated. Raises pydantic's ValidationError."""
        return Entry.model_validate_json(self.text)


class Bundled(Head):
    """A profile whose entries are validated when they are chosen."""

    @cached_property
    def entries(self) -> tuple[Unread, ...] | tuple[Entry, ...]:
        """The entries, read when they are asked for first; those of a file that was written by hand are read whole.

        Raises:
            ProfileError: with every mistake of a file that cannot be read.
        """
        texts = read_data(Path(self.source)).partition(_ENTRIES)[2].split(b"\n- ")
        try:
            points = json.loads(b"[%b]" % b",".join(text.partition(_REST)[0] + b"}" for text in texts))
            for point, text in zip(points, texts, strict=True):
                point |= {"problem": _problem(tuple(point["problem"].items())), "text": text}
            return tuple(map(Unread.model_validate, points))
        except (AttributeError, LookupError, TypeError, ValueError):  # of what is no point, or no problem
            return read_profile(Path(self.source)).entries


@cache
def _problem(fields: tuple[tuple[str, Any], ...]) -> Problem:
    """The problem with these fields: the kernels of a file share a few."""
    return Problem(**dict(fields))


@cache
def bundled_profiles(folder: Path) -> Mapping[Path, Bundled]:
    """The profiles in `folder`, looked for once; a damaged file is passed over with a `ProfileWarning`."""

    def report(error: ProfileError) -> None:
        warnings.warn(f"passed over: {error}", ProfileWarning, stacklevel=4)

    found = {}
    for _, path, data in profiles_in([Place("bundled", folder)], report):
        try:
            found[path] = _without_entries(data, str(path))
        except ProfileError as error:
            report(error)
    return found


def _without_entries(data: bytes, source: str) -> Bundled:
    content = read_laid_out(data.partition(_ENTRIES)[0].decode(errors="replace"), MAX_VALUES)
    try:
        profile = Bundled.model_validate(content)
        for kernel in profile.kernels:
            known_kernel(kernel)
    except ValueError:  # it was written by hand, or is damaged
        whole = parse_profile(data, source)
        profile = Bundled.model_construct(**{name: getattr(whole, name) for name in Head.model_fields})
    profile._source = source
    return profile


bundled_profiles(bundled_folder())  # now, so that the first look-up need not
