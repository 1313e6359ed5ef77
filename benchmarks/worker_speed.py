"""How much faster more worker processes compile: those of this machine, and those of a Ray cluster on it.

    python benchmarks/worker_speed.py --configs 24 --turns 3

Both pools compile the same configs of `pooling` for an A100, each into an empty cache of Triton's, with one worker and
with one for each core, in turns; what is printed are medians. Without Ray (`pip install cca-attention[ray]`) its row is
left out. Needs no GPU.
"""

from __future__ import annotations

import importlib.util
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Annotated, Any

import triton
import typer
from rich.console import Console
from rich.table import Table

from cca_attention.autotune import jobs
from cca_attention.autotune.compile import aim
from cca_attention.autotune.pool import Pool
from cca_attention.autotune.worker import Done, Job
from cca_attention.problem import Problem
from cca_attention.profiles.configs import tunables

ARCH = "sm_80"
LIMIT_S = 300.0
PROBLEM = Problem(q_heads=32, kv_heads=8, seq_len=4096, head_dim=128)


def compile_anew(*args: Any) -> Any:
    """`jobs.compile_job` into a cache that nobody has filled."""
    with tempfile.TemporaryDirectory() as folder, triton.knobs.cache.scope():
        triton.knobs.cache.dir = folder
        return jobs.compile_job(*args)


def seconds(pool: Pool, workers: int, configs: int) -> float:
    """What `configs` configs take; the workers stand ready before the clock starts."""
    tunable = tunables()["pooling"]
    list(pool.run([Job(n, time.sleep, (1.0,)) for n in range(workers)], LIMIT_S))
    allowed = [config for config, refusal in tunable.candidates(PROBLEM) if refusal is None][:configs]
    args = [(tunable.config.__module__, tunable.name, PROBLEM, (config,)) for config in allowed]
    begin = time.monotonic()
    outcomes = [outcome for _, outcome in pool.run([Job(each, compile_anew, each) for each in args], LIMIT_S)]
    took = time.monotonic() - begin
    if failed := [outcome for outcome in outcomes if not isinstance(outcome, Done)]:
        raise SystemExit(f"{len(failed)} configs did not compile: {failed[0]}")
    return took


def kinds() -> dict[str, Callable[[int], Pool]]:
    """How a pool of so many workers is made, by where they run."""
    made: dict[str, Callable[[int], Pool]] = {"this machine's own": lambda size: Pool(size, aim, ARCH)}
    if importlib.util.find_spec("ray") is not None:
        from cca_attention.autotune import ray_pool

        ray_pool.connect("local")
        made["Ray, on this machine"] = lambda size: ray_pool.RayPool(size, aim, ARCH)
    return made


def main(
    configs: Annotated[int, typer.Option(min=1, help="How many are compiled.")] = 24,
    turns: Annotated[int, typer.Option(min=1, help="How often with each number of workers.")] = 3,
) -> None:
    """Time compiling with one worker and with one for each core."""
    sizes = (1, len(os.sched_getaffinity(0)))
    table = Table("workers", *(f"{size}, s" for size in sizes), "speed-up")
    for where, make in kinds().items():
        took: dict[int, list[float]] = {size: [] for size in sizes}
        for _ in range(turns):
            for size in sizes:
                with make(size) as pool:
                    took[size].append(seconds(pool, size, configs))
        few, many = (statistics.median(took[size]) for size in sizes)
        table.add_row(where, f"{few:.1f}", f"{many:.1f}", f"{few / many:.2f}x")
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
