"""Time every config that a plan could choose, on the GPUs of this host: what the plan's quality is judged by.

    python benchmarks/plan_sweep.py --output sweep.jsonl --budget 300

Every legal config of every kernel is compiled in worker processes, as cca-tune does; while they compile, those that are
done and fit are timed, in shuffled rounds with a cold L2 cache, after their output was compared with the built-in
config's. One slower than half as much again as the best is timed in the first round alone. All configs of a kernel and
a problem are timed on one GPU. One JSON line for each of them, written when the problem is done, so that what the
budget allowed is whole; a config without a time says why. What the file has already is not timed again.
"""

from __future__ import annotations

import json
import queue
import random
import threading
import time
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Annotated, Any, TextIO

import typer
from plan_bench import sample

from cca_attention.autotune import jobs, space
from cca_attention.autotune.binary import Resources
from cca_attention.autotune.compile import Sketch, aim
from cca_attention.autotune.devices import Device, device_at_hand
from cca_attention.autotune.host import HostCard, cards_here, take_card
from cca_attention.autotune.pool import Pool
from cca_attention.autotune.worker import Done, Failed, Job
from cca_attention.kernels.tunable import Config, Tunable
from cca_attention.problem import Problem
from cca_attention.profiles.configs import tunables

ROUNDS = 6
SLOW = 1.5
MOST_DECODE = 84
"""Of the 864 configs of decode, drawn at random; of every other kernel all are taken."""
COMPILE_S, SAMPLE_S, CELL_S, LAST_S = 60.0, 40.0, 10.0, 25.0
"""Limits of a job to compile and to time, and what must be left of the budget to begin a problem, and to compile on."""
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
    kernels: tuple[str, ...] = ORDER
    share: float = 1.0

    def each(self) -> Iterator[tuple[str, Problem]]:
        """The role and the problem of each."""
        for role, tokens, q_heads, kv_heads in self.problems:
            sizes = {"group_size": self.group_size, "window_size": self.window_size}
            yield role, Problem(q_heads=q_heads, kv_heads=kv_heads, seq_len=tokens, head_dim=128, **sizes)


JUDGED = tuple(("judge", tokens, 32, 8) for tokens in (32768, 8192, 131072))
FITTED = (("fit", 65536, 16, 4), ("fit", 16384, 48, 12))
POOLING = ("pooling", "pooling_backward")
PARTS = (
    Part(64, 4096, JUDGED),
    *(Part(group_size, 4096, FITTED, POOLING) for group_size in (64, 32, 128)),
    Part(16, 1024, (*JUDGED, *FITTED)),
    Part(32, 1024, JUDGED),
    Part(8, 512, (("fit", 16384, 64, 16), ("fit", 65536, 16, 4)), share=0.5),
)


@dataclass(frozen=True, slots=True)
class Unit:
    """One kernel, problems with the same compiled kernels and their roles, and the configs to look at."""

    tunable: Tunable
    problems: tuple[tuple[str, Problem], ...]
    configs: tuple[Config, ...]


def units(arch: str, done: Collection[tuple[str, Problem]]) -> list[Unit]:
    """What is to be compiled, in this order: all but what is `done`, decode last."""
    known, found = tunables(arch), []
    for part in PARTS:
        for name in part.kernels:
            tunable = known[name]
            problems = tuple((role, problem) for role, problem in part.each() if (name, problem) not in done)
            if not problems:
                continue
            first = problems[0][1]
            legal = [config for config, refusal in tunable.candidates(first) if refusal is None]
            if hasattr(tunable.config, "effective"):
                legal = list(dict.fromkeys(config.effective(first.spec) for config in legal))
            random.Random(f"{part.group_size}/{part.window_size} {name}").shuffle(legal)
            most = MOST_DECODE if name == "decode" else len(legal)
            if name not in POOLING and not tunable.archs:
                most = max(1, int(most * part.share))
            defaults = [tunable.default(problem, arch) for _, problem in problems]
            found.append(Unit(tunable, problems, tuple(dict.fromkeys([*legal[:most], *defaults]))))
    return sorted(found, key=lambda unit: unit.tunable.name == "decode")


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


def _failed(outcome: Done | Failed) -> bool:
    """A GPU context does not survive every error: the worker is renewed after any."""
    return isinstance(outcome, Failed)


@dataclass(slots=True)
class Cell:
    """A kernel and a problem: the resources and launches of each config, or why there are none, and the times."""

    tunable: Tunable
    role: str
    problem: Problem
    found: dict[Config, Any]
    why: dict[Config, str]
    samples: dict[Config, list[float]] = field(default_factory=dict)
    seconds: float = 0.0

    def rows(self, gpu: str) -> Iterator[dict[str, Any]]:
        """What is known of each config."""
        about = {"kernel": self.tunable.name, "role": self.role, "problem": self.problem.as_dict(), "gpu": gpu}
        for config, found in self.found.items():
            row = {**about, "config": asdict(config), **found, "work": asdict(self.tunable.work(self.problem, config))}
            yield row | {"us": round(median(self.samples[config]), 2), "samples": len(self.samples[config])}
        for config, why in self.why.items():
            yield {**about, "config": asdict(config), "why": why}


def cells(unit: Unit, done: dict[Config, Any], why: dict[Config, str]) -> list[Cell]:
    """Each problem of a unit that was compiled."""
    return [
        Cell(unit.tunable, role, problem, {config: found[number] for config, found in done.items()}, dict(why))
        for number, (role, problem) in enumerate(unit.problems)
    ]


class Sweep:
    """The run: a thread compiles, one for each GPU times what is ready, and writes it."""

    def __init__(self, device: Device, lines: TextIO, budget_s: float, workers: int) -> None:
        self._device, self._lines, self._workers = device, lines, workers
        self._ends = time.monotonic() + budget_s
        self._ready: queue.Queue[list[Cell] | None] = queue.Queue()
        self._writing = threading.Lock()

    def left(self) -> float:
        """Seconds of the budget."""
        return self._ends - time.monotonic()

    def run(self, wanted: list[Unit], cards: tuple[HostCard, ...]) -> None:
        """Compile and time everything that is wanted, or what the budget allows."""
        with ThreadPoolExecutor(1 + len(cards)) as threads:
            tasks = [*(threads.submit(self._time_on, card) for card in cards), threads.submit(self._compile, wanted)]
            for task in tasks:
                task.result()

    def _compile(self, wanted: list[Unit]) -> None:
        try:
            self._compile_units(wanted)
        finally:
            self._ready.put(None)

    def _compile_units(self, wanted: list[Unit]) -> None:
        waiting: list[Job] = []
        found: list[tuple[dict[Config, Any], dict[Config, str]]] = [({}, {}) for _ in wanted]
        for unit, (done, why) in zip(wanted, found, strict=True):
            where = (unit.tunable.config.__module__, unit.tunable.name, [problem for _, problem in unit.problems])
            waiting += [Job((unit, done, why, c), examine, (*where, c, self._device)) for c in unit.configs]
        typer.echo(f"{len(waiting)} to compile")
        with Pool(self._workers, aim, self._device.arch) as pool:
            for job, outcome in pool.run(waiting, COMPILE_S, until=self._ends - LAST_S):
                unit, done, why, config = job.tag
                if isinstance(outcome, Done):
                    done[config] = outcome.value
                else:
                    why[config] = outcome.message
                if len(done) + len(why) == len(unit.configs):
                    self._ready.put(cells(unit, done, why))
        typer.echo(f"compiled; {self.left():.0f} s left")

    def _time_on(self, card: HostCard) -> None:
        with Pool(1, take_card, card.handle, renew=_failed) as timer:
            while (ready := self._ready.get()) is not None:
                for cell in ready:
                    if self.left() > CELL_S and self._time(cell, timer):
                        self._write(cell, card)
        self._ready.put(None)  # for the next GPU's

    def _time(self, cell: Cell, timer: Pool) -> bool:
        """Take the times; False if the budget ended first."""
        cell.samples = {config: [] for config in cell.found}
        live = list(cell.found)
        for round_ in range(ROUNDS):
            random.Random(round_).shuffle(live)
            best = min((median(us) for us in cell.samples.values() if us), default=0.0)
            launches = 2 if round_ == 0 else 1 if best > 5e3 else 2 if best > 1e3 else 4
            for config in live:
                if self.left() < 1.0:
                    return False
                self._sample(cell, config, launches, timer)
            times = {config: min(cell.samples[config]) for config in live if config in cell.found}
            live = [config for config, us in times.items() if us <= SLOW * min(times.values())]
        return True

    def _sample(self, cell: Cell, config: Config, launches: int, timer: Pool) -> None:
        tunable, problem = cell.tunable, cell.problem
        where = (tunable.config.__module__, tunable.name, problem, tunable.default(problem, self._device.arch))
        ((_, outcome),) = timer.run([Job(None, sample, (*where, config, launches))], SAMPLE_S)
        cell.seconds += outcome.seconds
        if isinstance(outcome, Done):
            cell.samples[config] += outcome.value
        else:
            cell.why[config] = f"{outcome.kind}: {outcome.message[:200]}"
            del cell.found[config]

    def _write(self, cell: Cell, card: HostCard) -> None:
        rows = list(cell.rows(card.kind))
        timed = ((row["us"], tuple(row["config"].values())) for row in rows if "us" in row)
        best, config = min(timed, default=(0.0, ()))
        with self._writing:
            self._lines.writelines(json.dumps(row, separators=(",", ":")) + "\n" for row in rows)
            self._lines.flush()
            typer.echo(
                f"{cell.tunable.name}, {cell.problem}: {len(cell.found)} timed on GPU {card.index}, best {best} us "
                f"{config}; {len(cell.why)} not: {sorted(set(cell.why.values()))[:3]}; took {cell.seconds:.1f} s, "
                f"{self.left():.0f} s left"
            )


def main(
    output: Annotated[Path, typer.Option("--output", help="Where the JSON lines go, after those of earlier runs.")],
    budget: Annotated[float, typer.Option("--budget", help="Seconds.")] = 300.0,
    workers: Annotated[int, typer.Option("--workers", help="Processes that compile.")] = 28,
) -> None:
    """Time every config that a plan could choose, on the GPUs of this host."""
    device = device_at_hand()
    if device is None:
        raise typer.BadParameter("there is no GPU here")
    with output.open("a+", encoding="utf-8") as lines:
        lines.seek(0)
        rows = map(json.loads, lines)
        done = {(row["kernel"], Problem(**row["problem"])) for row in rows}
        Sweep(device, lines, budget, workers).run(units(device.arch, done), cards_here())


if __name__ == "__main__":
    typer.run(main)
