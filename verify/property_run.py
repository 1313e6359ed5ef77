"""Running a check on many drawn cases: what the tests and `cca-verify` both call."""

from __future__ import annotations

import math
import re
import secrets
import time
import warnings
import zlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import hypothesis
from hypothesis import HealthCheck, Phase, settings
from hypothesis.database import DirectoryBasedExampleDatabase

from .cases import Case
from .inputs import poisoned_memory
from .registry import checks
from .strategies import REQUIRED, cases, classes
from .tolerance import Comparison

PROFILES: dict[str, dict[str, Any]] = {
    "pr": {"derandomize": True, "database": None, "max_examples": 12},
    "nightly": {"max_examples": 2000},
    "mutants": {
        "derandomize": True,
        "database": None,
        "max_examples": 25,
        "phases": (Phase.explicit, Phase.generate),
    },
}
"""Settings of hypothesis by name: short and always the same; long and new each time; to the first failure, as it is."""
COMMON: dict[str, Any] = {
    "deadline": None,  # the interpreter's first call of a kernel takes many times what others do
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
    "report_multiple_bugs": False,
    "print_blob": True,
}
EMPTY = "compares nothing"
"""The class of cases on which a check had nothing to compare."""
MORE = (0, 8, 32)
"""Examples beyond those asked for, tried in turn while no example compared anything: hypothesis' first is the least."""


class PropertyFailedError(AssertionError):
    """A comparison of a check failed."""


@dataclass(frozen=True, slots=True)
class Failure:
    """The least case that fails: what it found (failed comparisons, or an exception), and hypothesis' blob for it."""

    case: Case
    found: tuple[str, ...]
    blob: str


@dataclass(frozen=True, slots=True)
class PropertyResult:
    """What came of a run.

    `examples` were run; `worst` used most of its budget, on `worst_case`; `classes` counts the examples of each
    class; `seed` draws the same cases again.
    """

    check: str
    seed: int
    examples: int
    worst: Comparison | None
    worst_case: Case | None
    failures: tuple[Failure, ...]
    classes: dict[str, int]
    duration_s: float

    @property
    def ok(self) -> bool:
        """Whether nothing failed and something was compared."""
        return not self.failures and self.examples > self.classes.get(EMPTY, 0)


def missing_classes(results: Iterable[PropertyResult]) -> frozenset[str]:
    """The required classes that no example of these runs was of."""
    return REQUIRED - {name for result in results for name, count in result.classes.items() if count}


def run_property(
    check_name: str,
    *,
    examples: int,
    seed: int | None = None,
    derandomize: bool = False,
    device: str = "cpu",
    dtypes: tuple[str, ...] | None = None,
    shrink: bool = True,
) -> PropertyResult:
    """Run a check on drawn cases, in poisoned memory, up to its first failure.

    Args:
        check_name: a key of `registry.checks`.
        examples: how many cases to draw; more, up to a limit, if all of them leave the check nothing to compare.
        seed: of the draw; None: a new one, or with `derandomize` always the same, of the check's name.
        device, dtypes: see `strategies.cases`.
        shrink: look for the least case that fails; without it the first one is reported as it is.

    Raises:
        KeyError: for a check that there is not.
    """
    if seed is None:
        seed = zlib.crc32(check_name.encode()) if derandomize else secrets.randbits(64)
    run, drawn = _Run(check_name), cases(check_name, device=device, dtypes=dtypes)
    # what is derandomised must depend on nothing but the seed: neither on what it finds, nor on earlier runs
    phases = [
        Phase.generate,
        *([] if derandomize else [Phase.reuse, Phase.target]),
        *([Phase.shrink] if shrink else []),
    ]
    database = None if derandomize else DirectoryBasedExampleDatabase(".hypothesis/examples")
    began = time.monotonic()
    failures: tuple[Failure, ...] = ()
    try:
        for more in MORE:
            limits = settings(max_examples=examples + more, phases=phases, database=database, **COMMON)
            hypothesis.seed(seed)(limits(hypothesis.given(case=drawn)(run.example)))()
            if run.count > run.classes[EMPTY]:
                break
    except Exception as error:  # hypothesis raises what the least failing example raised
        if run.failed is None:
            raise
        failures = (Failure(*run.failed, blob_of(error)),)
    return PropertyResult(
        check_name, seed, run.count, run.worst, run.worst_case, failures, dict(run.classes), time.monotonic() - began
    )


def drawn_classes(
    check_name: str, *, examples: int, device: str = "cpu", dtypes: tuple[str, ...] | None = None
) -> Counter[str]:
    """How many of the cases of a derandomised run are of each class, without running them."""
    run = _Run(check_name)
    limits = settings(max_examples=examples, phases=[Phase.generate], database=None, **COMMON)
    drawn = hypothesis.given(case=cases(check_name, device=device, dtypes=dtypes))(run.count_classes)
    hypothesis.seed(zlib.crc32(check_name.encode()))(limits(drawn))()
    return run.classes


@dataclass
class _Run:
    """What the examples of one run leave behind."""

    check_name: str
    count: int = 0
    worst: Comparison | None = None
    worst_case: Case | None = None
    failed: tuple[Case, tuple[str, ...]] | None = None
    classes: Counter[str] = field(default_factory=Counter)

    def example(self, case: Case) -> None:
        """Run the check on one case and raise if it fails."""
        self.count_classes(case)
        try:
            with poisoned_memory(), warnings.catch_warnings():
                # numpy's, in the interpreter, about NaN that the check planted
                warnings.filterwarnings("ignore", "All-NaN slice|invalid value", RuntimeWarning)
                comparisons = checks()[self.check_name](case)
        except Exception as error:
            self.failed = case, (f"{type(error).__name__}: {error}",)
            raise
        if all(comparison.empty for comparison in comparisons):
            self.classes[EMPTY] += 1
        self._judge(case, comparisons)

    def count_classes(self, case: Case) -> None:
        """Count a case and what is special about it."""
        self.count += 1
        for name in sorted(classes(case)):
            self.classes[name] += 1
            hypothesis.event(name)

    def _judge(self, case: Case, comparisons: list[Comparison]) -> None:
        failed = tuple(str(comparison) for comparison in comparisons if not comparison.ok)
        worst = max(comparisons, key=lambda comparison: comparison.budget_use, default=None)
        if worst is not None and (self.worst is None or worst.budget_use > self.worst.budget_use):
            self.worst, self.worst_case = worst, case
        if failed:
            self.failed = case, failed
            raise PropertyFailedError("\n".join(failed))
        if worst is not None and math.isfinite(worst.budget_use):
            hypothesis.target(worst.budget_use, label="budget use")


def blob_of(error: BaseException) -> str:
    """How to have hypothesis run the failing example again; empty if it does not say."""
    notes = "\n".join([*getattr(error, "__notes__", []), str(error)])
    found = re.search(r"@reproduce_failure\([^)]*\)", notes)
    return found.group() if found else ""
