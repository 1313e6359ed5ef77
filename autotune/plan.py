"""The two steps of tuning for a GPU that is not there: a short list by the model, and its times on the GPU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..kernels.tunable import Config, Tunable
from ..problem import Problem
from ..profiles.configs import as_config, source_hash
from ..profiles.schema import Entry, Profile
from .devices import Device
from .progress import Progress, Request
from .search import ranked

SHORT = 5
"""Configs of a kernel's short list: docs/tuning.md has what that loses on an H200."""


class PlanError(ValueError):
    """A profile whose short lists cannot be confirmed; the message says why."""


def short_list(kernel: Progress) -> list[Config]:
    """The configs that the model expects most of, best first."""
    return [trial.config for trial in ranked(list(kernel.trials.values()), kernel.default)[:SHORT]]


def requests_of(
    profile: Profile, device: Device, tunables: Mapping[str, Tunable], same: Mapping[str, Any]
) -> list[Request]:
    """The runs that time the short lists of `profile` on `device`, one for each problem.

    Kernels for this architecture alone have few configs, and none could be verified where the plan was made: they are
    timed in full beside the kernel that they stand in for.

    Args:
        tunables: those that run on `device`, by name.
        same: what else each `Request` takes.

    Raises:
        PlanError: if no entry has a short list, or one is of another source of its kernel.
    """
    planned: dict[Problem, list[Entry]] = {}
    for entry in profile.entries:
        if entry.shortlist is not None:
            planned.setdefault(entry.problem, []).append(entry)
    if not planned:
        raise PlanError("none of its entries has a short list; cca-tune plan writes one")
    stale = [kernel for kernel, source in profile.kernels.items() if source.source_hash != source_hash(kernel)]
    if stale:
        raise PlanError(f"it was planned for another source of {', '.join(stale)}; plan again with this version")
    return [_request(problem, entries, device, tunables, same) for problem, entries in planned.items()]


def _request(
    problem: Problem, entries: list[Entry], device: Device, tunables: Mapping[str, Tunable], same: Mapping[str, Any]
) -> Request:
    only = {
        entry.kernel: tuple(as_config(entry.kernel, fields) for fields in entry.shortlist or ()) for entry in entries
    }
    for name, tunable in tunables.items():
        if tunable.archs and any(name.startswith(f"{kernel}_") for kernel in only):
            legal = tuple(config for config, refusal in tunable.candidates(problem) if refusal is None)
            only |= {name: legal} if legal else {}
    starts = {entry.interval.seq_len[0] for entry in entries if entry.interval is not None}
    return Request(
        device=device, problem=problem, tunables=tuple(tunables[name] for name in only), at_hand=True, only=only,
        least_ctx=min(starts, default=None), **same,
    )  # fmt: skip
