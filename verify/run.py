"""Runs units in worker processes that may crash, hang or be interrupted, and makes the record of what came out."""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from .child import Child, ChildFailedError, Failure
from .layers import BUDGETS_S
from .record import Result, Trouble, result_from
from .units import Place, Unit, failed, run_unit

TROUBLES: dict[Failure, Trouble] = {"raised": "exception", "crashed": "crash", "hung": "timeout"}
NO_GPU = "needs an NVIDIA GPU, and there is none here"


class Display(Protocol):
    """Is told of a run as it goes on."""

    def started(self, unit: Unit) -> None:
        """A worker began `unit`."""

    def ended(self, result: Result) -> None:
        """A unit came to its result."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How to run: worker processes at a time on the CPU and on the GPU, what the layers' time budgets are multiplied
    by, and whether there is a GPU to use."""

    jobs: int = 2
    gpu_jobs: int = 8
    budget_scale: float = 1.0
    gpu: bool = False


def run(units: Sequence[Unit], options: Options, display: Display) -> Generator[Result, None, None]:
    """The result of every unit as it comes, layer by layer; closing the iterator ends all workers."""
    for unit in units:
        if unit.place == "gpu" and not options.gpu:
            result = unit.blank(status="not-run", message=NO_GPU)
            display.ended(result)
            yield result
    for layer in dict.fromkeys(unit.layer for unit in units):
        todo = [unit for unit in units if unit.layer == layer and (unit.place != "gpu" or options.gpu)]
        budget = BUDGETS_S.get(layer, float("inf")) * options.budget_scale
        for place, alone in dict.fromkeys((unit.place, unit.alone) for unit in todo):
            crew = 1 if alone else options.gpu_jobs if place == "gpu" else options.jobs
            here = [unit for unit in todo if (unit.place, unit.alone) == (place, alone)]
            yield from _Crew(place, here, min(crew, len(here)), time.monotonic() + budget, display).results()


class _Crew:
    """Threads with a child process each, which take units from one queue until it is empty."""

    def __init__(self, place: Place, units: Sequence[Unit], size: int, deadline: float, display: Display) -> None:
        self._waiting, self._results = deque(units), queue.SimpleQueue[Result | BaseException]()
        self._place, self._count, self._deadline, self._display = place, len(units), deadline, display
        self._stop = threading.Event()
        self._children = [Child(interpret=place == "interpreter") for _ in range(size)]
        self._threads = [threading.Thread(target=self._work, args=(child,)) for child in self._children]

    def results(self) -> Iterator[Result]:
        """Every unit's result; whatever happens, no process is left."""
        finished = False
        for thread in self._threads:
            thread.start()
        try:
            for _ in range(self._count):
                result = self._results.get()
                if isinstance(result, BaseException):
                    raise result
                self._display.ended(result)
                yield result
            finished = True
        finally:
            self._stop.set()
            for child in () if finished else self._children:
                child.kill()
            for thread in self._threads:
                thread.join()

    def _work(self, child: Child) -> None:
        with child:
            while not self._stop.is_set():
                try:
                    unit = self._waiting.popleft()
                except IndexError:
                    return
                try:
                    self._results.put(self._attempt(child, unit))
                except BaseException as error:  # a mistake of ours: it must end the run, not one thread
                    self._results.put(error)
                    return

    def _attempt(self, child: Child, unit: Unit) -> Result:
        left = self._deadline - time.monotonic()
        if left <= 0:
            return failed(unit, "timeout", f"layer {unit.layer} used up its time before this; see --budget-scale")
        self._display.started(unit)
        started = time.monotonic()
        try:
            result = result_from(child.call(run_unit, unit.as_dict(), timeout_s=min(unit.limit_s, left)))
            if self._place == "gpu" and result.status != "pass":
                child.close()  # a GPU's context does not survive every error
            return result
        except ChildFailedError as error:
            result = failed(unit, TROUBLES[error.kind], str(error))
            return replace(result, duration_s=time.monotonic() - started)
