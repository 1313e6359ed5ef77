"""The workers in a Ray cluster, one on this machine without a GPU: every outcome is what it is in local processes."""

from __future__ import annotations

import importlib.util
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import toy_jobs

from cca_attention import cli
from cca_attention.autotune.pool import LostError
from cca_attention.autotune.worker import Done, Failed, Job

HAS_RAY = importlib.util.find_spec("ray") is not None
needs_ray = pytest.mark.skipif(not HAS_RAY, reason="needs Ray")


@pytest.fixture(scope="module")
def ray_pool() -> Iterator[Any]:
    """The module, in a cluster of this machine."""
    from cca_attention.autotune import ray_pool

    ray_pool.connect("local")
    yield ray_pool
    ray_pool.leave()


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
def test_a_cluster_without_a_gpu_has_no_cards_and_at_least_one_core(ray_pool: Any) -> None:
    assert ray_pool.cluster_cards() == () and ray_pool.cores() >= 1


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
