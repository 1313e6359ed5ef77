"""The profiles that come with the package as "auto" takes them: little is read of them, and the whole says the same."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import triton
import yaml

from cca_attention.profiles import choice, resolve
from cca_attention.profiles.bundled import Unread, bundled_profiles
from cca_attention.profiles.choice import choose
from cca_attention.profiles.layout import laid_out
from cca_attention.profiles.places import Place, bundled_folder
from cca_attention.profiles.reading import read_profile
from cca_attention.profiles.resolve import AutoProfile
from cca_attention.profiles.schema import Head, ProfileWarning
from cca_attention.verify.sample_profile import A100, PROBLEM, TEXT, TUNED

FILES = list(bundled_profiles(bundled_folder()))
GPU = torch.device("cuda", 0)
FIRST = """
import json, sys, time
import torch
from cca_attention import Problem
from cca_attention.profiles import bundled, choice, resolve, schema
from cca_attention.profiles.bundled import bundled_profiles
from cca_attention.profiles.live import LiveDevice

assert bundled_profiles.cache_info().currsize == 1, "the import has not read what they are for"
profiles = bundled_profiles(bundled.bundled_folder())
path = next(path for path in profiles if path.name == sys.argv[1] + ".yaml")
held, opened, validated = profiles[path], [], []
device = held.device
kinds = ("arch", "sm_count", "shared_bytes_per_block", "l2_bytes", "hbm_bytes")
live = LiveDevice(name=device.names[-1], **{kind: getattr(device, kind) for kind in kinds})
resolve.live_device = lambda device: live
choice.triton.__version__ = held.software.triton
choice.source_hash = lambda kernel: held.kernels[kernel].source_hash if kernel in held.kernels else ""
whole = schema.as_config
schema.as_config = lambda kernel, values: validated.append(kernel) or whole(kernel, values)
problem = Problem(q_heads=32, kv_heads=8, seq_len=131072, head_dim=128)
sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" else None)
begin = time.thread_time()
found = resolve.AutoProfile().resolutions(problem, torch.device("cuda", 0))
took = time.thread_time() - begin
print(json.dumps([str(path), opened, sorted(validated), sorted(k for k in found if found[k].entry), took]))
"""


def first_look_up(gpu: str, empty: Path) -> tuple[str, list[str], list[str], list[str], float]:
    """Of a fresh process: its file, the files opened, kernels of the entries validated and of those served, seconds."""
    child = subprocess.run(
        ["env", "CCA_PROFILE_PATH=", f"XDG_DATA_HOME={empty}", sys.executable, "-c", FIRST, gpu],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert child.returncode == 0, child.stderr
    return tuple(json.loads(child.stdout.splitlines()[-1]))  # type: ignore[return-value]


@pytest.mark.timeout(120)
@pytest.mark.parametrize("gpu", ["h200", "b200", "a100-80gb"])
def test_a_first_look_up_opens_one_file_and_validates_one_entry_of_a_kernel(gpu: str, tmp_path: Path) -> None:
    file, opened, validated, served, seconds = first_look_up(gpu, tmp_path)
    assert [path for path in opened if not path.startswith("/proc/")] == [file]
    assert validated == served and len(served) >= 7
    assert seconds < 0.05  # ten times what docs/profiles.md allows


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(bundled_folder()).as_posix())
def test_what_is_read_of_a_file_chooses_what_the_whole_of_it_does(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    part, whole = bundled_profiles(bundled_folder())[path], read_profile(path)
    assert all(isinstance(entry, Unread) for entry in part.entries) and part.source == whole.source
    assert tuple(entry.whole() for entry in part.entries) == whole.entries
    assert all(getattr(part, name) == getattr(whole, name) for name in Head.model_fields)
    monkeypatch.setattr(choice, "source_hash", lambda kernel: whole.kernels[kernel].source_hash)
    monkeypatch.setattr(triton, "__version__", whole.software.triton)
    own = whole.entries[0].problem
    for change in ({}, {"seq_len": 2048}, {"batch": 64}, {"kv_heads": 4}, {"head_dim": 64}, {"seq_len": 2**24}):
        for kernel in whole.kernels:
            assert choose(part, kernel, replace(own, **change)) == choose(whole, kernel, replace(own, **change))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that stands for the one of the package, with no others; the GPU at hand is an A100."""
    monkeypatch.setattr(resolve, "bundled_folder", lambda: tmp_path)
    monkeypatch.setattr(resolve, "places_of_others", lambda report: [])
    monkeypatch.setattr(resolve, "live_device", lambda device: A100)
    return tmp_path


def put(path: Path, old: str = "", new: str = "") -> None:
    """The sample profile, laid out as we write it, with one word replaced."""
    text = laid_out(yaml.safe_load(TEXT))
    assert old in text
    path.write_text(text.replace(old, new, 1) if old else text)


def look_up() -> choice.Resolution:
    return AutoProfile().resolutions(PROBLEM, GPU)["forward"]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"sm_count": 108', '"sm_count": "many"'),
        ('"triton": ', '"other": '),
        ('"forward": {"source', '"another": {"source'),
        ('"median_us": 51000.0', '"median_us": -1'),
        ('"block_q": 128', '"block_q": "many"'),
        ('"kv_heads": 8, "seq_len"', '"kv_heads": 5, "seq_len"'),
        ('- {"kernel"', '- 1\n- {"kernel"'),
        ('"determinism": {', '"determinism": '),
    ],
)  # fmt: skip
def test_one_that_was_damaged_is_passed_over_with_a_warning(folder: Path, old: str, new: str) -> None:
    put(folder / "1.yaml", old, new)
    with pytest.warns(ProfileWarning, match=r"passed over: .*1\.yaml"):
        assert look_up().source == "built-in"
    put(folder / "2.yaml")
    bundled_profiles.cache_clear()
    with pytest.warns(ProfileWarning, match=r"passed over: .*1\.yaml"):
        assert (look_up().source, look_up().config) == (str(folder / "2.yaml"), TUNED)


def test_one_that_was_written_by_hand_is_read_whole(folder: Path) -> None:
    (folder / "1.yaml").write_text(TEXT)
    assert (look_up().level, look_up().config) == ("exact", TUNED)


def test_a_file_of_others_is_read_whole(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(folder / "1.yaml", '"median_us": 51000.0', '"median_us": -1')
    other = replace(PROBLEM, head_dim=64)  # its only entry is not for this, and is never chosen
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert AutoProfile().resolutions(other, GPU)["forward"].source == "built-in"
    monkeypatch.setattr(resolve, "bundled_folder", lambda: folder / "none")
    monkeypatch.setattr(resolve, "places_of_others", lambda report: [Place("user", folder)])
    with pytest.warns(ProfileWarning, match=r"passed over: .*1\.yaml has 1 mistake"):
        assert AutoProfile().resolutions(other, GPU)["forward"].source == "built-in"
