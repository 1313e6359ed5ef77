"""Time every config that a plan could choose, on the GPU at hand: what the plan's quality is judged by.

    python benchmarks/plan_sweep.py --output sweep.jsonl.gz --budget 400

Every legal config of every kernel is compiled in worker processes, as cca-tune does; while they compile, those that are
done and fit are timed, in shuffled rounds with a cold L2 cache, after their output was compared with the built-in
config's. One slower than twice the best is timed in the first round alone. One JSON line a config and problem, written
as soon as its kernel is done, so that a run whose budget ends has a balanced part; a config without a time says why.
"""

from __future__ import annotations

import gzip
import json
import queue
import random
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any, TextIO

import torch
import typer
from torch import Tensor

from cca_attention.autotune import jobs, space
from cca_attention.autotune.binary import Resources
from cca_attention.autotune.compile import Sketch, aim, find_tunable
from cca_attention.autotune.devices import Device, device_at_hand
from cca_attention.autotune.measure import FLUSH_BYTES, SEED, policy_of
from cca_attention.autotune.pool import Pool
from cca_attention.autotune.worker import Done, Job
from cca_attention.kernels.tunable import Config, Tunable
from cca_attention.problem import Problem
from cca_attention.profiles.configs import tunables

ROUNDS = 6
SLOW = 2.0
TOLERANCE = 0.03
"""The distance between two configs' outputs, over their norm, beyond which one is wrong: bfloat16 rounds at 0.004."""
FLUSHES = 3
"""Writes of the whole L2 cache before a launch: a host that is busy compiling must still be ahead of the GPU."""
MOST_DECODE = 84
"""Of the 864 configs of decode, drawn at random; of every other kernel all are taken."""
COMPILE_S, SAMPLE_S, LAST_S = 45.0, 40.0, 35.0
OUTPUTS = {
    "pooling": ("k_core", "v_core", "pool_lse"), "pooling_backward": ("pool_delta", "dq"), "forward": ("out", "lse"),
    "backward_dq": ("dq",), "backward_dcore": ("dk_core", "dv_core"), "backward_dkv": ("dk", "dv"), "decode": ("out",),
}  # fmt: skip
ORDER = (
    "pooling", "forward_hopper", "backward_dq", "backward_dq_hopper", "decode", "forward", "backward_dcore_hopper",
    "backward_dkv_hopper", "pooling_backward", "backward_dcore", "backward_dkv",
)  # fmt: skip
"""Kernels that compile fast first."""


@dataclass(frozen=True, slots=True)
class Part:
    """Problems of one group and window size, which share their compiled kernels; `share` of the configs is taken."""

    group_size: int
    window_size: int
    problems: tuple[tuple[str, int, int, int], ...]  # role, tokens, query heads, key/value heads
    share: float = 1.0

    def each(self) -> Iterator[tuple[str, Problem]]:
        """The role and the problem of each."""
        for role, tokens, q_heads, kv_heads in self.problems:
            sizes = {"group_size": self.group_size, "window_size": self.window_size}
            yield role, Problem(q_heads=q_heads, kv_heads=kv_heads, seq_len=tokens, head_dim=128, **sizes)


JUDGED = tuple(("judge", tokens, 32, 8) for tokens in (32768, 8192, 131072))
PARTS = (
    Part(16, 1024, (JUDGED[0], ("fit", 65536, 16, 4), ("fit", 16384, 48, 12), *JUDGED[1:])),
    Part(32, 1024, JUDGED),
    Part(8, 512, (("fit", 16384, 64, 16), ("fit", 65536, 16, 4)), share=0.5),
    Part(64, 4096, JUDGED),
)


@dataclass(frozen=True, slots=True)
class Unit:
    """One kernel of one part, and the configs to look at."""

    part: Part
    tunable: Tunable
    configs: tuple[Config, ...]


def units(arch: str) -> list[Unit]:
    """What is to be compiled, in this order."""
    known, found = tunables(arch), []
    for part in PARTS:
        for name in ORDER:
            tunable = known[name]
            problems = [problem for _, problem in part.each()]
            legal = [config for config, refusal in tunable.candidates(problems[0]) if refusal is None]
            if hasattr(tunable.config, "effective"):
                legal = list(dict.fromkeys(config.effective(problems[0].spec) for config in legal))
            random.Random(f"{part.group_size}/{part.window_size} {name}").shuffle(legal)
            most = MOST_DECODE if name == "decode" else len(legal)
            if name != "pooling" and not tunable.archs:
                most = max(1, int(most * part.share))
            defaults = [tunable.default(problem, arch) for problem in problems]
            found.append(Unit(part, tunable, tuple(dict.fromkeys([*legal[:most], *defaults]))))
    return found


def examine(module: str, name: str, problems: list[Problem], config: Config, device: Device) -> list[dict[str, Any]]:
    """In a compiling worker: for each problem what the config launches, and what that takes."""
    sketches = [Sketch.from_dict(jobs.sketch_job(module, name, problem, (config,))[0]) for problem in problems]
    if (lack := space.certain_shortage(device, config, sketches[0])) is not None:
        raise ValueError(f"certainly short of {lack}")
    (record,) = jobs.compile_job(module, name, problems[0], (config,))
    resources = tuple(Resources(**values) for values in record["resources"])
    if (lack := space.shortage(device, resources)) is not None:
        raise ValueError(f"short of {lack}")
    return [{"launches": [asdict(launch) for launch in sketch.launches], **record} for sketch in sketches]


class Bench:
    """In the timing worker: the tensors of one problem, and what the built-in config makes of them."""

    last: Bench | None = None

    def __init__(self, module: str, name: str, problem: Problem, default: Config) -> None:
        self.key, self.tunable = (name, problem), find_tunable(module, name)
        self.tensors = self.tunable.allocate(problem, torch.device("cuda"), torch.Generator("cuda").manual_seed(SEED))
        self.flush = torch.empty(FLUSH_BYTES // 4, dtype=torch.int32, device="cuda")
        self.runs: dict[Config, Any] = {}
        self.outputs = OUTPUTS[name.removesuffix("_hopper")]
        self.launch(default)
        self.right = {output: self.tensors[output].clone() for output in self.outputs}

    def launch(self, config: Config) -> None:
        """Launch on outputs that hold nothing of use; dq is added to."""
        for output in self.outputs:
            self.tensors[output].fill_(0.0 if self.key[0].startswith("backward_dq") else float("nan"))
        self.tunable.launch(self.key[1], self.tensors, config)
        torch.cuda.synchronize()

    def distance(self) -> float:
        """The largest distance of an output from the built-in config's, over that one's norm."""
        return max(map(_distance, (self.tensors[output] for output in self.outputs), self.right.values()))

    def prepare(self, config: Config) -> None:
        """Make it ready to be timed.

        Raises:
            ValueError: if its output is wrong.
        """
        self.launch(config)
        if not (distance := self.distance()) <= TOLERANCE:
            raise ValueError(f"wrong by {distance:.3g}")
        self.runs[config] = lambda: self.tunable.launch(self.key[1], self.tensors, config)
        if policy_of(self.key[0]).mode == "cuda_graph":
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self.runs[config]()
            self.runs[config] = graph.replay


def _distance(made: Tensor, right: Tensor) -> float:
    worst = 0.0
    for a, b in zip(made.flatten(0, -2).split(2**18), right.flatten(0, -2).split(2**18), strict=True):
        if not torch.equal(a.isnan(), b.isnan()):
            return float("inf")
        a, b = a.float().nan_to_num(), b.float().nan_to_num()
        scale = max(b.norm().item(), 1e-3 * b.numel() ** 0.5)
        worst = max(worst, (a - b).norm().item() / scale)
    return worst


def sample(module: str, name: str, problem: Problem, default: Config, config: Config, launches: int) -> list[float]:
    """In the timing worker: microseconds of some launches, each with a cold L2 cache."""
    if Bench.last is None or Bench.last.key != (name, problem):
        Bench.last = None
        torch.cuda.empty_cache()
        Bench.last = Bench(module, name, problem, default)
    bench = Bench.last
    if config not in bench.runs:
        bench.prepare(config)
    pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(launches)]
    for start, end in pairs:
        for _ in range(FLUSHES):
            bench.flush.zero_()
        start.record()
        bench.runs[config]()
        end.record()
    torch.cuda.synchronize()
    return [round(1e3 * start.elapsed_time(end), 2) for start, end in pairs]


class Sweep:
    """The run: a thread compiles, this one times what is ready and writes it."""

    def __init__(self, device: Device, output: Path, budget_s: float, workers: int) -> None:
        self._device, self._output, self._workers = device, output, workers
        self._ends = time.monotonic() + budget_s
        self._ready: queue.Queue[tuple[Unit, dict[Config, Any]] | None] = queue.Queue()

    def left(self) -> float:
        """Seconds of the budget."""
        return self._ends - time.monotonic()

    def run(self) -> None:
        """Compile and time everything, or what the budget allows."""
        with Pool(1, jobs.no_setup, renew=True) as timer, gzip.open(self._output, "at", encoding="utf-8") as lines:
            compiling = threading.Thread(target=self._compile, daemon=True)
            compiling.start()
            while (item := self._ready.get()) is not None:
                for role, problem in item[0].part.each():
                    if self.left() > 8.0:
                        self._time(*item, role, problem, timer, lines)
            compiling.join()

    def _compile(self) -> None:
        waiting: list[Job] = []
        found: dict[int, dict[Config, Any]] = {}
        for number, unit in enumerate(units(self._device.arch)):
            problems = [problem for _, problem in unit.part.each()]
            where = (unit.tunable.config.__module__, unit.tunable.name, problems)
            waiting += [Job((number, unit, c), examine, (*where, c, self._device)) for c in unit.configs]
            found[number] = {}
        with Pool(self._workers, aim, self._device.arch) as pool:
            for job, outcome in pool.run(waiting, COMPILE_S):
                number, unit, config = job.tag
                found[number][config] = outcome.value if isinstance(outcome, Done) else outcome.message
                if len(found[number]) == len(unit.configs):
                    self._ready.put((unit, found.pop(number)))
                if self.left() < LAST_S:
                    break
        self._ready.put(None)

    def _time(
        self, unit: Unit, compiled: dict[Config, Any], role: str, problem: Problem, timer: Pool, lines: TextIO
    ) -> None:
        tunable, number = unit.tunable, [p for _, p in unit.part.each()].index(problem)
        samples: dict[Config, list[float]] = {c: [] for c, found in compiled.items() if not isinstance(found, str)}
        why = {config: found for config, found in compiled.items() if isinstance(found, str)}
        live = list(samples)
        for round_ in range(ROUNDS):
            random.Random(round_).shuffle(live)
            self._round(tunable, problem, live, samples, why, timer, first=round_ == 0)
            times = {config: min(us) for config, us in samples.items() if us and config not in why}
            live = [config for config, us in times.items() if us <= SLOW * min(times.values())]
        for config, found in compiled.items():
            row = {"kernel": tunable.name, "role": role, "problem": problem.as_dict(), "config": asdict(config)}
            if config in why:
                row["why"] = why[config]
            else:
                row |= {**found[number], "work": asdict(tunable.work(problem, config))}
                row |= {"us": round(median(samples[config]), 2), "samples": len(samples[config])}
            lines.write(json.dumps(row) + "\n")
        lines.flush()
        typer.echo(f"{tunable.name}, {problem}: {len(samples)} timed, {len(why)} not; {self.left():.0f} s left")

    def _round(
        self, tunable: Tunable, problem: Problem, live: list[Config], samples: dict[Config, list[float]],
        why: dict[Config, str], timer: Pool, *, first: bool,
    ) -> None:  # fmt: skip
        """One sample of each config, of more launches where they are short."""
        best = min((median(us) for us in samples.values() if us), default=0.0)
        launches = 2 if first else 1 if best > 5e3 else 2 if best > 1e3 else 4
        where = (tunable.config.__module__, tunable.name, problem, tunable.default(problem, self._device.arch))
        for config in live:
            ((_, outcome),) = timer.run([Job(None, sample, (*where, config, launches))], SAMPLE_S)
            if isinstance(outcome, Done):
                samples[config] += outcome.value
            else:
                why[config] = f"{outcome.kind}: {outcome.message[:200]}"


def main(
    output: Annotated[Path, typer.Option("--output", help="Where the JSON lines go.")],
    budget: Annotated[float, typer.Option("--budget", help="Seconds.")] = 400.0,
    workers: Annotated[int, typer.Option("--workers", help="Processes that compile.")] = 14,
) -> None:
    """Time every config that a plan could choose, on the GPU at hand."""
    device = device_at_hand()
    if device is None:
        raise typer.BadParameter("there is no GPU here")
    Sweep(device, output, budget, workers).run()


if __name__ == "__main__":
    typer.run(main)
