"""Where the tests run: compiled on an NVIDIA GPU if there is one, else every kernel in Triton's interpreter.

All memory that the code under test allocates is poisoned, and tests that need a GPU are counted as not run where
there is none.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings

HAS_GPU = torch.cuda.is_available()
INTERPRET = "TRITON_INTERPRET"
NOT_RUN = pytest.StashKey[int]()

if HAS_GPU and os.environ.get(INTERPRET, "0") != "0":
    raise pytest.UsageError(
        f"{INTERPRET} is set and there is a GPU: unset it to test the compiled kernels, "
        "or hide the GPU with CUDA_VISIBLE_DEVICES= to test in the interpreter"
    )
if not HAS_GPU:
    os.environ[INTERPRET] = "1"  # triton reads it when it is imported, which is below
    torch.set_num_threads(1)  # the tensors are tiny, and pytest-xdist has a process for each core

from cca_attention.kernels.tunable import Tunable  # noqa: E402
from cca_attention.verify.inputs import poisoned_memory  # noqa: E402
from cca_attention.verify.interpreter import patch_language_once_per_launch  # noqa: E402
from cca_attention.verify.property_run import COMMON, PROFILES  # noqa: E402

if not HAS_GPU:
    patch_language_once_per_launch()

for name, profile in PROFILES.items():
    settings.register_profile(name, **profile, **COMMON)
settings.load_profile("pr")


@pytest.fixture
def device() -> str:
    """Where the tensors of a test live."""
    return "cuda" if HAS_GPU else "cpu"


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    """Fresh memory is NaN in every test."""
    with poisoned_memory():
        yield


@pytest.fixture
def toy() -> Iterator[Any]:
    """The toy kernel's module, among the kernels for one test alone."""
    import toy_tunable

    yield toy_tunable
    del sys.modules["toy_tunable"], Tunable.REGISTRY["toy"], Tunable.REGISTRY["harmful"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One journal for a module's runs of the tuner: what it has is not compiled again."""
    return tmp_path_factory.mktemp("cache")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Take out what needs a GPU where there is none, and remember how much that was."""
    needs_gpu = [] if HAS_GPU else [item for item in items if item.get_closest_marker("gpu")]
    config.stash[NOT_RUN] = len(needs_gpu)
    if needs_gpu:
        config.hook.pytest_deselected(items=needs_gpu)
        items[:] = [item for item in items if item not in needs_gpu]


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker of pytest-xdist tells the count to the one that reports."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["not_run"] = session.config.stash[NOT_RUN]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Every worker collects everything: their counts are the same."""
    node.config.stash[NOT_RUN] = getattr(node, "workeroutput", {}).get("not_run", 0)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Say what was not run, and in which mode the rest was."""
    mode = "compiled, on " + torch.cuda.get_device_name() if HAS_GPU else "in the interpreter, on the CPU"
    terminalreporter.write_line(f"kernels ran {mode}")
    if count := config.stash.get(NOT_RUN, 0):
        terminalreporter.write_line(f"{count} tests were not run: they need an NVIDIA GPU")
