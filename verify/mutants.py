"""Faults planted in our own sources, to prove that the checks can fail.

A mutant is a replacement in the text of one source file, so that it cannot drift away from the code: one that no
longer applies is an error. It runs in a child process, on a copy of the package with that file changed, and has to be
seen by the check that it names. The eight mistakes of spec.md section 8 are the first of them.
"""

from __future__ import annotations

import importlib
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..kernels.forward import ForwardConfig
from ..kernels.tunable import Schedule
from ..problem import Problem
from .cases import Case, same_tiles
from .child import call_in_child
from .inputs import poisoned_memory
from .registry import checks

PACKAGE = __name__.partition(".")[0]
NEEDED = ("kernels", "verify", "profiles")
"""The sub-packages that the checks load; they may lie elsewhere than the package itself."""
TIMEOUT_S = 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Mutant:
    """One planted fault.

    Args:
        mistake: number in spec.md section 8.
        says: what is wrong.
        module: where, below the package; `old`, which must be there once, becomes `new`.
        check: the name of the check that has to see it, on `case`.
    """

    mistake: int
    says: str
    module: str
    old: str
    new: str
    check: str
    case: Case


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether the check of a mutant saw it; `seen` are the comparisons that failed."""

    killed: bool
    seen: tuple[str, ...]


def _case(
    *, dtype: str = "float32", schedule: Schedule | None = None, case: dict[str, Any] | None = None, **problem: Any
) -> Case:
    shape: dict[str, Any] = {
        "batch": 2, "q_heads": 2, "kv_heads": 2, "seq_len": 29, "head_dim": 16, "group_size": 4, "window_size": 6,
    }  # fmt: skip
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tiles = same_tiles(16, 16) if schedule is None else schedule
    return Case(problem=Problem(**{**shape, "dtype": dtype, **problem}), schedule=tiles, device=device, **(case or {}))


EIGHT: dict[str, Mutant] = {
    "truncated_division_shows_core_0": Mutant(
        mistake=1,
        says="// truncates toward zero: rows w .. w+g-2 see core 0",
        module="kernels/primitives.py",
        old="return tl.maximum(position + 1 - WINDOW_SIZE, 0) // GROUP_SIZE",
        new="return tl.maximum((position + 1 - WINDOW_SIZE - GROUP_SIZE) // GROUP_SIZE + 1, 0)",
        check="partition",
        case=_case(group_size=5, window_size=3, head_dim=32),
    ),
    "window_in_whole_groups": Mutant(
        mistake=2,
        says="where g does not divide w, rows lose tokens or count them twice",
        module="kernels/primitives.py",
        old="return visible_cores(position, GROUP_SIZE, WINDOW_SIZE) * GROUP_SIZE",
        new="return tl.maximum((position + 1) // GROUP_SIZE - WINDOW_SIZE // GROUP_SIZE, 0) * GROUP_SIZE",
        check="partition",
        case=_case(head_dim=32),
    ),
    "strides_of_k_and_v_exchanged": Mutant(
        mistake=3,
        says="right only where k and v have the same strides",
        module="kernels/forward.py",
        old="q.stride(), k.stride(), v.stride(), k_core.stride(), out.stride(), lse.stride(),",
        new="q.stride(), v.stride(), k.stride(), k_core.stride(), out.stride(), lse.stride(),",
        check="forward_equals_oracle",
        case=_case(case={"layout": "different"}),
    ),
    "backward_of_whole_core_tiles": Mutant(
        mistake=4,
        says="the number of cores must be a multiple of the tile",
        module="kernels/backward_dkv.py",
        old="end_c = tl.minimum(first_c + BLOCK_C, length // GROUP_SIZE)",
        new="end_c = tl.minimum(first_c + BLOCK_C, length // GROUP_SIZE // BLOCK_C * BLOCK_C)",
        check="backward_equals_oracle",
        case=_case(seq_len=41, group_size=2),
    ),
    "training_rounds_the_number_of_groups": Mutant(
        mistake=5,
        says="training has another window than inference",
        module="attention.py",
        old="    packed = cu_seqlens is not None\n",
        new="    packed = cu_seqlens is not None\n"
        "    groups = max(0, q.shape[2] - window_size) // group_size // 4 * 4\n"
        "    window_size = max(window_size, q.shape[2] - groups * group_size)\n",
        check="decode_equals_prefill",
        case=_case(),
    ),
    "group_0_pooled_again": Mutant(
        mistake=6,
        says="decode pools the first group whenever a group is complete",
        module="kernels/decode.py",
        old="tokens = core * GROUP_SIZE + offs_t",
        new="tokens = offs_t",
        check="decode_equals_prefill",
        case=_case(),
    ),
    "padding_ignored": Mutant(
        mistake=7,
        says="padding takes part as if it were tokens",
        module="attention.py",
        old="return Sequences.padded(bounds.clamp(0, q.shape[2]))",
        new="return Sequences.dense(q.shape[0])",
        check="forward_equals_oracle",
        case=_case(case={"bounds": ((0, 20), (9, 29))}),
    ),
    "several_tokens_a_step_see_alike": Mutant(
        mistake=7,
        says="all tokens of a step see what the last one sees",
        module="kernels/decode.py",
        old="position = seen + index",
        new="position = seen + NUM_NEW - 1 + 0 * index",
        check="decode_equals_prefill",
        case=_case(),
    ),
    "reorder_forgets_the_cores": Mutant(
        mistake=7,
        says="beam search moves the raw tokens and not the cores",
        module="cache_state.py",
        old="for storage, axis in ((self.core, 1), (self.raw, 1), (self.seen, 0)):",
        new="for storage, axis in ((self.raw, 1), (self.seen, 0)):",
        check="reorder_equals_fresh",
        case=_case(),
    ),
    "tiles_that_no_config_changes": Mutant(
        mistake=8,
        says="32 x 32 tiles whatever the config says",
        module="kernels/forward.py",
        old="        **config.launch_args(),\n",
        new="        **{**config.launch_args(), 'BLOCK_Q': 32, 'BLOCK_K': 32},\n",
        check="schedule_is_used",
        case=_case(seq_len=61, schedule=Schedule({"forward": ForwardConfig(block_q=16, block_k=16)})),
    ),
    "float32_through_float16": Mutant(
        mistake=8,
        says="float32 is computed in half precision",
        module="kernels/primitives.py",
        old="acc = tl.dot(probs.to(v.dtype), v, acc=acc,",
        new="acc = tl.dot(probs.to(tl.float16), v.to(tl.float16), acc=acc,",
        check="forward_equals_oracle",
        case=_case(),
    ),
}
"""The eight mistakes of spec.md section 8; the seventh is three, the eighth two."""


def copy_package(into: Path) -> Path:
    """Copy of this package below `into`, with the sub-packages that the checks need."""
    root = into / PACKAGE
    for name in (PACKAGE, *(f"{PACKAGE}.{part}" for part in NEEDED)):
        source = Path(*importlib.import_module(name).__path__)
        target = root.joinpath(*name.split(".")[1:])
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)
    return root


def plant(mutant: Mutant, root: Path) -> None:
    """Change the copy of the package at `root`.

    Raises:
        ValueError: if the mutant no longer applies: its text must be in the file exactly once.
    """
    path = root / mutant.module
    text = path.read_text()
    if (count := text.count(mutant.old)) != 1:
        raise ValueError(f"the mutant that replaces {mutant.old!r} is stale: {mutant.module} has it {count} times")
    path.write_text(text.replace(mutant.old, mutant.new))


def failures(name: str) -> list[str]:
    """The comparisons that fail when the check of mutant `name` runs on this process's package."""
    mutant = EIGHT[name]
    with poisoned_memory():
        return [str(comparison) for comparison in checks()[mutant.check](mutant.case) if not comparison.ok]


def judge(name: str) -> Verdict:
    """Plant mutant `name` in a copy of the package and run its check there.

    Raises:
        ValueError: if the mutant is stale.
        ChildFailedError: if the changed package does not run, which proves nothing about the check.
    """
    with tempfile.TemporaryDirectory() as folder:
        plant(EIGHT[name], copy_package(Path(folder)))
        seen = call_in_child(
            failures, name, interpret=not torch.cuda.is_available(), timeout_s=TIMEOUT_S, source=Path(folder)
        )
    return Verdict(bool(seen), tuple(seen))
