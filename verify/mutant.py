"""What a planted fault is: patches of our own source text, and the check that has to see them.

A patch is a replacement of a text that must be in its file exactly once, so that it cannot drift away from the code.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..problem import Problem
from .cases import Case, same_tiles


class StaleError(ValueError):
    """A mutant that no longer applies; the message says which file has its text how often."""


@dataclass(frozen=True, slots=True)
class Patch:
    """In `module`, a path below the package, `old`, which must be there once, becomes `new`."""

    module: str
    old: str
    new: str

    def apply(self, root: Path) -> None:
        """Change the copy of the package at `root`.

        Raises:
            StaleError: unless `old` is in the file exactly once.
        """
        path = root / self.module
        text = path.read_text() if path.is_file() else ""
        if (count := text.count(self.old)) != 1:
            raise StaleError(f"the mutant that replaces {self.old!r} is stale: {self.module} has it {count} times")
        path.write_text(text.replace(self.old, self.new))


@dataclass(frozen=True, slots=True, kw_only=True)
class Mutant:
    """One planted fault.

    Args:
        id: where it is listed: "1" to "8" in spec.md section 8, else "F1" and so on in docs/mutants.md.
        says: what is wrong.
        patches: that plant it.
        check: the name of the check (`registry.checks`) or trial (`mutants_trials`) that has to see it, on `case`.
        dies: that seeing it may mean the end of the process: its crash counts as the check's work.
    """

    id: str
    says: str
    patches: tuple[Patch, ...]
    check: str
    case: Case
    dies: bool = False

    @property
    def family(self) -> str:
        """The letter of its id; "eight" for the published mistakes."""
        return self.id[0] if self.id[0].isalpha() else "eight"


def small(*, dtype: str = "float32", more: dict[str, Any] | None = None, **problem: Any) -> Case:
    """A case with several tiles, a ragged last one and an unfinished group, where g does not divide w.

    Args:
        more: arguments of `Case`. problem: of `Problem`.
    """
    shape: dict[str, Any] = {
        "batch": 1, "q_heads": 2, "kv_heads": 2, "seq_len": 29, "head_dim": 16, "group_size": 4, "window_size": 6,
    }  # fmt: skip
    problem_of_it = Problem(**{**shape, "dtype": dtype, **problem})
    return Case(**{"problem": problem_of_it, "schedule": same_tiles(16, 16), **(more or {})})


BASE = small()
STEPS = small(batch=2, seq_len=19, group_size=3, window_size=4, q_heads=1, kv_heads=1)
"""For the checks that feed a cache, which launch many times."""


def fault(id: str, says: str, *patches: Patch, check: str, case: Case = BASE, dies: bool = False) -> Mutant:
    """A `Mutant`, in fewer words."""
    return Mutant(id=id, says=says, patches=patches, check=check, case=case, dies=dies)
