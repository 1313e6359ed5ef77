"""Timing one kernel's configs: rounds are kept and taken up again, and whatever a config does is its own outcome."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cca_attention.autotune.card import CardState
from cca_attention.autotune.contest import MOST_LOST, Contest
from cca_attention.autotune.devices import find_device
from cca_attention.autotune.journal import Journal
from cca_attention.autotune.keys import Keys, config_fields
from cca_attention.autotune.progress import Progress, Request
from cca_attention.autotune.search import Trial
from cca_attention.autotune.stations import Station
from cca_attention.autotune.tune import Tuner, _put_out
from cca_attention.autotune.worker import Done, Failed, Job
from cca_attention.kernels.tunable import Config
from cca_attention.problem import Problem

PROBLEM = Problem(q_heads=1, kv_heads=1, seq_len=4096, head_dim=64)
Answer = Callable[[Config], "float | Failed"]


class Here:
    """A pool of this process: `answer` says what a launch of a config takes, or how it fails."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.asked: list[Config] = []

    def run(self, jobs: Iterable[Job], limit_s: float) -> Iterator[tuple[Job, Done | Failed]]:
        for job in jobs:
            self.asked.append(job.tag)
            answer = self.answer(job.tag)
            yield job, answer if isinstance(answer, Failed) else Done([answer] * 3, 0.1)


def kernel_of(toy: Any) -> Progress:
    """The kernel with twelve configs, all of which were compiled and are right."""
    default = toy.default(PROBLEM, "sm_80")
    configs = [default, *(c for c, _ in toy.HARMFUL.candidates(PROBLEM) if c != default)]
    kernel = Progress(toy.HARMFUL, default, space=tuple(configs))
    kernel.trials = {config: Trial(config) for config in configs}
    return kernel


def contest(
    toy: Any, folder: Path, answer: Answer, until: float = math.inf, card: Any = None, **changes: Any
) -> tuple[Progress, Here]:
    """One kernel after its contest, and what was asked of the pool."""
    request = Request(
        device=find_device("a100"), problem=PROBLEM, tunables=(toy.HARMFUL,), cache_folder=folder, at_hand=True, jobs=1,
        most_compiled=0, **changes,
    )  # fmt: skip
    kernel, pool = kernel_of(toy), Here(answer)
    with Journal(folder) as journal:
        keys = Keys(request.device, PROBLEM, "a card")
        run = Contest(request, journal, keys, lambda *_: None, _put_out, lambda _: None)
        state = (lambda: None) if card is None else card.state
        run.run(kernel, Station("0", pool, state), until)  # type: ignore[arg-type]
    return kernel, pool


class HotCard:
    """A GPU that is too hot for its first rounds."""

    def __init__(self, rounds: int) -> None:
        self.rounds = rounds

    def state(self) -> CardState:
        self.rounds -= 1
        return CardState(1200, 2000, 90, 650.0, ("thermal slowdown",) if self.rounds >= 0 else ("power cap",))


def time_us(config: Any) -> float:
    """Separable; the best has 64 rows, 64 keys and 8 warps."""
    return 100.0 - config.block_q / 8 - config.block_k / 16 - config.num_warps


def test_what_the_gate_found_holds_for_every_length_and_for_no_other_kind_of_problem(toy: Any) -> None:
    keys = Keys(find_device("a100"), PROBLEM, "a card")
    config = toy.ToyConfig()
    for changes, same in (({"seq_len": 8192}, True), ({"batch": 3}, True), ({"group_size": 8}, False)):
        other = replace(keys, problem=replace(PROBLEM, **changes))
        assert (other.of("verify", toy.TOY, config) == keys.of("verify", toy.TOY, config)) == same
        assert other.of("measure", toy.TOY, config) != keys.of("measure", toy.TOY, config)
    assert replace(keys, card=None).of("verify", toy.TOY, config) != keys.of("verify", toy.TOY, config)
    assert keys.of("recheck", toy.TOY, config) != keys.of("verify", toy.TOY, config)


def test_every_round_has_the_built_in_config_and_its_samples_are_kept(toy: Any, tmp_path: Path) -> None:
    kernel, _ = contest(toy, tmp_path, time_us)
    assert all(kernel.default in found for found in kernel.rounds) and len(kernel.rounds) >= 6
    lines = [json.loads(line) for line in (tmp_path / "journal.jsonl").read_text().splitlines()]
    assert [line["key"]["phase"] for line in lines] == ["round"] * len(kernel.rounds)
    assert lines[0]["value"]["samples_us"][config_fields(kernel.default)] == [time_us(kernel.default)] * 3
    best = min(kernel.trials.values(), key=lambda trial: trial.score or math.inf)
    assert (best.config.num_warps, best.timing and best.timing.median_us) == (8, 80.0)
    assert best.timing is not None and best.timing.samples == 3 * len(kernel.rounds)
    assert best.baseline is not None and best.baseline.median_us == time_us(kernel.default)


def test_the_order_within_a_round_is_drawn_anew_and_repeated_by_the_seed(toy: Any, tmp_path: Path) -> None:
    orders = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        _, pool = contest(toy, tmp_path / name, time_us, seed=seed)
        orders.append(pool.asked)
    assert orders[0] == orders[1] != orders[2]
    assert orders[0][:12] != orders[0][12:24]


@pytest.mark.parametrize("strategy", ["racing", "exhaustive", "coordinate", "evolutionary"])
def test_an_interrupted_contest_goes_on_where_it_was(toy: Any, tmp_path: Path, strategy: str) -> None:
    def fails_at_times(config: Any) -> float | Failed:
        out = (config.num_warps, config.block_q) == (2, 64)
        return Failed("error", "RuntimeError: no", 0.1) if out else time_us(config)

    whole, pool = contest(toy, tmp_path / "whole", fails_at_times, strategy=strategy)
    for after in (3, 20, len(pool.asked) - 1):
        folder, calls = tmp_path / f"{after}", [0]

        def interrupted(config: Config, calls: list[int] = calls, after: int = after) -> float | Failed:
            calls[0] += 1
            if calls[0] > after:
                raise KeyboardInterrupt
            return fails_at_times(config)

        with pytest.raises(KeyboardInterrupt):
            contest(toy, folder, interrupted, strategy=strategy)
        resumed, rest = contest(toy, folder, fails_at_times, strategy=strategy)
        assert resumed.rounds == whole.rounds and resumed.quarantined == whole.quarantined
        assert len(rest.asked) < len(pool.asked) or after == 3
        assert contest(toy, folder, fails_at_times, strategy=strategy)[1].asked == []


def test_a_config_that_fails_is_asked_once_ever(toy: Any, tmp_path: Path) -> None:
    def answer(config: Config) -> float | Failed:
        return time_us(config) if config.num_warps != 8 else Failed("crashed", "the worker ended with code -11", 0.1)

    kernel, pool = contest(toy, tmp_path, answer)
    assert [config.num_warps for config in pool.asked].count(8) == 4 == len(kernel.quarantined)
    assert {(reason.outcome, reason.phase) for reason in kernel.quarantined.values()} == {("crash", "measure")}
    again, rest = contest(toy, tmp_path, answer)
    assert (again.quarantined, rest.asked) == (kernel.quarantined, [])


def test_time_that_is_up_ends_the_search_with_what_it_has(toy: Any, tmp_path: Path) -> None:
    kernel, _ = contest(toy, tmp_path, time_us, until=0.0)
    assert kernel.out_of_time and len(kernel.rounds) == 1 and kernel.timed == 12


def test_no_room_for_the_tensors_is_no_configs_fault(toy: Any, tmp_path: Path) -> None:
    message = "cca_attention.autotune.measure.NoRoomError: no room for the tensors of harmful"
    kernel, pool = contest(toy, tmp_path, lambda config: Failed("error", message, 0.1))
    assert (kernel.trouble, kernel.quarantined, len(pool.asked)) == (message, {}, 1)
    assert contest(toy, tmp_path, time_us)[0].timed == 12, "and nothing of it is remembered"


def test_a_kernel_that_no_config_survives_is_given_up(toy: Any, tmp_path: Path) -> None:
    message = "RuntimeError: CUDA error: an illegal memory access was encountered"
    kernel, pool = contest(toy, tmp_path, lambda config: Failed("error", message, 0.1))
    assert len(pool.asked) == MOST_LOST
    assert kernel.trouble == f"the first 4 configs could not be timed: illegal access: {message}"


@pytest.mark.parametrize("bad_us", [1e-3, 0.0, -1.0, math.nan, math.inf])
def test_a_time_that_cannot_be_is_not_believed(toy: Any, tmp_path: Path, bad_us: float) -> None:
    def answer(config: Config) -> float:
        return bad_us if config.num_warps == 8 else time_us(config)

    kernel, _ = contest(toy, tmp_path, answer)
    assert kernel.failed == {"implausible timing": 4}
    assert {trial.config.num_warps for trial in kernel.trials.values() if trial.refusal is None} == {2, 4}


@pytest.mark.parametrize(("hot", "tries"), [(0, 1), (2, 3), (9, 4)])
def test_a_round_that_was_throttled_is_done_over(
    toy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hot: int, tries: int
) -> None:
    monkeypatch.setattr("cca_attention.autotune.contest.COOL_DOWN_S", 0.0)
    kernel, pool = contest(toy, tmp_path, time_us, until=0.0, card=HotCard(hot))
    assert len(pool.asked) == 12 * tries and len(kernel.rounds) == 1
    (state,) = kernel.states
    assert state is not None and state["sm_mhz"] == 1200
    assert state["throttled"] == (("thermal slowdown",) if hot == 9 else ("power cap",)), "what is kept is said"
    recalled, nothing = contest(toy, tmp_path, time_us, until=0.0)
    assert nothing.asked == [] and recalled.states[0] == {**state, "throttled": list(state["throttled"])}


def test_the_previous_choice_is_kept_among_equals(toy: Any, tmp_path: Path) -> None:
    kernel, _ = contest(toy, tmp_path, lambda config: 100.0 if config == kernel_of(toy).default else 80.0)
    request = Request(
        device=find_device("a100"), problem=PROBLEM, tunables=(toy.HARMFUL,), cache_folder=tmp_path, at_hand=True,
        jobs=1, most_compiled=0,
    )  # fmt: skip
    with Journal(tmp_path) as journal:
        tuner = Tuner(request, journal, [kernel], lambda _: None)
        first, *_, last = tuner._order(kernel)[:-1]
        kernel.chosen = last
        tuner._remember()
        assert [tuner._order(kernel)[0], first != last] == [last, True]
        forgotten = replace(request, problem=replace(PROBLEM, batch=2))
        assert Tuner(forgotten, journal, [kernel], lambda _: None)._order(kernel)[0] == first
