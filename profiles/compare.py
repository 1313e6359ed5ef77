"""What differs between two profiles, what a change of software makes of one, and which problems have no entry."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from ..kernels.tunable import Tunable
from ..problem import Problem
from .choice import Level, choose
from .configs import KERNEL_ABI, source_hash
from .live import minor_version
from .schema import Entry, Profile

Effect = Literal["rejected", "degraded", "noted"]


@dataclass(frozen=True, slots=True)
class Difference:
    """One thing that two profiles say differently; None where one of them says nothing."""

    what: str
    old: str | None
    new: str | None


@dataclass(frozen=True, slots=True)
class Staleness:
    """What becomes of an entry, and why."""

    entry: Entry
    effect: Effect
    reason: str


@dataclass(frozen=True, slots=True)
class Cell:
    """The level that `kernel` gets for `problem`; "hole" if no entry serves it."""

    kernel: str
    problem: Problem
    level: Level | Literal["hole"]
    reason: str


def differences(old: Profile, new: Profile) -> Iterator[Difference]:
    """All that differs, entry by entry."""
    for block in ("device", "software", "semantic"):
        mine, yours = getattr(old, block), getattr(new, block)
        for name in type(mine).model_fields:
            yield from _if_differs(f"{block}.{name}", getattr(mine, name), getattr(yours, name))
    for kernel in sorted(old.kernels.keys() | new.kernels.keys()):
        yield from _if_differs(f"kernels.{kernel}", old.kernels.get(kernel), new.kernels.get(kernel))
    mine, yours = ({(e.kernel, str(e.problem)): e for e in profile.entries} for profile in (old, new))
    for key in sorted(mine.keys() | yours.keys()):
        before, after = mine.get(key), yours.get(key)
        if before is None or after is None:
            yield from _if_differs(" on ".join(key), before and before.config, after and after.config)
            continue
        for name in Entry.model_fields:
            yield from _if_differs(f"{' on '.join(key)}: {name}", getattr(before, name), getattr(after, name))


def _if_differs(what: str, old: object, new: object) -> Iterator[Difference]:
    if old != new:
        yield Difference(what, *(None if value is None else str(value) for value in (old, new)))


def stale(
    profile: Profile, triton: str, fp_fusion: bool, driver: str | None = None, sources: dict[str, str] | None = None
) -> Iterator[Staleness]:
    """What the loader makes of each entry under other software; entries that it takes as before are not named.

    Args:
        triton, fp_fusion, driver: of the software; driver None says nothing of it.
        sources: the hashes of the kernels' sources; default: those of this checkout.
    """
    software = profile.software
    for entry in profile.entries:
        kernel = profile.kernels[entry.kernel]
        current = source_hash(entry.kernel) if sources is None else sources[entry.kernel]
        other_triton = minor_version(software.triton) != minor_version(triton)
        if kernel.abi != KERNEL_ABI:
            yield Staleness(entry, "rejected", f"kernel ABI {kernel.abi}, now {KERNEL_ABI}")
        elif kernel.source_hash != current:
            yield Staleness(entry, "rejected", "the kernel's source has changed")
        elif software.fp_fusion not in (None, fp_fusion):
            yield Staleness(entry, "rejected", f"fp_fusion {software.fp_fusion}, now {fp_fusion}")
        elif other_triton and entry.evidence == "modelled":
            yield Staleness(entry, "rejected", f"modelled for Triton {software.triton}, now {triton}")
        elif other_triton:
            yield Staleness(entry, "degraded", f"Triton {software.triton}, now {triton}")
        elif driver is not None and software.driver not in (None, driver):
            yield Staleness(entry, "noted", f"driver {software.driver}, now {driver}")


def coverage(profiles: Sequence[Profile], problems: Sequence[Problem]) -> Iterator[Cell]:
    """The best level that the profiles of one GPU give each of its kernels for each problem on that GPU."""
    arch = profiles[0].device.arch
    named = {kernel for profile in profiles for kernel in profile.kernels}
    kernels = [name for name, tunable in Tunable.REGISTRY.items() if not tunable.archs or name in named]
    for problem in problems:
        for kernel in kernels:
            if arch not in (Tunable.REGISTRY[kernel].archs or (arch,)):
                continue
            found = [choose(profile, kernel, problem) for profile in profiles if kernel in profile.kernels]
            served = [resolution for resolution in found if resolution.entry is not None]
            if served:
                yield Cell(kernel, problem, served[0].level, "; ".join(served[0].reasons))
            else:
                reasons = [reason for resolution in found for reason in resolution.reasons]
                yield Cell(kernel, problem, "hole", "; ".join(reasons) or "no profile has this kernel")
