"""Compiling for GPUs that are not here, and the worker processes that do it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import toy_jobs
import triton

from cca_attention.autotune.binary import Resources
from cca_attention.autotune.compile import META, Sketch, aim, compile_config, sketch, target_of
from cca_attention.autotune.jobs import spent
from cca_attention.autotune.pool import Pool, Renew, no_renewal
from cca_attention.autotune.worker import Done, Failed, Job, Process
from cca_attention.kernels import decode
from cca_attention.problem import Problem
from cca_attention.profiles.configs import tunables

PROBLEM = Problem(q_heads=1, kv_heads=1, seq_len=256, head_dim=64)


def outcomes(pool: Pool, jobs: list[Job], limit_s: float = 60.0) -> dict[Any, Done | Failed]:
    """What became of each job, by its tag."""
    return {job.tag: outcome for job, outcome in pool.run(jobs, limit_s)}


@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942"])
def test_a_kernel_compiles_for_an_absent_gpu(toy: Any, arch: str) -> None:
    config = toy.ToyConfig(block_q=64, num_warps=4)
    with Pool(1, aim, arch) as pool:
        jobs = [
            Job("sketch", sketch, ("toy_tunable", "toy", PROBLEM, (config,))),
            Job("compile", compile_config, ("toy_tunable", "toy", PROBLEM, config)),
        ]
        found = outcomes(pool, jobs, limit_s=120.0)
    drawn, compiled = found["sketch"], found["compile"]
    assert isinstance(drawn, Done) and isinstance(compiled, Done), found
    (launch,) = drawn.value[0].launches
    assert (launch.kernel, launch.grid, launch.traits.dot_rows) == ("toy_kernel", (4, 1, 1), 64)
    (used,) = compiled.value
    assert isinstance(used, Resources)
    assert (used.kernel, used.num_warps, used.spill_bytes) == ("toy_kernel", 4, 0)
    assert 32 <= used.registers <= 512
    assert (used.loop_instructions > 0) == arch.startswith("sm_")
    assert 64 * 64 * 2 <= used.shared_bytes <= 65536


def test_spills_are_seen_and_the_compiler_is_asked_only_for_what_differs(toy: Any) -> None:
    configs = [toy.ToyConfig(block_q=q, block_k=32, num_warps=w) for q, w in ((32, 4), (32, 8), (512, 4))]
    with Pool(1, aim, "sm_80") as pool:
        jobs = [Job(c, compile_config, ("toy_tunable", "toy", PROBLEM, c)) for c in configs]
        jobs.append(Job("sketch", sketch, ("toy_tunable", "toy", PROBLEM, tuple(configs))))
        found = outcomes(pool, jobs, limit_s=120.0)
    narrow, wide, spilling = (found[config] for config in configs)
    assert isinstance(narrow, Done) and isinstance(wide, Done) and isinstance(spilling, Done), found
    assert (narrow.value[0].num_warps, wide.value[0].num_warps) == (4, 8)
    assert narrow.value[0].spill_bytes == 0 < spilling.value[0].spill_bytes
    assert narrow.value[0].loop_spill_bytes == 0 < spilling.value[0].loop_spill_bytes
    drawn = found["sketch"]
    assert isinstance(drawn, Done)
    first, second, third = drawn.value
    assert first.launches == second.launches != third.launches
    assert len({first.key, second.key, third.key}) == 3


def test_what_does_not_compile_says_why(toy: Any) -> None:
    config = toy.ToyConfig(block_k=1024)
    with Pool(1, aim, "sm_80") as pool:
        found = outcomes(pool, [Job("it", compile_config, ("toy_tunable", "toy", PROBLEM, config))])["it"]
    assert isinstance(found, Failed) and found.kind == "error"
    assert "a tile that does not compile" in found.message and "\n" not in found.message


def test_workers_compile_also_where_this_process_interprets(toy: Any) -> None:
    with triton.knobs.runtime.scope():
        triton.knobs.runtime.interpret = True
        with Pool(1, aim, "sm_80") as pool:
            found = outcomes(pool, [Job("it", compile_config, ("toy_tunable", "toy", PROBLEM, toy.ToyConfig()))])["it"]
        assert triton.knobs.runtime.interpret
    assert isinstance(found, Done), found


def test_workers_started_by_several_threads_leave_this_process_interpreting() -> None:
    with triton.knobs.runtime.scope():
        triton.knobs.runtime.interpret = True
        with ThreadPoolExecutor(4) as threads:
            workers = list(threads.map(lambda _: Process(toy_jobs.ready, ()), range(4)))
        interprets = triton.knobs.runtime.interpret
    for worker in workers:
        worker.kill()
    assert interprets


KEYS = """
import sys
from cca_attention.autotune.compile import find_tunable
from cca_attention.kernels.tunable import Tunable
first = find_tunable(*sys.argv[1:])
for kernel in first.kernels:
    kernel.cache_key
print([kernel.cache_key for tunable in Tunable.REGISTRY.values() for kernel in tunable.kernels])
"""


def test_processes_find_what_others_compiled_whatever_they_began_with() -> None:
    asked = [("cca_attention.kernels.pooling", "pooling"), ("cca_attention.kernels.backward_dkv", "backward_dkv")]
    command, environment = [sys.executable, "-c", KEYS], {**os.environ, "TRITON_INTERPRET": "0"}
    ends = [subprocess.run([*command, *args], env=environment, capture_output=True, text=True) for args in asked]
    assert ends[0].stdout.count("', '") > 10, ends[0].stderr
    assert ends[0].stdout == ends[1].stdout


def test_a_sketch_survives_being_written_down(toy: Any) -> None:
    import json
    from dataclasses import asdict

    with Pool(1, aim, "sm_90") as pool:
        found = outcomes(pool, [Job("it", sketch, ("toy_tunable", "toy", PROBLEM, (toy.ToyConfig(),)))])["it"]
    assert isinstance(found, Done), found
    assert Sketch.from_dict(json.loads(json.dumps(asdict(found.value[0])))) == found.value[0]


def test_decode_is_compiled_as_it_is_launched_where_launches_overlap() -> None:
    config = tunables("sm_80")["decode"].default(PROBLEM, "sm_80")
    job = Job("sketch", sketch, (type(config).__module__, "decode", PROBLEM, (config,)))
    keys = {}
    for arch in ("sm_80", "sm_86", "sm_90"):
        with Pool(1, aim, arch) as pool:
            drawn = outcomes(pool, [job], limit_s=120.0)["sketch"]
        assert isinstance(drawn, Done), drawn
        keys[arch] = drawn.value[0].key
    assert keys["sm_80"] == keys["sm_86"] != keys["sm_90"]


@pytest.mark.parametrize(("batch", "early"), [(1, 2), (64, 1)])
def test_the_merge_begins_with_attending_where_few_programs_attend(
    batch: int, early: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(decode, "enqueue", lambda kernel, grid, *args, **constants: asked.append(constants))
    monkeypatch.setattr(decode, "_can_start_early", lambda: True)
    problem = replace(PROBLEM, batch=batch)
    kernel = tunables("sm_90")["decode"]
    kernel.launch(problem, kernel.allocate(problem, META, None), kernel.default(problem, "sm_90"))
    assert [(constants["EARLY"], constants["launch_pdl"]) for constants in asked] == [(early, True)] * 2


@pytest.mark.parametrize(("arch", "backend", "threads"), [("sm_100", "cuda", 32), ("gfx942", "hip", 64)])
def test_targets(arch: str, backend: str, threads: int) -> None:
    target = target_of(arch)
    assert (target.backend, target.warp_size) == (backend, threads)


def test_every_kind_of_outcome_is_a_value(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    jobs = [Job(n, toy_jobs.double, (n,)) for n in range(5)]
    jobs[1:1] = [Job("fail", toy_jobs.fail, ()), Job("die", toy_jobs.die, ()), Job("talk", toy_jobs.chatter, ())]
    jobs[3:3] = [Job("hang", toy_jobs.hang, (str(tmp_path / "pids"),))]
    with Pool(2, toy_jobs.ready) as pool:
        found = outcomes(pool, jobs, limit_s=3.0)
    assert [found[n].value for n in range(5) if isinstance(found[n], Done)] == [0, 2, 4, 6, 8]
    fail, die, hang = found["fail"], found["die"], found["hang"]
    assert isinstance(fail, Failed) and (fail.kind, fail.message) == ("error", "ValueError: the tile is crooked")
    assert isinstance(die, Failed) and (die.kind, die.message) == ("crashed", "the worker ended with code -11")
    assert isinstance(hang, Failed) and (hang.kind, hang.message) == ("timeout", "not done after 3 s")
    assert capfd.readouterr() == ("", "")
    for process in map(int, (tmp_path / "pids").read_text().split()):
        assert not alive(process)


def alive(process: int) -> bool:
    """Whether a process still runs, a moment after it was killed."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        stat = Path(f"/proc/{process}/stat")
        if not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z":
            return False
        time.sleep(0.05)
    return True


def test_leaving_a_pool_ends_its_workers_and_what_they_started(tmp_path: Path) -> None:
    marker = tmp_path / "pids"
    jobs = [Job("hang", toy_jobs.hang, (str(marker),)), *(Job(n, toy_jobs.double, (n,)) for n in range(50))]
    with pytest.raises(KeyboardInterrupt), Pool(2, toy_jobs.ready) as pool:
        for _ in pool.run(jobs, 60.0):
            if marker.exists() and marker.read_text():
                raise KeyboardInterrupt
            time.sleep(0.1)
    assert not any(alive(process) for process in map(int, marker.read_text().split()))


INTERRUPTED = """
import os, signal
from multiprocessing.process import BaseProcess
from cca_attention.autotune import worker
start = BaseProcess.start
def interrupted(process):
    start(process)
    os.kill(os.getpid(), signal.SIGINT)
if __name__ == "__main__":
    BaseProcess.start = interrupted
    worker.Process(print, ())
"""


def test_an_interrupt_while_a_worker_starts_leaves_none_to_wait_for(tmp_path: Path) -> None:
    script = tmp_path / "interrupted.py"
    script.write_text(INTERRUPTED)
    ended = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=60)
    assert ended.stderr.endswith("KeyboardInterrupt\n")


def test_workers_that_cannot_start_are_an_error() -> None:
    with (
        pytest.raises(RuntimeError, match="a worker could not start: OSError: no such target"),
        Pool(2, toy_jobs.not_ready) as pool,
    ):
        outcomes(pool, [Job(1, toy_jobs.double, (1,))])


@pytest.mark.parametrize(("renew", "processes"), [(no_renewal, 1), (spent, 2)])
def test_a_worker_whose_job_raised_is_replaced_on_request(renew: Renew, processes: int) -> None:
    jobs = [Job("before", os.getpid, ()), Job("fail", toy_jobs.fail, ()), Job("after", os.getpid, ())]
    with Pool(1, toy_jobs.ready, renew=renew) as pool:
        found = outcomes(pool, jobs)
    before, after = found["before"], found["after"]
    assert isinstance(before, Done) and isinstance(after, Done)
    assert len({before.value, after.value}) == processes


def test_a_worker_that_found_a_config_wrong_checks_no_other() -> None:
    jobs = [Job(ok, toy_jobs.evidence, (ok,)) for ok in (True, False)] + [Job("after", toy_jobs.evidence, (True,))]
    with Pool(1, toy_jobs.ready, renew=spent) as pool:
        found = {tag: outcome.value[0] for tag, outcome in outcomes(pool, jobs).items() if isinstance(outcome, Done)}
    assert [found[tag]["ok"] for tag in (True, False, "after")] == [True, False, True]
    assert found[True]["process"] == found[False]["process"] != found["after"]["process"]
