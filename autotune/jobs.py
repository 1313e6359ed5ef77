"""What worker processes are asked to do: each job takes some configs of a kernel and returns a record for each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch

from ..kernels.tunable import Config
from ..problem import Problem
from ..verify.gate import Evidence, check_config, run_trials
from ..verify.gate_cases import SEED
from .compile import compile_config, find_tunable, sketch
from .worker import Done, Failed

Record = dict[str, Any]
Verify = Callable[[str, str, Config, Problem], Evidence]
"""Module and name of a tunable, a config and the problem. Called in a worker process, so it must pickle."""
Sample = Callable[[str, str, Config, Problem], list[float]]
"""The same, but it gives the microseconds of some launches."""


def no_setup() -> None:
    """The set-up of workers that need none."""


def sketch_job(module: str, name: str, problem: Problem, configs: tuple[Config, ...]) -> list[Record]:
    """The `Sketch` of each config."""
    return [asdict(found) for found in sketch(module, name, problem, configs)]


def compile_job(module: str, name: str, problem: Problem, configs: tuple[Config, ...]) -> list[Record]:
    """The `Resources` of each kernel that each config launches."""
    compiled = (compile_config(module, name, problem, config) for config in configs)
    return [{"resources": [asdict(kernel) for kernel in kernels]} for kernels in compiled]


def verify_job(
    module: str,
    name: str,
    problem: Problem,
    configs: tuple[Config, ...],
    verify: Verify,
) -> list[Record]:
    """The evidence that `verify` finds for each config."""
    torch.set_num_threads(1)  # others verify beside it, and what is computed on the CPU is small
    return [asdict(verify(module, name, config, problem)) for config in configs]


def verify_by_gate(module: str, name: str, config: Config, problem: Problem) -> Evidence:
    """Run the config on every small shape against the oracle."""
    return _by_gate(module, name, config, problem)


def check_by_gate(module: str, name: str, config: Config, problem: Problem) -> Evidence:
    """What a config must pass before it is timed: the first small shape, which has several of its tiles."""
    return _by_gate(module, name, config, problem, only_first=True)


def recheck_by_gate(module: str, name: str, config: Config, problem: Problem) -> Evidence:
    """What it must pass after: every small shape, with contents that it was not checked with."""
    return _by_gate(module, name, config, problem, seed=SEED + 1)


def _by_gate(module: str, name: str, config: Config, problem: Problem, **how: Any) -> Evidence:
    """By the gate: on a GPU in this process, which is lost if that goes wrong, elsewhere in the interpreter's own."""
    find_tunable(module, name)  # with it, what other workers have compiled is found
    if torch.cuda.is_available():
        return run_trials(name, config, problem, "cuda", **how)
    return check_config(name, config, problem=problem, **how)


def spent(outcome: Done | Failed) -> bool:
    """Whether a worker does no other job: a GPU's context does not survive every error, nor every wrong config."""
    if isinstance(outcome, Failed):
        return True
    found = outcome.value if isinstance(outcome.value, list) else []
    return any(isinstance(record, dict) and record.get("ok") is False for record in found)
