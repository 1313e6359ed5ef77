"""What other projects use: the pytest plugin, `--profile`, the example project and the workflow files."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from cca_attention import Problem, cli_verify
from cca_attention.kernels.forward import ForwardConfig
from cca_attention.kernels.pooling import PoolingConfig
from cca_attention.profiles.configs import source_hash, tunables
from cca_attention.profiles.schema import Baseline, Entry, Profile
from cca_attention.verify.layers import profile_units
from cca_attention.verify.record import Result, read
from cca_attention.verify.run import Options, run
from cca_attention.verify.units import Unit

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "downstream"
PROBLEM = Problem(q_heads=2, kv_heads=2, seq_len=256, head_dim=16, group_size=4, window_size=8, dtype="float32")
SMALL = {"pooling": asdict(PoolingConfig(block_c=4)), "forward": asdict(ForwardConfig(block_q=16, block_k=16))}


def profile(path: Path, **configs: dict[str, int]) -> Path:
    """Write a profile with these configs for the tiny problem."""
    entries = [
        {
            "kernel": kernel, "problem": PROBLEM.as_dict(), "config": config, "evidence": "default",
            "baseline": {"config": config, "time_us": None},
        }
        for kernel, config in configs.items()
    ]  # fmt: skip
    content = {
        "schema": "cca-profile/1.0",
        "created": "2026-11-22T10:00:00+00:00",
        "device": {
            "name": "a100-80gb", "vendor": "nvidia", "arch": "sm_80", "sm_count": 108, "shared_bytes_per_block": 166912,
            "names": ["a100"], "l2_bytes": 41943040, "hbm_bytes": 80000000000, "hbm_gbps": 2039.0,
        },
        "software": {"cca_attention": "0.1.0", "triton": "3.7.1", "torch": "2.13.0", "python": "3.11.7"},
        "semantic": {"group_size": 4, "window_size": 8, "core_heads": "query", "pooling": "last_query"},
        "kernels": {kernel: {"source_hash": source_hash(kernel)} for kernel in configs},
        "entries": entries,
    }  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture
def downstream(tmp_path: Path) -> Path:
    """A copy of the example project."""
    shutil.copytree(EXAMPLE, tmp_path / "downstream", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path / "downstream"


def pytest_in(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run its suite in a process of its own, as its workflow does."""
    command = ["env", "PYTHONPATH=src", sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=100)


def test_the_example_project_passes_with_the_profiles_configs(downstream: Path) -> None:
    profile(downstream / "profiles" / "a100-80gb.yaml", **SMALL)
    ran = pytest_in(downstream, "--cca-profile", "profiles/a100-80gb.yaml")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "4 passed" in ran.stdout
    assert f"cca-attention::forward[{PROBLEM}] PASSED" in ran.stdout


def test_a_config_that_cannot_run_fails_their_suite(downstream: Path) -> None:
    profile(downstream / "bad.yaml", forward={**SMALL["forward"], "block_q": 48}, pooling=SMALL["pooling"])
    ran = pytest_in(downstream, "--cca-profile", "bad.yaml", "-k", "forward")
    assert ran.returncode == 1 and "1 failed" in ran.stdout
    assert "refused: block_q 48 is not a power of two" in ran.stdout


def test_a_profile_that_cannot_be_read_is_an_error(downstream: Path) -> None:
    ran = pytest_in(downstream, "--cca-profile", "none.yaml")
    assert ran.returncode == 4 and "--cca-profile: there is no profile file none.yaml" in ran.stdout + ran.stderr


def test_the_command_checks_a_profile(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, record = profile(tmp_path / "p.yaml", pooling=SMALL["pooling"]), tmp_path / "r.json"
    with pytest.raises(SystemExit) as ended:
        cli_verify.main(["--profile", str(path), "--json", str(record), "--jobs", "1"])
    assert ended.value.code == 0, capsys.readouterr().err
    (result,) = read(record).results
    assert (result.id, result.status, result.kernel) == (f"profile/pooling/{PROBLEM}", "pass", "pooling")
    assert result.budget_use is not None and 0 < result.budget_use <= 1


def test_a_kernel_of_one_gpu_is_not_run_without_one() -> None:
    hopper = tunables("sm_90")["forward_hopper"]
    half = replace(PROBLEM, head_dim=64, dtype="bfloat16")
    config = next(config for config, refusal in hopper.candidates(half) if refusal is None)
    entry = Entry(
        kernel="forward_hopper", problem=half, config=asdict(config), evidence="default",
        baseline=Baseline(config=asdict(config), time_us=None),
    )  # fmt: skip
    (unit,) = profile_units(Profile.model_construct(entries=(entry,)))
    (result,) = run([unit], Options(gpu=False), Silence())
    assert (result.status, result.id) == ("not-run", f"profile/forward_hopper/{half}")


class Silence:
    def started(self, unit: Unit) -> None: ...

    def ended(self, result: Result) -> None: ...


def options_used(text: str) -> set[str]:
    """Options of `cca-verify` in the lines of a workflow file."""
    lines = [line for line in text.splitlines() if "cca-verify" in line or "options" in line]
    return set(re.findall(r"(?<![\w-])(--[a-z-]+)", "\n".join(lines)))


@pytest.mark.parametrize(
    "path", [ROOT / "ci" / "verify-action" / "action.yml", EXAMPLE / ".github" / "workflows" / "verify.yml"],
    ids=lambda path: path.name,
)  # fmt: skip
def test_workflow_files_use_options_that_there_are(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content: dict[Any, Any] = yaml.safe_load(path.read_text())
    assert content["name"]
    used = options_used(path.read_text())
    known = set()
    for command in ([], ["report"]):
        with pytest.raises(SystemExit):
            cli_verify.main([*command, "--help"])
        known |= set(re.findall(r"--[a-z-]+", capsys.readouterr().out))
    assert "--json" in used and used <= known


def test_the_action_says_what_it_takes() -> None:
    action = yaml.safe_load((ROOT / "ci" / "verify-action" / "action.yml").read_text())
    text = (ROOT / "ci" / "verify-action" / "action.yml").read_text()
    assert action["runs"]["using"] == "composite"
    assert set(re.findall(r"inputs\.(\w+)", text)) == set(action["inputs"])
    script = action["runs"]["steps"][0]["run"]
    checked = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr
