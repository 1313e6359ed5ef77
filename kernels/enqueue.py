"""Launching a kernel as it was launched before, without Triton's look at every argument."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

KNOWN: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...], Any]] = {}
"""By all that a launch was compiled for: the compiled kernel, the constants that it is to be given, and whose it is.

A kernel's own hash takes longer than its launch; it is kept here so that no other one can get its `id`.
"""
REMEMBERED = 4096

Launch = tuple[Any, Any, tuple[int, int, int], tuple[Any, ...]]
"""(kernel, compiled kernel or None, programs, arguments with constants)."""


class Notes(threading.local):
    """Where this thread's launches are noted."""

    launches: list[Launch] | None = None

    @contextmanager
    def noting(self) -> Iterator[list[Launch]]:
        """Note the launches of `enqueue` in the list that this gives."""
        self.launches = []
        try:
            yield self.launches
        finally:
            self.launches = None


NOTES = Notes()


def enqueue(kernel: Any, grid: tuple[int, int, int], *args: Any, **constants: Any) -> None:
    """``kernel[grid](*args, **constants)``, from the second time on past 25 us of Triton's.

    What Triton compiles depends on the types of the arguments, on whether a pointer is aligned to 16 bytes and on what
    divides an integer. Here calls are the same if dtypes and alignments agree, and every integer and constant.

    Args:
        kernel: a function of `triton.jit` or `gluon.jit`. grid: programs. args: tensors, tensor descriptors, integers,
            None and tuples of integers, in the order of the kernel's parameters. constants: its remaining parameters,
            and Triton's options.
    """
    compiled, rest = None, ()
    if is_watched(kernel):
        kernel[grid](*args, **constants)
    else:
        key = (id(kernel), torch.cuda.current_device(), *map(_kind, args), *constants.items())
        known = KNOWN.get(key)
        if known is not None:
            compiled, rest, _ = known
            compiled[grid](*args, *rest)
        else:
            if len(KNOWN) >= REMEMBERED:
                KNOWN.clear()
            compiled = kernel[grid](*args, **constants)
            rest = tuple(constants[name] for name in kernel.arg_names[len(args) :])
            KNOWN[key] = compiled, rest, kernel
    if NOTES.launches is not None:
        NOTES.launches.append((kernel, compiled, grid, (*args, *rest)))


def is_watched(kernel: Any) -> bool:
    """Whether `kernel` must be called as it is: it is interpreted, or its launches are watched (verify.gate)."""
    return not isinstance(kernel, JITFunction) or "run" in vars(kernel)


def _kind(x: Any) -> Any:
    if isinstance(x, Tensor):
        return x.dtype, x.data_ptr() % 16 == 0
    if hasattr(x, "block_shape"):  # a descriptor's address is always aligned
        return x.base.dtype, *x.shape, *x.strides, *x.block_shape
    return x
