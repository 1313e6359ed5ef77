"""Real faults on real GPUs: each is an outcome of its config or of its card, and the run comes to its end."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from toy_runs import PROBLEM, request_for, run

from cca_attention.autotune.devices import device_at_hand
from cca_attention.autotune.host import HostCard, cards_here, named_cards
from cca_attention.autotune.journal import Journal
from cca_attention.autotune.progress import LIMIT_S, Progress, Request, plan
from cca_attention.autotune.stations import Station
from cca_attention.autotune.tune import Tuner
from cca_attention.autotune.workshop import Workshop

pytestmark = pytest.mark.gpu
OUTCOMES = {
    "wrong": ("wrong", "check"),
    "raises": ("illegal access", "check"),
    "90 us": ("hang", "check"),
    "80 us": ("crash", "check"),
    "oom": ("oom", "measure"),
    "illegal access": ("illegal access", "measure"),
    "crash": ("crash", "measure"),
    "hang": ("hang", "measure"),
    "wrong after 60 us": ("wrong", "recheck"),
}


@pytest.fixture
def planted(toy: Any) -> Iterator[Any]:
    """The faults."""
    import planted

    yield planted
    del sys.modules["planted"]


def on(used: tuple[HostCard, ...], toy: Any, folder: Path, **changes: Any) -> Request:
    """A run of the toy kernel on real cards."""
    return request_for(
        toy, folder, device=device_at_hand(), at_hand=True, jobs=4, cards=used, recheck=toy.accept, **changes
    )


def races(request: Request, *lengths: int) -> tuple[list[Progress], list[Station]]:
    """The toy kernel at some contexts, after its races."""
    requests = [replace(request, problem=replace(PROBLEM, seq_len=length)) for length in lengths]
    with Journal(request.cache_folder) as journal, Workshop(request) as workshop:
        tuners = [Tuner(each, journal, plan(each), lambda kernel: None) for each in requests]
        workshop.run(tuners)
    return [tuner.kernels[0] for tuner in tuners], workshop.stations


def test_every_fault_on_the_card_is_an_outcome_that_is_kept(toy: Any, planted: Any, tmp_path: Path) -> None:
    request = replace(
        on(cards_here()[:1], toy, tmp_path, tunables=(toy.HARMFUL,)),
        check=planted.check_or_harm, sample=planted.sample_or_harm, recheck=toy.check_after,
        limit_s={**LIMIT_S, "check": 8.0, "measure": 6.0},
    )  # fmt: skip
    found = run(request)
    outcomes = {toy.fate_of(config): (reason.outcome, reason.phase) for config, reason in found.quarantined.items()}
    assert outcomes == OUTCOMES
    assert +found.failed == {"implausible timing": 1}
    assert found.chosen is not None and toy.fate_of(found.chosen.config) in ("100 us", "70 us")
    journal = (tmp_path / "journal.jsonl").read_bytes()
    again = run(request)
    assert (again.chosen, again.quarantined) == (found.chosen, found.quarantined)
    assert (tmp_path / "journal.jsonl").read_bytes() == journal


def test_a_card_that_dies_in_a_race_leaves_it_to_the_other(toy: Any, planted: Any, tmp_path: Path) -> None:
    used = cards_here()
    if len(used) < 2:
        pytest.skip("it takes two GPUs")
    used = used[:2]
    (tmp_path / "doomed").write_text(used[0].handle)
    take = partial(planted.take, str(tmp_path))
    request = on(used, toy, tmp_path / "cache", take=take, sample=planted.sample_until_death)
    kernels, stations = races(request, 4096, 8192)
    assert [kernel.stage for kernel in kernels] == ["done"] * 2
    assert all(not kernel.quarantined and set(+kernel.failed) == {"compile error"} for kernel in kernels)
    lost = "a worker could not start: RuntimeError: planted: it has fallen off the bus"
    assert [station.lost for station in stations] == [lost, None]
    samples = [line.split() for line in (tmp_path / "samples").read_text().splitlines()]
    assert {length for length, card in samples if card == used[1].handle} == {"4096", "8192"}
    assert len([card for _, card in samples if card == used[0].handle]) == planted.LIFE
    again, _ = races(replace(request, cards=used[1:]), 4096, 8192)
    assert [kernel.chosen for kernel in again] == [kernel.chosen for kernel in kernels]
    assert len((tmp_path / "samples").read_text().splitlines()) == len(samples), "a like card takes the journal's times"


def test_times_of_an_unlike_card_are_not_taken(toy: Any, planted: Any, tmp_path: Path) -> None:
    (tmp_path / "doomed").write_text("none")
    take = partial(planted.take, str(tmp_path))
    request = on(cards_here()[:1], toy, tmp_path / "cache", take=take, sample=planted.sample_until_death)
    (kernel,), _ = races(request, 4096)
    samples = len((tmp_path / "samples").read_text().splitlines())
    other = replace(request.cards[0], index=1, kind=f"{request.cards[0].kind}, another driver")
    (anew,), _ = races(replace(request, cards=(other,)), 4096)
    assert kernel.chosen is not None and anew.chosen is not None
    assert len((tmp_path / "samples").read_text().splitlines()) > samples and anew.samples != kernel.samples
    with pytest.raises(ValueError, match="what unlike cards measure is never mixed"):
        named_cards("0,1", (*request.cards, other))
