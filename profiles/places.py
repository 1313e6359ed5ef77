"""Where profiles are looked for: the current folder, the environment's, the user's, other packages', our own."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path

from platformdirs import user_data_path

from .reading import ProfileError

ENVIRONMENT = "CCA_PROFILE_PATH"
"""The only environment variable that the package reads: folders with profiles, in the form of PATH."""
ENTRY_POINTS = "cca_attention.profiles"
"""Group of the entry points by which a package says where it keeps profiles: the dotted name of a folder of it."""

Report = Callable[[ProfileError], None]


@dataclass(frozen=True, slots=True)
class Place:
    """A folder with profiles, and for words what it is; `pattern` of the files in it."""

    what: str
    folder: Path
    pattern: str = "**/*.yaml"

    def files(self) -> list[Path]:
        """The YAML files there, in order; none if there is no such folder."""
        return sorted(path for path in self.folder.glob(self.pattern) if path.is_file())


def user_folder() -> Path:
    """Where a user's own profiles are looked for by name."""
    return user_data_path("cca-attention") / "profiles"


def bundled_folder() -> Path:
    """The profiles that come with the package."""
    return Path(__file__).with_name("data")


def refuse(error: ProfileError) -> None:
    """What is done about a place that is named and not there, unless a caller knows better."""
    raise error


def environment_folders(report: Report = refuse) -> Iterator[Path]:
    """The folders that the environment names; one that is not there is reported."""
    named = os.environ.get(ENVIRONMENT, "")
    for folder in (Path(part) for part in named.split(os.pathsep) if part):
        if folder.is_dir():
            yield folder
        else:
            report(ProfileError(f"{ENVIRONMENT} names the folder {folder}, which is not there"))


def package_folders(report: Report = refuse) -> Iterator[tuple[str, Path]]:
    """Name and folder of each entry point; the package itself is found, not imported. No folder is reported."""
    for point in sorted(entry_points(tuple(sys.path)), key=lambda point: point.name):
        package, *inner = point.value.split(".")
        found = importlib.util.find_spec(package) if package.isidentifier() else None
        roots = list(found.submodule_search_locations or ()) if found is not None else []
        folder = next((path for root in roots if (path := Path(root, *inner)).is_dir()), None)
        if folder is None:
            report(ProfileError(f"the entry point {point.name!r} of {ENTRY_POINTS} names no folder: {point.value}"))
        else:
            yield point.name, folder


@cache
def entry_points(path: tuple[str, ...]) -> tuple[metadata.EntryPoint, ...]:
    """Those of our group in the packages on `path`, asked for once; what never names it is not parsed."""
    looked = list(path)
    names = {found.name for found in metadata.distributions(path=looked) if ENTRY_POINTS in _said(found)}
    nearest = (next(iter(metadata.distributions(name=name, path=looked))) for name in sorted(names))
    return tuple(point for found in nearest for point in found.entry_points.select(group=ENTRY_POINTS))


def _said(found: metadata.Distribution) -> str:
    return found.read_text("entry_points.txt") or ""


def current_folder() -> Place:
    """Where `cca-tune` writes: looked at for a profile that is asked for by its name, never for "auto"."""
    return Place("current folder", Path.cwd(), "*.yaml")


def places(report: Report = refuse) -> list[Place]:
    """Every other place, in the order in which they are looked at; one that is named and not there is reported.

    Raises:
        ProfileError: by the default `report`.
    """
    return [*places_of_others(report), Place("bundled", bundled_folder())]


def places_of_others(report: Report = refuse) -> list[Place]:
    """The same without the profiles that come with the package."""
    return [
        *(Place(ENVIRONMENT, folder) for folder in environment_folders(report)),
        Place("user", user_folder()),
        *(Place(f"package {name}", folder) for name, folder in package_folders(report)),
    ]


entry_points(tuple(sys.path))  # now, so that the first look-up need not
