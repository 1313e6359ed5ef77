"""The verdict of a record of cca-verify, derived anew from its JSON: `python -m cca_attention.ci.verdict R.json`.

It imports nothing of the package and takes no status on trust: every planned check must be there once, as many as the
repository expects, each pass must have compared something within its budget, and each skip must be allowed. The exit
codes are those of cca-verify: 0 pass; 1 failure; 2 surviving mutant; 3 time-out, crash or a run that did not end;
4 environment; 5 configuration, and any file that is not a whole record.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

SCHEMA = "cca-verify/1"
HERE = Path(__file__).parent
PASSED, FAILED, SURVIVED, CRASHED, BROKEN, MISCONFIGURED = range(6)
SERIOUS = (MISCONFIGURED, BROKEN, CRASHED, FAILED, SURVIVED)
"""Codes by how little is known after them; a run that deserves several gets the first."""
MOST_LINES = 20

Complaint = tuple[int, str]


def complaints(
    record: Any, expected: Mapping[str, int] | None = None, allowed: Mapping[str, str] | None = None
) -> list[Complaint]:
    """What is wrong with a parsed record: exit codes and lines, empty for a pass.

    `expected` are the least numbers of checks of each layer and `allowed` the ids that may be skipped, by default those
    of the repository.
    """
    if not isinstance(record, dict) or record.get("schema") != SCHEMA:
        return [(MISCONFIGURED, f"this is not a record of schema {SCHEMA}")]
    try:
        found = list(_of_plan(record, read_expected() if expected is None else expected))
        for result in record["results"]:
            found += _of_result(result, record, read_allowed() if allowed is None else allowed)
        found += [(FAILED, f"class of inputs never hit: {name}") for name in record["footer"]["missing_classes"]]
        found += [(FAILED, f"ratchet: {line}") for line in record["footer"]["ratchet"]]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        return [(MISCONFIGURED, f"the record is damaged: {type(error).__name__}: {error}")]
    return found


def _of_plan(record: dict[str, Any], expected: Mapping[str, int]) -> Iterator[Complaint]:
    results, header = record["results"], record["header"]
    if record["complete"] is not True:
        yield CRASHED, "the run did not come to its end"
    ids = Counter(result["id"] for result in results)
    planned = set(header["planned"])
    yield from ((MISCONFIGURED, f"planned, and not there: {name}") for name in sorted(planned - set(ids)))
    yield from ((MISCONFIGURED, f"there, and not planned: {name}") for name in sorted(set(ids) - planned))
    yield from ((MISCONFIGURED, f"{count} results of {name}") for name, count in ids.items() if count > 1)
    ran = Counter(result["layer"] for result in results if result["status"] != "not-run")
    if not ran:
        yield MISCONFIGURED, "no check ran"
    of_layer = Counter(result["layer"] for result in results)
    for layer in header["layers"]:
        if of_layer[layer] < max(1, expected.get(layer, 1)):
            yield MISCONFIGURED, f"{layer} has {of_layer[layer]} checks, expected are {max(1, expected.get(layer, 1))}"
    counted = Counter(result["status"] for result in results)
    if {status: n for status, n in record["footer"]["counts"].items() if n} != dict(counted):
        yield MISCONFIGURED, "the footer counts other results than there are"


def _of_result(result: dict[str, Any], record: dict[str, Any], allowed: Mapping[str, str]) -> Iterator[Complaint]:
    name, status = result["id"], result["status"]
    said = f"{name}: {result['message']}"
    if status == "pass":
        yield from ((FAILED, f"{name}: {why}") for why in _hollow(result))
        if record["header"]["strict"] and result["warnings"]:
            yield FAILED, f"{name}: {result['warnings'][0]}"
    elif status == "fail":
        yield SURVIVED if result["layer"] == "L5" else FAILED, said
    elif status == "error":
        codes = {"stale-mutant": MISCONFIGURED, "environment": BROKEN}
        yield codes.get(result["trouble"], CRASHED), said
    elif status == "skip":
        if name not in allowed:
            yield MISCONFIGURED, f"{name} was skipped, and is not in the list of allowed skips"
    elif status == "not-run":
        no_tool = result["facts"].get("missing") == "compute-sanitizer"
        if result["mode"] != "gpu" or (record["header"]["gpu"] and not no_tool):
            yield MISCONFIGURED, f"{name} was not run although it could have been"
    else:
        yield MISCONFIGURED, f"{name} has the unknown status {status!r}"


def _hollow(result: dict[str, Any]) -> Iterator[str]:
    """Why a pass is none."""
    if result["layer"] == "L5":
        if result["facts"].get("killed") is not True:
            yield "a pass of a mutant that was not killed"
        return
    if not result["cases"] > 0:
        yield "a pass of no case"
    use = result["budget_use"]
    if not isinstance(use, int | float) or isinstance(use, bool) or not math.isfinite(use) or not 0 <= use <= 1:
        yield f"a pass with a budget use of {use!r}"


def read_expected() -> dict[str, int]:
    """The least numbers of checks, from expected.json."""
    expected: dict[str, int] = json.loads((HERE / "expected.json").read_text())
    return expected


def read_allowed() -> dict[str, str]:
    """Ids that may be skipped, with the reason, from allowed_skips.yaml: lines of ``id: reason``, and comments."""
    allowed = {}
    for line in (HERE / "allowed_skips.yaml").read_text().splitlines():
        text = line.partition("#")[0].strip()
        if not text or text == "{}":
            continue
        match = re.fullmatch(r"([^\s:]+): (\S.*)", text)
        if match is None:
            raise ValueError(f"allowed_skips.yaml: {line!r} is not 'id: reason'")
        allowed[match[1]] = match[2]
    return allowed


def exit_code(found: list[Complaint]) -> int:
    """The code of the most serious complaint."""
    codes = {code for code, _ in found}
    return next((code for code in SERIOUS if code in codes), PASSED)


def judge_file(path: Path) -> tuple[int, list[str]]:
    """Exit code and lines to print for the record at `path`."""
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        return MISCONFIGURED, [f"{path} is not a whole record: {error}"]
    found = complaints(record)
    code = exit_code(found)
    if found:
        more = [f"and {len(found) - MOST_LINES} more"] if len(found) > MOST_LINES else []
        return code, [line for _, line in found[:MOST_LINES]] + more
    count = Counter(result["status"] for result in record["results"])
    return code, [f"pass: {count['pass']} checks passed, {count['skip']} skipped, {count['not-run']} not run"]


def main(arguments: list[str]) -> int:
    """Print the verdict on one file and return its exit code."""
    if len(arguments) != 1:
        sys.stderr.write("usage: python -m cca_attention.ci.verdict R.json\n")
        return MISCONFIGURED
    code, lines = judge_file(Path(arguments[0]))
    (sys.stderr if code else sys.stdout).write("\n".join(lines) + "\n")
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
