"""The profiles that come with the package: known before the first look-up, and validated as far as one takes of them.

They are a part of the package like its code, and its tests validate the whole of them. Files from anywhere else are
never read by this.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from pydantic import model_validator

from .configs import known_kernel
from .identity import DeviceIdentity, SemanticBlock
from .layout import read_laid_out
from .memory import ProfileWarning
from .places import Place, bundled_folder
from .reading import MAX_VALUES, ProfileError, parse_header, read_data, read_profile
from .schema import Entry, Head, Point, Profile
from .store import profiles_in


class Unread(Point):
    """An entry of which only what it is for has been read; `text` is all of it, in JSON."""

    text: bytes

    def whole(self) -> Entry:
        """The entry, validated. Raises pydantic's ValidationError."""
        return Entry.model_validate_json(self.text)


class Bundled(Head):
    """A profile whose entries are validated when they are chosen."""

    entries: tuple[Unread, ...]

    @model_validator(mode="after")
    def _kernels_are_known(self) -> Bundled:
        for kernel in self.kernels:
            known_kernel(kernel)
        return self


_REST = b',\n  "config":'
"""Where in an entry's text its point ends."""


def read_bundled(path: Path) -> Bundled | Profile:
    """The profile in a file that comes with the package; one that is not laid out as we write them is read whole.

    Raises:
        ProfileError: with every mistake of a file that cannot be read.
    """
    head, _, entries = read_data(path).partition(b"\nentries:\n- ")
    texts = entries.split(b"\n- ")
    content = read_laid_out(head.decode(errors="replace"), MAX_VALUES)
    try:
        points = json.loads(b"[%b]" % b",".join(text.partition(_REST)[0] + b"}" for text in texts))
        unread = [{**point, "text": text} for point, text in zip(points, texts, strict=True)]
        profile = Bundled.model_validate({**(content or {}), "entries": unread})
    except (ValueError, TypeError):  # a point that is no mapping
        return read_profile(path)
    profile._source = str(path)
    return profile


@cache
def bundled_headers(folder: Path) -> Mapping[Path, tuple[DeviceIdentity, SemanticBlock]]:
    """The GPU and the semantics of each profile in `folder`, asked for once; a damaged file is passed over."""

    def report(error: ProfileError) -> None:
        warnings.warn(f"passed over: {error}", ProfileWarning, stacklevel=4)

    headers = {}
    for _, path, data in profiles_in([Place("bundled", folder)], report):
        try:
            headers[path] = parse_header(data, str(path))
        except ProfileError as error:
            report(error)
    return {path: header for path, header in headers.items() if header is not None}


bundled_headers(bundled_folder())  # now, so that the first look-up need not
