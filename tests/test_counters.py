"""benchmarks/counters.py: what `ncu` prints becomes a table, and docs show the one of the record."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT: dict[str, Any] = runpy.run_path(str(ROOT / "benchmarks" / "counters.py"))
VALUES = ["16,054,000", "1,667,078,049.5", "76.39", "39.58", "40.06", "91.01", "410,875,420,831.2"]


def printed(*names: str) -> str:
    """What `ncu` says of these kernels, between its own words."""
    head = ["ID", "Kernel Name", "Grid Size", *SCRIPT["COUNTERS"]]
    lines = [head, ["", "", "", "ns", "hz", "%", "%", "%", "%", "byte/s"]]
    lines += [[str(i), f"{name}_kernel", "(132, 1, 1)", *VALUES] for i, name in enumerate(names)]
    text = "\n".join(",".join(f'"{cell}"' for cell in line) for line in lines)
    return f"==PROF== Connected to process 975\n{text}\n==PROF== Disconnected from process 975\n"


def test_every_launch_is_a_row_with_every_counter() -> None:
    first, second = SCRIPT["rows"](printed("pooling", "forward"))
    assert (first["kernel"], second["kernel"], first["grid"]) == ("pooling", "forward", "(132, 1, 1)")
    assert [first[name] for name in SCRIPT["COUNTERS"]] == [float(value.replace(",", "")) for value in VALUES]
    head, _, row, _ = SCRIPT["table"]({"kernels": [{**first, "busy_ms": 0.5}, second]})
    assert row == "| `pooling` | 0.50 | 16.054 | 1,667 | 76.4 | 39.6 | 40.1 | 91.0 | 0.41 |"
    assert head.count("|") == row.count("|")


def test_a_counter_that_was_not_printed_is_no_zero() -> None:
    with pytest.raises(ValueError, match="could not convert"):
        SCRIPT["rows"](printed("pooling").replace("76.39", "n/a"))


def test_docs_show_the_record() -> None:
    record = json.loads((ROOT / "docs" / "data" / "counters-h200.json").read_text(encoding="utf-8"))
    shown = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    assert "\n".join(SCRIPT["table"](record)) in shown
