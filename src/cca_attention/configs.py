"""Which configs the kernels of a call are launched with: a registered profile's, or the built-in ones."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .kernels.tunable import HANDLES, Config, Schedule, Tunable
from .problem import Problem
from .spec import CCASpec

if TYPE_CHECKING:
    from .profiles.schema import Profile


@lru_cache
def architecture(device: torch.device) -> str:
    """ "sm_90", "gfx942" and the like; "cpu" for the interpreter."""
    if device.type != "cuda":
        return "cpu"
    if torch.version.hip:
        return str(torch.cuda.get_device_properties(device).gcnArchName).split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def problem_of(q: Tensor, k: Tensor, spec: CCASpec) -> Problem:
    """The problem that tensors q (B, Hq, T, D) and k (B, Hkv, T, D) pose, for the choice of configs."""
    return _problem(*q.shape, k.shape[1], spec, q.dtype)


@lru_cache(maxsize=1024)
def _problem(
    batch: int, q_heads: int, seq_len: int, head_dim: int, kv_heads: int, spec: CCASpec, dtype: torch.dtype
) -> Problem:
    return Problem(
        batch=batch,
        q_heads=q_heads,
        kv_heads=kv_heads,
        seq_len=seq_len,
        head_dim=head_dim,
        group_size=spec.group_size,
        window_size=spec.window_size,
        core_heads=spec.core_heads,
        pooling=spec.pooling,
        dtype=str(dtype).removeprefix("torch."),
    )


class Configs:
    """The config of each kernel for one problem on one architecture: the schedule's, else the built-in default.

    `choice` is equal for those that choose alike for equal problems on one GPU.
    """

    def __init__(self, schedule: Schedule, problem: Problem, arch: str, *, forced: bool = False) -> None:
        self.choice = (schedule.handle, forced)
        self._schedule = schedule
        self._forced = forced
        self._problem = problem
        self._arch = arch

    def forces(self, kernel: str) -> bool:
        """Whether `kernel` is to run where it can, worth it or not: a caller's own schedule names it."""
        return self._forced and kernel in self._schedule

    def __getitem__(self, kernel: str) -> Any:
        if kernel in self._schedule:
            config = self._schedule[kernel]
            if refusal := config.refusal(self._problem):
                raise ValueError(f"profile: the {kernel} config cannot run {self._problem}: {refusal}")
            return config
        return _built_in(kernel, self._problem, self._arch)


@lru_cache(maxsize=4096)
def _built_in(kernel: str, problem: Problem, arch: str) -> Config:
    return Tunable.REGISTRY[kernel].default(problem, arch)


def register_profile(profile: str | Profile | Schedule | None) -> str:
    """The handle under which the ops find `profile`: None, a name or path, a Profile or a Schedule.

    A name or path is loaded once per process; inside of what ``torch.compile`` traces, when the op first runs.
    Raises what `load_profile` raises; "auto" takes what it finds.
    """
    if profile is None:
        return ""
    if not isinstance(profile, str):
        return profile.handle
    if not torch.compiler.is_compiling():
        _registered(profile)
    return profile


def _registered(handle: str) -> Any:
    if handle not in HANDLES:
        from .profiles.resolve import profile_for

        HANDLES[handle] = profile_for(handle)
    return HANDLES[handle]


def configs_for(handle: str, q: Tensor, k: Tensor, spec: CCASpec) -> Configs:
    """The configs that a registered profile gives for these tensors."""
    problem = problem_of(q, k, spec)
    profile = _registered(handle) if handle else Schedule()
    arch = architecture(q.device)
    if isinstance(profile, Schedule):
        return Configs(profile, problem, arch, forced=True)
    return Configs(profile.schedule(problem, q.device), problem, arch)
