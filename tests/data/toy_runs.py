"""Runs of the tuner on the toy kernels, without commands: what several test modules begin with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from cca_attention.autotune.devices import find_device
from cca_attention.autotune.journal import Journal
from cca_attention.autotune.progress import Progress, Request, plan
from cca_attention.autotune.tune import Tuner
from cca_attention.problem import Problem

PROBLEM = Problem(q_heads=1, kv_heads=1, seq_len=4096, head_dim=64)


def request_for(toy: Any, folder: Path, **changes: Any) -> Request:
    """A run of the toy kernel for an A100 that is not there."""
    request = Request(
        device=find_device("a100"), problem=PROBLEM, tunables=(toy.TOY,), cache_folder=folder, at_hand=False, jobs=1,
        most_compiled=0, check=toy.accept, verify=toy.accept,
    )  # fmt: skip
    return replace(request, **changes)


def run(request: Request, watch: Callable[[Progress], None] = lambda kernel: None) -> Progress:
    """The state of the one kernel after a run."""
    kernels = plan(request)
    with Journal(request.cache_folder) as journal:
        Tuner(request, journal, kernels, watch).run()
    return kernels[0]
