"""A process that has imported what the package needs, but not the package, and forks itself for every job.

A fresh interpreter takes seconds to import torch and triton; a fork has them. What a job does, a crash and a hang
included, stays in its fork. This file is run as a script and therefore imports nothing of the package; `mutants` talks
to it. Jobs come as lines of JSON on the standard input, a reply to each goes to the standard output:

    {"source": folder put first on the path, "module", "function", "argument", "timeout_s", "words": file for output}
    {"code": exit code, negative for a signal, "late": whether it was killed, "reply": JSON of what was returned}
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import select
import signal
import sys
import time
import traceback
from typing import Any, TextIO

PRELOADED = (
    "numpy", "torch", "torch._dynamo", "triton", "triton.language", "pydantic", "yaml", "platformdirs", "filelock",
)  # fmt: skip
"""What the package imports; torch's compiler comes with the first call of an operator of one's own."""
MOST_AT_ONCE = 65536

Job = dict[str, Any]


def serve(jobs: TextIO, replies: TextIO) -> None:
    """Answer every job, one after the other, until there are no more."""
    for name in PRELOADED:
        importlib.import_module(name)
    importlib.import_module("torch").set_num_threads(1)
    for line in jobs:
        replies.write(json.dumps(run(json.loads(line))) + "\n")
        replies.flush()


def run(job: Job) -> dict[str, Any]:
    """What became of a job in a fork of this process."""
    read, write = os.pipe()
    process = os.fork()
    if process == 0:
        os.close(read)
        obey(job, write)
    os.close(write)
    reply = receive(read, time.monotonic() + job["timeout_s"])
    os.close(read)
    if reply is None:
        os.kill(process, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    return {"code": code, "late": reply is None, "reply": (reply or b"").decode()}


def receive(pipe: int, end: float) -> bytes | None:
    """All that comes out of `pipe` until it is closed; None if that is not so by `end`."""
    parts: list[bytes] = []
    while select.select([pipe], [], [], max(0.0, end - time.monotonic()))[0]:
        part = os.read(pipe, MOST_AT_ONCE)
        if not part:
            return b"".join(parts)
        parts.append(part)
    return None


def obey(job: Job, pipe: int) -> None:
    """Do the job and end this process: with exit code 0 if the reply is in `pipe`, else with 1."""
    words = os.open(job["words"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(words, stream)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    code = 1
    try:
        sys.path.insert(0, job["source"])
        module = importlib.import_module(job["module"])
        if not str(module.__file__).startswith(job["source"]):
            raise ImportError(f"{module.__file__} is not of the copy in {job['source']}")
        reply = json.dumps(getattr(module, job["function"])(job["argument"]))
        with os.fdopen(pipe, "w") as file:
            file.write(reply)
        code = 0
    except BaseException:  # whatever it is, it is this job's, and told by its last line
        os.write(words, traceback.format_exc().encode())
    finally:
        os._exit(code)


if __name__ == "__main__":
    sys.path[:] = [path for path in sys.path if path]  # not the folder that this was started in
    sys.dont_write_bytecode = True
    serve(sys.stdin, sys.stdout)
