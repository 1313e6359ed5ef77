"""Tuning in two steps: the short list that a plan writes, what `confirm` makes of it, and what both refuse."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from toy_runs import PROBLEM, request_for, run

from cca_attention import cli
from cca_attention.autotune.plan import SHORT, PlanError, confirmation, planned
from cca_attention.autotune.progress import Progress, Request
from cca_attention.autotune.result import profile_of
from cca_attention.autotune.search import ranked
from cca_attention.problem import Problem
from cca_attention.profiles.configs import tunables
from cca_attention.profiles.schema import Profile
from cca_attention.profiles.store import merged, read_profile, write_profile
from cca_attention.terminal import OK, USAGE


def absent(toy: Any, folder: Path) -> Request:
    """A run of the harmful kernel for an A100 that is not there."""
    return request_for(toy, folder, tunables=(toy.HARMFUL,))


def plan_of(toy: Any, folder: Path) -> tuple[Progress, Profile]:
    """What was planned, and its profile."""
    kernel = run(absent(toy, folder))
    return kernel, profile_of(absent(toy, folder), [kernel])


def test_a_plan_has_the_best_of_each_kernel_by_the_model_in_their_order(toy: Any, cache: Path, tmp_path: Path) -> None:
    kernel, profile = plan_of(toy, cache)
    write_profile(profile, tmp_path / "a100.yaml")
    (entry,) = read_profile(tmp_path / "a100.yaml").entries
    order = [asdict(trial.config) for trial in ranked(list(kernel.trials.values()), kernel.default)]
    assert len(order) == 12 and entry.evidence == "modelled"
    assert list(entry.shortlist or ()) == order[:SHORT] and entry.config == order[0]


def test_confirming_times_the_short_list_and_the_built_in_config_alone(toy: Any, cache: Path, tmp_path: Path) -> None:
    _, profile = plan_of(toy, cache)
    by_fate = {fate: toy.ToyConfig(block_q=q, block_k=k, num_warps=w) for (q, k, w), fate in toy.FATES.items()}
    listed = tuple(asdict(by_fate[fate]) for fate in ("70 us", "wrong", "90 us"))
    entries = tuple(entry.model_copy(update={"shortlist": listed}) for entry in profile.entries)
    lists = planned(profile.model_copy(update={"entries": entries}))
    here = replace(
        absent(toy, tmp_path), at_hand=True, most_compiled=3, check=toy.check, sample=toy.time_it,
        recheck=toy.check_after,
    )  # fmt: skip
    request = confirmation(here, lists[PROBLEM])
    found = run(request)
    assert {toy.fate_of(config) for config in found.samples} == {"70 us", "90 us", "100 us"}
    assert {toy.fate_of(config) for config in found.quarantined} == {"wrong"}
    assert found.legal == 4 and found.chosen is not None and toy.fate_of(found.chosen.config) == "70 us"
    (entry,) = merged(profile, profile_of(request, [found])).entries
    assert (entry.evidence, entry.shortlist) == ("measured", None)
    assert entry.latency is not None and entry.latency.median_us == 70.0
    with pytest.raises(PlanError, match="none of its entries has a short list; cca-tune plan writes one"):
        planned(profile_of(request, [found]))


def test_a_plan_for_another_source_is_not_confirmed(toy: Any, cache: Path) -> None:
    _, profile = plan_of(toy, cache)
    old = profile.kernels["harmful"].model_copy(update={"source_hash": "0" * 64})
    with pytest.raises(PlanError, match="it was planned for another source of harmful; plan again with this version"):
        planned(profile.model_copy(update={"kernels": {"harmful": old}}))


def test_kernels_for_one_architecture_are_confirmed_in_full_beside_the_planned_ones(toy: Any, cache: Path) -> None:
    _, profile = plan_of(toy, cache)
    known = tunables("sm_90")
    problem = Problem(q_heads=32, kv_heads=8, seq_len=8192, head_dim=128)
    (entry,) = profile.entries
    default = asdict(known["forward"].default(problem, "sm_90"))
    entry = entry.model_copy(update={"kernel": "forward", "problem": problem, "shortlist": (default,)})
    request = replace(absent(toy, cache), problem=problem, tunables=tuple(known.values()))
    narrow = confirmation(request, [entry])
    assert [tunable.name for tunable in narrow.tunables] == ["forward", "forward_hopper"]
    assert narrow.only is not None and len(narrow.only["forward"]) == 1
    assert len(narrow.only["forward_hopper"]) == len(list(known["forward_hopper"].candidates(problem)))


def ended(*arguments: str) -> int:
    """The exit code of a command."""
    with pytest.raises(SystemExit) as error:
        cli.tune_main(arguments)
    return int(str(error.value.code))


def test_a_plan_looks_at_every_legal_config_as_if_there_were_no_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Request] = []
    monkeypatch.setattr(cli, "_run", lambda requests, output, **_: seen.extend(requests) or OK)
    made = cli._requests
    monkeypatch.setattr(cli, "_requests", lambda *_: [replace(r, at_hand=True) for r in made(*_)])
    monkeypatch.chdir(tmp_path)
    assert ended("plan", "--gpu", "h200", "--ctx", "8192,32768", "--cache-dir", str(tmp_path)) == OK
    assert [request.problem.seq_len for request in seen] == [8192, 32768]
    assert all((request.at_hand, request.most_compiled, request.only) == (False, 0, None) for request in seen)
    assert all(not tunable.archs for request in seen for tunable in request.tunables)
    seen.clear()
    assert ended("plan", "--gpu", "h200", "--ctx", "8192", "--phase", "decode", "--candidates", "5") == OK
    assert [(r.most_compiled, [t.name for t in r.tunables]) for r in seen] == [(5, ["decode"])]


def test_a_plan_is_confirmed_where_its_gpu_is(toy: Any, cache: Path, tmp_path: Path, monkeypatch: Any) -> None:
    path, seen = tmp_path / "a100.yaml", []
    write_profile(plan_of(toy, cache)[1], path)
    monkeypatch.setattr(cli, "_run", lambda requests, output, **_: seen.extend([*requests, output]) or OK)
    monkeypatch.setattr(cli, "_requests", lambda *_: [replace(absent(toy, cache), at_hand=True)])
    assert ended("confirm", str(path)) == OK
    request, output = seen
    assert output == path and request.at_hand and len(request.only["harmful"]) == SHORT


def test_what_cannot_be_confirmed_is_refused_with_one_line(
    toy: Any, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "_chosen_tunables", lambda *_: (toy.HARMFUL,))
    path = tmp_path / "plan.yaml"
    for content, said in (
        (None, str(path)),
        ("milk: 2\n", f"{path} is not a profile"),
        (plan_of(toy, cache)[1], f"{path} is a plan for a100-80gb, which is not in this machine"),
    ):
        if isinstance(content, Profile):
            write_profile(content, path)
        elif content is not None:
            path.write_text(content)
        before = path.read_bytes() if path.exists() else None
        assert ended("confirm", str(path), "--cache-dir", str(cache)) == USAGE
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1 and err.startswith("cca-tune: ") and said in err, err
        assert (path.read_bytes() if path.exists() else None) == before
    assert ended("plan", "--ctx", "64", "--gpu", "h2000") == USAGE
    assert "unknown GPU 'h2000'; did you mean h200" in capsys.readouterr().err
