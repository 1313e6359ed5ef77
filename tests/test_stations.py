"""Races on several GPUs: each at one, all at once, and those of a GPU that is lost anew at another."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cca_attention.autotune import host, jobs
from cca_attention.autotune.devices import find_device
from cca_attention.autotune.host import HostCard, cards_for, named_cards
from cca_attention.autotune.journal import Journal
from cca_attention.autotune.pool import LostError, Pool
from cca_attention.autotune.progress import Request, plan
from cca_attention.autotune.stations import Station, spread
from cca_attention.autotune.tune import Tuner
from cca_attention.autotune.worker import Done, Failed, Job
from cca_attention.autotune.workshop import Workshop
from cca_attention.problem import Problem

PROBLEM = Problem(q_heads=1, kv_heads=1, seq_len=4096, head_dim=64)


class Rest:
    """A pool that nobody asks; `stop` wakes whoever waits."""

    def __init__(self) -> None:
        self.stopped = threading.Event()

    def stop(self) -> None:
        self.stopped.set()


def stations(count: int) -> list[Station]:
    return [Station(str(n), Rest()) for n in range(count)]  # type: ignore[arg-type]


@pytest.fixture
def toys(toy: Any) -> Iterator[Any]:
    """Cards for the toy kernel."""
    import toy_cards

    yield toy_cards
    del sys.modules["toy_cards"]


def test_every_piece_is_done_once_by_whoever_is_free() -> None:
    done: list[tuple[int, str]] = []

    def do(piece: int, station: Station) -> None:
        time.sleep(0.2 if piece == 0 else 0.01)
        done.append((piece, station.name))

    assert spread(range(9), stations(2), do) == []
    assert sorted(piece for piece, _ in done) == list(range(9))
    assert len([piece for piece, name in done if name == dict(done)[0]]) < 4, "one is slow: the other does more"


def test_a_lost_stations_piece_is_done_again_by_another_that_had_nothing_left() -> None:
    done: list[tuple[str, str]] = []
    two = stations(2)

    def do(piece: str, station: Station) -> None:
        if piece == "long":
            time.sleep(0.3)
            if station.name == first_of.setdefault("long", station.name):
                raise LostError("it fell off the bus")
        done.append((piece, station.name))

    first_of: dict[str, str] = {}
    assert spread(["long", "short"], two, do) == []
    assert sorted(piece for piece, _ in done) == ["long", "short"]
    lost = [station for station in two if station.lost is not None]
    assert [(s.name, s.lost) for s in lost] == [(first_of["long"], "it fell off the bus")]


def test_what_is_left_when_every_station_is_lost_is_given_back() -> None:
    def do(piece: int, station: Station) -> None:
        raise LostError("gone")

    assert sorted(spread(range(4), stations(3), do)) == [0, 1, 2, 3]


@pytest.mark.parametrize("kind", [KeyboardInterrupt, ValueError])
def test_any_other_exception_ends_all(kind: type[BaseException]) -> None:
    two = stations(2)

    def do(piece: int, station: Station) -> None:
        if piece == 0:
            raise kind("no")
        assert station.pool.stopped.wait(30)  # type: ignore[attr-defined]
        raise LostError("the workers were stopped")

    with pytest.raises(kind):
        spread(range(5), two, do)


def test_jobs_of_a_place_that_is_lost_are_done_at_another(toys: Any, tmp_path: Path) -> None:
    good, doomed = tmp_path / "good", tmp_path / "doomed"
    toy = sys.modules["toy_tunable"]
    args = ("toy_tunable", "toy", toy.ToyConfig(), PROBLEM)
    with Pool(2, toys.take, renew=jobs.spent, places=[(str(good),), (str(doomed),)]) as pool:
        found = list(pool.run([Job(n, toys.sample_after, args) for n in range(30)], 30.0))
        assert sorted(job.tag for job, _ in found) == list(range(30))
        assert all(isinstance(outcome, Done) for _, outcome in found), "the card's end is held against no job"
        assert pool.lost == {(str(doomed),): "RuntimeError: doomed has fallen off the bus"}
        toys.dead(good).touch()
        with pytest.raises(LostError, match="a worker could not start: RuntimeError: good has fallen off the bus"):
            list(pool.run([Job(0, toys.sample_or_harm, ("", "", toy.ToyConfig(block_k=64, num_warps=2), PROBLEM))], 30))


def test_time_that_is_up_leaves_out_what_need_not_be_done(toys: Any, tmp_path: Path) -> None:
    with Pool(1, toys.take, str(tmp_path / "card")) as pool:
        jobs = [Job(n, time.sleep, (0.0,), must=n == 2) for n in range(4)]
        assert [job.tag for job, _ in pool.run(jobs, 30.0, until=time.monotonic() - 1)] == [2]


def cards(*paths: Path) -> tuple[HostCard, ...]:
    return tuple(HostCard(n, "NVIDIA A100", "a card", str(path)) for n, path in enumerate(paths))


def races(toys: Any, folder: Path, used: tuple[HostCard, ...], lengths: tuple[int, ...]) -> tuple[Any, list[Station]]:
    """The toy kernel at some contexts, after its races on some cards."""
    toy = sys.modules["toy_tunable"]
    request = Request(
        device=find_device("a100"), problem=PROBLEM, tunables=(toy.TOY,), cache_folder=folder, at_hand=True, jobs=2,
        most_compiled=0, cards=used, take=toys.take, sample=toys.sample, check=toy.accept, recheck=toy.accept,
    )  # fmt: skip
    with Journal(folder) as journal, Workshop(request) as workshop:
        requests = [replace(request, problem=replace(PROBLEM, seq_len=length)) for length in lengths]
        tuners = [Tuner(each, journal, plan(each), lambda kernel: None) for each in requests]
        workshop.run(tuners)
    return [tuner.kernels[0] for tuner in tuners], workshop.stations


def test_a_race_is_one_cards_alone_and_all_cards_race(toys: Any, tmp_path: Path) -> None:
    folder, lengths = tmp_path / "cache", (4096, 8192, 2048)
    (tmp_path / "two").mkdir()
    paths = [tmp_path / "two" / name for name in "ab"]
    kernels, used = races(toys, folder, cards(*paths), lengths)
    assert [kernel.stage for kernel in kernels] == ["done"] * 3
    timed = [set(path.read_text().splitlines()) for path in paths]
    assert all(timed) and not timed[0] & timed[1]
    assert timed[0] | timed[1] == {f"toy {length}" for length in lengths}
    assert sorted(name for station in used for name in station.done) == sorted(f"toy at {n}" for n in lengths)
    assert not any(station.lost for station in used)
    again, _ = races(toys, folder, cards(tmp_path / "one"), lengths)
    assert [kernel.chosen for kernel in again] == [kernel.chosen for kernel in kernels], (
        "alike cards share what they know"
    )
    assert not (tmp_path / "one").exists()


def test_a_card_that_dies_in_the_middle_costs_no_config_its_name(toys: Any, tmp_path: Path) -> None:
    good, doomed = tmp_path / "good", tmp_path / "doomed"
    kernels, used = races(toys, tmp_path / "cache", cards(good, doomed), (4096, 8192))
    assert [kernel.stage for kernel in kernels] == ["done"] * 2
    assert all(not kernel.quarantined and set(+kernel.failed) == {"compile error"} for kernel in kernels)
    assert set(good.read_text().splitlines()) == {"toy 4096", "toy 8192"}, "its race was run anew at the other"
    assert len(set(doomed.read_text().splitlines())) == 1
    lost = "a worker could not start: RuntimeError: doomed has fallen off the bus"
    assert [(station.name, station.lost) for station in used] == [("0", None), ("1", lost)]


def test_when_the_last_card_dies_the_kernels_say_so(toys: Any, tmp_path: Path) -> None:
    (kernel,), _ = races(toys, tmp_path / "cache", cards(tmp_path / "doomed"), (4096,))
    assert (kernel.stage, kernel.chosen, kernel.quarantined) == ("failed", None, {})
    assert kernel.trouble is not None and kernel.trouble.startswith("GPU 0 is lost: a worker could not start")


A100, OTHER, H200 = (HostCard(n, name, kind) for n, name, kind in (
    (0, "NVIDIA A100-SXM4-80GB", "one"), (1, "NVIDIA A100-SXM4-80GB", "another driver"), (2, "NVIDIA H200", "h200")
))  # fmt: skip


@pytest.mark.parametrize(
    ("text", "there", "said"),
    [
        ("0", (), "--devices 0: there is no GPU in this machine"),
        ("0,7", (A100, H200), "--devices 0,7: there is no GPU 7 in this machine; there are 0, 2"),
        ("a", (A100,), r"--devices must be indices of GPUs with commas between \(0,1\), got 'a'"),
        ("", (A100,), "--devices must be indices"),
        ("0,2", (A100, H200), "GPU 0 is a one, GPU 2 a h200; what unlike cards measure is never mixed"),
        ("0,1", (A100, OTHER), "GPU 0 is a one, GPU 1 a another driver; what unlike"),
    ],
)
def test_devices_that_cannot_be_used_are_refused(text: str, there: tuple[HostCard, ...], said: str) -> None:
    with pytest.raises((LookupError, ValueError), match=said):
        named_cards(text, there)


def test_all_alike_cards_of_the_product_are_used_and_no_others() -> None:
    twin = replace(A100, index=3)
    there = (H200, A100, OTHER, twin)
    assert cards_for(find_device("a100"), there, named=False) == (A100, twin)
    assert cards_for(find_device("h200"), there, named=False) == (H200,)
    assert cards_for(find_device("h100"), there, named=False) == ()
    assert named_cards("3,0", there) == (A100, twin)
    with pytest.raises(ValueError, match="GPU 2 is a NVIDIA H200, no a100-80gb"):
        cards_for(find_device("a100"), (H200,), named=True)


def test_a_worker_is_given_its_card_before_anything_asks_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(host, "touch", lambda: said.append(host.os.environ["CUDA_VISIBLE_DEVICES"]))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "before")
    host.take_card("7")
    host.take_card("")
    assert said == ["7", "7"]


def test_nothing_that_workers_are_forked_with_has_asked_for_a_card() -> None:
    """The first question begins CUDA with every card: a fork of that cannot use one, nor be given one alone."""
    program = """
import torch
def asked(*_, **__):
    raise AssertionError("asked")
for name in ("is_available", "device_count", "get_device_properties", "current_device", "_lazy_init"):
    assert callable(getattr(torch.cuda, name))
    setattr(torch.cuda, name, asked)
import cca_attention.autotune.jobs, cca_attention.autotune.host
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_a_failure_that_is_not_the_cards_stays_the_jobs(toys: Any, tmp_path: Path) -> None:
    toy = sys.modules["toy_tunable"]
    args = ("", "", toy.ToyConfig(block_k=64, num_warps=2), PROBLEM)
    with Pool(1, toys.take, str(tmp_path / "card"), renew=jobs.spent) as pool:
        ((_, outcome),) = pool.run([Job(0, toys.sample_or_harm, args)], 30.0)
    assert isinstance(outcome, Failed) and outcome.kind == "crashed"
