"""Makes docs/data/mutants.json and docs/mutants.md: which check sees which fault, and which other project's rule would.

    python -m cca_attention.verify.mutant_table docs            # all mutants; some ten minutes on one core
    python -m cca_attention.verify.mutant_table docs F9 tf32    # these only, the others as the file has them

It exits as `cca-verify mutants` does. The rules get the results of the mutants that one call of the operator can show:
the eight published ones, F and B, as far as they are not of the decode state.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy
import torch
import triton
from rich.console import Console

from .child import ChildFailedError
from .mutants import MUTANTS, NOT_APPLICABLE, Judge, Verdict, exit_code, planted, selected, workshop
from .mutants_rules import (
    DTYPES,
    FAMILIES,
    Refusals,
    needs_gradients,
    refusals_of_all_families,
    refusals_of_mutant,
    shows_in_one_call,
)
from .rules import RULES

SCHEMA = "cca-mutants/1"
TIMEOUT_S = 120.0
ALL = "all families"


# --- the data ---------------------------------------------------------------------------------------------------------


class Survey:
    """Judges mutants and asks the rules about them and, once for each case, about the correct kernels."""

    def __init__(self, judge: Judge, table: dict[str, Any]) -> None:
        self.judge, self.table = judge, table
        if ALL not in table["correct"]:
            table["correct"][ALL] = self._ask(refusals_of_all_families, None, judge.original)

    def enter(self, name: str) -> Verdict:
        """Judge mutant `name` and enter what is found into the table."""
        mutant, verdict = MUTANTS[name], self.judge.judge(name, MUTANTS[name])
        row: dict[str, Any] = {**asdict(verdict), "killed": verdict.killed, "refused": None, "baseline": None}
        if shows_in_one_call(mutant) and verdict.outcome in ("killed", "survived"):
            row["baseline"] = f"{mutant.case.problem}, {mutant.case.layout}, {mutant.case.family}, " + (
                f"bounds {mutant.case.bounds}, scale {mutant.case.scale}, gradients {needs_gradients(mutant)}"
            )
            if row["baseline"] not in self.table["correct"]:
                correct = self._ask(refusals_of_mutant, name, self.judge.original)
                self.table["correct"][row["baseline"]] = correct
            with planted(mutant, self.judge.original) as source:
                row["refused"] = self._ask(refusals_of_mutant, name, source)
        self.table["mutants"][name] = row
        return verdict

    def _ask(self, question: Callable[[Any], Refusals], argument: Any, source: Path) -> Refusals:
        """What the rules say; of what takes the process down, that all refuse it."""
        try:
            found: Refusals = self.judge.forks.call(question, argument, source=source, timeout_s=TIMEOUT_S)
        except ChildFailedError:
            if source == self.judge.original:
                raise
            found = {dtype: {family: list(RULES) for family in FAMILIES} for dtype in DTYPES}
        return found


def measure(names: Iterable[str] | None, table: dict[str, Any], console: Console) -> list[Verdict]:
    """Judge the mutants `names` (default: all), and enter what is found into `table`."""
    verdicts = []
    with workshop() as (forks, original):
        survey = Survey(Judge(forks, original), table)
        for name in selected(names):
            verdicts.append(verdict := survey.enter(name))
            console.print(f"{verdict.outcome:8} {verdict.id:3} {name} ({verdict.seconds:.1f} s) {verdict.error}")
    return verdicts


def blank() -> dict[str, Any]:
    """A table with nothing in it, of these versions."""
    versions = {"python": platform.python_version()}
    versions |= {module.__name__: module.__version__ for module in (torch, triton, numpy)}
    rules = {name: {"words": rule.words, "source": rule.source, "dtypes": rule.dtypes} for name, rule in RULES.items()}
    return {
        "schema": SCHEMA, "versions": versions, "rules": rules, "families": FAMILIES, "not_applicable": NOT_APPLICABLE,
        "correct": {}, "mutants": {},
    }  # fmt: skip


# --- the page ---------------------------------------------------------------------------------------------------------


def saw(table: dict[str, Any], row: dict[str, Any], rule: str, dtype: str) -> list[str]:
    """The families on which `rule` refuses a mutant and accepts the correct kernels."""
    correct = table["correct"][row["baseline"]][dtype]
    return [
        family for family, refused in row["refused"][dtype].items() if rule in refused and rule not in correct[family]
    ]


def kills(table: dict[str, Any], rule: str, dtype: str, family: str | None = None) -> int:
    """How many mutants `rule` sees in `dtype`, on values of `family` or on any."""
    found = (saw(table, row, rule, dtype) for row in table["mutants"].values() if row["refused"])
    return sum(bool(families) if family is None else family in families for families in found)


def alarms(table: dict[str, Any], rule: str, dtype: str) -> tuple[int, int]:
    """How many runs of the correct kernels `rule` refuses in `dtype`, and of how many."""
    runs = [refused for case in table["correct"].values() for refused in case[dtype].values()]
    return sum(rule in refused for refused in runs), len(runs)


def page(table: dict[str, Any]) -> str:
    """docs/mutants.md."""
    judged = sum(row["refused"] is not None for row in table["mutants"].values())
    killed = sum(row["killed"] for row in table["mutants"].values())
    versions = ", ".join(f"{name} {version}" for name, version in table["versions"].items())
    parts = [
        INTRO.format(killed=killed, count=len(table["mutants"])),
        RULES_INTRO.format(judged=judged),
        *(f"- {name}: {rule['words']} ({rule['source']})" for name, rule in table["rules"].items()),
        *(line for dtype in DTYPES for line in _rules(table, judged, dtype)),
        MUTANTS_INTRO,
        *_mutants(table),
        STAND_INS,
        *(f"- {fault}. Ours: {reason}." for fault, reason in table["not_applicable"].items()),
        f"\nMade by `python -m cca_attention.verify.mutant_table docs`, with {versions}.",
    ]
    return "\n".join(parts) + "\n"


def _rules(table: dict[str, Any], judged: int, dtype: str) -> Iterator[str]:
    families = table["families"]
    yield f"\nIn {dtype}, of {judged} mutants:\n"
    yield f"| rule | {' | '.join(families)} | on any | false alarms |"
    yield "|---|" + "---|" * (len(families) + 2)
    for name, rule in table["rules"].items():
        if dtype in rule["dtypes"]:
            counts = [kills(table, name, dtype, family) for family in (*families, None)]
            alarm = "{} of {}".format(*alarms(table, name, dtype))
            yield f"| {name} | {' | '.join(map(str, counts))} | {alarm} |"


def _mutants(table: dict[str, Any]) -> Iterator[str]:
    yield "| id | mutant | what is wrong | seen by | in | missed by, float16 | missed by, float32 |"
    yield "|---|---|---|---|---|---|---|"
    for name, row in table["mutants"].items():
        seen = ", ".join(dict.fromkeys(row["seen"][:3])) + (" ..." if len(row["seen"]) > 3 else "")
        verdict = f"`{row['check']}`" if row["killed"] else f"**{row['outcome']}**"
        missed = [_missed(table, row, dtype) for dtype in DTYPES]
        yield f"| {row['id']} | {name} | {row['says']} | {verdict} | {seen} | " + " | ".join(missed) + " |"


def _missed(table: dict[str, Any], row: dict[str, Any], dtype: str) -> str:
    if row["refused"] is None:
        return "-"
    rules = [name for name, rule in table["rules"].items() if dtype in rule["dtypes"]]
    missed = [name for name in rules if not saw(table, row, name, dtype)]
    return "all" if missed == rules else ", ".join(missed) or "none"


INTRO = """# Mutants

A check that cannot fail proves nothing. Each of these faults is planted in a copy of our own sources, as a patch of
the text, and a check that it names in advance has to see it; the same check has to pass without it. A patch that no
longer applies is an error, a patched package that does not run is no success, and the rate has to be 100 %:
**{killed} of {count} are seen**. `cca-verify mutants` does it again.

The published mistakes of CCA's own code are 1 to 8. F are faults of the forward, B of the backward, D of the decode
state, R of programs that meet in memory, A of a tuner's candidates, H of the gate itself."""

RULES_INTRO = """
## What other projects' rules would have seen

The results of {judged} mutants (1 to 8, F and B, as far as one call shows them) were also given to the acceptance rules
of other projects, on each mutant's own shape and layout, in memory full of NaN, with values of three families and the
mutant's own (`small_values` has values 1000 times smaller). A rule sees a mutant where it refuses out, dq, dk or dv of
it and accepts those of the correct kernels on the same inputs. False alarms are the runs of the correct kernels that a
rule refuses, on the same inputs and on all families.

Read it with this in mind. The shapes are tiny, and shape, layout and poisoned memory are chosen to provoke the faults:
that flatters every rule, most of all one that takes a mean or one largest error of a whole tensor. Rules for bfloat16
are applied to float16, which is kinder to them. And faults of memory and of wide offsets are missed by all, ours
included, through no fault of a rule: results do not show them, the shadow checker does. "Seen by" below is this
project's whole answer, of which the rule for results is one part.
"""

MUTANTS_INTRO = """
## Every mutant

"In" are the comparisons that failed; "missed by" are the rules that accepted it on every family.
"""

STAND_INS = """
## What cannot be planted
"""


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("docs", type=Path, help="the folder of the documentation")
    parser.add_argument(
        "--only-page", action="store_true", help="make the page of the data that is there, judge nothing"
    )
    parser.add_argument("names", nargs="*", help="names or ids of mutants; default: all")
    options = parser.parse_args(arguments)
    data, console = options.docs / "data" / "mutants.json", Console(stderr=True)
    table = blank()
    if (options.names or options.only_page) and data.is_file():
        before = json.loads(data.read_text())
        table |= {key: before[key] for key in ("correct", "mutants")}
    verdicts = [] if options.only_page else measure(options.names or None, table, console)
    table["mutants"] = {name: table["mutants"][name] for name in MUTANTS if name in table["mutants"]}
    data.write_text(json.dumps(table, indent=1, allow_nan=False) + "\n")
    (options.docs / "mutants.md").write_text(page(json.loads(data.read_text())))
    return 0 if options.only_page else exit_code(verdicts)


if __name__ == "__main__":
    sys.exit(main())
