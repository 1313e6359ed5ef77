"""One run of `cca-verify` from its plan to its record."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from datetime import datetime, timezone
from typing import Any

from rich.console import Console

from . import provenance
from .conclusion import footer
from .display import Board
from .record import Header, Record, Result
from .run import Options, run
from .units import Unit

MOST_GPU_JOBS = 12


class Session:
    """The units of some layers and how they are to be run.

    Args:
        units, layers: what to run.
        use_gpu: whether to use the GPU, if there is one.
        jobs: worker processes at a time; None for two on the CPU, and on the GPU one for each core, up to 12.
        settings: the other fields of the record's header.
        expected: the least number of checks of a layer.
        allowed_skips: ids that may be skipped, with the reason.
    """

    def __init__(
        self, units: Sequence[Unit], layers: tuple[str, ...], *, use_gpu: bool, jobs: int | None,
        settings: Mapping[str, Any], expected: Mapping[str, int], allowed_skips: Mapping[str, str],
    ) -> None:  # fmt: skip
        gpu = provenance.gpu_name() if use_gpu else ""
        cores = len(os.sched_getaffinity(0))
        self._units, self._allowed = list(units), allowed_skips
        self._options = Options(
            jobs=jobs or min(2, cores), gpu_jobs=jobs or min(MOST_GPU_JOBS, cores),
            budget_scale=settings["budget_scale"], gpu=bool(gpu),
        )  # fmt: skip
        self.header = Header(
            commit=provenance.commit(), started=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            versions=provenance.versions(), gpu=gpu, layers=layers, planned=tuple(unit.id for unit in units),
            expected={layer: expected[layer] for layer in layers if layer in expected}, **settings,
        )  # fmt: skip

    def announcement(self) -> str:
        """What will run, and about how long it takes."""
        runs = [unit for unit in self._units if unit.place != "gpu" or self._options.gpu]
        crew = {"gpu": self._options.gpu_jobs}
        seconds = sum(unit.estimate_s / crew.get(unit.place, self._options.jobs) for unit in runs)
        where = self.header.gpu or "no GPU"
        idle = len(self._units) - len(runs)
        rest = f"; {idle} more need a GPU and will not be run" if idle else ""
        layers = ", ".join(dict.fromkeys(unit.layer for unit in runs)) or "nothing"
        return f"{where}: {len(runs)} checks in {layers}, about {max(1, round(seconds / 60))} min{rest}"

    def run(self, console: Console) -> Record:
        """Run everything; interrupted by Ctrl-C, the record holds what was done so far and is not complete."""
        results: list[Result] = []
        begun, complete = time.monotonic(), False
        try:
            console.print(self.announcement(), markup=False, highlight=False, soft_wrap=True)
            with Board(console, self._units) as board, closing(run(self._units, self._options, board)) as found:
                for result in found:
                    results.append(result)
            complete = True
        except KeyboardInterrupt:
            pass  # the record says that it is not complete
        end = footer(
            self.header, results, allowed_skips=self._allowed, duration_s=time.monotonic() - begun, complete=complete
        )
        return Record(header=self.header, results=tuple(results), footer=end, complete=complete)
