"""Worker processes that can be killed: a job that hangs or takes its process down is an outcome, not an end."""

from __future__ import annotations

import os
import signal
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing import connection, get_context
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, Literal

SETUP_LIMIT_S = 180.0
"""A worker that is not ready by then (importing PyTorch on a busy machine) never will be."""


@dataclass(frozen=True, slots=True)
class Job:
    """Call `function(*args)` in a worker; both must pickle. `tag` is the caller's own."""

    tag: Any
    function: Callable[..., Any]
    args: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Done:
    """What a job returned, and the seconds it took."""

    value: Any
    seconds: float


@dataclass(frozen=True, slots=True)
class Failed:
    """Why a job returned nothing: it raised, passed its time limit, or its process died."""

    kind: Literal["error", "timeout", "crashed"]
    message: str
    seconds: float


def _serve(pipe: Connection, setup: Callable[..., None], args: tuple[Any, ...]) -> None:
    """A worker's life: its own process group, quiet, until the pipe closes."""
    os.setsid()
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    pipe.send(_attempt(setup, args))
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:
            return
        pipe.send(_attempt(function, arguments))


def _attempt(function: Callable[..., Any], args: tuple[Any, ...]) -> Done | Failed:
    started = time.monotonic()
    try:
        value = function(*args)
    except Exception as error:
        message = " ".join("".join(traceback.format_exception_only(error)).split())
        return Failed("error", message, time.monotonic() - started)
    return Done(value, time.monotonic() - started)


class _Worker:
    """One process, and the job it is at."""

    def __init__(self, setup: Callable[..., None], args: tuple[Any, ...]) -> None:
        import triton

        context = get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, setup, args))
        # workers compile: if this process interprets its kernels, they must not
        with triton.knobs.runtime.scope():
            triton.knobs.runtime.interpret = False
            self._process.start()
        theirs.close()
        self.job: Job | None = None
        self.ready = False
        self.started = time.monotonic()

    def give(self, job: Job) -> None:
        self.job, self.started = job, time.monotonic()
        self.pipe.send((job.function, job.args))

    def exit_code(self) -> int | None:
        self._process.join(timeout=5)
        return self._process.exitcode

    def kill(self) -> None:
        """End the process and all that it started."""
        try:
            os.killpg(self._process.pid or 0, signal.SIGKILL)
        except ProcessLookupError:
            # it has no group of its own yet, or is gone
            self._process.kill()
        self._process.join()
        self.pipe.close()


class Pool:
    """`size` workers that each ran `setup(*args)`; a worker that was lost is replaced.

    `renew` replaces those whose job raised as well: a GPU context does not survive every error.
    """

    def __init__(self, size: int, setup: Callable[..., None], *args: Any, renew: bool = False) -> None:
        self._make: Callable[[], _Worker] = lambda: _Worker(setup, args)
        self._size = size
        self._renew = renew
        self._workers: list[_Worker] = []

    def __enter__(self) -> Pool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the workers; jobs that are given later get new ones."""
        for worker in self._workers:
            worker.kill()
        self._workers.clear()

    def run(self, jobs: Iterable[Job], limit_s: float) -> Iterator[tuple[Job, Done | Failed]]:
        """Every job with its outcome, as they end. `limit_s` seconds for each.

        Raises:
            RuntimeError: if the workers' setup fails, since then no job can be done.
        """
        waiting = deque(jobs)
        while len(self._workers) < min(self._size, len(waiting)):
            self._workers.append(self._make())
        while waiting or any(worker.job for worker in self._workers):
            for worker in self._workers:
                if worker.ready and worker.job is None and waiting:
                    worker.give(waiting.popleft())
            active = {w.pipe: w for w in self._workers if w.job or not w.ready}
            now = time.monotonic()
            soonest = min(w.started + (limit_s if w.ready else SETUP_LIMIT_S) for w in active.values())
            heard = connection.wait(list(active), timeout=max(0.0, soonest - now))
            yield from self._listen([active[pipe] for pipe in heard if isinstance(pipe, Connection)])
            yield from self._expire(limit_s)

    def _listen(self, workers: list[_Worker]) -> Iterator[tuple[Job, Done | Failed]]:
        for worker in workers:
            job = worker.job
            try:
                outcome: Done | Failed = worker.pipe.recv()
            except (EOFError, ConnectionResetError):
                code = worker.exit_code()
                outcome = Failed("crashed", f"the worker ended with code {code}", time.monotonic() - worker.started)
                self._replace(worker)
            if job is None:
                if isinstance(outcome, Failed):
                    raise RuntimeError(f"a worker could not start: {outcome.message}")
                worker.ready = True
            else:
                worker.job = None
                if self._renew and isinstance(outcome, Failed) and outcome.kind == "error":
                    self._replace(worker)
                yield job, outcome

    def _expire(self, limit_s: float) -> Iterator[tuple[Job, Done | Failed]]:
        now = time.monotonic()
        for worker in list(self._workers):
            if not worker.ready and now - worker.started > SETUP_LIMIT_S:
                raise RuntimeError(f"a worker was not ready within {SETUP_LIMIT_S:.0f} s")
            if worker.ready and worker.job is not None and now - worker.started > limit_s:
                job = worker.job
                self._replace(worker)
                yield job, Failed("timeout", f"not done after {limit_s:.0f} s", now - worker.started)

    def _replace(self, worker: _Worker) -> None:
        worker.kill()
        self._workers[self._workers.index(worker)] = self._make()
