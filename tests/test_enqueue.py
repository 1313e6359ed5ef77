"""Kernels that are launched again past Triton's look at their arguments are those that Triton would have launched."""

from __future__ import annotations

import gc
import weakref
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

from cca_attention.kernels import enqueue as module
from cca_attention.kernels.enqueue import enqueue

Call = tuple[str, tuple[Any, ...], tuple[Any, ...]]


class Kernel(JITFunction):  # type: ignore[misc, type-arg]
    """What `enqueue` needs of a jitted function; it notes who was launched how."""

    arg_names = ("x", "strides", "size", "BLOCK")  # type: ignore[assignment]

    def __init__(self, calls: list[Call]) -> None:
        self.calls = calls

    def run(self, *args: Any, grid: Any, warmup: bool, **constants: Any) -> Any:
        self.calls.append(("triton", grid, (*args, constants)))
        return Compiled(self.calls)


class Compiled:
    def __init__(self, calls: list[Call]) -> None:
        self.calls = calls

    def __getitem__(self, grid: tuple[int, int, int]) -> Any:
        return lambda *args: self.calls.append(("again", grid, args))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(module, "KNOWN", {})
    return []


def aligned(offset: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    memory = torch.zeros(64, dtype=dtype)
    assert memory.data_ptr() % 16 == 0
    return memory[offset:]


def test_the_second_time_the_compiled_kernel_gets_every_argument(calls: list[Call]) -> None:
    kernel, first, second = Kernel(calls), aligned(), aligned()
    enqueue(kernel, (3, 2, 1), first, (4, 1), 7, BLOCK=16, num_warps=4)
    enqueue(kernel, (5, 2, 1), second, (4, 1), 7, BLOCK=16, num_warps=4)
    assert calls[0] == ("triton", (3, 2, 1), (first, (4, 1), 7, {"BLOCK": 16, "num_warps": 4}))
    assert calls[1][:2] == ("again", (5, 2, 1)) and calls[1][2][0] is second and calls[1][2][1:] == ((4, 1), 7, 16)


CHANGES: dict[str, dict[str, Any]] = {
    "dtype": {"x": aligned(dtype=torch.float16)},
    "alignment": {"x": aligned(1)},
    "no tensor": {"x": None},
    "strides": {"strides": (8, 1)},
    "integer": {"size": 8},
    "constant": {"BLOCK": 32},
    "option": {"num_warps": 8},
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_triton_would_compile_anew_goes_to_triton(change: str, calls: list[Call]) -> None:
    kernel, usual = Kernel(calls), {"x": aligned(), "strides": (4, 1), "size": 7, "BLOCK": 16, "num_warps": 4}
    for given in (usual, {**usual, **CHANGES[change]}):
        x, strides, size, block, warps = given.values()
        enqueue(kernel, (1, 1, 1), x, strides, size, BLOCK=block, num_warps=warps)
    enqueue(Kernel(calls), (1, 1, 1), usual["x"], (4, 1), 7, BLOCK=16, num_warps=4)  # another kernel
    assert [who for who, *_ in calls] == ["triton", "triton", "triton"]


@dataclass
class Descriptor:
    """What `TensorDescriptor` has."""

    base: Tensor
    shape: tuple[int, ...] = (4, 4)
    strides: tuple[int, ...] = (4, 1)
    block_shape: tuple[int, ...] = (2, 4)


OTHER_DESCRIPTORS = [
    {"shape": (3, 4)},
    {"strides": (8, 1)},
    {"block_shape": (4, 4)},
    {"base": aligned(dtype=torch.float16)},
]


def test_descriptors_are_the_same_if_all_but_their_memory_is(calls: list[Call]) -> None:
    kernel = Kernel(calls)
    for descriptor in (Descriptor(aligned()), Descriptor(aligned())):
        enqueue(kernel, (1, 1, 1), descriptor, (4, 1), 7, BLOCK=16)
    assert [who for who, *_ in calls] == ["triton", "again"]
    for change in OTHER_DESCRIPTORS:
        enqueue(kernel, (1, 1, 1), replace(Descriptor(aligned()), **change), (4, 1), 7, BLOCK=16)
    assert [who for who, *_ in calls[2:]] == ["triton"] * len(OTHER_DESCRIPTORS)


def test_constants_of_other_names_are_others(calls: list[Call]) -> None:
    kernel, x = Kernel(calls), aligned()
    enqueue(kernel, (1, 1, 1), x, (4, 1), 7, BLOCK=16, num_warps=4)
    enqueue(kernel, (1, 1, 1), x, (4, 1), 7, BLOCK=16, num_stages=4)
    assert [who for who, *_ in calls] == ["triton", "triton"]


def test_no_other_kernel_takes_the_place_of_one_that_is_remembered(calls: list[Call]) -> None:
    kernel = Kernel(calls)
    here = weakref.ref(kernel)
    enqueue(kernel, (1, 1, 1), aligned(), (4, 1), 7, BLOCK=16)
    del kernel
    gc.collect()
    assert here() is not None


def test_each_device_has_its_own(calls: list[Call], monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, x = Kernel(calls), aligned()
    enqueue(kernel, (1, 1, 1), x, (4, 1), 7, BLOCK=16)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    enqueue(kernel, (1, 1, 1), x, (4, 1), 7, BLOCK=16)
    assert [who for who, *_ in calls] == ["triton", "triton"]


def test_who_watches_launches_sees_every_one(calls: list[Call]) -> None:
    kernel, x = Kernel(calls), aligned()
    enqueue(kernel, (1, 1, 1), x, (4, 1), 7, BLOCK=16)
    watched: list[Any] = []
    kernel.run = lambda *args, **options: watched.append(args)  # type: ignore[method-assign]
    enqueue(kernel, (1, 1, 1), x, (4, 1), 7, BLOCK=16)
    assert len(calls) == len(watched) == 1


def test_memory_of_launches_is_bounded(calls: list[Call], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "REMEMBERED", 2)
    for size in range(5):
        enqueue(Kernel(calls), (1, 1, 1), aligned(), (4, 1), size, BLOCK=16)
    assert len(module.KNOWN) <= 2
