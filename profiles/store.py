"""Profiles as files: found by path or by the GPU's name, written whole or not at all, merged without loss."""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from filelock import FileLock
from platformdirs import user_cache_path

from .choice import Mode
from .configs import KERNEL_ABI
from .evidence import KernelResources
from .identity import SemanticBlock, Semantics, plain
from .layout import laid_out
from .places import Place, Report, bundled_folder, current_folder, places, refuse, user_folder
from .reading import ProfileError, ProfileNotFound, parse_header, parse_profile, read_data, read_profile
from .schema import SCHEMA, Entry, KernelSource, Profile, tune_command

__all__ = [
    "ProfileError", "ProfileNotFound", "bundled_folder", "load_profile", "make_profile", "merged", "profile_files",
    "profiles_in", "read_profile", "update_profile", "user_folder", "write_profile", "write_text",
]  # fmt: skip

_EVIDENCE_RANK = {"default": 0, "modelled": 1, "transferred": 2, "measured": 3}
_COUNTS = (name for name, field in KernelResources.model_fields.items() if not field.is_required())
_MAY_BE_EMPTY = {"policy", "search", "pareto", "resources", "failed", "dtypes", "layouts", *_COUNTS}
SAYS_SO_WITHIN = 4096
"""Bytes in which a file has to say that it is a profile."""
_SCHEMA_LINE = re.compile(rb"^schema:\s*['\"]?cca-profile/", re.MULTILINE)


def load_profile(name: str | Path, mode: Mode = "checked") -> Profile:
    """The profile at a path, or the one for a GPU.

    Args:
        name: a path ending in .yaml or .yml; or a GPU's name ("a100", "NVIDIA H200"), looked for in the current
            folder, then in those that CCA_PROFILE_PATH names, the user's (`user_folder()`), those of installed
            packages, and among those that come with this one; or "auto" for the GPU at hand.
        mode: what its look-ups accept: "checked" takes what can run and says how good it is, "strict" only what was
            measured and verified on this very silicon (else an error), "off" nothing.

    Raises:
        ProfileNotFound: saying where was looked and which command makes one.
        ProfileError: for a file that is not a valid profile, with every mistake in it.
    """
    if isinstance(name, Path) or name.endswith((".yaml", ".yml")):
        return read_profile(Path(name), mode)
    wanted = plain(_name_at_hand() if name == "auto" else name)
    looked = places() if name == "auto" else [current_folder(), *places()]
    for _, path, data in profiles_in(looked):
        header = parse_header(data, str(path))
        if header is not None and wanted in map(plain, header[0].names):
            return parse_profile(data, str(path), mode)
    folders = ", ".join(str(place.folder) for place in looked)
    raise ProfileNotFound(f"no profile for the GPU {name!r} in {folders}; to make one: {tune_command(name)}")


def _name_at_hand() -> str:
    import torch

    if not torch.cuda.is_available():
        raise ProfileNotFound("profile 'auto' is the one of the GPU at hand, and PyTorch finds no GPU here")
    return torch.cuda.get_device_name()


def profile_files(looked: Sequence[Place]) -> Iterator[tuple[Place, Path]]:
    """The files of these places that say that they are profiles, whole or damaged."""
    return ((place, path) for place, path, _ in profiles_in(looked))


def profiles_in(looked: Sequence[Place], report: Report = refuse) -> Iterator[tuple[Place, Path, bytes]]:
    """The same with what is in them; a file that cannot be read is reported.

    Raises:
        ProfileError: by the default `report`.
    """
    for place in looked:
        for path in place.files():
            try:
                data = read_data(path)
            except ProfileError as error:
                report(error)
                continue
            if _SCHEMA_LINE.search(data, 0, SAYS_SO_WITHIN) is not None:
                yield place, path, data


def write_profile(profile: Profile, path: Path) -> None:
    """Write `profile` to `path`, replacing what is there only once the new file is whole and on disk."""
    content = profile.model_dump(mode="json", by_alias=True, exclude_none=True)
    write_text(path, laid_out(_without_empty(content)))


def _without_empty(block: Any) -> Any:
    """`block` without the optional parts that say nothing."""
    if isinstance(block, list):
        return [_without_empty(item) for item in block]
    if not isinstance(block, dict):
        return block
    return {name: _without_empty(item) for name, item in block.items() if item or name not in _MAY_BE_EMPTY}


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` in one step; on any failure what was there stays, and nothing else."""
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


def update_profile(path: Path, change: Callable[[Profile | None], Profile]) -> Profile:
    """Write what `change` makes of the profile at `path` (None: there is none), while no other process does the same.

    Raises:
        ProfileError: if what is there is no profile; it is then left alone.
    """
    folder = user_cache_path("cca-attention") / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    name = hashlib.sha256(str(path.resolve()).encode()).hexdigest()
    with FileLock(folder / f"{name[:32]}.lock"):
        profile = change(read_profile(path) if path.exists() else None)
        write_profile(profile, path)
    return profile


def merged(old: Profile, new: Profile) -> Profile:
    """`new` with what only `old` has: other problems, and better evidence on the same kernel source.

    Raises:
        ProfileError: if they are for different GPUs or semantics, or one kernel's times were taken in different ways.
    """
    pairs = (
        ("GPU", old.device.name, new.device.name),
        ("semantics", old.semantic.meaning, new.semantic.meaning),
        *(
            (f"measurement policy of {k}", old.policy[k], new.policy[k])
            for k in sorted(old.policy.keys() & new.policy.keys())
        ),
    )
    for name, mine, yours in pairs:
        if mine != yours:
            raise ProfileError(f"its {name} is {mine!r}, not {yours!r}")
    current = {kernel: source for kernel, source in old.kernels.items() if new.kernels.get(kernel, source) == source}
    entries = {(e.kernel, e.problem): e for e in old.entries if e.kernel in current}
    for entry in new.entries:
        held = entries.get((entry.kernel, entry.problem))
        if held is None or _EVIDENCE_RANK[held.evidence] <= _EVIDENCE_RANK[entry.evidence]:
            entries[entry.kernel, entry.problem] = entry
    parts = {name: getattr(new, name) for name in Profile.model_fields}
    for name in ("policy", "search"):
        parts[name] = {**getattr(old, name), **getattr(new, name)}
    parts |= {"kernels": {**current, **new.kernels}, "entries": tuple(entries.values())}
    parts["semantic"] = SemanticBlock.describing(new.semantic.meaning, [e.problem for e in entries.values()])
    return Profile(schema=parts.pop("schema_version"), **parts)


def make_profile(*, kernels: dict[str, str], entries: Sequence[Entry], semantic: Semantics, **parts: Any) -> Profile:
    """A profile made now.

    Args:
        kernels: the source hash of each kernel. entries: at most one for a kernel and problem.
        semantic: what the model computes; dtypes and head layouts are taken from the entries.
        parts: `device` and `software`; and, where known, `policy`, `search` and `pareto`.
    """
    return Profile(
        schema=SCHEMA,
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        kernels={name: KernelSource(source_hash=digest, abi=KERNEL_ABI) for name, digest in kernels.items()},
        semantic=SemanticBlock.describing(semantic, [entry.problem for entry in entries]),
        entries=tuple(entries),
        **parts,
    )
