"""Python processes of our own to call functions in: a crash, a hang or a patched copy of the package stays there."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from multiprocessing import Pipe
from pathlib import Path
from typing import Any, Literal

BOOT = """
import ctypes, importlib, json, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: no child outlives the one that asked for it
from multiprocessing.connection import Connection
pipe, path, interpret = Connection(int(sys.argv[1])), *sys.argv[2:]
if path:
    sys.path.insert(0, path)
if interpret:
    import torch
    from cca_attention.verify.interpreter import patch_language_once_per_launch
    torch.set_num_threads(1)
    patch_language_once_per_launch()
pipe.send_bytes(b"ready")
while True:
    try:
        module, name, argument = json.loads(pipe.recv_bytes())
    except EOFError:
        break
    try:
        answer = json.dumps({"value": getattr(importlib.import_module(module), name)(argument)})
    except Exception as error:
        answer = json.dumps({"error": " ".join(f"{type(error).__name__}: {error}".split())})
    pipe.send_bytes(answer.encode())
"""
BOOT_LIMIT_S = 180.0
"""A child that is not ready by then (importing PyTorch on a busy machine) never will be."""
PATIENCE_S = 5.0

Failure = Literal["raised", "crashed", "hung"]


class ChildFailedError(RuntimeError):
    """The child gave no result; the message says why, and `kind` whether it raised, crashed or was killed."""

    def __init__(self, message: str, kind: Failure = "crashed") -> None:
        super().__init__(message)
        self.kind = kind


class Child:
    """One process for many calls, started at the first; a call after it was lost starts another.

    Args:
        interpret: whether its kernels run in Triton's interpreter, with no GPU in sight, else compiled.
        source: a folder that holds the copy of `cca_attention` to use instead of this one.
    """

    def __init__(self, *, interpret: bool, source: Path | None = None) -> None:
        self._interpret, self._source = interpret, source
        self._process: subprocess.Popen[bytes] | None = None
        self._busy = self._killed = False

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def call(self, function: Callable[[Any], Any], argument: Any, *, timeout_s: float) -> Any:
        """``function(argument)``, all of it JSON; `function` is defined at the top of one of our modules.

        Raises:
            ChildFailedError: if it raised, crashed or took longer than `timeout_s`; in the last two cases the process
                and all that it started are gone.
        """
        if self._process is None:
            self._start()
        request = json.dumps([function.__module__, function.__name__, argument])
        self._busy = True
        try:
            self._pipe.send_bytes(request.encode())
        except BrokenPipeError:
            raise self._lost() from None
        answer = json.loads(self._receive(timeout_s))
        self._busy = False
        if "error" in answer:
            raise ChildFailedError(answer["error"], "raised")
        return answer["value"]

    def close(self) -> None:
        """End the process and all that it started; between two calls it is given the time to clean up."""
        if self._process is None:
            return
        self._pipe.close()
        if not self._busy:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(PATIENCE_S)
        _kill_group(self._process)
        self._process.wait()
        self._errors.close()
        self._process = None

    def kill(self) -> None:
        """End the process for good, from any thread; a call that waits for it, and every later one, fails."""
        self._killed = True
        if (process := self._process) is not None:
            _kill_group(process)

    def _start(self) -> None:
        self._pipe, theirs = Pipe()
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 closed with the process
        # triton reads these variables when it is imported: they have to be in the child's environment from the start
        mode = ["TRITON_INTERPRET=1", "CUDA_VISIBLE_DEVICES="] if self._interpret else ["-u", "TRITON_INTERPRET"]
        names = [str(theirs.fileno()), str(self._source or ""), "1" if self._interpret else ""]
        self._process = subprocess.Popen(
            ["env", *mode, sys.executable, "-c", BOOT, *names], pass_fds=[theirs.fileno()], start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=self._errors, stderr=self._errors,
        )  # fmt: skip
        theirs.close()
        self._busy = True
        if self._killed:
            self.kill()
        self._receive(BOOT_LIMIT_S)

    def _receive(self, timeout_s: float) -> bytes:
        try:
            if not self._pipe.poll(timeout_s):
                self.close()
                raise ChildFailedError(f"no result within {timeout_s:g} s", "hung")
            return self._pipe.recv_bytes()
        except (EOFError, ConnectionResetError):
            raise self._lost() from None

    def _lost(self) -> ChildFailedError:
        """Why the process is gone, after cleaning up behind it."""
        assert self._process is not None
        code = self._process.wait()
        self._errors.seek(0)
        said = " | ".join(self._errors.read().decode(errors="replace").strip().splitlines()[-3:])
        self.close()
        if code < 0:
            return ChildFailedError(f"killed by {signal.Signals(-code).name}: {said}")
        return ChildFailedError(f"exit code {code}{': ' + said if said else ''}")


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):  # it may have ended by itself
        os.killpg(process.pid, signal.SIGKILL)


def call_in_child(
    function: Callable[[Any], Any], argument: Any, *, interpret: bool, timeout_s: float, source: Path | None = None
) -> Any:
    """One call in a `Child` of its own; see there for the arguments and what is raised."""
    with Child(interpret=interpret, source=source) as child:
        return child.call(function, argument, timeout_s=timeout_s)
