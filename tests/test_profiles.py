"""Profile files: every mistake is reported, none is overwritten by halves, and no model is changed by one."""

from __future__ import annotations

import os
import warnings
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from cca_attention import cca_attention
from cca_attention.kernels.forward import ForwardConfig
from cca_attention.kernels.tunable import Schedule
from cca_attention.problem import Problem
from cca_attention.profiles import store
from cca_attention.profiles.configs import as_config, source_hash, tunables
from cca_attention.profiles.schema import Profile, ProfileMismatch, ProfileWarning, tune_command
from cca_attention.profiles.store import (
    ProfileError,
    ProfileNotFound,
    load_profile,
    merged,
    read_profile,
    write_profile,
)

PROBLEM = Problem(q_heads=32, kv_heads=8, seq_len=131072, head_dim=128)
FORWARD = asdict(ForwardConfig(block_q=128))


def entry(problem: Problem = PROBLEM, **changes: Any) -> dict[str, Any]:
    """A modelled entry of the forward kernel."""
    return {
        "kernel": "forward",
        "problem": problem.as_dict(),
        "config": FORWARD,
        "evidence": "modelled",
        "predicted": {"total_us": 51000.0, "parts": {"tensor_us": 35000.0}},
        "resources": [
            {"kernel": "forward_kernel", "shared_bytes": 98304, "registers": 255, "spill_bytes": 8, "num_warps": 8}
        ],
        "baseline": {"config": FORWARD, "time_us": 52000.0},
        "verification": {
            "suite": "1", "seed": 7, "cases": 12, "worst_budget_use": 0.25, "mode": "interpreter", "kernel_hash": "ab",
        },
    } | changes  # fmt: skip


def content(*entries: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A whole profile as YAML would give it."""
    return {
        "schema": "cca-profile/1.0",
        "created": "2026-11-22T10:00:00+00:00",
        "device": {
            "name": "a100-80gb", "vendor": "nvidia", "arch": "sm_80", "sm_count": 108, "shared_bytes_per_block": 166912,
            "names": ["a100-80gb", "a100", "NVIDIA A100-SXM4-80GB"], "l2_bytes": 41943040, "hbm_bytes": 80000000000,
            "hbm_gbps": 2039.0,
        },
        "software": {"cca_attention": "0.1.0", "triton": "3.10", "torch": "2.13.0", "python": "3.11.7"},
        "semantic": {"group_size": 16, "window_size": 1024, "core_heads": "query", "pooling": "last_query"},
        "kernels": {"forward": {"source_hash": source_hash("forward")}},
        "entries": list(entries or [entry()]),
    } | changes  # fmt: skip


def make(*entries: dict[str, Any], **changes: Any) -> Profile:
    """The profile of `content`."""
    return Profile.model_validate(content(*entries, **changes))


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """The three places where names are looked up, all empty."""
    found = {name: tmp_path / name for name in ("here", "user", "bundled")}
    for folder in found.values():
        folder.mkdir()
    monkeypatch.chdir(found["here"])
    monkeypatch.setattr(store, "user_folder", lambda: found["user"])
    monkeypatch.setattr(store, "bundled_folder", lambda: found["bundled"])
    return found


def test_a_profile_survives_being_written(tmp_path: Path) -> None:
    profile = make()
    write_profile(profile, tmp_path / "a.yaml")
    assert read_profile(tmp_path / "a.yaml") == profile
    assert hash(read_profile(tmp_path / "a.yaml")) == hash(profile)
    assert (tmp_path / "a.yaml").stat().st_mode & 0o777 == 0o644
    assert yaml.safe_load((tmp_path / "a.yaml").read_text())["software"]["triton"] == "3.10"


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.yaml"
    write_profile(make(), path)
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_profile(make(entry(evidence="default")), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_all_mistakes_are_reported_at_once_with_their_places(tmp_path: Path) -> None:
    wrong = content(entry(), surprise=1)
    wrong["software"]["triton"] = 3.1
    wrong["device"]["sm_count"] = -4
    wrong["entries"][0]["config"] = {**FORWARD, "BLOCK_M": 64}
    wrong["entries"][0]["resources"][0]["registers"] = "many"
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(wrong))
    with pytest.raises(ProfileError) as caught:
        read_profile(tmp_path / "a.yaml")
    message = str(caught.value)
    assert "has 4 mistakes" in message
    for place in ("surprise", "software.triton", "device.sm_count", "entries.0.resources.0.registers"):
        assert place in message


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"config": {**FORWARD, "block_m": 64}}, "wrong here: block_m"),
        ({"config": {"num_warps": 4}}, "wrong here: block_.*num_stages"),
        ({"kernel": "sideways"}, "no kernel is called 'sideways'; there are .*forward"),
        ({"evidence": "measured"}, "evidence 'measured' and a measured latency go together"),
        ({"evidence": "modelled", "predicted": None}, "needs the predicted time"),
        ({"evidence": "guessed"}, "'measured', 'modelled' or 'default'"),
        ({"problem": {**PROBLEM.as_dict(), "seq_len": 0}}, "seq_len must be at least 1, got 0"),
        ({"problem": {**PROBLEM.as_dict(), "layers": 3}}, "unexpected keyword argument 'layers'"),
        ({"problem": {**PROBLEM.as_dict(), "group_size": 8}}, "has other semantics than the profile"),
        ({"problem": "large"}, "a problem is a mapping"),
    ],
)
def test_an_entry_that_contradicts_itself_is_refused(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(content(entry() | change)))
    with pytest.raises(ProfileError, match=said):
        read_profile(tmp_path / "a.yaml")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("schema: cca-profile/1.0\nschema: cca-profile/1.0\n", "the key 'schema' is given twice.*line 2"),
        ("schema: cca-profile/1.0\ndevice:\n  name: a\n  name: b\n", "the key 'name' is given twice.*line 4"),
        ("schema: cca-profile/1.0\nentries: [\n", "line 3"),
        ("schema: cca-profile/9.0\n", r"Input should be 'cca-profile/1\.0'"),
        ("model: llama\n", "is not a profile"),
        ("", "is not a profile"),
    ],
)
def test_a_file_that_is_no_profile_says_why(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ProfileError, match=said):
        load_profile(tmp_path / "a.yaml")


def test_two_entries_for_one_problem_are_a_mistake() -> None:
    with pytest.raises(ValueError, match="more than one entry for forward on B1-H32"):
        make(entry(), entry())


def test_names_are_looked_up_in_order(folders: dict[str, Path]) -> None:
    with pytest.raises(ProfileNotFound, match="to make one: cca-tune --gpu a100 --ctx 131072"):
        load_profile("a100")
    for place in ("bundled", "user", "here"):
        write_profile(make(created=place), folders[place] / "any-name.yaml")
        for name in ("a100", "A100-80GB", "NVIDIA A100-SXM4-80GB", "a100_80gb"):
            assert load_profile(name).created == place
    with pytest.raises(ProfileNotFound, match="h200"):
        load_profile("h200")


def test_other_files_in_the_way_are_passed_over_but_a_broken_profile_is_not(folders: dict[str, Path]) -> None:
    (folders["here"] / "a.yaml").write_bytes(b"\xff\xfe not text: [")
    (folders["here"] / "docker-compose.yaml").write_text("schema: something/else\nservices: {}\n")
    write_profile(make(), folders["user"] / "a100.yaml")
    assert load_profile("a100").device.name == "a100-80gb"
    (folders["here"] / "b.yaml").write_text("schema: cca-profile/1.0\ndevice: {}\n")
    with pytest.raises(ProfileError, match=r"b\.yaml has \d+ mistakes"):
        load_profile("a100")


def test_auto_is_the_gpu_at_hand(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ProfileNotFound, match="PyTorch finds no GPU here"):
        load_profile("auto")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "NVIDIA A100-SXM4-80GB")
    write_profile(make(), folders["here"] / "x.yaml")
    assert load_profile("auto").device.name == "a100-80gb"


@pytest.mark.parametrize("missing", ["nowhere.yaml", Path("nowhere")])
def test_a_path_that_is_not_there_is_said_so(missing: str | Path) -> None:
    with pytest.raises(ProfileNotFound, match="there is no profile file nowhere"):
        load_profile(missing)


def test_the_nearest_problem_gives_the_config() -> None:
    short = entry(replace(PROBLEM, seq_len=4096), config={**FORWARD, "block_q": 64})
    profile = make(entry(), short)
    for seq_len, block_q in ((100, 64), (4096, 64), (16384, 64), (40000, 128), (10**6, 128)):
        config = profile.schedule(replace(PROBLEM, seq_len=seq_len))["forward"]
        assert config == ForwardConfig(**{**FORWARD, "block_q": block_q}), seq_len


@pytest.mark.parametrize(
    "change", [{"group_size": 8}, {"window_size": 512}, {"core_heads": "kv"}, {"pooling": "mean"}], ids=str
)
def test_a_profile_never_changes_the_model(change: dict[str, Any]) -> None:
    with pytest.raises(ProfileMismatch, match=r"the profile of a100-80gb is for .*16.*, the call has"):
        make().schedule(replace(PROBLEM, **change))


@pytest.mark.parametrize(
    ("change", "reason"),
    [({"dtype": "float32"}, "tuned for no head_dim 128 in float32"), ({"head_dim": 64}, "tuned for no head_dim 64")],
    ids=str,
)
def test_what_was_not_tuned_runs_built_in_with_one_warning(change: dict[str, Any], reason: str) -> None:
    profile = make()
    with pytest.warns(ProfileWarning, match=f"{reason}.*built-in.*cca-tune --gpu a100-80gb --ctx 131072"):
        assert len(profile.schedule(replace(PROBLEM, **change))) == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(profile.schedule(replace(PROBLEM, **change))) == 0


def test_a_kernel_that_has_changed_since_runs_built_in() -> None:
    profile = make(kernels={"forward": {"source_hash": "0" * 64}})
    with pytest.warns(ProfileWarning, match="its source has changed since it was tuned"):
        assert len(profile.schedule(PROBLEM)) == 0


def test_a_config_that_the_kernel_refuses_is_not_used() -> None:
    profile = make(entry(config={**FORWARD, "block_q": 8}))
    with pytest.warns(ProfileWarning):
        assert len(profile.schedule(PROBLEM)) == 0


def test_merging_keeps_other_problems_and_better_evidence() -> None:
    other = entry(replace(PROBLEM, seq_len=8192))
    latency = {"median_us": 50.0, "p20_us": 49.0, "p80_us": 52.0, "samples": 90}
    timed = entry(evidence="measured", latency=latency)
    assert {e.problem.seq_len for e in merged(make(other), make()).entries} == {8192, 131072}
    assert [e.evidence for e in merged(make(timed), make()).entries] == ["measured"]
    assert [e.evidence for e in merged(make(), make(timed)).entries] == ["measured"]
    stale = make(timed, other, kernels={"forward": {"source_hash": "0" * 64}})
    assert [(e.evidence, e.problem.seq_len) for e in merged(stale, make()).entries] == [("modelled", 131072)]


def test_profiles_of_different_things_do_not_merge() -> None:
    h200 = make(device=content()["device"] | {"name": "h200"})
    with pytest.raises(ProfileError, match="its GPU is 'h200', not 'a100-80gb'"):
        merged(h200, make())
    semantic = content()["semantic"] | {"group_size": 8}
    coarse = make(entry(replace(PROBLEM, group_size=8)), semantic=semantic)
    with pytest.raises(ProfileError, match=r"its semantics is .*8.*, not .*16"):
        merged(coarse, make())


def test_every_kernel_of_the_package_is_known_by_name() -> None:
    assert set(tunables()) >= {"pooling", "forward", "backward_dq", "backward_dkv", "decode"}
    assert as_config("forward", FORWARD) == ForwardConfig(**FORWARD)
    assert source_hash("forward") != source_hash("pooling")


def test_the_command_that_would_tune_is_complete() -> None:
    assert tune_command("h200", PROBLEM) == (
        "cca-tune --gpu h200 --ctx 131072 --batch 1 --heads 32 --kv-heads 8 --head-dim 128 --group-size 16 "
        "--window-size 1024 --core-heads query --pooling last_query --dtype bfloat16"
    )


def test_a_compiled_graph_finds_its_profile_at_the_first_call(folders: dict[str, Path], device: str) -> None:
    """Given by name or as an object: before the graph runs nothing has been called with it."""
    kernels = {name: {"source_hash": source_hash(name)} for name in tunables()}
    profile, x = make(kernels=kernels), torch.randn(1, 2, 12, 16, device=device)
    write_profile(profile, folders["here"] / "a100.yaml")
    for given in (str(folders["here"] / "a100.yaml"), profile, Schedule({"forward": ForwardConfig(block_q=16)})):
        torch.compiler.reset()

        def call(q: torch.Tensor, given: Any = given) -> torch.Tensor:
            return cca_attention(q, q, q, group_size=16, window_size=1024, profile=given)

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ProfileWarning)  # it has no entry for this shape
            found = torch.compile(call, fullgraph=True, backend="aot_eager")(x)
        torch.testing.assert_close(found, cca_attention(x, x, x, group_size=16, window_size=1024))
