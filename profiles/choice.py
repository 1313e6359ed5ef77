"""Which entry of a profile a kernel is launched with, and why: the rules alone, without files and without a memory.

An entry has three claims: its GPU is like the one at hand, its shape is near, it was timed. The weakest of them is its
level. What cannot be believed (another kernel source, another reading of the configs' fields, another fp_fusion) or
cannot run (the kernel's own limits, the resources of the GPU at hand) is stepped over for the next nearest entry, and
where there is none the built-in config serves. Nothing is timed and nothing is compiled here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import triton

from ..kernels.tunable import Config, Tunable
from ..problem import Problem
from .configs import KERNEL_ABI, as_config, source_hash
from .identity import Semantics
from .live import LiveDevice, fp_fusion, minor_version

if TYPE_CHECKING:
    from .bundled import Bundled
    from .schema import Entry, Profile

Level = Literal["exact", "same silicon", "same arch", "nearest", "modelled", "default"]
Mode = Literal["strict", "checked", "off"]
LEVELS: tuple[Level, ...] = get_args(Level)
MODES: tuple[Mode, ...] = get_args(Mode)
STRICT_LEVELS = ("exact", "same silicon")
MAX_DOUBLINGS = 4.0
"""Beyond this distance (a factor of 16, over length, batch and heads together) an entry says nothing of a problem."""


class ProfileMismatch(ValueError):
    """A profile asked about something else than it was made for, or one that the mode "strict" does not accept."""


@dataclass(frozen=True, slots=True)
class Resolution:
    """What a kernel is launched with: the config, at what level, from where and why.

    `distance`: doublings from the shapes that the entry is for. `entry` is None if the config is the built-in one.
    `reasons`: why no better level, and what was passed over. `source`: the file, or "built-in".
    """

    kernel: str
    config: Config
    level: Level
    source: str
    reasons: tuple[str, ...] = ()
    distance: float | None = None
    entry: Entry | None = None


def choose(
    profile: Profile | Bundled, kernel: str, problem: Problem, live: LiveDevice | None = None, mode: Mode = "checked"
) -> Resolution:
    """The config of `kernel` for `problem` on the GPU `live` (None: taken to be the profile's own).

    Raises:
        ProfileMismatch: if `problem` has another group size, window size, core heads or pooling than the profile; in
            the mode "strict", for any level below "same silicon" and for an entry without verification.
    """
    arch = profile.device.arch if live is None else live.arch
    if mode == "off":
        return built_in(kernel, problem, arch, "the mode is off")
    check_semantics(profile, problem)
    reasons = list(_distrust(profile, kernel, live))
    found = reasons or _best(profile, kernel, problem, live)
    resolution = found if isinstance(found, Resolution) else built_in(kernel, problem, arch, *found)
    if mode == "strict":
        check_strictly(resolution, problem)
    return resolution


def built_in(kernel: str, problem: Problem, arch: str, *reasons: str) -> Resolution:
    """The resolution to the config that `kernel` comes with."""
    return Resolution(kernel, Tunable.REGISTRY[kernel].default(problem, arch), "default", "built-in", reasons)


def check_semantics(profile: Profile | Bundled, problem: Problem) -> None:
    """Raise `ProfileMismatch` if the profile is for another model than `problem` describes."""
    if not profile.semantic.is_of(problem):
        asked, held = Semantics.of(problem), profile.semantic.meaning
        raise ProfileMismatch(f"the profile of {profile.device.name} is for {held!r}, the call has {asked!r}")


def _distrust(profile: Profile | Bundled, kernel: str, live: LiveDevice | None) -> Iterator[str]:
    """Why no entry of `kernel` is believed."""
    source, software = profile.kernels.get(kernel), profile.software
    if source is not None and source.abi != KERNEL_ABI:
        yield f"its configs are of kernel ABI {source.abi}, this is {KERNEL_ABI}"
    elif source is not None and source.source_hash != source_hash(kernel):
        yield "its source has changed since it was tuned"
    if software.fp_fusion is not None and software.fp_fusion != fp_fusion():
        yield f"tuned with fp_fusion {software.fp_fusion}, here it is {fp_fusion()}"
    if live is not None and live.likeness(profile.device) is None:
        yield f"tuned for {profile.device.arch}, {live.name} is {live.arch}"


def _best(profile: Profile | Bundled, kernel: str, problem: Problem, live: LiveDevice | None) -> Resolution | list[str]:
    """The nearest entry that can run, or why there is none."""
    entries = [entry for entry in profile.entries if entry.kernel == kernel]
    if not entries:
        return ["no verified config"]
    ranked = [(outside, entry) for entry in entries if (outside := entry.distance_outside(problem)) is not None]
    if not ranked:
        return [f"tuned for no head_dim {problem.head_dim} in {problem.dtype}"]
    ranked.sort(key=lambda pair: (pair[0], pair[1].distance(problem)))
    passed_over: list[str] = []
    for distance, point in ranked:
        if distance > MAX_DOUBLINGS:
            passed_over.append(f"{point.problem} is {distance:.1f} doublings away, more than {MAX_DOUBLINGS:g}")
            break
        entry = point.whole()
        refusal = _refusal(profile, entry, problem, live)
        if refusal is None:
            return _at_its_level(profile, entry, distance, passed_over, live)
        passed_over.append(f"{entry.problem}: {refusal}")
    return passed_over


def _refusal(profile: Profile | Bundled, entry: Entry, problem: Problem, live: LiveDevice | None) -> str | None:
    """Why this entry cannot serve `problem`."""
    held, own = entry.verification, profile.kernels[entry.kernel].source_hash
    if held is not None and held.kernel_hash != own:
        return "it was verified on another source of the kernel"
    if entry.evidence == "modelled" and _other_triton(profile):
        return f"modelled for Triton {profile.software.triton}, this is {triton.__version__}"
    if refusal := as_config(entry.kernel, entry.config).refusal(problem):
        return refusal
    if not entry.resources:
        return "its resources are not recorded, so that nothing says that it can run"
    return None if live is None else live.shortage(entry.resources)


def _other_triton(profile: Profile | Bundled) -> bool:
    return minor_version(profile.software.triton) != minor_version(triton.__version__)


def _at_its_level(
    profile: Profile | Bundled, entry: Entry, distance: float, passed_over: list[str], live: LiveDevice | None
) -> Resolution:
    """The resolution to `entry`, at the level of its weakest claim."""
    likeness = "exact" if live is None else live.likeness(profile.device) or "same arch"
    claims: list[tuple[Level, str]] = [(likeness, f"this GPU is of the {likeness}")] if likeness != "exact" else []
    if entry.evidence == "transferred":
        claims.append(("same arch", f"measured on {entry.measured_on}"))
    if distance > 0:
        claims.append(("nearest", f"the nearest is {entry.problem}, {distance:.1f} doublings away"))
    if entry.evidence in ("modelled", "default"):
        claims.append(("modelled" if entry.evidence == "modelled" else "default", f"its evidence is {entry.evidence}"))
    level = max((claim for claim, _ in claims), key=LEVELS.index, default=LEVELS[0])
    notes = [note for _, note in claims]
    if _other_triton(profile):
        level = LEVELS[min(LEVELS.index(level) + 1, LEVELS.index("modelled"))] if level != "default" else level
        notes.append(f"one level lower: tuned with Triton {profile.software.triton}, this is {triton.__version__}")
    driver = profile.software.driver
    if live is not None and driver is not None and live.driver not in (None, driver):
        notes.append(f"tuned with driver {driver}, this is {live.driver}")
    config = as_config(entry.kernel, entry.config)
    return Resolution(entry.kernel, config, level, profile.source, (*notes, *passed_over), distance, entry)


def check_strictly(resolution: Resolution, problem: Problem) -> None:
    """Raise `ProfileMismatch` for what the mode "strict" does not accept."""
    if resolution.level not in STRICT_LEVELS:
        complaint = f"its level is {resolution.level!r}: {'; '.join(resolution.reasons)}"
    elif resolution.entry is None or resolution.entry.verification is None:
        complaint = "its entry has no verification"
    else:
        return
    raise ProfileMismatch(f"mode 'strict', {resolution.source}: {resolution.kernel} on {problem}: {complaint}")
