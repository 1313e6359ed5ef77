"""The profile file: which config each kernel gets for which problem on one GPU, and why that is to be believed."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PlainSerializer,
    PlainValidator,
    PositiveFloat,
    PositiveInt,
    PrivateAttr,
    model_validator,
)

from ..kernels.tunable import HANDLES, Config, Schedule
from ..problem import Problem
from ..spec import CoreHeads, Pooling
from .configs import as_config, source_hash

SCHEMA: Literal["cca-profile/1.0"] = "cca-profile/1.0"
Evidence = Literal["measured", "modelled", "default"]


class ProfileMismatch(ValueError):
    """A profile asked about something else than it was made for."""


class ProfileWarning(UserWarning):
    """A kernel runs with its built-in config although a profile was given."""


def _problem(value: Any) -> Problem:
    if isinstance(value, Problem):
        return value
    if not isinstance(value, dict):
        raise ValueError(f"a problem is a mapping, got {value!r}")
    try:
        return Problem(**value)
    except TypeError as error:
        raise ValueError(str(error)) from error


ProblemField = Annotated[Problem, PlainValidator(_problem), PlainSerializer(Problem.as_dict)]


class _Part(BaseModel):
    """Frozen, and any field that it does not know is a mistake."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class DeviceIdentity(_Part):
    """The GPU that the configs are for; `names` are all the names that it answers to."""

    name: str
    vendor: str
    arch: str
    names: tuple[str, ...]
    sm_count: PositiveInt
    shared_bytes_per_block: PositiveInt
    l2_bytes: PositiveInt
    hbm_bytes: PositiveInt
    hbm_gbps: PositiveFloat


class Software(_Part):
    """Versions, as strings: a YAML number would read "3.10" as 3.1."""

    cca_attention: str
    triton: str
    torch: str
    python: str
    cuda: str | None = None


class Semantics(_Part):
    """What the model computes. A profile is never applied to another model than this describes."""

    group_size: PositiveInt
    window_size: PositiveInt
    core_heads: CoreHeads
    pooling: Pooling

    @classmethod
    def of(cls, problem: Problem) -> Semantics:
        """The semantics of `problem`."""
        return cls(**{name: getattr(problem, name) for name in cls.model_fields})


class Latency(_Part):
    """A measured time: microseconds over `samples` launches."""

    median_us: PositiveFloat
    p20_us: PositiveFloat
    p80_us: PositiveFloat
    samples: PositiveInt


class Predicted(_Part):
    """A modelled time in microseconds and the terms that it was made of."""

    total_us: PositiveFloat
    parts: dict[str, float]


class KernelResources(_Part):
    """What one compiled kernel takes of a block and of a thread, and does in one pass through its loops."""

    kernel: str
    shared_bytes: NonNegativeInt
    registers: NonNegativeInt
    spill_bytes: NonNegativeInt
    num_warps: PositiveInt
    loop_instructions: NonNegativeInt = 0
    loop_spill_bytes: NonNegativeInt = 0


class Verification(_Part):
    """The run of a config against the oracle that it passed."""

    suite: str
    seed: int
    cases: PositiveInt
    worst_budget_use: float
    mode: Literal["gpu", "interpreter"]
    kernel_hash: str


class Baseline(_Part):
    """The built-in config and its time, measured or predicted like the entry's own."""

    config: dict[str, int]
    time_us: PositiveFloat | None


class Entry(_Part):
    """One kernel's config for one problem, with its evidence."""

    kernel: str
    problem: ProblemField
    config: dict[str, int]
    evidence: Evidence
    latency: Latency | None = None
    predicted: Predicted | None = None
    resources: tuple[KernelResources, ...] = ()
    baseline: Baseline
    verification: Verification | None = None

    @model_validator(mode="after")
    def _evidence_is_there(self) -> Entry:
        if (self.latency is not None) != (self.evidence == "measured"):
            raise ValueError(f"evidence {self.evidence!r} and a measured latency go together or not at all")
        if self.evidence == "modelled" and self.predicted is None:
            raise ValueError("evidence 'modelled' needs the predicted time")
        as_config(self.kernel, self.config)
        return self

    @property
    def time_us(self) -> float | None:
        """The measured median, else the prediction."""
        if self.latency is not None:
            return self.latency.median_us
        return None if self.predicted is None else self.predicted.total_us

    def distance(self, problem: Problem) -> float | None:
        """How far `problem` is from this entry's, in doublings; None if they share no config at all."""
        own = self.problem
        if (own.head_dim, own.dtype) != (problem.head_dim, problem.dtype):
            return None
        sizes = ("seq_len", "batch", "q_heads", "kv_heads")
        return sum(abs(math.log2(getattr(problem, size) / getattr(own, size))) for size in sizes)


class KernelSource(_Part):
    """The source that a kernel's configs were tuned and verified on."""

    source_hash: str


class Profile(_Part):
    """Tuned configs for one GPU and one model's semantics. Hashable; `schedule` is what launchers are given."""

    schema_version: Literal["cca-profile/1.0"] = Field(alias="schema")
    created: str
    device: DeviceIdentity
    software: Software
    semantic: Semantics
    kernels: dict[str, KernelSource]
    entries: tuple[Entry, ...]
    _schedules: dict[Problem, Schedule] = PrivateAttr(default_factory=dict)

    @model_validator(mode="after")
    def _entries_belong(self) -> Profile:
        for entry in self.entries:
            if entry.kernel not in self.kernels:
                raise ValueError(f"kernels names no source for {entry.kernel!r}, which has an entry")
            if Semantics.of(entry.problem) != self.semantic:
                raise ValueError(
                    f"the entry of {entry.kernel} for {entry.problem} has other semantics than the profile"
                )
        keys = [(entry.kernel, entry.problem) for entry in self.entries]
        if doubled := {key for key in keys if keys.count(key) > 1}:
            raise ValueError("more than one entry for " + ", ".join(f"{k} on {p}" for k, p in sorted(doubled, key=str)))
        return self

    @cached_property
    def handle(self) -> str:
        """The string that stands for it in `HANDLES`; equal profiles have equal handles."""
        return f"profile {hashlib.sha256(self.model_dump_json(by_alias=True).encode()).hexdigest()}"

    def model_post_init(self, context: Any, /) -> None:
        """Enter it in `HANDLES`."""
        super().model_post_init(context)
        HANDLES.setdefault(self.handle, self)

    def __hash__(self) -> int:
        return hash(self.handle)

    def schedule(self, problem: Problem) -> Schedule:
        """The config of each kernel from the nearest problem it was tuned for.

        Kernels without an entry for the head dimension and dtype, or whose source has changed since, are left to
        their built-in config, with one `ProfileWarning`.

        Raises:
            ProfileMismatch: if `problem` has another group size, window size, core heads or pooling.
        """
        if problem not in self._schedules:
            self._schedules[problem] = self._make_schedule(problem)
        return self._schedules[problem]

    def _make_schedule(self, problem: Problem) -> Schedule:
        asked = Semantics.of(problem)
        if asked != self.semantic:
            raise ProfileMismatch(f"the profile of {self.device.name} is for {self.semantic!r}, the call has {asked!r}")
        chosen: dict[str, Config] = {}
        reasons: list[str] = []
        for kernel in self.kernels:
            config, reason = self._nearest(kernel, problem)
            if config is not None:
                chosen[kernel] = config
            else:
                reasons.append(f"{kernel} ({reason})")
        if reasons:
            text = f"the profile of {self.device.name} does not serve {', '.join(reasons)}: built-in configs are used"
            warnings.warn(
                f"{text}; to tune them: {tune_command(self.device.name, problem)}", ProfileWarning, stacklevel=4
            )
        return Schedule(chosen)

    def _nearest(self, kernel: str, problem: Problem) -> tuple[Config | None, str]:
        if not any(entry.kernel == kernel for entry in self.entries):
            return None, "no verified config"
        found = sorted(self._fitting(kernel, problem), key=lambda pair: pair[0])
        if not found:
            return None, f"tuned for no head_dim {problem.head_dim} in {problem.dtype}"
        if source_hash(kernel) != self.kernels[kernel].source_hash:
            return None, "its source has changed since it was tuned"
        return found[0][1], ""

    def _fitting(self, kernel: str, problem: Problem) -> Iterator[tuple[float, Config]]:
        for entry in self.entries:
            distance = entry.distance(problem)
            if entry.kernel == kernel and distance is not None:
                config = as_config(kernel, entry.config)
                if config.refusal(problem) is None:
                    yield distance, config


def tune_command(device: str, problem: Problem | None = None) -> str:
    """The command line that tunes for `device`, and for `problem` if one is given."""
    words = f"cca-tune --gpu {device}"
    if problem is None:
        return f"{words} --ctx 131072"
    p = asdict(problem)
    options = {
        "ctx": "seq_len", "batch": "batch", "heads": "q_heads", "kv-heads": "kv_heads", "head-dim": "head_dim",
        "group-size": "group_size", "window-size": "window_size", "core-heads": "core_heads", "pooling": "pooling",
        "dtype": "dtype",
    }  # fmt: skip
    return " ".join([words, *(f"--{option} {p[field]}" for option, field in options.items())])
