"""What callers get for `profile=`: the best of all files for "auto", the same for every way to name one, and soon."""

from __future__ import annotations

import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cca_attention import cca_attention
from cca_attention.kernels.forward import default_config
from cca_attention.kernels.tunable import HANDLES
from cca_attention.profiles import live, places, resolve, schema
from cca_attention.profiles.choice import ProfileMismatch
from cca_attention.profiles.configs import source_hash
from cca_attention.profiles.reading import parse_profile
from cca_attention.profiles.resolve import AutoProfile
from cca_attention.profiles.schema import Profile, ProfileWarning
from cca_attention.verify.sample_profile import A100, PROBLEM, TEXT, TUNED

BUILT_IN = default_config(PROBLEM, "sm_80")
GPU = torch.device("cuda", 0)


def profile() -> Profile:
    """The sample profile."""
    return parse_profile(TEXT.encode(), "p.yaml")


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only folder with profiles, empty; the GPU at hand is an A100."""
    monkeypatch.delenv(places.ENVIRONMENT, raising=False)
    monkeypatch.setattr(places, "user_folder", lambda: tmp_path)
    monkeypatch.setattr(resolve, "bundled_folder", lambda: tmp_path / "none")
    monkeypatch.setattr(places, "package_folders", lambda report: iter(()))
    for module in (resolve, schema):
        monkeypatch.setattr(module, "live_device", lambda device: None if device is None else A100)
    monkeypatch.delitem(HANDLES, "auto", raising=False)
    return tmp_path


def put(folder: Path, name: str, **changes: str) -> None:
    """The sample profile with words replaced."""
    text = TEXT
    for old, new in changes.items():
        assert old.replace("__", " ") in text
        text = text.replace(old.replace("__", " "), new)
    (folder / name).write_text(text)


def test_auto_takes_the_profile_of_the_most_alike_gpu(files: Path) -> None:
    put(files, "1.yaml", **{"108": "64", "A100-SXM4-80GB": "A800"})
    put(files, "2.yaml", **{"sm_80": "sm_90"})
    assert AutoProfile().resolutions(PROBLEM, GPU)["forward"].source == str(files / "1.yaml")
    put(files, "3.yaml")
    found = AutoProfile().resolutions(PROBLEM, GPU)
    assert (found["forward"].source, found["forward"].level) == (str(files / "3.yaml"), "exact")
    assert found["pooling"].level == "default" and "forward_hopper" not in found


def test_auto_goes_on_to_the_next_profile_for_what_the_first_lacks(files: Path) -> None:
    put(files, "1.yaml", **{"seq_len:__131072": "seq_len: 1024", "[65536,__262144]": "[1024, 1024]"})
    put(files, "2.yaml")
    assert AutoProfile().resolutions(PROBLEM, GPU)["forward"].source == str(files / "2.yaml")


def test_auto_without_a_profile_is_built_in_with_one_warning(files: Path) -> None:
    put(files, "coarse.yaml", **{"group_size:__16": "group_size: 8"})
    auto = AutoProfile()
    with pytest.warns(ProfileWarning, match=r"no profile for NVIDIA A100.* serves .*cca-tune --gpu 'NVIDIA A100"):
        assert len(auto.schedule(PROBLEM, GPU)) == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(auto.schedule(PROBLEM, GPU)) == len(auto.schedule(PROBLEM, None)) == 0


def test_auto_passes_over_a_damaged_file_with_a_warning(files: Path) -> None:
    put(files, "1.yaml", **{"block_q:__128": "block_q: many"})
    put(files, "2.yaml", **{"sm_count:__108": "sm_count: many"})
    put(files, "3.yaml")
    with pytest.warns(ProfileWarning) as caught:
        found = AutoProfile().resolutions(PROBLEM, GPU)["forward"]
    assert found.source == str(files / "3.yaml")
    said = [str(warning.message) for warning in caught if "passed over" in str(warning.message)]
    assert len(said) == 2 and all(any(f"{number}.yaml has" in text for text in said) for number in (1, 2))


def test_auto_passes_over_a_place_that_is_not_there(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(files, "1.yaml")
    monkeypatch.setenv(places.ENVIRONMENT, "/nowhere/at/all")
    with pytest.warns(ProfileWarning, match="passed over: CCA_PROFILE_PATH names the folder /nowhere/at/all"):
        assert AutoProfile().resolutions(PROBLEM, GPU)["forward"].source == str(files / "1.yaml")


def test_resolve_answers_for_every_way_to_name_a_profile(files: Path) -> None:
    put(files, "a100.yaml")
    for given_as in ("auto", str(files / "a100.yaml"), profile()):
        found = resolve.resolve("forward", PROBLEM, given_as, GPU)
        assert (found.level, found.config) == ("exact", TUNED)
        assert resolve.resolve("forward", PROBLEM, given_as, GPU, "strict") == found
        assert resolve.resolve("forward", PROBLEM, given_as, GPU, "off").config == BUILT_IN
        assert resolve.resolve("pooling", PROBLEM, given_as, GPU).level == "default"
        with pytest.raises(ProfileMismatch, match="mode 'strict'"):
            resolve.resolve("pooling", PROBLEM, given_as, GPU, "strict")
    with pytest.raises(ValueError, match="no kernel is called 'sideways'"):
        resolve.resolve("sideways", PROBLEM)


def test_auto_works_where_there_is_nothing_to_find(device: str) -> None:
    x = torch.randn(1, 2, 40, 16, device=device)
    expected = cca_attention(x, x, x, group_size=4, window_size=8)

    def call(q: torch.Tensor) -> Any:
        return cca_attention(q, q, q, group_size=4, window_size=8, profile="auto")

    torch.compiler.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("error" if device == "cpu" else "ignore", ProfileWarning)
        torch.testing.assert_close(torch.compile(call, fullgraph=True, backend="aot_eager")(x), expected)
        torch.testing.assert_close(call(x), expected)


def test_look_ups_are_fast(files: Path) -> None:
    """A generous factor over the figures of docs/profiles.md: 5 ms and 2 us; the best of a few, the host is shared."""
    put(files, "a100.yaml")
    source_hash.cache_clear()
    held = profile()
    start = time.perf_counter()
    held.resolutions(PROBLEM, GPU)
    first = time.perf_counter() - start
    again, rounds = replace(PROBLEM), []
    for _ in range(20):
        start = time.perf_counter()
        for _ in range(1000):
            held.schedule(again, GPU)
        rounds.append((time.perf_counter() - start) / 1000)
    assert first < 0.05 and min(rounds) < 20e-6


def test_the_driver_is_read_where_the_system_says_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = tmp_path / "version"
    monkeypatch.setattr(live, "_DRIVER_VERSIONS", (tmp_path / "none", said))
    live.driver_version.cache_clear()
    said.write_text(
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build\nGCC version: 12.2.0"
    )
    assert live.driver_version() == "580.65.06"
    live.driver_version.cache_clear()
