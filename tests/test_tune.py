"""Whole runs of the tuner on a toy kernel: what is counted, chosen, remembered, quarantined and resumed."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_runs import PROBLEM, request_for, run

from cca_attention.autotune.compile import target_of
from cca_attention.autotune.devices import find_device
from cca_attention.autotune.journal import Journal
from cca_attention.autotune.measure import Timing, sample
from cca_attention.autotune.outcome import Quarantined
from cca_attention.autotune.progress import Progress, Request, plan
from cca_attention.autotune.result import profile_of, summary_of
from cca_attention.autotune.tune import MOST_REJECTED, Tuner
from cca_attention.profiles.store import read_profile, write_profile

DATA = Path(__file__).parent / "data"


def records(folder: Path, phase: str) -> list[dict[str, Any]]:
    """The journal's records of a phase."""
    lines = map(json.loads, (folder / "journal.jsonl").read_text().splitlines())
    return [line for line in lines if line["key"]["phase"] == phase]


def test_every_config_is_accounted_for_and_a_second_run_repeats_nothing(toy: Any, cache: Path) -> None:
    request = request_for(toy, cache)
    first = run(request)
    assert (first.legal, first.refused) == (12, 6)
    # the static assertion fails while the IR is made: 3 tiles of 1024 keys, at two numbers of warps
    assert first.failed == {"compile error": 6}
    assert first.ruled_out == {"registers": 2}
    assert first.to_compile == first.compiled == 4
    assert first.stage == "done" and first.chosen is not None and first.chosen.refusal is None
    best = min(trial.time_us for trial in first.trials.values() if trial.time_us is not None)
    assert first.chosen.time_us is not None and first.chosen.time_us <= best * 1.03
    journal = (cache / "journal.jsonl").read_bytes()
    second = run(request)
    assert second.cached == second.compiled == 4
    assert (cache / "journal.jsonl").read_bytes() == journal
    assert (second.chosen, second.evidence) == (first.chosen, first.evidence)


def test_the_choice_among_equals_does_not_depend_on_which_worker_was_first(toy: Any, cache: Path) -> None:
    request = request_for(toy, cache)
    same = [(config, replace(sketch, key="one")) for config, sketch in run(request).sketches.items()]
    chosen = []
    for sketches in (same, same[::-1]):
        (kernel,) = plan(request)
        kernel.sketches = dict(sketches)
        chosen.append(Tuner(request, Journal(cache), [kernel], lambda _: None)._shortlist(kernel))
    assert chosen[0] == chosen[1] and len(chosen[0]) == 1


def test_what_cannot_run_on_a_smaller_gpu_is_dropped_with_its_reason(toy: Any, cache: Path) -> None:
    full = run(request_for(toy, cache))
    needed = max(r.shared_bytes for trial in full.trials.values() for r in trial.resources)
    small = replace(find_device("a100"), name="small", shared_bytes_per_block=needed - 1)
    found = run(request_for(toy, cache, device=small))
    assert found.dropped["shared memory"] >= 1
    assert found.chosen is not None
    assert all(r.shared_bytes < needed for r in found.chosen.resources)
    refused = [trial.refusal for trial in found.trials.values() if trial.refusal is not None]
    assert set(refused) == {"shared memory beyond what small has"}


def test_a_gpu_on_which_nothing_runs_has_no_choice(toy: Any, cache: Path) -> None:
    tiny = replace(find_device("a100"), shared_bytes_per_block=1024)
    found = run(request_for(toy, cache, device=tiny))
    assert (found.stage, found.chosen) == ("failed", None)
    assert found.trouble is not None and "shared memory" in found.trouble


def test_only_the_most_promising_are_compiled(toy: Any, tmp_path: Path) -> None:
    found = run(request_for(toy, tmp_path, most_compiled=2))
    assert (found.compiled, found.outranked) == (2, 2)
    assert found.default in found.trials


def test_a_wrong_config_is_quarantined_and_the_next_is_chosen(toy: Any, cache: Path) -> None:
    wanted = request_for(toy, cache, problem=replace(PROBLEM, q_heads=2), verify=toy.reject_wide)
    found = run(wanted)
    assert found.chosen is not None and found.chosen.config.num_warps == 4
    assert found.quarantined and {config.num_warps for config in found.quarantined} == {8}
    assert set(found.quarantined.values()) == {Quarantined("wrong", "out is off by 2 budgets", "verify")}
    checked = len(records(cache, "verify"))
    again = run(wanted)
    assert (again.chosen, again.quarantined) == (found.chosen, found.quarantined)
    assert len(records(cache, "verify")) == checked


def test_every_kind_of_failure_is_survived_kept_and_not_tried_again(toy: Any, tmp_path: Path) -> None:
    request = request_for(
        toy, tmp_path, tunables=(toy.HARMFUL,), at_hand=True, check=toy.check, sample=toy.time_it,
        recheck=toy.check_after, limit_s={**Request.__dataclass_fields__["limit_s"].default_factory(), "measure": 5.0},
    )  # fmt: skip
    found = run(request)
    outcomes = {toy.fate_of(config): (reason.outcome, reason.phase) for config, reason in found.quarantined.items()}
    assert outcomes == {
        "wrong": ("wrong", "check"),
        "raises": ("illegal access", "check"),
        "oom": ("oom", "measure"),
        "illegal access": ("illegal access", "measure"),
        "crash": ("crash", "measure"),
        "hang": ("hang", "measure"),
        "wrong after 60 us": ("wrong", "recheck"),
    }
    assert +found.failed == {"implausible timing": 1}
    assert found.chosen is not None and toy.fate_of(found.chosen.config) == "70 us"
    assert found.evidence is not None and found.evidence["cases"] == 6, "three before and three after it was timed"
    (kernel,) = summary_of(request, [found])["kernels"].values()
    assert {entry["outcome"] for entry in kernel["quarantined"]} == {outcome for outcome, _ in outcomes.values()}
    assert all(entry["arch"] == "sm_80" and entry["head_dim"] == 64 for entry in kernel["quarantined"])
    journal = (tmp_path / "journal.jsonl").read_bytes()
    again = run(request)
    assert (again.chosen, again.quarantined) == (found.chosen, found.quarantined)
    assert (tmp_path / "journal.jsonl").read_bytes() == journal


def test_a_check_that_takes_its_worker_down_on_the_gpu_speaks_against_its_config(toy: Any, tmp_path: Path) -> None:
    request = request_for(
        toy, tmp_path, tunables=(toy.HARMFUL,), at_hand=True, check=toy.check_or_die, sample=toy.always_fast,
        recheck=toy.check_after,
    )  # fmt: skip
    found = run(request)
    died = {toy.fate_of(config): reason for config, reason in found.quarantined.items()}["raises"]
    assert died == Quarantined("crash", "the worker ended with code -11", "check")
    again = run(replace(request, check=toy.accept))
    assert again.quarantined[next(c for c in found.quarantined if toy.fate_of(c) == "raises")] == died


def test_a_kernel_that_is_always_wrong_is_given_up(toy: Any, tmp_path: Path) -> None:
    found = run(request_for(toy, tmp_path, verify=toy.reject_all))
    assert (found.stage, found.chosen, len(found.quarantined)) == ("failed", None, MOST_REJECTED)
    assert found.trouble == "the 4 best configs are in quarantine: wrong: out is off by 3 budgets"
    assert all(record["value"]["ok"] is False for record in records(tmp_path, "verify"))


def test_a_verification_that_breaks_down_is_no_evidence_and_is_not_remembered(toy: Any, cache: Path) -> None:
    request = request_for(toy, cache, problem=replace(PROBLEM, q_heads=3), verify=toy.break_down)
    found = run(request)
    assert found.chosen is None and found.trouble is not None and "OSError: the oracle is out" in found.trouble
    assert run(replace(request, verify=toy.accept)).stage == "done"


def test_the_profile_says_how_it_knows(toy: Any, cache: Path, tmp_path: Path) -> None:
    request = request_for(toy, cache)
    found = run(request)
    write_profile(profile_of(request, [found]), tmp_path / "a.yaml")
    profile = read_profile(tmp_path / "a.yaml")
    (entry,) = profile.entries
    assert (entry.evidence, entry.latency) == ("modelled", None)
    assert entry.predicted is not None and entry.predicted.total_us == entry.time_us > 0
    assert entry.verification is not None and entry.verification.cases == 3
    assert entry.baseline.config == {"num_warps": 4, "num_stages": 2, "block_q": 32, "block_k": 32}
    assert found.chosen is not None
    assert profile.schedule(PROBLEM)["toy"] == found.chosen.config
    assert profile.software.triton and profile.device.arch == "sm_80"
    summary = json.loads(json.dumps(summary_of(request, [found])))
    assert summary["kernels"]["toy"]["ruled_out"] == {"registers": 2}


def test_nothing_unverified_reaches_a_profile(toy: Any, tmp_path: Path) -> None:
    request = request_for(toy, tmp_path, verify=toy.reject_all, most_compiled=1)
    with pytest.raises(ValueError, match="toy has no verified choice"):
        from cca_attention.autotune.result import _entry

        _entry(request, run(request))
    assert profile_of(request, [run(request)]).entries == ()


def test_an_interrupted_run_keeps_what_it_finished(toy: Any, tmp_path: Path) -> None:
    def interrupt(kernel: Progress) -> None:
        if kernel.compiled == 2:
            raise KeyboardInterrupt

    request = request_for(toy, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        run(request, interrupt)
    assert len(records(tmp_path, "compile")) == 2
    found = run(request)
    assert (found.cached, found.compiled, found.stage) == (2, 4, "done")


def test_a_killed_run_goes_on_where_it_was(toy: Any, tmp_path: Path) -> None:
    program = textwrap.dedent(f"""
        import sys
        sys.path.insert(0, {str(DATA)!r})
        from pathlib import Path
        import toy_tunable
        from cca_attention.autotune.devices import find_device
        from cca_attention.autotune.journal import Journal
        from cca_attention.autotune.progress import Request, plan
        from cca_attention.autotune.tune import Tuner
        from cca_attention.problem import Problem
        if __name__ == "__main__":
            request = Request(
                device=find_device("a100"), problem=Problem(q_heads=1, kv_heads=1, seq_len=4096, head_dim=64),
                tunables=(toy_tunable.TOY,), cache_folder=Path({str(tmp_path)!r}), at_hand=False, jobs=1,
                most_compiled=0, verify=toy_tunable.accept,
            )
            with Journal(request.cache_folder) as journal:
                Tuner(request, journal, plan(request), lambda kernel: None).run()
    """)
    script = tmp_path / "run.py"
    script.write_text(program)
    process = subprocess.Popen([sys.executable, str(script)])
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if (tmp_path / "journal.jsonl").exists() and records(tmp_path, "compile"):
            process.send_signal(signal.SIGKILL)
        time.sleep(0.02)
    assert process.wait() == -signal.SIGKILL
    before = {json.dumps(record["key"]) for record in records(tmp_path, "compile")}
    found = run(request_for(toy, tmp_path))
    after = [json.dumps(record["key"]) for record in records(tmp_path, "compile")]
    assert len(after) == len(set(after)) == found.compiled == 4
    assert found.cached == len(before) >= 1 and before < set(after)


def test_a_default_that_cannot_run_the_problem_is_an_error(toy: Any, tmp_path: Path) -> None:
    broken = replace(toy.TOY, default=lambda problem, arch: toy.ToyConfig(block_k=128))
    with pytest.raises(ValueError, match=r"the built-in config of toy cannot run .*: block_k is 128"):
        run(request_for(toy, tmp_path, tunables=(broken,)))


@pytest.mark.gpu
def test_the_gpu_at_hand_is_measured(toy: Any, tmp_path: Path) -> None:
    major, minor = torch.cuda.get_device_capability()
    device = replace(find_device("h200"), arch=f"sm_{major}{minor}")
    assert target_of(device.arch).arch == 10 * major + minor
    timing = Timing.of(sample("toy_tunable", "toy", toy.ToyConfig(block_q=64), PROBLEM))
    assert 0 < timing.p20_us <= timing.median_us <= timing.p80_us
    assert timing.samples > 10
    found = run(request_for(toy, tmp_path, device=device, at_hand=True, recheck=toy.accept))
    assert found.chosen is not None and found.chosen.timing is not None and found.timed == 4
