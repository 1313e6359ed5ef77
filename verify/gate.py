"""The gate of a launch config: nothing enters a profile before it equals the oracle here.

`check_config` forces one kernel's config and runs the checks that the kernel takes part in, on small shapes of the
problem's kind, in memory full of NaN: on the GPU if there is one, else in a child process under Triton's interpreter,
where bfloat16 is wrong and float32 and float16 stand in for it; the evidence says which.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch

from ..kernels.tunable import Config, Schedule
from ..problem import Problem
from ..profiles.configs import as_config, source_hash, tunables
from .cases import Case
from .child import ChildFailedError, call_in_child
from .inputs import poisoned_memory
from .registry import checks
from .tolerance import Comparison

SUITE = "config/1"
SEED = 20261122
TIMEOUT_S = 600.0
STANDARD: dict[str, Any] = {"q_heads": 32, "kv_heads": 8, "seq_len": 4096, "head_dim": 128}
"""The problem that is meant where none is given."""
CHECKS_OF: dict[str, tuple[str, ...]] = {
    "pooling": ("forward_equals_oracle", "bitwise_repeat"),
    "forward": ("forward_equals_oracle", "bitwise_repeat"),
    "backward_dq": ("backward_equals_oracle", "bitwise_repeat"),
    "backward_dkv": ("backward_equals_oracle", "bitwise_repeat"),
    "backward_dcore": ("backward_equals_oracle", "bitwise_repeat"),
    "pooling_backward": ("backward_equals_oracle", "bitwise_repeat"),
    "decode": ("decode_equals_prefill",),
}
STAND_INS = {
    "bfloat16": ("float32", "float16"),
    "float16": ("float32", "float16"),
    "float32": ("float32",),
    "float64": ("float64",),
}
"""What the interpreter runs for a dtype: float32 sees the errors of logic that half precision hides."""

Mode = Literal["gpu", "interpreter"]


@dataclass(frozen=True, slots=True)
class Evidence:
    """What speaks for a config, or against it.

    `cases` that were run, `worst_budget_use` the largest error over its bound (at most 1 if `ok`; infinite where
    nothing was compared), `mode` where the kernels ran, `message` the first failure, or in which dtypes the kernels
    ran if not in the problem's, `kernel_hash` the source that was checked.
    """

    ok: bool
    suite: str
    seed: int
    cases: int
    worst_budget_use: float
    mode: Mode
    message: str
    kernel_hash: str


def check_config(
    kernel: str, config: Config, *, problem: Problem | None = None, timeout_s: float = TIMEOUT_S
) -> Evidence:
    """Verify one candidate config of `kernel` for problems like `problem` (default: 32/8 heads, head_dim 128, bf16).

    A wrong result, an exception, a crash or a hang of the child process is evidence against the config, not an error.

    Raises:
        ValueError: for a kernel that there is not, or a config of another kernel.
    """
    if kernel not in CHECKS_OF or not isinstance(config, tunables()[kernel].config):
        raise ValueError(
            f"kernel must be one of {', '.join(CHECKS_OF)} with a config of its own, got {kernel}: {config}"
        )
    problem = problem or Problem(**STANDARD)
    on_gpu = torch.cuda.is_available()
    if (refusal := config.refusal(problem)) is not None:
        return _evidence(kernel, "gpu" if on_gpu else "interpreter", 0, math.inf, f"refused: {refusal}")
    if on_gpu:
        return run_cases(kernel, config, problem, "cuda")
    request = {"kernel": kernel, "config": asdict(config), "problem": problem.as_dict()}
    try:
        return Evidence(**call_in_child(run_request, request, interpret=True, timeout_s=timeout_s))
    except ChildFailedError as error:
        return _evidence(kernel, "interpreter", 0, math.inf, f"the child process failed: {error}")


def run_request(request: dict[str, Any]) -> dict[str, Any]:
    """The evidence for a request of `check_config`, in the child."""
    tunables()
    config, problem = as_config(request["kernel"], request["config"]), Problem(**request["problem"])
    return asdict(run_cases(request["kernel"], config, problem, "cpu"))


def run_cases(kernel: str, config: Config, problem: Problem, device: str) -> Evidence:
    """The evidence from all small cases, run in this process up to the first failure."""
    mode: Mode = "gpu" if device == "cuda" else "interpreter"
    worst, count, dtypes = 0.0, 0, set()
    for check, case in small_cases(kernel, config, problem, device):
        count += 1
        dtypes.add(case.problem.dtype)
        try:
            with poisoned_memory():
                comparisons = checks()[check](case)
        except Exception as error:  # whatever a candidate raises speaks against it
            found = f"{type(error).__name__}: {error}"
            return _evidence(kernel, mode, count, math.inf, f"{check} of {case.problem}: {found}")
        worst = max([worst, *(comparison.budget_use for comparison in comparisons)])
        if failed := _first_failure(comparisons):
            return _evidence(kernel, mode, count, worst, f"{check} of {case.problem}, {case.family}: {failed}")
    if not count:
        return _evidence(kernel, mode, 0, math.inf, "refused: on every small shape")
    others = ", ".join(sorted(dtypes - {problem.dtype}))
    note = f"{problem.dtype} was not run, {others} stood in" if problem.dtype not in dtypes else ""
    return _evidence(kernel, mode, count, worst, note, ok=True)


def small_cases(kernel: str, config: Config, problem: Problem, device: str) -> Iterator[tuple[str, Case]]:
    """(check, case) pairs: shapes of the problem's kind whose ends fall inside, at and beyond the config's tiles.

    Kept are head_dim, head ratio (up to 8), core_heads, pooling and w mod g; sizes shrink until g and w are small.
    """
    for dtype in (problem.dtype,) if device == "cuda" else STAND_INS[problem.dtype]:
        for number, shape in enumerate(_shapes(kernel, config, problem)):
            small = replace(problem, dtype=dtype, **shape)
            if config.refusal(small) is not None:
                continue
            case = Case(
                problem=small,
                layout="different",
                device=device,
                seed=SEED + number,
                schedule=Schedule({kernel: config}),
            )
            first, *others = CHECKS_OF[kernel]
            yield first, case
            if number == 1:
                yield first, replace(case, family="rising")
                yield from ((check, case) for check in others)
            if number == 2:
                lengths = (0, small.seq_len - small.seq_len // 3 - 1, 1, small.seq_len // 3)
                yield first, replace(case, lengths=lengths)


def _shapes(kernel: str, config: Config, problem: Problem) -> Iterator[dict[str, Any]]:
    """Many small groups over several tiles; the problem's own groups; and, but for decode, one packed row."""
    ratio = min(problem.q_heads // problem.kv_heads, 8)
    tile = min(128, max([value for name, value in asdict(config).items() if name.startswith("block_")], default=16))
    g, w = min(problem.group_size, 64), problem.window_size
    w = min(w, g + w % g)
    one, two = {"kv_heads": 1, "q_heads": ratio}, {"kv_heads": 2, "q_heads": 2 * ratio}
    few = {"batch": 2, **one, "group_size": g, "window_size": w, "seq_len": w + 3 * g + 5}
    many = {"batch": 1, **two, "group_size": min(g, 3), "window_size": min(w, 20)}
    if kernel == "decode":
        yield {**many, "seq_len": 61}
        yield few
        return
    yield {**many, "seq_len": min(3 * tile + 25, 397)}  # cores, too, fill a tile
    yield few
    yield {**many, **one, "batch": 1, "seq_len": tile + 30}


def _first_failure(comparisons: list[Comparison]) -> str | None:
    if not comparisons or all(comparison.empty for comparison in comparisons):
        return "compared nothing"
    return next((str(comparison) for comparison in comparisons if not comparison.ok), None)


def _evidence(kernel: str, mode: Mode, cases: int, worst: float, message: str, *, ok: bool = False) -> Evidence:
    return Evidence(ok, SUITE, SEED, cases, worst, mode, message, source_hash(kernel))
