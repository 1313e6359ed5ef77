"""Where profiles are kept: read by path or by the GPU's name, written whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from datetime import datetime, timezone
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from platformdirs import user_data_path
from pydantic import ValidationError

from .schema import Entry, KernelSource, Profile, tune_command

_EVIDENCE_RANK = {"default": 0, "modelled": 1, "measured": 2}


class ProfileError(ValueError):
    """A profile file that cannot be used; the message says what is wrong with it, all at once."""


class ProfileNotFound(ProfileError, LookupError):
    """No profile of that name; the message says which command makes one."""


class _UniqueKeyLoader(yaml.SafeLoader):
    """PyYAML's safe loader, but a key given twice is an error instead of the last one winning."""


def _unique_mapping(loader: _UniqueKeyLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [loader.construct_object(key) for key, _ in node.value]
    for position, key in enumerate(keys):
        if key in keys[:position]:
            mark = node.value[position][0].start_mark
            raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} is given twice", mark)
    return dict(zip(keys, (loader.construct_object(value, deep=True) for _, value in node.value), strict=True))


_UniqueKeyLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _unique_mapping)


def user_folder() -> Path:
    """Where a user's own profiles are looked for by name."""
    return user_data_path("cca-attention") / "profiles"


def bundled_folder() -> Path:
    """The profiles that come with the package."""
    return Path(str(resources.files(__package__))) / "data"


def load_profile(name: str | Path) -> Profile:
    """The profile at a path, or the one for a GPU.

    Args:
        name: a path ending in .yaml or .yml; or a GPU's name ("a100", "NVIDIA H200"), looked for in the current
            folder, then in the user's (`user_folder()`), then among those that come with the package; or "auto" for
            the GPU at hand.

    Raises:
        ProfileNotFound: saying where was looked and which command makes one.
        ProfileError: for a file that is not a valid profile, with every mistake in it.
    """
    if isinstance(name, Path) or name.endswith((".yaml", ".yml")):
        if not Path(name).is_file():
            raise ProfileNotFound(f"there is no profile file {name}")
        return read_profile(Path(name))
    wanted = _plain(_name_at_hand() if name == "auto" else name)
    folders = [Path.cwd(), user_folder(), bundled_folder()]
    for path in _profile_files(folders):
        profile = _read_if_profile(path)
        if profile is not None and wanted in map(_plain, profile.device.names):
            return profile
    looked = ", ".join(map(str, folders))
    raise ProfileNotFound(f"no profile for the GPU {name!r} in {looked}; to make one: {tune_command(name)}")


def _plain(name: str) -> str:
    """A name as names are compared: letters and digits only, without the vendor."""
    return "".join(c for c in name.lower().replace("nvidia", "").replace("amd", "") if c.isalnum())


def _name_at_hand() -> str:
    import torch

    if not torch.cuda.is_available():
        raise ProfileNotFound("profile 'auto' is the one of the GPU at hand, and PyTorch finds no GPU here")
    return torch.cuda.get_device_name()


def _profile_files(folders: list[Path]) -> Iterator[Path]:
    for folder in folders:
        pattern = "*.yaml" if folder == Path.cwd() else "**/*.yaml"
        yield from sorted(folder.glob(pattern))


def _read_if_profile(path: Path) -> Profile | None:
    """The profile in `path`; None if the file says that it is something else."""
    with path.open(encoding="utf-8", errors="replace") as file:
        if not any(line.startswith("schema:") and "cca-profile/" in line for line in file):
            return None
    return read_profile(path)


def read_profile(path: Path) -> Profile:
    """The profile in one file. Raises `ProfileError` with every mistake found, each with its place."""
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _UniqueKeyLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ProfileError(f"{path}: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict) or not str(content.get("schema")).startswith("cca-profile/"):
        raise ProfileError(f"{path} is not a profile: it has no line 'schema: cca-profile/1.0'")
    try:
        return Profile.model_validate(content)
    except ValidationError as error:
        mistakes = [f"  {'.'.join(map(str, e['loc'])) or 'profile'}: {e['msg']}" for e in error.errors()]
        raise ProfileError(f"{path} has {len(mistakes)} mistakes:\n" + "\n".join(mistakes)) from error


def write_profile(profile: Profile, path: Path) -> None:
    """Write `profile` to `path`, replacing what is there only once the new file is whole and on disk."""
    content = profile.model_dump(mode="json", by_alias=True, exclude_none=True)
    text = yaml.safe_dump(content, sort_keys=False, width=110, default_flow_style=None)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def merged(old: Profile, new: Profile) -> Profile:
    """`new` with what only `old` has: other problems, and better evidence on the same kernel source.

    Raises:
        ProfileError: if they are for different GPUs or semantics.
    """
    for name, mine, yours in (("GPU", old.device.name, new.device.name), ("semantics", old.semantic, new.semantic)):
        if mine != yours:
            raise ProfileError(f"its {name} is {mine!r}, not {yours!r}")
    current = {kernel: source for kernel, source in old.kernels.items() if new.kernels.get(kernel, source) == source}
    entries = {(e.kernel, e.problem): e for e in old.entries if e.kernel in current}
    for entry in new.entries:
        held = entries.get((entry.kernel, entry.problem))
        if held is None or _EVIDENCE_RANK[held.evidence] <= _EVIDENCE_RANK[entry.evidence]:
            entries[entry.kernel, entry.problem] = entry
    return new.model_copy(update={"kernels": {**current, **new.kernels}, "entries": tuple(entries.values())})


def make_profile(*, kernels: dict[str, str], entries: list[Entry], **parts: Any) -> Profile:
    """A profile made now: `kernels` maps each to its source hash; `parts` are device, software and semantic."""
    return Profile(
        schema="cca-profile/1.0",
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        kernels={name: KernelSource(source_hash=digest) for name, digest in kernels.items()},
        entries=tuple(entries),
        **parts,
    )
