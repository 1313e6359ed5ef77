"""One worker: a process that can be killed, and does one job after the other."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import forkserver, get_context, resource_tracker
from multiprocessing.connection import Connection
from typing import Any, Literal, Protocol

_STARTING = threading.Lock()
"""Held while this process's environment is changed for what it starts."""


@dataclass(frozen=True, slots=True)
class Job:
    """Call `function(*args)` in a worker; both must pickle. `tag` is the caller's own.

    `must`: it is done even if the time is up.
    """

    tag: Any
    function: Callable[..., Any]
    args: tuple[Any, ...]
    must: bool = False


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


class Worker(Protocol):
    """One process, which runs its set-up and then one job after the other."""

    def give(self, job: Job) -> None:
        """Begin a job."""

    def answer(self) -> Done | Failed:
        """What came of the set-up or of the job; after `wait` of its pool has named it, or it waits."""

    def kill(self) -> None:
        """End the process and all that it started."""

    def strike(self) -> None:
        """The signal alone, from any thread: whoever waits for an answer learns that the process is gone."""


def attempt(function: Callable[..., Any], args: tuple[Any, ...]) -> Done | Failed:
    """A call as an outcome."""
    started = time.monotonic()
    try:
        value = function(*args)
    except Exception as error:
        message = " ".join("".join(traceback.format_exception_only(error)).split())
        return Failed("error", message, time.monotonic() - started)
    return Done(value, time.monotonic() - started)


def _begin_fork_server() -> None:
    """Make sure that the process is there whose forks are the workers.

    It has imported what they need: they start at once, and share that memory. It compiles kernels also where this
    process interprets them, never touches a GPU, and Ctrl-C is neither for it nor for them.
    """
    import triton

    forkserver.set_forkserver_preload([f"{__package__}.jobs"])
    resource_tracker.ensure_running()  # the fork server begins with it, and it would let SIGINT through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        with _STARTING, triton.knobs.runtime.scope():
            triton.knobs.runtime.interpret = False
            forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _serve(pipe: Connection, setup: Callable[..., None], args: tuple[Any, ...]) -> None:
    """A worker's life: its own process group, quiet, until the pipe closes."""
    os.setsid()
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    gc.freeze()  # what was imported is not collected: its memory stays shared
    pipe.send(attempt(setup, args))
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:
            return
        pipe.send(attempt(function, arguments))


class Process:
    """A worker on this machine."""

    def __init__(self, setup: Callable[..., None], args: tuple[Any, ...]) -> None:
        _begin_fork_server()
        context = get_context("forkserver")
        self.pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, setup, args), daemon=True)
        self._process.start()
        theirs.close()

    def give(self, job: Job) -> None:
        """Begin a job; if the process is gone, `answer` says so."""
        try:
            self.pipe.send((job.function, job.args))
        except BrokenPipeError:
            return

    def answer(self) -> Done | Failed:
        """What it sent, or that it is gone."""
        try:
            outcome: Done | Failed = self.pipe.recv()
        except (EOFError, ConnectionResetError):
            self._process.join(timeout=5)
            return Failed("crashed", f"the worker ended with code {self._process.exitcode}", 0.0)
        return outcome

    def kill(self) -> None:
        """End the process and all that it started."""
        self.strike()
        self._process.join()
        self.pipe.close()

    def strike(self) -> None:
        """The signal alone, from any thread: whoever waits for an answer learns that the process is gone."""
        try:
            os.killpg(self._process.pid or 0, signal.SIGKILL)
        except ProcessLookupError:
            # it has no group of its own yet, or is gone
            self._process.kill()
