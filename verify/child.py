"""A function call in a fresh Python process: a crash, a hang or a patched copy of the package stays there."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

BOOT = """
import importlib, json, sys
path, module, name, interpret = sys.argv[1:]
if path:
    sys.path.insert(0, path)
if interpret:
    import torch
    from cca_attention.verify.interpreter import patch_language_once_per_launch
    torch.set_num_threads(1)
    patch_language_once_per_launch()
print(json.dumps(getattr(importlib.import_module(module), name)(json.load(sys.stdin))))
"""


class ChildFailedError(RuntimeError):
    """The child gave no result; the message says why."""


def call_in_child(
    function: Callable[[Any], Any], argument: Any, *, interpret: bool, timeout_s: float, source: Path | None = None
) -> Any:
    """``function(argument)`` in a child, all of it JSON.

    Args:
        function: defined at the top of one of our modules.
        interpret: whether the child's kernels run in Triton's interpreter, else compiled.
        timeout_s: the child is killed after so many seconds.
        source: a folder that holds the copy of `cca_attention` to use instead of this one.

    Raises:
        ChildFailedError: if the child raised, crashed or was killed.
    """
    # triton reads this variable when it is imported: it has to be in the child's environment from the start
    mode = ["TRITON_INTERPRET=1"] if interpret else ["-u", "TRITON_INTERPRET"]
    names = [str(source or ""), function.__module__, function.__name__, "1" if interpret else ""]
    command = ["env", *mode, sys.executable, "-c", BOOT, *names]
    try:
        child = subprocess.run(command, input=json.dumps(argument), capture_output=True, text=True, timeout=timeout_s)
    except subprocess.TimeoutExpired as error:
        raise ChildFailedError(f"no result within {timeout_s:g} s") from error
    if child.returncode < 0:
        raise ChildFailedError(f"killed by {signal.Signals(-child.returncode).name}: {_last_lines(child.stderr)}")
    if child.returncode:
        raise ChildFailedError(_last_lines(child.stderr) or f"exit code {child.returncode}")
    return json.loads(child.stdout.splitlines()[-1])


def _last_lines(text: str, count: int = 3) -> str:
    return " | ".join(text.strip().splitlines()[-count:])
