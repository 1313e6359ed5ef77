"""The two steps of tuning for a GPU that is not there: a short list by the model, and its times on the GPU."""

from __future__ import annotations

from dataclasses import replace

from ..kernels.tunable import Config
from ..problem import Problem
from ..profiles.configs import as_config, source_hash
from ..profiles.schema import Entry, Profile
from .progress import Progress, Request
from .search import ranked

SHORT = 5
"""Configs of a kernel's short list: docs/tuning.md says what that loses on an H200."""


class PlanError(ValueError):
    """A profile whose short lists cannot be confirmed; the message says why."""


def short_list(kernel: Progress) -> list[Config]:
    """The configs that the model expects most of, best first."""
    return [trial.config for trial in ranked(list(kernel.trials.values()), kernel.default)[:SHORT]]


def planned(profile: Profile) -> dict[Problem, list[Entry]]:
    """The entries of `profile` that have a short list, by their problem.

    Raises:
        PlanError: if there is none, or one is of another source of its kernel.
    """
    found: dict[Problem, list[Entry]] = {}
    for entry in profile.entries:
        if entry.shortlist is not None:
            found.setdefault(entry.problem, []).append(entry)
    if not found:
        raise PlanError("none of its entries has a short list; cca-tune plan writes one")
    kernels = {entry.kernel for entries in found.values() for entry in entries}
    if stale := sorted(name for name in kernels if profile.kernels[name].source_hash != source_hash(name)):
        raise PlanError(f"it was planned for another source of {', '.join(stale)}; plan again with this version")
    return found


def confirmation(request: Request, entries: list[Entry]) -> Request:
    """`request` narrowed to the kernels and the short lists of `entries`, which are of its problem.

    Kernels for this architecture alone have few configs, and none of them could be verified where the plan was made:
    all are timed, beside the kernel that they stand in for.
    """
    only = {e.kernel: tuple(as_config(e.kernel, fields) for fields in e.shortlist or ()) for e in entries}
    for tunable in request.tunables:
        if tunable.archs and any(tunable.name.startswith(f"{entry.kernel}_") for entry in entries):
            legal = (config for config, refusal in tunable.candidates(request.problem) if refusal is None)
            only[tunable.name] = tuple(legal)
    starts = [entry.interval.seq_len[0] for entry in entries if entry.interval is not None]
    return replace(
        request, tunables=tuple(t for t in request.tunables if only.get(t.name)), only=only, most_compiled=0,
        least_ctx=min(starts, default=None),
    )  # fmt: skip
