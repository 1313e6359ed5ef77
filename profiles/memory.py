"""What has been looked up, so that it is looked up once: the path that every launch goes through."""

from __future__ import annotations

import shlex
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict

import torch

from ..kernels.tunable import Schedule
from ..problem import Problem
from .choice import Resolution

REMEMBERED = 4096
"""Problems that are remembered; after so many all are forgotten."""

Key = tuple[Problem, torch.device | None]


class ProfileWarning(UserWarning):
    """A kernel runs with its built-in config although a profile was given, or a profile was passed over."""


class Memory:
    """The resolutions of each problem and device, made by `resolve` when they are asked for first.

    `who` and `gpu` are for the warning that names the kernels without a usable entry: "... serves", and the GPU.
    """

    def __init__(
        self,
        resolve: Callable[[Problem, torch.device | None], Mapping[str, Resolution]],
        who: str,
        gpu: str | None,
    ) -> None:
        self._resolve, self._who, self._gpu = resolve, who, gpu
        self._resolutions: dict[Key, Mapping[str, Resolution]] = {}
        self._schedules: dict[Key, Schedule] = {}

    def resolutions(self, problem: Problem, device: torch.device | None) -> Mapping[str, Resolution]:
        """The resolution of each kernel."""
        found = self._resolutions.get((problem, device))
        if found is None:
            if len(self._resolutions) >= REMEMBERED:
                self._resolutions.clear()
            found = self._resolutions[problem, device] = self._resolve(problem, device)
        return found

    def schedule(self, problem: Problem, device: torch.device | None) -> Schedule:
        """The configs that are not the built-in ones; a `ProfileWarning` names the kernels that have none."""
        found = self._schedules.get((problem, device))
        if found is None:
            if len(self._schedules) >= REMEMBERED:
                self._schedules.clear()
            found = self._schedules[problem, device] = self._make_schedule(problem, device)
        return found

    def _make_schedule(self, problem: Problem, device: torch.device | None) -> Schedule:
        resolutions = self.resolutions(problem, device).values()
        unserved = [f"{r.kernel} ({'; '.join(r.reasons)})" for r in resolutions if r.entry is None and r.reasons]
        if unserved and self._gpu is not None:
            text = f"{self._who} {', '.join(unserved)}: built-in configs are used"
            warnings.warn(f"{text}; to tune them: {tune_command(self._gpu, problem)}", ProfileWarning, stacklevel=5)
        return Schedule({r.kernel: r.config for r in resolutions if r.entry is not None})


def tune_command(device: str, problem: Problem | None = None) -> str:
    """The command line that tunes for `device`, and for `problem` if one is given."""
    words = f"cca-tune --gpu {shlex.quote(device)}"
    if problem is None:
        return f"{words} --ctx 131072"
    p = asdict(problem)
    p["dtype"] = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}.get(problem.dtype, problem.dtype)
    options = {
        "ctx": "seq_len", "batch": "batch", "heads": "q_heads", "kv-heads": "kv_heads", "head-dim": "head_dim",
        "group-size": "group_size", "window-size": "window_size", "core-heads": "core_heads", "pooling": "pooling",
        "dtype": "dtype",
    }  # fmt: skip
    return " ".join([words, *(f"--{option} {p[field]}" for option, field in options.items())])
