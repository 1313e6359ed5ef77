"""What worker processes are asked to do: each job takes some configs of a kernel and returns a record for each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from ..kernels.tunable import Config
from ..problem import Problem
from ..verify.gate import Evidence, check_config
from .compile import compile_config, sketch
from .measure import time_interleaved

Record = dict[str, Any]
Verify = Callable[[str, str, Config, Problem], Evidence]
"""Module and name of a tunable, a config and the problem. Called in a worker process, so it must pickle."""


def no_setup() -> None:
    """The set-up of workers that need none."""


def sketch_job(module: str, name: str, problem: Problem, configs: tuple[Config, ...]) -> list[Record]:
    """The `Sketch` of each config."""
    return [asdict(found) for found in sketch(module, name, problem, configs)]


def compile_job(module: str, name: str, problem: Problem, configs: tuple[Config, ...]) -> list[Record]:
    """The `Resources` of each kernel that each config launches."""
    compiled = (compile_config(module, name, problem, config) for config in configs)
    return [{"resources": [asdict(kernel) for kernel in kernels]} for kernels in compiled]


def measure_job(module: str, name: str, problem: Problem, configs: tuple[Config, ...], default: Config) -> list[Record]:
    """The `Timing` of each config and of the default, taken in turns."""
    records = []
    for config in configs:
        baseline, timing = time_interleaved(module, name, problem, (default, config))
        records.append({"timing": asdict(timing), "baseline": asdict(baseline)})
    return records


def verify_job(
    module: str,
    name: str,
    problem: Problem,
    configs: tuple[Config, ...],
    verify: Verify,
) -> list[Record]:
    """The evidence that `verify` finds for each config."""
    return [asdict(verify(module, name, config, problem)) for config in configs]


def verify_by_gate(module: str, name: str, config: Config, problem: Problem) -> Evidence:
    """Run the config on small shapes against the oracle."""
    return check_config(name, config, problem=problem)
