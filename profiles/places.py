"""Where profiles are looked for: the current folder, the environment's, the user's, other packages', our own."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata, resources
from pathlib import Path

from platformdirs import user_data_path

from .reading import ProfileError

ENVIRONMENT = "CCA_PROFILE_PATH"
"""The only environment variable that the package reads: folders with profiles, in the form of PATH."""
ENTRY_POINTS = "cca_attention.profiles"
"""Group of the entry points by which a package says where it keeps profiles: the dotted name of a folder of it."""


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
    return Path(str(resources.files(__package__))) / "data"


def environment_folders() -> list[Path]:
    """The folders that the environment names.

    Raises:
        ProfileError: for one that is not there.
    """
    named = os.environ.get(ENVIRONMENT, "")
    folders = [Path(part) for part in named.split(os.pathsep) if part]
    for folder in folders:
        if not folder.is_dir():
            raise ProfileError(f"{ENVIRONMENT} names the folder {folder}, which is not there")
    return folders


def package_folders() -> Iterator[tuple[str, Path]]:
    """Name and folder of each entry point; the package itself is found, not imported.

    Raises:
        ProfileError: for one that names no folder.
    """
    for point in sorted(metadata.entry_points(group=ENTRY_POINTS), key=lambda point: point.name):
        package, *inner = point.value.split(".")
        found = importlib.util.find_spec(package) if package.isidentifier() else None
        roots = list(found.submodule_search_locations or ()) if found is not None else []
        folder = next((path for root in roots if (path := Path(root, *inner)).is_dir()), None)
        if folder is None:
            raise ProfileError(f"the entry point {point.name!r} of {ENTRY_POINTS} names no folder: {point.value}")
        yield point.name, folder


def current_folder() -> Place:
    """Where `cca-tune` writes: looked at for a profile that is asked for by its name, never for "auto"."""
    return Place("current folder", Path.cwd(), "*.yaml")


def places() -> list[Place]:
    """Every other place, in the order in which they are looked at.

    Raises:
        ProfileError: for a place that is named and not there.
    """
    return [
        *(Place(ENVIRONMENT, folder) for folder in environment_folders()),
        Place("user", user_folder()),
        *(Place(f"package {name}", folder) for name, folder in package_folders()),
        Place("bundled", bundled_folder()),
    ]
