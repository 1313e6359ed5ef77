"""Profile files: every mistake is reported, none is overwritten by halves, and no model is changed by one."""

from __future__ import annotations

import json
import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import yaml

from cca_attention import cca_attention
from cca_attention.kernels.forward import ForwardConfig
from cca_attention.kernels.tunable import HANDLES, Schedule
from cca_attention.problem import Problem
from cca_attention.profiles.configs import as_config, source_hash, tunables
from cca_attention.profiles.json_schema import PUBLISHED, json_schema
from cca_attention.profiles.schema import SCHEMA, Profile, ProfileMismatch, ProfileWarning, tune_command
from cca_attention.profiles.store import (
    ProfileError,
    ProfileNotFound,
    load_profile,
    merged,
    read_profile,
    update_profile,
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
            "suite": "1", "seed": 7, "cases": 12, "worst_budget_use": 0.25, "mode": "interpreter",
            "kernel_hash": source_hash("forward"),
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
        "software": {"cca_attention": "0.1.0", "triton": triton.__version__, "torch": "2.13.0", "python": "3.11.7"},
        "semantic": {"group_size": 16, "window_size": 1024, "core_heads": "query", "pooling": "last_query"},
        "kernels": {"forward": {"source_hash": source_hash("forward")}},
        "entries": list(entries or [entry()]),
    } | changes  # fmt: skip


def make(*entries: dict[str, Any], **changes: Any) -> Profile:
    """The profile of `content`."""
    return Profile.model_validate(content(*entries, **changes))


def test_a_profile_survives_being_written(tmp_path: Path) -> None:
    profile = make(software=content()["software"] | {"triton": "3.10"})
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


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"config": {**FORWARD, "block_m": 64}}, "wrong here: block_m"),
        ({"config": {"num_warps": 4}}, "wrong here: block_.*num_stages"),
        ({"kernel": "sideways"}, "no kernel is called 'sideways'; there are .*forward"),
        ({"evidence": "measured"}, "evidence 'measured' and a measured latency go together"),
        ({"evidence": "modelled", "predicted": None}, "needs the predicted time"),
        ({"evidence": "guessed"}, "'measured', 'transferred', 'modelled' or 'default'"),
        ({"problem": {**PROBLEM.as_dict(), "seq_len": 0}}, "seq_len must be at least 1, got 0"),
        ({"problem": {**PROBLEM.as_dict(), "layers": 3}}, "problem.layers: Unexpected keyword argument"),
        ({"problem": {**PROBLEM.as_dict(), "group_size": 8}}, "has other semantics than the profile"),
        ({"problem": "large"}, "Input should be a dictionary or an instance of Problem"),
    ],
)
def test_an_entry_that_contradicts_itself_is_refused(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(content(entry() | change), sort_keys=False))
    with pytest.raises(ProfileError, match=said):
        read_profile(tmp_path / "a.yaml")


def test_a_source_of_no_kernel_is_a_mistake(tmp_path: Path) -> None:
    kernels = {"sideways": {"source_hash": "0"}, "forward": {"source_hash": source_hash("forward")}}
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(content(kernels=kernels), sort_keys=False))
    with pytest.raises(ProfileError, match=r"line \d+: no kernel is called 'sideways'; there are"):
        read_profile(tmp_path / "a.yaml")


def test_two_entries_for_one_problem_are_a_mistake() -> None:
    with pytest.raises(ValueError, match="more than one entry for forward on B1-H32"):
        make(entry(), entry())


@pytest.mark.parametrize("missing", ["nowhere.yaml", Path("nowhere")])
def test_a_path_that_is_not_there_is_said_so(missing: str | Path) -> None:
    with pytest.raises(ProfileNotFound, match="there is no profile file nowhere"):
        load_profile(missing)


def test_the_nearest_problem_gives_the_config() -> None:
    short = entry(replace(PROBLEM, seq_len=4096), config={**FORWARD, "block_q": 64})
    profile = make(entry(), short)
    for seq_len, block_q in ((300, 64), (4096, 64), (16384, 64), (40000, 128), (10**6, 128)):
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


def test_a_merged_profile_is_another_one() -> None:
    old, new = make(entry(replace(PROBLEM, seq_len=8192))), make()
    both = merged(old, new)
    assert both.handle not in (old.handle, new.handle) and HANDLES[both.handle] == both
    assert both.schedule(replace(PROBLEM, seq_len=8192)) == old.schedule(replace(PROBLEM, seq_len=8192))
    assert both.semantic.dtypes == ("bfloat16",)


def test_times_taken_in_different_ways_do_not_merge() -> None:
    policy = {"mode": "eager", "cold_l2": True, "interleaved": True}
    timed, replayed = make(policy={"forward": policy}), make(policy={"forward": policy | {"mode": "cuda_graph"}})
    with pytest.raises(ProfileError, match=r"its measurement policy of forward is .*eager.*, not .*cuda_graph"):
        merged(timed, replayed)
    assert merged(make(), timed).policy == timed.policy == merged(timed, make()).policy


def test_an_update_keeps_what_another_process_wrote(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    update_profile(path, lambda held: make() if held is None else pytest.fail("there is none yet"))
    other = make(entry(replace(PROBLEM, seq_len=8192)))
    update_profile(path, lambda held: pytest.fail("it is there") if held is None else merged(held, other))
    assert {e.problem.seq_len for e in read_profile(path).entries} == {8192, 131072}
    lengths = [16384 * step for step in range(1, 9)]
    more = [make(entry(replace(PROBLEM, seq_len=length))) for length in lengths]
    with ThreadPoolExecutor(len(more)) as pool:
        list(pool.map(lambda new: update_profile(path, lambda held: merged(held or new, new)), more))
    assert {e.problem.seq_len for e in read_profile(path).entries} == {8192, 131072, *lengths}
    path.write_text("schema: cca-profile/1.0\n")
    with pytest.raises(ProfileError, match=r"has .* mistakes"):
        update_profile(path, lambda held: make())
    assert path.read_text() == "schema: cca-profile/1.0\n" and list(tmp_path.iterdir()) == [path]


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
        "--window-size 1024 --core-heads query --pooling last_query --dtype bf16"
    )


def test_a_compiled_graph_finds_its_profile_at_the_first_call(tmp_path: Path, device: str) -> None:
    """Given by name or as an object: before the graph runs nothing has been called with it."""
    kernels = {name: {"source_hash": source_hash(name)} for name in tunables()}
    profile, x = make(kernels=kernels), torch.randn(1, 2, 12, 16, device=device)
    write_profile(profile, tmp_path / "a100.yaml")
    for given in (str(tmp_path / "a100.yaml"), profile, Schedule({"forward": ForwardConfig(block_q=16)})):
        torch.compiler.reset()

        def call(q: torch.Tensor, given: Any = given) -> torch.Tensor:
            return cca_attention(q, q, q, group_size=16, window_size=1024, profile=given)

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ProfileWarning)  # it has no entry for this shape
            found = torch.compile(call, fullgraph=True, backend="aot_eager")(x)
        torch.testing.assert_close(found, cca_attention(x, x, x, group_size=16, window_size=1024))


def test_the_published_schema_is_that_of_the_code() -> None:
    assert PUBLISHED.read_text() == json_schema(), "run: cca-profile schema > profiles/cca-profile-1.json"
    published = json.loads(PUBLISHED.read_text())
    assert published["title"] == SCHEMA and set(published["required"]) == {
        "schema", "created", "device", "software", "semantic", "kernels", "entries",
    }  # fmt: skip
    assert published["$defs"]["Problem"]["additionalProperties"] is False
