"""Faults planted in our own sources, to prove that the checks can fail.

Each mutant is judged on a copy of the package with its patches applied, in a process of its own, by the check that it
names; before, the same checks have to pass on an unpatched copy. The faults are listed in docs/mutants.md. They are
judged in Triton's interpreter on every machine: most faults are of logic, and a GPU would hide some of them.
"""

from __future__ import annotations

import compileall
import importlib
import json
import math
import py_compile
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import triton

from . import mutants_fork
from .child import ChildFailedError
from .inputs import poisoned_memory
from .interpreter import patch_language_once_per_launch
from .mutant import Mutant, StaleError
from .mutants_backward import BACKWARD
from .mutants_cache import CACHE
from .mutants_forward import FORWARD
from .mutants_gate import GATE
from .mutants_layout import LAYOUT
from .mutants_published import EIGHT
from .mutants_trials import TRIALS
from .registry import checks
from .tolerance import Comparison

PACKAGE = __name__.partition(".")[0]
NEEDED = ("kernels", "verify", "profiles", "autotune")
"""The sub-packages that checks and trials load; they may lie elsewhere than the package itself."""
TIMEOUT_S = 60.0

MUTANTS: dict[str, Mutant] = EIGHT | FORWARD | LAYOUT | BACKWARD | CACHE | GATE
"""Every mutant by name."""

NOT_APPLICABLE: dict[str, str] = {
    "F16: weights in fp8": "no kernel casts to fp8; half precision stands in for it",
    "F16: accumulation in bfloat16": "the interpreter computes bfloat16 wrongly; half precision stands in for it",
    "F16: TF32": "the interpreter computes every product in full; operands with 10 bits stand in for it",
    "D5: page of the neighbour": "the cache has no pages; the slot of the ring and the row of the batch stand in",
    "R1: a plain addition for an atomic one": "no kernel has atomics; a counter that all programs add to stands in",
    "R3: scratch that is not zeroed": "no scratch must be zero; padding rows and parts that are not stored stand in",
}
"""Faults of the list that nothing of ours can have, and why; the nearest that it can have are planted instead."""

Outcome = Literal["killed", "survived", "stale", "baseline", "failed"]
EXIT_CODES: dict[Outcome, int] = {"killed": 0, "survived": 2, "failed": 3, "baseline": 4, "stale": 5}
"""Of the command, for the worst outcome of a mutant, which has the highest number."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of one mutant.

    `outcome`: "killed" by its check; "survived" it; "stale", it no longer applies; "baseline", the check fails without
    it as well; "failed", the patched package does not run, which proves nothing of the check. `seen`: the comparisons
    that failed. `budget_use`: the largest finite error over its bound among them, None if none is finite. `error`: of
    every outcome but the first two.
    """

    name: str
    id: str
    family: str
    says: str
    check: str
    outcome: Outcome
    seen: tuple[str, ...] = ()
    budget_use: float | None = None
    seconds: float = 0.0
    error: str = ""

    @property
    def killed(self) -> bool:
        """Whether the check saw it."""
        return self.outcome == "killed"


# --- in the copy ------------------------------------------------------------------------------------------------------


def failures(name: str) -> list[dict[str, Any]]:
    """The comparisons that fail when the check of mutant `name` runs on this process's package, in the interpreter.

    Raises:
        RuntimeError: outside of the interpreter, or if the check compared nothing.
    """
    if not triton.knobs.runtime.interpret:
        raise RuntimeError("mutants are judged in the interpreter: set TRITON_INTERPRET=1 before triton is imported")
    patch_language_once_per_launch()
    mutant = MUTANTS[name]
    with poisoned_memory():
        found = killers()[mutant.check](mutant.case)
    if not found:
        raise RuntimeError(f"{mutant.check} compared nothing")
    return [asdict(comparison) for comparison in found if not comparison.ok]


def killers() -> Mapping[str, Callable[..., list[Comparison]]]:
    """Every check and trial that a mutant can name."""
    return {**checks(), **TRIALS}


# --- the judge --------------------------------------------------------------------------------------------------------


class Forks:
    """Calls functions of copies of the package in forks of a process that has imported torch and triton."""

    def __init__(self, folder: Path) -> None:
        # triton reads its variable when it is imported; a GPU is no use here, and CUDA does not survive a fork
        command = ["env", "TRITON_INTERPRET=1", "CUDA_VISIBLE_DEVICES=", sys.executable, "-c"]
        command.append(Path(mutants_fork.__file__).read_text())
        self._words = folder / "words"
        self._parent = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def call(self, function: Callable[[Any], Any], argument: Any, *, source: Path, timeout_s: float = TIMEOUT_S) -> Any:
        """``function(argument)``, all of it JSON, with the copy of the package in `source`.

        Raises:
            ChildFailedError: if the fork raised, crashed or took longer than `timeout_s`.
            RuntimeError: if the process that forks is gone.
        """
        job = {
            "source": str(source), "module": function.__module__, "function": function.__name__, "argument": argument,
            "timeout_s": timeout_s, "words": str(self._words),
        }  # fmt: skip
        assert self._parent.stdin is not None and self._parent.stdout is not None
        self._parent.stdin.write(json.dumps(job) + "\n")
        self._parent.stdin.flush()
        if not (line := self._parent.stdout.readline()):
            raise RuntimeError(f"the process that forks has ended with code {self._parent.wait()}")
        reply = json.loads(line)
        if reply["late"]:
            raise ChildFailedError(f"no result within {timeout_s:g} s")
        if reply["code"] < 0:
            raise DiedError(f"killed by signal {-reply['code']}")
        if reply["code"]:
            words = self._words.read_text(errors="replace").strip().splitlines()
            raise ChildFailedError(" | ".join(words[-3:]))
        return json.loads(reply["reply"])

    def close(self) -> None:
        """End the process."""
        self._parent.communicate()


class DiedError(ChildFailedError):
    """A fork was ended by a signal."""


@contextmanager
def workshop() -> Iterator[tuple[Forks, Path]]:
    """Forks, and a folder with a compiled copy of the package; both are gone at the end."""
    with tempfile.TemporaryDirectory() as folder:
        original = Path(folder) / "original"
        # by the hash of its source: the time stamp of a patched file may be that of the original
        mode = py_compile.PycInvalidationMode.CHECKED_HASH
        compileall.compile_dir(copy_package(original), quiet=2, invalidation_mode=mode)
        forks = Forks(Path(folder))
        try:
            yield forks, original
        finally:
            forks.close()


def copy_package(into: Path) -> Path:
    """Copy of this package below `into`, with the sub-packages that the checks need."""
    root = into / PACKAGE
    for name in (PACKAGE, *(f"{PACKAGE}.{part}" for part in NEEDED)):
        source = Path(*importlib.import_module(name).__path__)
        target = root.joinpath(*name.split(".")[1:])
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)
    return root


@contextmanager
def planted(mutant: Mutant, original: Path) -> Iterator[Path]:
    """A folder with a copy of the package in `original` with the mutant in it.

    Raises:
        StaleError: if the mutant no longer applies.
    """
    with tempfile.TemporaryDirectory(dir=original.parent) as folder:
        shutil.copytree(original, folder, dirs_exist_ok=True)
        for patch in mutant.patches:
            patch.apply(Path(folder) / PACKAGE)
        yield Path(folder)


class Judge:
    """Judges mutants with the `Forks` and the copy of a `workshop`; each baseline is taken once."""

    def __init__(self, forks: Forks, original: Path) -> None:
        self.forks, self.original = forks, original
        self._baselines: dict[Any, str] = {}

    def judge(self, name: str, mutant: Mutant) -> Verdict:
        """Plant `mutant`, run its check and say what became of it; the check and the case are those of `name`."""
        start = time.perf_counter()
        verdict = self._judge(
            name, mutant, Verdict(name, mutant.id, mutant.family, mutant.says, mutant.check, "survived")
        )
        return replace(verdict, seconds=time.perf_counter() - start)

    def _judge(self, name: str, mutant: Mutant, verdict: Verdict) -> Verdict:
        try:
            with planted(mutant, self.original) as source:
                if wrong := self._baseline(name):
                    return replace(verdict, outcome="baseline", error=wrong)
                seen = self.forks.call(failures, name, source=source)
        except StaleError as error:
            return replace(verdict, outcome="stale", error=str(error))
        except DiedError as error:
            if mutant.dies:
                return replace(verdict, outcome="killed", seen=(str(error),))
            return replace(verdict, outcome="failed", error=str(error))
        except ChildFailedError as error:
            return replace(verdict, outcome="failed", error=str(error))
        finite = [comparison["budget_use"] for comparison in seen if math.isfinite(comparison["budget_use"])]
        return replace(
            verdict,
            outcome="killed" if seen else "survived",
            seen=tuple(comparison["name"] for comparison in seen),
            budget_use=max(finite, default=None),
        )

    def _baseline(self, name: str) -> str:
        """What the check of `name` finds wrong with the package as it is, empty if nothing."""
        key = MUTANTS[name].check, repr(MUTANTS[name].case)
        if key not in self._baselines:
            try:
                wrong = self.forks.call(failures, name, source=self.original)
                self._baselines[key] = ", ".join(comparison["name"] for comparison in wrong)
            except ChildFailedError as error:
                self._baselines[key] = str(error)
        return self._baselines[key]


def judge_all(
    names: Iterable[str] | None = None, *, on_result: Callable[[Verdict], None] | None = None
) -> list[Verdict]:
    """Judge the mutants `names` (default: all), which may be names or ids, and tell `on_result` of each as it is known.

    Raises:
        ValueError: for a name that there is not.
    """
    verdicts, chosen = [], selected(names)
    with workshop() as (forks, original):
        judge = Judge(forks, original)
        for name in chosen:
            verdicts.append(judge.judge(name, MUTANTS[name]))
            if on_result is not None:
                on_result(verdicts[-1])
    return verdicts


def selected(names: Iterable[str] | None) -> list[str]:
    """The names of the mutants that are called so or have such an id, all of them for None."""
    if names is None:
        return list(MUTANTS)
    wanted = list(names)
    known = {*MUTANTS, *(mutant.id for mutant in MUTANTS.values())}
    if unknown := [name for name in wanted if name not in known]:
        raise ValueError(f"no mutant has the name or id {', '.join(unknown)}; there are {', '.join(MUTANTS)}")
    return [name for name, mutant in MUTANTS.items() if name in wanted or mutant.id in wanted]


def run_mutants(
    names: Iterable[str] | None = None, *, on_result: Callable[[Verdict], None] | None = None
) -> list[dict[str, Any]]:
    """`judge_all` as values for JSON."""
    return [{**asdict(verdict), "killed": verdict.killed} for verdict in judge_all(names, on_result=on_result)]


def exit_code(verdicts: Iterable[Verdict]) -> int:
    """Of the command: that of the worst outcome, and 5 if nothing was judged."""
    return max((EXIT_CODES[verdict.outcome] for verdict in verdicts), default=5)
