"""The example of a package that ships profiles: installed as its users would, found, verified and used."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import triton

from cca_attention import cli_profile
from cca_attention.profiles.configs import as_config, source_hash
from cca_attention.profiles.reading import read_profile
from cca_attention.verify.gate import check_config

EXAMPLE = Path(__file__).parents[1] / "examples" / "profile_package"
FILE = Path("acme_cca_profiles") / "profiles" / "a10g.yaml"
SCRIPT = """
import sys, torch
from cca_attention import CCASpec, Problem, load_profile
from cca_attention.configs import configs_for, register_profile
from cca_attention.profiles import resolve, schema
from cca_attention.profiles.live import LiveDevice

profile = load_profile("a10g")
q, k = (torch.empty(1, heads, 32768, 128, dtype=torch.bfloat16, device="meta") for heads in (32, 8))
config = configs_for(register_profile("a10g"), q, k, CCASpec(16, 1024))["forward"]
facts = dict(arch="sm_86", sm_count=80, shared_bytes_per_block=101376, l2_bytes=6291456, hbm_bytes=24 * 10**9)
resolve.live_device = lambda device: LiveDevice(name="NVIDIA A10G", **facts)
auto = resolve.resolve("forward", Problem(q_heads=32, kv_heads=8, seq_len=100_000, head_dim=128), "auto")
print(profile.source, config.block_q, auto.source, auto.config.block_q, "acme_cca_profiles" in sys.modules, sep="\\n")
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package of this checkout's kernels, installed in a folder of its own; its forward has tiles of its own."""
    source, site = tmp_path_factory.mktemp("source") / "package", tmp_path_factory.mktemp("site")
    shutil.copytree(EXAMPLE, source, ignore=shutil.ignore_patterns("*.egg-info", "build", "__pycache__"))
    path = source / "src" / FILE
    text = path.read_text()
    for kernel in ("pooling", "forward"):
        text = re.sub(f"({kernel}: {{source_hash: )\\w+", rf"\g<1>{source_hash(kernel)}", text)
    text = re.sub(r"triton: [^,]+", f"triton: {triton.__version__}", text).replace("block_q: 128", "block_q: 64", 1)
    path.write_text(text)
    pip = ["pip", "install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation", "--target", str(site)]
    child = subprocess.run([sys.executable, "-m", *pip, str(source)], capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    return site


@pytest.mark.timeout(120)
def test_its_profile_is_found_and_used_and_it_is_not_imported(site: Path) -> None:
    settings = [f"PYTHONPATH={site}", f"XDG_DATA_HOME={site}", "CCA_PROFILE_PATH="]
    child = subprocess.run(
        ["env", *settings, sys.executable, "-c", SCRIPT], cwd=site.parent, capture_output=True, text=True
    )
    assert child.returncode == 0, child.stderr
    assert child.stdout.splitlines() == [str(site / FILE), "64", str(site / FILE), "64", "False"]


@pytest.mark.timeout(120)
def test_its_configs_are_verified(site: Path) -> None:
    profile = read_profile(site / FILE)
    assert {entry.kernel for entry in profile.entries} == {"pooling", "forward"}
    (entry,) = (entry for entry in profile.entries if entry.kernel == "pooling")
    evidence = check_config(entry.kernel, as_config(entry.kernel, entry.config), problem=entry.problem)
    assert evidence.ok, evidence.message


def test_what_is_in_the_example_can_be_read() -> None:
    profile = read_profile(EXAMPLE / "src" / FILE)
    assert profile.device.name == "a10g" and "[project.entry-points" in (EXAMPLE / "pyproject.toml").read_text()


def test_the_commands_of_its_readme_are_ones_that_there_are(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = (EXAMPLE / "README.md").read_text()
    for words in re.findall(r"^ +cca-profile (.*?)(?: +#.*)?$", text, re.MULTILINE):
        arguments = [str(site / FILE) if word in ("a10g", f"src/{FILE}") else word for word in words.split()]
        with pytest.raises(SystemExit) as ended:
            cli_profile.main(arguments)
        assert ended.value.code == 0, (words, capsys.readouterr().err)
