"""Launching a kernel as it was launched before, without Triton's look at every argument."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

KNOWN: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}
"""By all that a launch was compiled for: the compiled kernel, and the constants that it is to be given."""
REMEMBERED = 4096


def enqueue(kernel: Any, grid: tuple[int, int, int], *args: Any, **constants: Any) -> None:
    """``kernel[grid](*args, **constants)``, from the second time on past 25 us of Triton's.

    What Triton compiles depends on the types of the arguments, on whether a pointer is aligned to 16 bytes and on what
    divides an integer. Here calls are the same if dtypes and alignments agree, and every integer and constant.

    Args:
        kernel: a function of `triton.jit`. grid: programs. args: tensors, integers, None and tuples of integers, in the
            order of the kernel's parameters. constants: its remaining parameters, and Triton's options.
    """
    if not isinstance(kernel, JITFunction) or "run" in vars(kernel):  # interpreted, or watched (verify.gate.launches)
        kernel[grid](*args, **constants)
        return
    key = (id(kernel), torch.cuda.current_device(), *map(_kind, args), *constants.values())
    known = KNOWN.get(key)
    if known is not None:
        compiled, rest = known
        compiled[grid](*args, *rest)
        return
    if len(KNOWN) >= REMEMBERED:
        KNOWN.clear()
    compiled = kernel[grid](*args, **constants)
    KNOWN[key] = compiled, tuple(constants[name] for name in kernel.arg_names[len(args) :])


def _kind(x: Any) -> Any:
    return (x.dtype, x.data_ptr() % 16 == 0) if isinstance(x, Tensor) else x
