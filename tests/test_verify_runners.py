"""What the units of `cca-verify` do in their worker processes; those of the GPU are tried on the eager path here."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cca_attention import cca_attention, fused
from cca_attention.verify import calls, gpu, layers, ratchet, runners, units
from cca_attention.verify.layers import Extent, plan
from cca_attention.verify.record import Result
from cca_attention.verify.units import Unit

INTERPRETED = pytest.mark.skipif(torch.cuda.is_available(), reason="these units are for the interpreter")


def unit(runner: str, check: str, **fields: Any) -> Unit:
    return Unit(
        id=f"L9/{check}", layer="L9", check=check, runner=runner, place="interpreter", mode="interpreter",
        **{"dtype": "float32", **fields},
    )  # fmt: skip


def run(wanted: Unit) -> Result:
    return units.RUNNERS[wanted.runner](wanted)


def planned(name: str) -> Unit:
    """The unit of this id."""
    return next(each for each in plan((name[:2],), Extent(examples=2)) if each.id == name)


# --- in the interpreter ------------------------------------------------------------------------------------------


@INTERPRETED
def test_fixed_cases_of_a_check() -> None:
    result = run(unit("check", "forward_equals_oracle", arguments={"cases": ("two_tiles", "packed")}))
    assert (result.status, result.cases) == ("pass", 2) and 0 < (result.budget_use or 0) <= 1


@INTERPRETED
def test_a_shadowed_check_sees_memory_that_is_read_before_it_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = unit("shadowed", "forward_equals_oracle", arguments={"cases": ("all_raw",)})
    assert run(wanted).status == "pass"
    monkeypatch.setattr(fused, "launch_pooling", lambda *tensors, **options: None)
    result = run(replace(wanted, arguments={"cases": ("two_tiles",)}))
    assert result.status == "fail"


@INTERPRETED
def test_drawn_cases_count_their_classes() -> None:
    result = run(planned("L2/drawn/constant_values"))
    assert result.status == "pass" and result.cases >= 2
    assert result.facts["classes"] and "crosses tile" in result.facts["required_classes"]
    assert result.seed == result.facts["seed"] != 0


@INTERPRETED
def test_a_drawn_failure_says_how_to_repeat_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*tensors: torch.Tensor, **options: Any) -> Any:
        out, lse = cca_attention(*tensors, **options)
        return out + 1, lse

    monkeypatch.setattr(calls, "cca_attention", wrong)
    result = run(planned("L2/drawn/forward_equals_oracle"))
    assert result.status == "fail" and "out: FAILED" in result.message
    assert "Case(" in result.case and "reproduce_failure" in result.blob


def test_without_hypothesis_the_environment_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, f"{runners.__package__}.property_run", None)
    result = run(unit("drawn", "forward_equals_oracle", arguments={"examples": 1, "seed": None, "device": "cpu"}))
    assert (result.status, result.trouble) == ("error", "environment") and "pip install" in result.message


@INTERPRETED
def test_a_config_is_forced() -> None:
    wanted = planned("L3/config/pooling/block_c2-block_t16")
    result = run(wanted)
    assert result.status == "pass" and result.facts == {"configs": 1, "without_room": 0}
    assert result.config is not None and result.config["pooling"]["block_c"] == 2


def test_every_choice_of_tiles_has_a_unit_and_a_gpu_gets_all_of_its_configs() -> None:
    found = [each for each in plan(("L3", "L6"), Extent()) if each.runner == "config"]
    here, there = ([each for each in found if each.layer == layer] for layer in ("L3", "L6"))
    assert {each.id[2:] for each in here} == {each.id[2:] for each in there}
    assert all(len(each.arguments["configs"]) == 1 for each in here)
    assert sum(len(each.arguments["configs"]) for each in there) > 900
    few = [each for each in plan(("L6",), Extent(examples=2, seed=7)) if each.runner == "config"]
    assert max(len(each.arguments["configs"]) for each in few) == 2


def test_a_ratchet_that_grew_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ratchet, "measure", lambda: {"a/out/float32/eager": 0.9})
    monkeypatch.setattr(ratchet, "load", lambda: {"a/out/float32/eager": 0.2})
    result = run(planned("L2/ratchet"))
    assert result.status == "fail" and "a/out/float32/eager" in result.message and result.facts["ratchet"]
    monkeypatch.setattr(ratchet, "load", lambda: {"a/out/float32/eager": 0.9})
    assert run(planned("L2/ratchet")).status == "pass"


# --- on the GPU, tried on the eager path -------------------------------------------------------------------------


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """The GPU's units on the CPU, small."""
    right = gpu.Case
    monkeypatch.setattr(gpu, "DEVICE", "cpu")
    monkeypatch.setattr(gpu, "BATCH", 2)
    monkeypatch.setattr(gpu, "LARGE", {"q_heads": 2, "kv_heads": 2, "seq_len": 300, "head_dim": 16})
    monkeypatch.setattr(gpu, "LARGE_DECODE", {**gpu.LARGE, "batch": 2})
    monkeypatch.setattr(gpu, "Case", lambda **given: right(**given, backend="eager"))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("name", ["repeats/float32", "large/forward", "large/backward/unaligned", "large/decode"])
def test_units_of_the_gpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "REPEATS", 2)
    wanted = planned(f"L6/{name}")
    assert run(wanted).status == "pass"
    calls_made = []

    def drifting(*args: Any, **options: Any) -> Any:
        calls_made.append(1)
        return {name: x + 0.01 * len(calls_made) for name, x in calls.run(*args, **options).items()}

    def drifting_feed(*args: Any) -> Any:
        calls_made.append(1)
        return calls.feed(*args) + 0.01 * len(calls_made)

    monkeypatch.setattr(gpu, "run", drifting)
    monkeypatch.setattr(gpu, "feed", drifting_feed)
    assert run(wanted).status == "fail"


def test_the_large_tensors_are_large() -> None:
    for sizes in (gpu.LARGE, gpu.LARGE_DECODE):
        elements = sizes.get("batch", 1) * sizes["q_heads"] * sizes["seq_len"] * sizes["head_dim"]
        assert elements // (1 if sizes is gpu.LARGE else 2) > 2**31, "cores are half of the tokens in decode"


SANITIZER = """#!/bin/sh
echo "{said}"
echo "========= {summary} SUMMARY: {count} {what}"
"""


def sanitized(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tool: str, count: int, said: str = gpu.DONE, strict: bool = False
) -> Result:
    """The result of a tool that says this."""
    summary = "RACECHECK" if tool == "racecheck" else "ERROR"
    program = folder / gpu.TOOL
    program.write_text(SANITIZER.format(said=said, summary=summary, count=count, what="errors"))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    return run(replace(planned(f"L6/sanitizer/{tool}"), strict=strict))


def test_what_the_sanitizer_says_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert sanitized(tmp_path, monkeypatch, "memcheck", 0).status == "pass"
    failed = sanitized(tmp_path, monkeypatch, "memcheck", 3)
    assert failed.status == "fail" and "errors of memcheck" in failed.message
    crashed = sanitized(tmp_path, monkeypatch, "memcheck", 0, said="killed")
    assert (crashed.status, crashed.trouble) == ("error", "crash")
    hazard = sanitized(tmp_path, monkeypatch, "racecheck", 2)
    assert hazard.status == "pass" and hazard.warnings
    assert sanitized(tmp_path, monkeypatch, "racecheck", 2, strict=True).status == "fail"


def test_without_the_sanitizer_it_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    result = run(planned("L6/sanitizer/initcheck"))
    assert result.status == "not-run" and result.facts == {"missing": gpu.TOOL}
