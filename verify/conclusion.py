"""What a run's results mean: the exit code, the words for it, and the footer of the record."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from .provenance import hashes
from .record import (
    BROKEN,
    CRASHED,
    FAILED,
    INTERRUPTED,
    MEANINGS,
    MISCONFIGURED,
    PASSED,
    SURVIVED,
    Footer,
    Header,
    Result,
    counts,
)

SERIOUS = (MISCONFIGURED, BROKEN, CRASHED, FAILED, SURVIVED)
"""Codes by how little is known after them; a run that deserves several gets the first."""


def footer(
    header: Header, results: Sequence[Result], *, allowed_skips: Mapping[str, str], duration_s: float, complete: bool
) -> Footer:
    """The end of the record of these results."""
    coverage = Counter[str]()
    required: dict[str, None] = {}
    for result in results:
        coverage.update(result.facts.get("classes", {}))
        required |= dict.fromkeys(result.facts.get("required_classes", ()))
    missing = tuple(name for name in required if not coverage[name])
    ratchet = tuple(line for result in results for line in result.facts.get("ratchet", ()))
    code = exit_code(header, results, allowed_skips) if complete else INTERRUPTED
    if complete and code == PASSED and (missing or ratchet):
        code = FAILED
    return Footer(
        exit_code=code, verdict=MEANINGS[code], duration_s=duration_s, counts=counts(results), coverage=dict(coverage),
        missing_classes=missing, ratchet=ratchet, sha256=hashes(),
        mutants=tuple(result.facts for result in results if result.layer == "L5"),
    )  # fmt: skip


def exit_code(header: Header, results: Sequence[Result], allowed_skips: Mapping[str, str]) -> int:
    """0 for a pass, else the code of the most serious thing that is wrong."""
    codes = {_code_of(header, result, allowed_skips) for result in results}
    present = Counter(result.layer for result in results)
    if all(result.status == "not-run" for result in results):
        codes.add(MISCONFIGURED)
    if any(present[layer] < max(1, header.expected.get(layer, 1)) for layer in header.layers):
        codes.add(MISCONFIGURED)
    return next((code for code in SERIOUS if code in codes), PASSED)


def _code_of(header: Header, result: Result, allowed_skips: Mapping[str, str]) -> int:
    if result.status == "fail":
        return SURVIVED if result.layer == "L5" else FAILED
    if result.status == "error":
        return {"stale-mutant": MISCONFIGURED, "environment": BROKEN}.get(result.trouble, CRASHED)
    if result.status == "skip" and result.id not in allowed_skips:
        return MISCONFIGURED
    if result.status == "not-run":
        could_not = result.mode == "gpu" and (not header.gpu or "missing" in result.facts)
        return PASSED if could_not else MISCONFIGURED
    return PASSED
