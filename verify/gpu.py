"""What only a GPU can show: repeats under load, more than 2^31 elements, and the memory tools of CUDA."""

from __future__ import annotations

import math
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor

from ..kernels.tunable import Schedule
from ..problem import Problem
from ..profiles.configs import tunables
from .calls import feed, make_cache, run
from .cases import Case
from .inputs import Inputs, make_inputs
from .record import Result, Status
from .tolerance import Comparison, compare_bitwise
from .units import Evaluated, Unit, judge, runner

DEVICE = "cuda"
BATCH = 60
LARGE: dict[str, Any] = {"q_heads": 260, "kv_heads": 260, "seq_len": 65536, "head_dim": 128}
"""65536 x 128 x 260 is 1.5 % more than 2^31."""
LARGE_DECODE = {**LARGE, "batch": 4, "q_heads": 130, "kv_heads": 130}
"""With groups of 2, so that there are as many elements in the core keys."""
TOOLS = ("memcheck", "initcheck", "racecheck")
TOOL = "compute-sanitizer"
TARGET = "from cca_attention.cli_verify import main; main(['sanitize-target'])"
NO_TOOL = f"{TOOL} is not on the PATH"


@runner
def repeats(unit: Unit) -> Result:
    """P33: the same bits from every one of `times` calls, forward, backward and decode, at a batch of 60."""
    return judge(unit, _repeated(unit))


def _repeated(unit: Unit) -> Evaluated:
    problem = Problem(
        batch=BATCH, q_heads=4, kv_heads=2, seq_len=389, head_dim=64, group_size=16, window_size=50, dtype=unit.dtype
    )
    case = Case(problem=problem, layout="different", device=DEVICE)
    inputs = make_inputs(case)
    first = run(case, inputs, grads=True)
    differing = dict.fromkeys(first, 0)
    for _ in range(unit.arguments["times"]):
        for name, x in run(case, inputs, grads=True).items():
            differing[name] += not torch.equal(_bits(x), _bits(first[name]))
    found = [_none_of(f"repeats that differ in {name}", count) for name, count in differing.items()]
    caches = [make_cache(case) for _ in range(2)]
    outs = [feed(cache, inputs, 0, [problem.seq_len - 20, *[1] * 20]) for cache in caches]
    yield case, [*found, compare_bitwise("decode again", *outs)]


def _bits(x: Tensor) -> Tensor:
    return x.contiguous().view({2: torch.int16, 4: torch.int32}[x.element_size()])


def _none_of(name: str, count: int) -> Comparison:
    return compare_bitwise(name, torch.tensor(count), torch.tensor(0))


@runner
def large(unit: Unit) -> Result:
    """Offsets beyond 2^31: the last and the first head of a huge call have the bits of a call with that head alone."""
    torch.cuda.empty_cache()
    if unit.direction == "decode":
        return judge(unit, _huge_decode())
    return judge(unit, _huge(unit.direction == "backward", unit.arguments["first"]))


def _normal(*shape: int, first: int = 0) -> Tensor:
    """Values that begin at element `first` of their memory: an odd one keeps away kernels that need alignment."""
    generator = torch.Generator(DEVICE).manual_seed(sum(shape))
    values = torch.randn(first + math.prod(shape), generator=generator, dtype=torch.bfloat16, device=DEVICE)
    return values[first:].view(shape)


def _defaults(problem: Problem) -> Schedule:
    """The built-in configs for `problem`, to be used for parts of it too: other tiles may give other bits."""
    arch = arch_at_hand() if DEVICE == "cuda" else "sm_80"
    return Schedule({name: tunable.default(problem, arch) for name, tunable in tunables(arch).items()})


def arch_at_hand() -> str:
    """Architecture of the GPU that is here, such as "sm_90"."""
    return "sm_{}{}".format(*torch.cuda.get_device_capability())


def _huge(grads: bool, first: int) -> Evaluated:
    p = Problem(**LARGE, group_size=16, window_size=256)
    case = Case(problem=p, device=DEVICE, schedule=_defaults(p))
    shape = p.batch, p.q_heads, p.seq_len, p.head_dim
    q, k, v = (_normal(*shape, first=first) for _ in range(3))
    inputs = Inputs(q, k, v, _normal(*shape, first=first) if grads else q, torch.zeros(shape[:3], device=DEVICE))
    results = run(case, inputs, grads=grads)
    for heads in (slice(p.q_heads - 1, p.q_heads), slice(0, 1)):
        part = Inputs(*(x[:, heads].contiguous() for x in inputs))
        alone = run(case, part, grads=grads)
        yield case, [compare_bitwise(f"{name} of {heads}", x[:, heads], alone[name]) for name, x in results.items()]


def _huge_decode() -> Evaluated:
    p = Problem(**LARGE_DECODE, group_size=2, window_size=64)
    case = Case(problem=p, device=DEVICE, schedule=_defaults(p))
    q, k, v = (_normal(p.batch, p.q_heads, p.seq_len, p.head_dim) for _ in range(3))
    sizes = [p.seq_len - 3, 1, 1, 1]
    inputs = Inputs(q, k, v, q, q)
    out = feed(make_cache(case), inputs, 0, sizes)[:, :, -3:].clone()
    torch.cuda.empty_cache()
    single = replace(case, problem=replace(p, batch=1))
    alone = feed(make_cache(single), Inputs(*(x[-1:] for x in inputs)), 0, sizes)[:, :, -3:]
    yield case, [compare_bitwise("decoded rows of the last sequence", out[-1:], alone)]


# --- compute-sanitizer ------------------------------------------------------------------------------------------------


@runner
def sanitizer(unit: Unit) -> Result:
    """One tool of compute-sanitizer on `sanitize_target`; what racecheck says is a suspicion, for it is not exact."""
    tool = unit.arguments["tool"]
    if shutil.which(TOOL) is None:
        return unit.blank(status="not-run", message=NO_TOOL, facts={"missing": TOOL})
    with FileLock(Path(tempfile.gettempdir()) / "cca-verify-sanitizer.lock"):
        # compiling takes minutes under a tool: it is done once, without one; what fails here fails again below
        subprocess.run([sys.executable, "-c", TARGET], capture_output=True, check=False, timeout=COMPILE_S)
    child = subprocess.run(sanitizer_command(tool), capture_output=True, text=True, timeout=unit.limit_s - 10)
    said = child.stdout + child.stderr
    summaries = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)", said)
    if not summaries or DONE not in said:
        return unit.blank(status="error", trouble="crash", message=" | ".join(said.strip().splitlines()[-3:]))
    count = int(summaries[-1])
    if tool != "racecheck":
        return judge(unit, [(None, [_none_of(f"errors of {tool}: {'; '.join(_complaints(said))}", count)])])
    warnings = _complaints(said) if count else ()
    status: Status = "fail" if warnings and unit.strict else "pass"
    return unit.blank(
        status=status, cases=1, comparisons=1, budget_use=0.0, warnings=warnings, message="; ".join(warnings[:1])
    )


def _complaints(said: str) -> tuple[str, ...]:
    lines = [line.strip("= ").strip() for line in said.splitlines()]
    found = [line for line in lines if line.startswith(("Error", "Warning", "Invalid", "Uninitialized", "Race"))]
    return tuple(dict.fromkeys(found))[:5] or ("see its output",)


DONE = "sanitize-target: done"
COMPILE_S = 300.0


def sanitizer_command(tool: str) -> list[str]:
    """The command line that runs `sanitize_target` under one tool."""
    return [
        "env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", TOOL, "--tool", tool, "--error-exitcode", "9", sys.executable, "-c",
        TARGET,
    ]  # fmt: skip


def sanitize_target() -> int:
    """Forward, backward and decode on tiny shapes in every dtype, and the kernels that only large calls choose; how
    many groups of launches that were."""
    count = 0
    for case in target_cases():
        inputs = make_inputs(case)
        run(case, inputs, grads=True)
        feed(make_cache(case), inputs, 0, [case.problem.seq_len - 5, 1, 1, 3])
        torch.cuda.synchronize()
        count += 2
    problem = Problem(
        batch=1, q_heads=4, kv_heads=2, seq_len=300, head_dim=64, group_size=4, window_size=40, dtype="bfloat16"
    )
    for tunable in tunables(arch_at_hand()).values():
        if tunable.archs:
            tensors = tunable.allocate(problem, torch.device(DEVICE), torch.Generator(DEVICE).manual_seed(0))
            tunable.launch(problem, tensors, tunable.default(problem, arch_at_hand()))
            torch.cuda.synchronize()
            count += 1
    return count


def target_cases() -> Iterator[Case]:
    """Ragged tiles, an unfinished group and grouped-query heads, for each dtype and each kind of cores."""
    for dtype in ("bfloat16", "float16", "float32"):
        for core_heads in ("query", "kv"):
            problem = Problem(
                batch=1, q_heads=4, kv_heads=2, seq_len=75, head_dim=40, group_size=4, window_size=10, dtype=dtype,
                core_heads=core_heads,
            )  # fmt: skip
            yield Case(problem=problem, layout="different", device=DEVICE)
