"""Jobs for worker processes, of every kind of outcome. Imports nothing that takes long."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path


def ready() -> None:
    """A set-up that works."""


def not_ready() -> None:
    """A set-up that does not."""
    raise OSError("no such target")


def double(number: int) -> int:
    """A job that works."""
    return 2 * number


def fail() -> None:
    """A job that raises."""
    raise ValueError("the tile\nis crooked")


def evidence(ok: bool) -> list[dict[str, int]]:
    """A job that verifies a config."""
    return [{"ok": ok, "process": os.getpid()}]


def die() -> None:
    """A job that takes its process down."""
    os.kill(os.getpid(), signal.SIGSEGV)


def chatter() -> None:
    """A job that prints where nobody wants it."""
    sys.stdout.write("noise on stdout\n")
    os.write(2, b"noise on stderr\n")


def hang(marker: str) -> None:
    """A job that never ends, nor does the process that it starts; both write their ids to `marker`."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    Path(marker).write_text(f"{os.getpid()} {child.pid}")
    time.sleep(600)
