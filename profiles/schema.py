"""The profile file: which config each kernel gets for which problem on one GPU, and why that is to be believed."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any, Literal

import torch
from pydantic import Field, PrivateAttr, model_validator

from ..kernels.tunable import HANDLES, Schedule
from ..problem import Problem
from .choice import Mode, ProfileMismatch, Resolution, choose
from .configs import as_config, known_kernel, source_hash
from .evidence import (
    MOST,
    Baseline,
    Determinism,
    Fields,
    KernelResources,
    Latency,
    Margin,
    MeasurementPolicy,
    ParetoPoint,
    Part,
    Predicted,
    SearchRecord,
    Size,
    Verification,
)
from .identity import DeviceIdentity, HeadLayout, KernelSource, SemanticBlock, Semantics, Software
from .live import live_device
from .memory import Memory, ProfileWarning, tune_command

__all__ = [
    "SCHEMA", "Baseline", "Contradictions", "Determinism", "DeviceIdentity", "Entry", "Evidence", "HeadLayout",
    "Interval", "KernelResources", "KernelSource", "Latency", "Margin", "MeasurementPolicy", "ParetoPoint",
    "Predicted", "Profile", "ProfileMismatch", "ProfileWarning", "SearchRecord", "SemanticBlock", "Semantics",
    "Software", "Verification", "tune_command",
]  # fmt: skip

SCHEMA = "cca-profile/1.0"
Evidence = Literal["measured", "transferred", "modelled", "default"]
Location = tuple[int | str, ...]


class Contradictions(ValueError):
    """What parts of a profile say against each other, each with the place of the part."""

    def __init__(self, found: list[tuple[Location, str]]) -> None:
        super().__init__("; ".join(message for _, message in found))
        self.found = found


def _apart(size: int, other: int) -> float:
    """Doublings between two sizes."""
    return abs(math.log2(size / other))


def _outside(size: int, least: int, most: int) -> float:
    """Doublings to the nearest of these sizes; 0.0 for one of them."""
    return 0.0 if least <= size <= most else max(math.log2(least / size), math.log2(size / most))


class Interval(Part):
    """Closed ranges of sequence lengths and batches that an entry, measured at one point of them, is for."""

    seq_len: tuple[Size, Size]
    batch: tuple[Size, Size] = (1, 1)

    def doublings_outside(self, problem: Problem) -> float:
        """How far `problem` lies outside, in doublings; 0.0 inside."""
        return _outside(problem.seq_len, *self.seq_len) + _outside(problem.batch, *self.batch)


class Point(Part):
    """What an entry is for: a kernel, the problem that it was tuned on, and what that problem stands for."""

    kernel: str
    problem: Problem
    interval: Interval | None = None

    def distance(self, problem: Problem) -> float | None:
        """How far `problem` is from this one, in doublings; None if they share no config at all."""
        own = self.problem
        if (own.head_dim, own.dtype) != (problem.head_dim, problem.dtype):
            return None
        return _apart(problem.seq_len, own.seq_len) + _apart(problem.batch, own.batch) + self._heads_apart(problem)

    def distance_outside(self, problem: Problem) -> float | None:
        """As `distance`, but 0.0 in the whole interval."""
        distance = self.distance(problem)
        if distance is None or self.interval is None:
            return distance
        return self._heads_apart(problem) + self.interval.doublings_outside(problem)

    def _heads_apart(self, problem: Problem) -> float:
        return _apart(problem.q_heads, self.problem.q_heads) + _apart(problem.kv_heads, self.problem.kv_heads)


class Entry(Point):
    """One kernel's config for one problem, with its evidence; `interval` is what that problem stands for.

    Transferred evidence was measured on another GPU, `measured_on`, of the same architecture. `shortlist`: the configs
    that a model expects most of, best first, which `cca-tune confirm` times.
    """

    config: Fields
    evidence: Evidence
    measured_on: str | None = None
    latency: Latency | None = None
    predicted: Predicted | None = None
    resources: tuple[KernelResources, ...] = ()
    shortlist: tuple[Fields, ...] | None = None
    baseline: Baseline
    verification: Verification | None = None
    determinism: Determinism | None = None

    @model_validator(mode="after")
    def _evidence_is_there(self) -> Entry:
        p = self.problem
        if max(p.batch, p.q_heads, p.seq_len, p.group_size, p.window_size) > MOST:
            raise ValueError(f"a size of the problem is beyond {MOST}")
        timed = self.evidence in ("measured", "transferred")
        if (self.latency is not None) != timed:
            raise ValueError(f"evidence {self.evidence!r} and a measured latency go together or not at all")
        if (self.measured_on is not None) != (self.evidence == "transferred"):
            raise ValueError(f"evidence {self.evidence!r} and measured_on go together or not at all")
        if self.evidence == "modelled" and self.predicted is None:
            raise ValueError("evidence 'modelled' needs the predicted time")
        if self.interval is not None and self.interval.doublings_outside(self.problem) > 0:
            raise ValueError(f"its interval {self.interval!r} does not hold its own problem {self.problem}")
        if self.verification is None or self.verification.kernel_hash == source_hash(self.kernel):
            as_config(self.kernel, self.config)  # of another source it is served to nobody, and may have other fields
        return self

    @property
    def time_us(self) -> float | None:
        """The measured median, else the prediction."""
        if self.latency is not None:
            return self.latency.median_us
        return None if self.predicted is None else self.predicted.total_us

    def whole(self) -> Entry:
        """Itself: all of it has been validated."""
        return self


class Head(Part):
    """All that a profile says before its entries: for which GPU, software, semantics and kernels they are."""

    schema_version: str = Field(alias="schema", pattern=r"^cca-profile/1\.\d{1,4}$")
    created: str
    device: DeviceIdentity
    software: Software
    semantic: SemanticBlock
    kernels: dict[str, KernelSource]
    policy: dict[str, MeasurementPolicy] = Field(default_factory=dict)
    search: dict[str, SearchRecord] = Field(default_factory=dict)
    pareto: tuple[ParetoPoint, ...] = ()
    _source: str = PrivateAttr(default="a profile that is in no file")

    @property
    def source(self) -> str:
        """The file that it was read from."""
        return self._source


class Profile(Head):
    """Tuned configs for one GPU and one model's semantics. Hashable; `schedule` is what launchers are given."""

    entries: tuple[Entry, ...]
    _mode: Mode = PrivateAttr(default="checked")

    @model_validator(mode="after")
    def _entries_belong(self) -> Profile:
        if found := list(self._contradictions()):
            raise Contradictions(found)
        return self

    def _contradictions(self) -> Iterator[tuple[Location, str]]:
        for kernel in self.kernels:
            try:
                known_kernel(kernel)
            except ValueError as error:
                yield ("kernels", kernel), str(error)
        seen: set[tuple[str, Problem]] = set()
        for index, entry in enumerate(self.entries):
            place = "entries", index
            if entry.kernel not in self.kernels:
                yield place, f"kernels names no source for {entry.kernel!r}, which has an entry"
            if complaint := self.semantic.complaint(entry.problem):
                yield place, f"the entry of {entry.kernel} for {entry.problem} {complaint}"
            if (entry.kernel, entry.problem) in seen:
                yield place, f"more than one entry for {entry.kernel} on {entry.problem}"
            seen.add((entry.kernel, entry.problem))

    @cached_property
    def digest(self) -> str:
        """The sha256 of what it says."""
        return hashlib.sha256(self.model_dump_json(by_alias=True).encode()).hexdigest()

    @cached_property
    def handle(self) -> str:
        """The string that stands for it in `HANDLES`; equal profiles have equal handles."""
        return f"{self._mode} profile {self.digest}"

    def model_post_init(self, context: Any, /) -> None:
        """Enter it in `HANDLES`."""
        super().model_post_init(context)
        HANDLES.setdefault(self.handle, self)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Profile) and self.handle == other.handle

    def __hash__(self) -> int:
        return hash(self.handle)

    @property
    def mode(self) -> Mode:
        """How much `schedule` accepts: see `choose`."""
        return self._mode

    def read_from(self, source: str, mode: Mode = "checked") -> Profile:
        """The same content with the name of its file and the mode of its look-ups."""
        new = Profile.model_construct(**{name: getattr(self, name) for name in Profile.model_fields})
        new.__dict__["digest"] = self.digest  # where `cached_property` keeps it
        new._source, new._mode = source, mode
        HANDLES[new.handle] = new
        return new

    @cached_property
    def memory(self) -> Memory:
        """What has been looked up."""
        name = self.device.name
        return Memory(self._resolve, f"the profile of {name} does not serve", None if self._mode == "off" else name)

    def _resolve(self, problem: Problem, device: torch.device | None) -> dict[str, Resolution]:
        live = live_device(device)
        return {kernel: choose(self, kernel, problem, live, self._mode) for kernel in self.kernels}

    def resolutions(self, problem: Problem, device: torch.device | None = None) -> Mapping[str, Resolution]:
        """What each kernel of the profile is launched with for `problem` on `device` (None: on the profile's own GPU).

        Raises:
            ProfileMismatch: as `choose` does.
        """
        return self.memory.resolutions(problem, device)

    def schedule(self, problem: Problem, device: torch.device | None = None) -> Schedule:
        """The config of each kernel that has a usable entry for `problem` on `device` (None: the profile's own GPU).

        Kernels without one are left to their built-in config, with one `ProfileWarning`.

        Raises:
            ProfileMismatch: as `choose` does.
        """
        return self.memory.schedule(problem, device)
