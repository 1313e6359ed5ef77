"""What a candidate config is put through: small shapes of the problem's kind, and what is looked at on each."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..kernels.tunable import Config, Schedule, Tunable
from ..problem import Problem
from .calls import Results, compare_all, feed, make_cache, oracle, run, same_bits
from .cases import Case
from .guard import Guards
from .inputs import Inputs, make_inputs, poisoned_memory
from .registry import Direction
from .tolerance import Comparison, compare_bitwise

SEED = 20261122
DIRECTION_OF: dict[str, Direction] = {
    "pooling": "forward",
    "forward": "forward",
    "backward_dq": "backward",
    "backward_dkv": "backward",
    "backward_dcore": "backward",
    "pooling_backward": "backward",
    "decode": "decode",
    "forward_hopper": "forward",
    "backward_dcore_hopper": "backward",
    "backward_dkv_hopper": "backward",
    "backward_dq_hopper": "backward",
}
STAND_INS = {
    "bfloat16": ("float32", "float16"),
    "float16": ("float32", "float16"),
    "float32": ("float32",),
    "float64": ("float64",),
}
"""What the interpreter runs for a dtype: float32 sees the errors of logic that half precision hides."""


@dataclass(frozen=True, slots=True)
class Trial:
    """One case; `again`: also with new contents in the same memory, and with those in new memory."""

    case: Case
    again: bool = False


def trials(kernel: str, config: Config, problem: Problem, device: str, seed: int = SEED) -> Iterator[Trial]:
    """Shapes of the problem's kind whose ends fall inside, at and beyond the config's tiles.

    Kept are head_dim, head ratio (up to 8; in the interpreter, which is slow, up to 2), core_heads, pooling and w mod
    g; sizes shrink until g and w are small. The interpreter runs a second dtype on one shape only.
    """
    dtypes = (problem.dtype,) if device == "cuda" else STAND_INS[problem.dtype]
    portable = not Tunable.REGISTRY[kernel].archs  # the others leave packed sequences and odd strides to those
    for dtype in dtypes:
        for number, shape in enumerate(_shapes(kernel, config, problem, 8 if device == "cuda" else 2)):
            small = replace(problem, dtype=dtype, **shape)
            if config.refusal(small) is not None or (dtype != dtypes[0] and number != FEW):
                continue
            forced = Schedule({kernel: config})
            layout = "different" if portable else "transposed"
            case = Case(problem=small, layout=layout, device=device, seed=seed + number, schedule=forced)
            if number == PACKED and portable:
                tokens = small.seq_len
                case = replace(case, lengths=(0, tokens - tokens // 3 - 1, 1, tokens // 3))
            yield Trial(case, again=number == FEW and dtype == dtypes[0])


MANY, FEW, PACKED = range(3)


def _shapes(kernel: str, config: Config, problem: Problem, most: int) -> Iterator[dict[str, Any]]:
    """Many small groups over several tiles; the problem's own groups; and, but for decode, one row for documents."""
    ratio = min(problem.q_heads // problem.kv_heads, most)
    tile = min(128, max([value for name, value in asdict(config).items() if name.startswith("block_")], default=16))
    g, w = min(problem.group_size, 64), problem.window_size
    w = min(w, g + w % g)
    one, two = {"kv_heads": 1, "q_heads": ratio}, {"kv_heads": 2, "q_heads": 2 * ratio}
    ends_in_a_group = (w + 4 * g) // g * g + min(3, g - 1)
    many = {"batch": 1, **two, "group_size": min(g, 2), "window_size": min(w, 20)}
    yield {**many, "seq_len": 61 if kernel == "decode" else min(2 * tile + 45, 301)}  # cores, too, fill a tile
    yield {"batch": 2, **one, "group_size": g, "window_size": w, "seq_len": ends_in_a_group}
    if kernel != "decode":
        yield {**many, **one, "group_size": min(g, 3), "seq_len": tile + 30}


def look(trial: Trial, kernel: str) -> list[Comparison]:
    """Everything that is looked at in a trial: results, inputs, what lies beside the tensors, and what comes back."""
    direction, case = DIRECTION_OF[kernel], trial.case
    guards = Guards()
    inputs = Inputs(*(guards.place(x) for x in make_inputs(case)))
    found, _ = _right(case, inputs, direction, guards)
    if trial.again:
        found += _again(case, inputs, direction, guards)
    return [*found, *guards.comparisons()]


def _right(case: Case, inputs: Inputs, direction: Direction, guards: Guards) -> tuple[list[Comparison], Results]:
    """Whether the results are the oracle's and the inputs have the bits that they had; and the results."""
    before = {name: _digest(x) for name, x in inputs._asdict().items()}
    actual = _results(case, inputs, direction, guards)
    after = {name: _digest(x) for name, x in inputs._asdict().items()}
    # small as it is, float64 on a GPU would have half a gigabyte of PyTorch's kernels loaded there
    expected = oracle(replace(case, device="cpu"), Inputs(*(x.cpu() for x in inputs)), grads=direction == "backward")
    kept = [compare_bitwise(f"hash of {name} as it was", after[name], before[name]) for name in before]
    return [*compare_all(actual, {name: expected[name] for name in actual}), *kept], actual


def _again(case: Case, inputs: Inputs, direction: Direction, guards: Guards) -> list[Comparison]:
    """New contents in the same memory, as an answer kept by address would have it; then the same in new memory."""
    for old, new in zip(inputs, make_inputs(replace(case, family="rising", seed=case.seed + 1000)), strict=True):
        old.copy_(new)
    found, same = _right(case, inputs, direction, guards)
    moved = _results(case, Inputs(*(guards.place(x) for x in inputs)), direction, guards)
    return [*found, *same_bits(moved, same, " in new memory")]


def _results(case: Case, inputs: Inputs, direction: Direction, guards: Guards) -> Results:
    with poisoned_memory(), guards.allocations():
        if direction != "decode":
            return run(case, inputs, grads=direction == "backward")
        tokens = case.problem.seq_len
        return {"out": feed(make_cache(case), inputs, 0, (tokens - 6, 1, 3, 2))}


def _digest(x: Tensor) -> Tensor:
    """sha256 of the bits of a tensor, as a tensor."""
    bits = x.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return torch.frombuffer(bytearray(hashlib.sha256(bits.numpy().tobytes()).digest()), dtype=torch.uint8)
