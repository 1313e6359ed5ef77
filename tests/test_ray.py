"""The workers in a Ray cluster, one on this machine without a GPU: every outcome is what it is in local processes."""

from __future__ import annotations

import importlib.util
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import toy_jobs
from toy_runs import request_for

from cca_attention import cli
from cca_attention.autotune import workshop
from cca_attention.autotune.host import HostCard
from cca_attention.autotune.journal import Journal
from cca_attention.autotune.pool import LostError
from cca_attention.autotune.progress import plan
from cca_attention.autotune.tune import Tuner
from cca_attention.autotune.worker import Done, Failed, Job

HAS_RAY = importlib.util.find_spec("ray") is not None
needs_ray = pytest.mark.skipif(not HAS_RAY, reason="needs Ray")


@pytest.fixture(scope="module")
def joined() -> Iterator[Any]:
    """The module, in a cluster of this machine that says it had two GPUs."""
    from cca_attention.autotune import ray_pool

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ray.init", partial(ray_pool.ray.init, num_gpus=2))
        ray_pool.connect("local")
    yield ray_pool
    ray_pool.leave()


@pytest.fixture
def ray_pool(joined: Any) -> Iterator[Any]:
    """The module, which has not looked for GPUs yet."""
    yield joined
    joined.cluster_cards.cache_clear()


@needs_ray
def test_every_kind_of_outcome_is_a_value(ray_pool: Any, tmp_path: Path) -> None:
    jobs = [Job(n, toy_jobs.double, (n,)) for n in range(4)]
    jobs[1:1] = [Job("fail", toy_jobs.fail, ()), Job("die", toy_jobs.die, ())]
    jobs[3:3] = [Job("hang", toy_jobs.hang, (str(tmp_path / "pids"),))]
    with ray_pool.RayPool(2, toy_jobs.ready) as pool:
        found = {job.tag: outcome for job, outcome in pool.run(jobs, 3.0)}
    assert [found[n].value for n in range(4) if isinstance(found[n], Done)] == [0, 2, 4, 6]
    fail, die, hang = found["fail"], found["die"], found["hang"]
    assert isinstance(fail, Failed) and (fail.kind, fail.message) == ("error", "ValueError: the tile is crooked")
    assert isinstance(die, Failed) and die.kind == "crashed" and die.message.startswith("the worker was lost")
    assert isinstance(hang, Failed) and (hang.kind, hang.message) == ("timeout", "not done after 3 s")
    assert len(found) == len(jobs)


@needs_ray
def test_workers_that_cannot_start_are_an_error(ray_pool: Any) -> None:
    with (
        pytest.raises(LostError, match="a worker could not start: OSError: no such target"),
        ray_pool.RayPool(1, toy_jobs.not_ready) as pool,
    ):
        list(pool.run([Job(1, toy_jobs.double, (1,))], 30.0))


@needs_ray
def test_a_pool_that_is_stopped_ends_what_it_does_in_another_thread(ray_pool: Any) -> None:
    ended: list[BaseException] = []

    def wait() -> None:
        try:
            list(pool.run([Job("long", time.sleep, (120.0,))], 120.0))
        except LostError as error:
            ended.append(error)

    with ray_pool.RayPool(1, toy_jobs.ready) as pool:
        thread = threading.Thread(target=wait)
        thread.start()
        time.sleep(2.0)
        pool.stop()
        thread.join(60.0)
    assert [str(error) for error in ended] == ["the workers were stopped"]


@needs_ray
def test_a_cluster_without_a_gpu_has_no_cards_and_at_least_one_core(
    ray_pool: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 2.0})
    monkeypatch.setattr("ray.available_resources", lambda: {"CPU": 2.0})
    assert ray_pool.cluster_cards() == () and ray_pool.cores() >= 1


@needs_ray
def test_gpus_that_cannot_be_used_are_an_error_that_says_why(
    ray_pool: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_pool, "connect", lambda address: None)
    said = "--ray: none of the 2 GPUs of the Ray cluster can be used: LookupError: PyTorch sees no GPU in the process"
    assert refusal(capsys, "--ray", "local").startswith(said)


@needs_ray
def test_a_run_races_on_every_gpu_of_the_cluster(
    ray_pool: Any, toy: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import toy_cards

    found = HostCard(0, "NVIDIA A100", str(tmp_path / "card"))
    monkeypatch.setattr(ray_pool, "describe", lambda: found)
    monkeypatch.setattr(ray_pool, "take_alike", toy_cards.take)
    used = ray_pool.cluster_cards()
    assert [(card.index, card.name, card.kind) for card in used] == [(n, found.name, found.kind) for n in (0, 1)]
    assert ray_pool.cluster_cards() is used, "those that Ray has not got back yet would be missed"
    monkeypatch.setattr(workshop, "MOST_CHECKERS", 2)
    lengths = (4096, 8192)
    request = request_for(
        toy, tmp_path / "cache", at_hand=True, jobs=2, ray="local", cards=used, sample=toy_cards.sample,
        recheck=toy.accept,
    )  # fmt: skip
    with Journal(request.cache_folder) as journal, workshop.Workshop(request) as staff:
        requests = [replace(request, problem=replace(request.problem, seq_len=length)) for length in lengths]
        tuners = [Tuner(each, journal, plan(each), lambda kernel: None) for each in requests]
        staff.run(tuners)
    assert [tuner.kernels[0].stage for tuner in tuners] == ["done"] * 2
    assert sorted(name for station in staff.stations for name in station.done) == sorted(
        f"toy at {length}" for length in lengths
    )
    assert not any(station.lost for station in staff.stations)
    assert set((tmp_path / "card").read_text().splitlines()) == {f"toy {length}" for length in lengths}


@needs_ray
def test_a_cluster_that_cannot_be_joined_is_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def nobody(**options: Any) -> None:
        raise ConnectionError(f"ray.init() could not\nconnect to {options['address']}")

    monkeypatch.setattr("ray.init", nobody)
    said = "--ray: there is no Ray cluster at head:1: ray.init() could not connect to head:1"
    assert refusal(capsys, "--ray", "head:1") == said


def test_cards_are_named_here_or_found_in_a_cluster(capsys: pytest.CaptureFixture[str]) -> None:
    said = "--devices 0 are GPUs of this machine, and --ray local uses those of a cluster"
    assert refusal(capsys, "--ray", "local", "--devices", "0") == said


def test_without_ray_the_extra_is_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cca_attention.autotune.ray_pool", None)
    monkeypatch.delattr("cca_attention.autotune.ray_pool", raising=False)
    assert 'install it with: pip install "cca-attention[ray]"' in refusal(capsys, "--ray", "local")


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line on stderr of a command that must not begin."""
    with pytest.raises(SystemExit) as ended:
        cli.tune_main(["--gpu", "a100", "--ctx", "64", *arguments])
    out, err = capsys.readouterr()
    assert (ended.value.code, out, err.count("\n")) == (2, "", 1)
    return err.removeprefix("cca-tune: ").rstrip()
