"""What is done again is what the call would have done: on toy kernels; test_replay_gpu.py has the real ones."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from cca_attention import replay
from cca_attention.kernels import enqueue as enqueue_module
from cca_attention.kernels.enqueue import enqueue
from cca_attention.replay import replayed


class Kernel(JITFunction):  # type: ignore[misc, type-arg]
    """A kernel for `enqueue`: out = x + y, of `size` floats, on the CPU."""

    arg_names = ("x", "y", "out", "size")  # type: ignore[assignment]

    def __init__(self) -> None:
        self.launches = 0

    def run(self, *args: Any, grid: Any, warmup: bool, **constants: Any) -> Any:
        self.add(*args)
        return Compiled(self)

    def add(self, x: Any, y: Any, out: Any, size: int) -> None:
        self.launches += 1
        a, b, c = (floats(each, size) for each in (x, y, out))
        for i in range(size):
            c[i] = a[i] + b[i]


class Compiled:
    """What Triton makes of it."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, int, int]) -> Any:
        return lambda *args, stream=None: self.kernel.add(*args)


def floats(where: Any, size: int) -> Any:
    address = where if isinstance(where, int) else getattr(where, "base", where).data_ptr()
    return (ctypes.c_float * size).from_address(address)


@dataclass
class Descriptor:
    """What `TensorDescriptor` has."""

    base: Any
    shape: list[int]
    strides: list[int]
    block_shape: list[int]


class Streams:
    """Triton's driver, of a GPU that is not there."""

    def get_current_stream(self, device: int) -> int:
        return 0


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[Kernel]:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(enqueue_module, "KNOWN", {})
    monkeypatch.setattr(driver, "_active", Streams())
    monkeypatch.setattr(replay, "INTERPRETED", False)
    replay.forget()
    yield Kernel()
    replay.forget()


class Call:
    """A function for `replayed` that counts how often it is called."""

    def __init__(self, body: Callable[..., tuple[Tensor, ...]]) -> None:
        self.body = body
        self.calls = 0

    def __call__(self, *inputs: Tensor | None) -> tuple[Tensor, ...]:
        self.calls += 1
        return self.body(*inputs)


def draw(size: int = 8) -> Tensor:
    return torch.rand(size)


def test_from_the_third_time_on_there_are_only_the_launches(kernel: Kernel) -> None:
    def double_sum(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        hidden, out = torch.empty_like(x), x.new_empty(8)
        enqueue(kernel, (1, 1, 1), x, y, hidden, 8)
        enqueue(kernel, (1, 1, 1), hidden, hidden, out, 8)
        return (out,)

    call = Call(double_sum)
    for turn in range(5):
        x, y = draw(), draw()
        (out,) = replayed("sum", call, (x, y))
        torch.testing.assert_close(out, 2 * (x + y))
        assert call.calls == min(turn + 1, 2) and kernel.launches == 2 * (turn + 1)


def test_views_of_new_tensors_and_descriptors_are_found_again(kernel: Kernel) -> None:
    def halves(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        out = torch.empty(16)
        first = Descriptor(out, [8], [1], [8])
        enqueue(kernel, (1, 1, 1), Descriptor(x, [8], [1], [8]), y, first, 8)
        enqueue(kernel, (1, 1, 1), x, x, out.as_strided((8,), (1,), 8), 8)
        return (out,)

    call = Call(halves)
    for _ in range(4):
        x, y = draw(), draw()
        torch.testing.assert_close(replayed("halves", call, (x, y))[0], torch.cat((x + y, x + x)))
    assert call.calls == 2


def test_views_of_inputs_are_found_again(kernel: Kernel) -> None:
    def onto_the_second_half(x: Tensor, state: Tensor) -> tuple[Tensor, ...]:
        out = torch.empty(8)
        enqueue(kernel, (1, 1, 1), x, state[0], state[1], 8)
        enqueue(kernel, (1, 1, 1), state[0], state[1], out, 8)
        return (out,)

    call = Call(onto_the_second_half)
    for _ in range(4):
        x, state = draw(), draw(16).view(2, 8)
        (out,) = replayed("halves of an input", call, (x, state))
        torch.testing.assert_close(state[1], x + state[0])
        torch.testing.assert_close(out, x + 2 * state[0])
    assert call.calls == 2


def test_a_view_of_memory_that_two_inputs_share_is_not_remembered(kernel: Kernel) -> None:
    def first_of_the_other(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        out = torch.empty(8)
        enqueue(kernel, (1, 1, 1), x, y.view(2, 8)[0], out, 8)
        return (out,)

    call = Call(first_of_the_other)
    for _ in range(4):
        memory = draw(24)
        x, y = memory[:8], memory[8:]
        torch.testing.assert_close(replayed("shared", call, (x, y))[0], x + y[:8])
    assert call.calls == 4


@pytest.mark.parametrize("fill", [0.0, -2.5])
def test_filled_tensors_are_filled_again(kernel: Kernel, fill: float) -> None:
    def part(x: Tensor) -> tuple[Tensor, ...]:
        out = torch.zeros(8) if fill == 0 else x.new_full((8,), fill)
        enqueue(kernel, (1, 1, 1), x, x, out, 4)
        return (out,)

    call = Call(part)
    for _ in range(4):
        x = draw()
        (out,) = replayed(("part", fill), call, (x,))
        torch.testing.assert_close(out, torch.cat((2 * x[:4], torch.full((4,), fill))))
    assert call.calls == 2


def add(kernel: Kernel) -> Call:
    def body(x: Tensor, y: Tensor | None) -> tuple[Tensor, ...]:
        out = torch.empty(8)
        enqueue(kernel, (1, 1, 1), x, x if y is None else y, out, 8)
        return (out,)

    return Call(body)


def test_other_metadata_is_another_call(kernel: Kernel) -> None:
    call, wide, memory = add(kernel), torch.rand(16), torch.rand(9)
    kinds = {
        "usual": lambda: draw(),
        "strides": lambda: wide[::2].as_strided((8,), (2,)),
        "alignment": lambda: memory[1:],
        "shape": lambda: draw().view(2, 4),
        "dtype": lambda: torch.rand(8, dtype=torch.float64),
    }
    for number, make in enumerate(kinds.values()):
        for _ in range(4):
            replayed("add", call, (make(), draw()))
        assert call.calls == 2 * (number + 1)
    for number, what in enumerate(("another", "third")):
        for _ in range(4):
            replayed(what, call, (draw(), draw()))
        assert call.calls == 2 * (len(kinds) + number + 1)


def test_one_tensor_in_two_places_is_another_call(kernel: Kernel) -> None:
    call = add(kernel)
    for _ in range(4):
        x = draw()
        torch.testing.assert_close(replayed("add", call, (x, x))[0], x + x)
    for _ in range(4):
        x, y = draw(), draw()
        torch.testing.assert_close(replayed("add", call, (x, y))[0], x + y)
        torch.testing.assert_close(replayed("add", call, (x, None))[0], x + x)


OTHERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "arithmetic": lambda x, out: out.add_(1),
    "a copy": lambda x, out: out.copy_(x),
    "a result that is a view": lambda x, out: out[2:],
    "a result that is an input": lambda x, out: x,
}


@pytest.mark.parametrize("other", OTHERS)
def test_what_does_anything_else_is_called_every_time(kernel: Kernel, other: str) -> None:
    def body(x: Tensor) -> tuple[Tensor, ...]:
        out = torch.empty(8)
        enqueue(kernel, (1, 1, 1), x, x, out, 8)
        return (OTHERS[other](x, out),)

    call = Call(body)
    for _ in range(5):
        x = draw()
        expected = {"arithmetic": 2 * x + 1, "a result that is a view": 2 * x[2:]}.get(other, x)
        torch.testing.assert_close(replayed(other, call, (x,))[0], expected)
    assert call.calls == 5


def test_memory_of_others_is_not_remembered(kernel: Kernel) -> None:
    elsewhere = draw()

    def body(x: Tensor) -> tuple[Tensor, ...]:
        out = torch.empty(8)
        enqueue(kernel, (1, 1, 1), x, elsewhere, out, 8)
        return (out,)

    call = Call(body)
    for _ in range(4):
        replayed("elsewhere", call, (draw(),))
    assert call.calls == 4


def test_who_watches_a_kernel_sees_every_call(kernel: Kernel) -> None:
    call, watched = add(kernel), []
    for _ in range(3):
        replayed("add", call, (draw(), draw()))
    assert call.calls == 2
    kernel.run = lambda *args, **options: watched.append(args)  # type: ignore[method-assign]
    for _ in range(3):
        replayed("add", call, (draw(), draw()))
        replayed("anew", call, (draw(), draw()))
    assert len(watched) == 6
    del kernel.run
    launches = kernel.launches
    for _ in range(3):
        replayed("anew", call, (draw(), draw()))  # a watched call was not taken for one that cannot be done again
    assert call.calls == 2 + 6 + 1 and kernel.launches == launches + 3


def test_others_launches_are_not_recorded(kernel: Kernel) -> None:
    def body(x: Tensor) -> tuple[Tensor, ...]:
        out = torch.empty(8)
        other = threading.Thread(target=enqueue, args=(kernel, (1, 1, 1), x, x, torch.empty(8), 8))
        other.start()
        other.join()
        enqueue(kernel, (1, 1, 1), x, x, out, 8)
        return (out,)

    call = Call(body)
    for _ in range(2):
        replayed("threads", call, (draw(),))
    launches = kernel.launches
    replayed("threads", call, (draw(),))
    assert call.calls == 2 and kernel.launches == launches + 1


def test_what_is_remembered_is_bounded(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "REMEMBERED", 3)
    call = add(kernel)
    for number in range(10):
        replayed(number, call, (draw(), draw()))
    assert len(replay.KNOWN) <= 3
