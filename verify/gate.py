"""The gate of a launch config: nothing enters a profile before it equals the oracle here.

`check_config` forces one kernel's config on small shapes of the problem's kind, in memory full of NaN between guard
pads, with inputs that are hashed before and after, and again with new contents in the same memory: in a process of its
own, since a candidate may take its process down. That is on the GPU if there is one, else in Triton's interpreter,
where bfloat16 is wrong and float32 and float16 stand in for it; the evidence says which.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache, partial
from itertools import islice
from typing import Any, Literal

import torch
import triton
from triton.runtime.errors import OutOfResources

from ..configs import architecture
from ..kernels.tunable import Config, Tunable
from ..problem import Problem
from ..profiles.configs import as_config, source_hash
from .child import Child, ChildFailedError, Failure
from .gate_cases import DIRECTION_OF, SEED, Trial, look, trials
from .tolerance import Comparison

SUITE = "config/3"
"""What a config is put through; to be raised with that, so that journals do not take less for it."""
TIMEOUT_S = 600.0
STANDARD: dict[str, Any] = {"q_heads": 32, "kv_heads": 8, "seq_len": 4096, "head_dim": 128}
"""The problem that is meant where none is given."""

Mode = Literal["gpu", "interpreter"]
Outcome = Literal["passed", "wrong", "crash", "hang", "oom", "refused"]
OUTCOMES: dict[Failure, Outcome] = {"raised": "crash", "crashed": "crash", "hung": "hang"}


@dataclass(frozen=True, slots=True)
class Evidence:
    """What speaks for a config, or against it.

    `cases` that were run, `worst_budget_use` the largest error over its bound (at most 1 if `ok`; infinite where
    nothing was compared), `mode` where the kernels ran, `message` the first failure, or in which dtypes the kernels
    ran if not in the problem's, `kernel_hash` the source that was checked, `outcome` what happened: "crash" is an
    exception or a lost process, "oom" a lack of memory of any kind.
    """

    ok: bool
    suite: str
    seed: int
    cases: int
    worst_budget_use: float
    mode: Mode
    message: str
    kernel_hash: str
    outcome: Outcome = "passed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Quarantine:
    """A config that failed, with what a report of a compiler's mistake needs; `arch` is "interpreter" without a GPU."""

    kernel: str
    config: dict[str, int]
    outcome: Outcome
    message: str
    arch: str
    triton: str
    dtype: str
    head_dim: int
    group_size: int
    kernel_hash: str


@dataclass(frozen=True, slots=True)
class Launched:
    """A launch of a tunable kernel: the function's name, and the choices that it was compiled for."""

    function: str
    options: str = ""


def check_config(
    kernel: str, config: Config, *, problem: Problem | None = None, timeout_s: float = TIMEOUT_S, seed: int = SEED,
    only_first: bool = False,
) -> Evidence:  # fmt: skip
    """Verify one candidate config of `kernel` for problems like `problem` (default: 32/8 heads, head_dim 128, bf16).

    A wrong result, an exception, a crash or a hang is evidence against the config, not an error.

    Args:
        seed: of the contents.
        only_first: the first shape alone, several tiles of many small groups.

    Raises:
        ValueError: for a kernel that there is not, or a config of another kernel.
    """
    if kernel not in DIRECTION_OF or not isinstance(config, Tunable.REGISTRY[kernel].config):
        raise ValueError(
            f"kernel must be one of {', '.join(DIRECTION_OF)} with a config of its own, got {kernel}: {config}"
        )
    problem = problem or Problem(**STANDARD)
    mode: Mode = "gpu" if torch.cuda.is_available() else "interpreter"
    refusal = config.refusal(problem)
    arch = architecture(torch.device("cuda" if mode == "gpu" else "cpu"))
    if (archs := Tunable.REGISTRY[kernel].archs) and arch not in archs:
        refusal = f"it runs on {', '.join(archs)} only, not {f'on {arch}' if mode == 'gpu' else 'in the interpreter'}"
    if refusal is not None:
        return _against(kernel, mode, "refused", f"refused: {refusal}")
    request = {
        "kernel": kernel, "config": asdict(config), "problem": problem.as_dict(), "seed": seed, "only_first": only_first
    }  # fmt: skip
    child = _child(mode)
    try:
        evidence = Evidence(**child.call(run_request, request, timeout_s=timeout_s))
    except ChildFailedError as error:
        child.close()
        return _against(kernel, mode, OUTCOMES[error.kind], f"the child process failed: {error}")
    if not evidence.ok:
        child.close()  # whatever the candidate left there, the next one starts afresh
    return evidence


@cache
def _child(mode: Mode) -> Child:
    """The process that candidates run in, one after the other."""
    return Child(interpret=mode == "interpreter")


def run_request(request: dict[str, Any]) -> dict[str, Any]:
    """The evidence for a request of `check_config`, in the child."""
    torch.set_num_threads(1)  # others verify beside it, and what is computed on the CPU is small
    config, problem = as_config(request["kernel"], request["config"]), Problem(**request["problem"])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    options = {name: request[name] for name in ("seed", "only_first")}
    return asdict(run_trials(request["kernel"], config, problem, device, **options))


def run_trials(
    kernel: str, config: Config, problem: Problem, device: str, *, seed: int = SEED, only_first: bool = False
) -> Evidence:
    """The evidence from all trials, or the first, run in this process up to the first failure."""
    mode: Mode = "gpu" if device == "cuda" else "interpreter"
    worst, count, dtypes = 0.0, 0, set()
    for trial in islice(trials(kernel, config, problem, device, seed), 1 if only_first else None):
        count += 1
        dtypes.add(trial.case.problem.dtype)
        comparisons, outcome, reason = tried(trial, kernel)
        worst = max([worst, *(comparison.budget_use for comparison in comparisons)])
        if outcome != "passed":
            message = f"{trial.case.problem}, {trial.case.family}: {reason}"
            return _against(
                kernel, mode, outcome, message, seed=seed, cases=count, worst=worst if comparisons else math.inf
            )
    if not count:
        return _against(kernel, mode, "refused", "refused: on every small shape")
    others = ", ".join(sorted(dtypes - {problem.dtype}))
    note = f"{problem.dtype} was not run, {others} stood in" if problem.dtype not in dtypes else ""
    return Evidence(True, SUITE, seed, count, worst, mode, note, source_hash(kernel))


def tried(trial: Trial, kernel: str) -> tuple[list[Comparison], Outcome, str]:
    """The comparisons of a trial, what came of it and why."""
    try:
        with launches(kernel) as launched:
            comparisons = look(trial, kernel)
    except (OutOfResources, torch.OutOfMemoryError) as error:
        return [], "oom", f"{type(error).__name__}: {error}"
    except Exception as error:  # whatever a candidate raises speaks against it
        return [], "crash", f"{type(error).__name__}: {error}"
    if not comparisons or all(comparison.empty for comparison in comparisons):
        return [], "wrong", "compared nothing"
    if not launched and trial.case.device == "cuda":
        return [], "wrong", f"{kernel} was not launched: another kernel did the work"
    failed = next((str(comparison) for comparison in comparisons if not comparison.ok), None)
    return comparisons, "passed" if failed is None else "wrong", failed or ""


@contextmanager
def launches(*kernels: str) -> Iterator[set[Launched]]:
    """What is launched of these tunable kernels, by default of all, while this lasts; never within another.

    The interpreter launches otherwise: nothing is seen there.
    """
    seen: set[Launched] = set()

    def watched(function: Any, *args: Any, **kwargs: Any) -> Any:
        chosen = {name: value for name, value in kwargs.items() if isinstance(value, (bool, int, str))}
        seen.add(Launched(function.fn.__name__, repr(sorted(chosen.items()))))
        return type(function).run(function, *args, **kwargs)

    functions = {id(f): f for name in kernels or Tunable.REGISTRY for f in Tunable.REGISTRY[name].kernels}.values()
    for function in functions:
        function.run = partial(watched, function)
    try:
        yield seen
    finally:
        for function in functions:
            del function.run


def _against(
    kernel: str,
    mode: Mode,
    outcome: Outcome,
    message: str,
    *,
    seed: int = SEED,
    cases: int = 0,
    worst: float = math.inf,
) -> Evidence:
    return Evidence(False, SUITE, seed, cases, worst, mode, message, source_hash(kernel), outcome)


def quarantine(kernel: str, config: Config, problem: Problem | None, evidence: Evidence) -> Quarantine:
    """The record of a config that failed.

    Raises:
        ValueError: if it did not.
    """
    if evidence.ok:
        raise ValueError(f"evidence must be against the config, got {evidence}")
    problem = problem or Problem(**STANDARD)
    arch = "sm_{}{}".format(*torch.cuda.get_device_capability()) if evidence.mode == "gpu" else "interpreter"
    return Quarantine(
        kernel=kernel, config=asdict(config), outcome=evidence.outcome, message=evidence.message, arch=arch,
        triton=triton.__version__, dtype=problem.dtype, head_dim=problem.head_dim, group_size=problem.group_size,
        kernel_hash=evidence.kernel_hash,
    )  # fmt: skip
