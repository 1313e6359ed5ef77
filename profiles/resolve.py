"""From what callers give as `profile=` to configs: `resolve` says which config a kernel gets, from where and why."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path

import torch
from pydantic import ValidationError

from ..kernels.tunable import HANDLES, Schedule
from ..problem import Problem
from .bundled import Bundled, bundled_profiles
from .choice import LEVELS, Mode, Resolution, built_in, check_strictly, choose
from .configs import known_kernel, tunables
from .identity import DeviceIdentity, SemanticBlock
from .live import LiveDevice, live_device
from .memory import Memory, ProfileWarning
from .places import bundled_folder, places_of_others
from .reading import ProfileError, parse_header, parse_profile
from .schema import Profile
from .store import load_profile, profiles_in


class AutoProfile:
    """What ``profile="auto"`` stands for: of all the profiles there are, the best for the GPU and model of a call.

    Those for the very GPU come before those for the same silicon under another name, and these before those for the
    same architecture; among equals the order of places decides. A kernel that the first has no usable entry for is
    looked up in the next. Files are looked for once, those of the package when this module is imported; a damaged one,
    and a place that is named and not there, is passed over with a `ProfileWarning`. On a CPU there is nothing to look
    for.
    """

    handle = "auto"

    def __init__(self) -> None:
        self._bundled = bundled_profiles(bundled_folder())
        self._profiles: dict[Path, Profile | Bundled | None] = {**self._bundled}
        self._memories: dict[torch.device | None, Memory] = {}

    def resolutions(self, problem: Problem, device: torch.device | None = None) -> Mapping[str, Resolution]:
        """What each kernel is launched with for `problem` on `device`."""
        return self._memory(device).resolutions(problem, device)

    def schedule(self, problem: Problem, device: torch.device | None = None) -> Schedule:
        """The configs that a profile has for `problem` on `device`; empty if there is none."""
        return self._memory(device).schedule(problem, device)

    def _memory(self, device: torch.device | None) -> Memory:
        if device not in self._memories:
            live = live_device(device)
            who, gpu = ("no GPU serves", None) if live is None else (f"no profile for {live.name} serves", live.name)
            self._memories[device] = Memory(self._resolve, who, gpu)
        return self._memories[device]

    def _resolve(self, problem: Problem, device: torch.device | None) -> dict[str, Resolution]:
        live = live_device(device)
        arch = "cpu" if live is None else live.arch
        missing = () if live is None else ("no profile for this GPU and model",)
        wanted, found = tunables(arch), dict[str, Resolution]()
        for path, profile in () if live is None else self._for(live, problem):
            open_kernels = [name for name in profile.kernels if name not in found or found[name].entry is None]
            try:
                found |= {name: choose(profile, name, problem, live) for name in open_kernels}
            except ProfileError as error:  # of a bundled one, whose entries are read now
                self._pass_over(path, error)
            except ValidationError as error:  # of one of them, which is validated now
                self._pass_over(path, ProfileError(f"{path}: {error}"))
            if all(kernel in found and found[kernel].entry is not None for kernel in wanted):
                break
        return {kernel: built_in(kernel, problem, arch, *missing) for kernel in wanted if kernel not in found} | found

    def _for(self, live: LiveDevice, problem: Problem) -> Iterator[tuple[Path, Profile | Bundled]]:
        """The profiles for this GPU and model, the best first; each is read when it is needed."""
        ranked = []
        for path, device, block in self._headers(live.arch):
            likeness = live.likeness(device)
            if likeness is not None and block.is_of(problem):
                ranked.append((LEVELS.index(likeness), path))
        for _, path in sorted(ranked, key=lambda pair: pair[0]):
            profile = self._read(path)
            if profile is not None:
                yield path, profile

    def _headers(self, arch: str) -> Iterator[tuple[Path, DeviceIdentity, SemanticBlock]]:
        """What the profiles are for, in the order of places."""
        for path, data in self._files.items():
            try:
                header = parse_header(data, str(path), arch)
            except ProfileError as error:
                self._pass_over(path, error)
                continue
            if header is not None:
                yield path, *header
        for path, profile in self._bundled.items():
            yield path, profile.device, profile.semantic

    @cached_property
    def _files(self) -> dict[Path, bytes]:
        """Those of others."""

        def report(error: ProfileError) -> None:
            warnings.warn(f"passed over: {error}", ProfileWarning, stacklevel=8)

        return {path: data for _, path, data in profiles_in(places_of_others(report), report)}

    def _read(self, path: Path) -> Profile | Bundled | None:
        if path not in self._profiles:
            try:
                self._profiles[path] = parse_profile(self._files[path], str(path))
            except ProfileError as error:
                self._pass_over(path, error)
        return self._profiles[path]

    def _pass_over(self, path: Path, error: Exception) -> None:
        if path not in self._profiles or self._profiles[path] is not None:  # not yet said
            warnings.warn(f"passed over: {error}", ProfileWarning, stacklevel=8)
        self._profiles[path] = None


def profile_for(name: str | Path) -> AutoProfile | Profile:
    """What stands behind a `profile=` of that name: `load_profile`'s answer, but "auto" takes what it finds."""
    return AutoProfile() if name == "auto" else load_profile(name)


def resolve(
    kernel: str,
    problem: Problem,
    profile: str | Profile = "auto",
    device: torch.device | None = None,
    mode: Mode = "checked",
) -> Resolution:
    """What `kernel` is launched with for `problem` on `device`, at what level, from which file and why.

    Args:
        profile: as of `cca_attention`. device: None asks for the profile's own GPU, wherever it is.
        mode: "strict" raises for what was not measured and verified on this very silicon; "off" gives the built-in
            config. A `Profile` that was loaded with a stricter mode keeps it.

    Raises:
        ValueError: for a kernel that there is not.
        ProfileMismatch: if the profile is for another group size, window size, core heads or pooling.
        ProfileError: if there is no such profile, or it is damaged.
    """
    known_kernel(kernel)
    if mode == "off":
        live = live_device(device)
        return built_in(kernel, problem, "cpu" if live is None else live.arch, "the mode is off")
    if isinstance(profile, str):
        if profile not in HANDLES:
            HANDLES[profile] = profile_for(profile)
        held: Profile | AutoProfile = HANDLES[profile]
    else:
        held = profile
    found = held.resolutions(problem, device).get(kernel)
    if found is None:
        live = live_device(device)
        found = built_in(kernel, problem, "cpu" if live is None else live.arch, "the profile does not have it")
    if mode == "strict":
        check_strictly(found, problem)
    return found
