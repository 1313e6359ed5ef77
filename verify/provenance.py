"""Where and from what a record comes: commit, versions, GPU, and hashes of what decides a verdict."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
import shutil
import subprocess
from pathlib import Path

import torch

HERE = Path(__file__).parent
DECIDING = {"tolerance": ("tolerance.py", "rounding*.py"), "mutants": ("mutant*.py",)}
"""The files whose contents say what passes, and what was planted."""


def commit() -> str:
    """Commit of the checkout that this package is in, with "+changes" if it has any; "" outside of one."""
    head = _said("git", "-C", str(HERE), "rev-parse", "HEAD")
    tracked = _said("git", "-C", str(HERE), "ls-files", Path(__file__).name)
    if not head or not tracked:
        return ""
    return head + ("+changes" if _said("git", "-C", str(HERE), "status", "--porcelain", "-uno") else "")


def versions() -> dict[str, str]:
    """Of Python, the packages that decide results, and the GPU's driver."""
    found = {"python": platform.python_version()}
    for name in ("cca-attention", "torch", "triton", "numpy", "hypothesis"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = ""
    found["cuda"] = torch.version.cuda or ""
    found["driver"] = _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").partition("\n")[0]
    return found


def gpu_name() -> str:
    """The GPU at hand, "" if there is none."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else ""


def hashes() -> dict[str, str]:
    """sha256 of the modules of the tolerance and of the registry of mutants."""
    found = {}
    for name, patterns in DECIDING.items():
        digest = hashlib.sha256()
        for path in sorted(path for pattern in patterns for path in HERE.glob(pattern)):
            digest.update(path.name.encode() + path.read_bytes())
        found[name] = digest.hexdigest()
    return found


def _said(*command: str) -> str:
    """What a program prints; "" if it is not there or fails."""
    if shutil.which(command[0]) is None:
        return ""
    child = subprocess.run(command, capture_output=True, text=True, timeout=30)
    return child.stdout.strip() if child.returncode == 0 else ""
