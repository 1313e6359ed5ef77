"""The configs of one kernel against each other on the GPU: a search is asked what to time, in rounds that are kept.

Every sample is a job of a worker process that can be killed, so that the config at fault is known whatever happens. A
round is one record of the journal: a run that was stopped, and the same run again, takes from there what it has.
"""

from __future__ import annotations

import hashlib
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import Any

from ..kernels.tunable import Config
from .journal import Journal, Key, Phase
from .keys import Keys, config_fields
from .measure import Timing
from .outcome import NO_ROOM_FOR_TENSORS, record_of
from .pool import Pool
from .predict import roofline_us
from .progress import Progress, Request
from .race import Round
from .stations import Station
from .strategies import STRATEGIES, Space
from .worker import Done, Job

MOST_LOST = 4
"""Configs that fail one after the other, before any was timed, after which the kernel itself is suspected."""

PATIENCE, COOL_DOWN_S = 4, 5.0
"""Tries of a round while the GPU is throttled for its heat or its power supply, and the seconds between them."""

PutOut = Callable[[Progress, Config, Mapping[str, Any], Phase], None]
Prepare = Callable[[Progress, tuple[Config, ...]], None]


class Contest:
    """What times the kernels of a run.

    Args:
        prepare: compiles and verifies configs that were not yet, and enters them in the kernel's trials.
        put_out: quarantines a config for what a record of a phase says against it.
        watch: is told whenever a round has ended.
    """

    def __init__(
        self, request: Request, journal: Journal, keys: Keys, prepare: Prepare, put_out: PutOut,
        watch: Callable[[Progress], None],
    ) -> None:  # fmt: skip
        self._request, self._journal, self._keys = request, journal, keys
        self._prepare, self._put_out, self._watch = prepare, put_out, watch

    def run(self, kernel: Progress, station: Station, until: float) -> None:
        """Time one kernel's configs until the search has seen enough, or `until` (of `time.monotonic`) has passed.

        Raises:
            LostError: if the station's GPU is lost; what was timed is kept, and can be gone on from elsewhere.
        """
        request = self._request
        for found in (kernel.rounds, kernel.samples, kernel.states):
            found.clear()
        space = Space(kernel.space, most=request.most_compiled, rounds=request.rounds, seed=request.seed)
        search = STRATEGIES[request.strategy](space)
        try:
            asked = next(search)
            while kernel.trouble is None:
                self._prepare(kernel, asked)
                asked = search.send(self._round(kernel, asked, station))
                self._watch(kernel)
                if time.monotonic() > until:
                    search.close()
                    kernel.out_of_time = True
                    break
        except StopIteration:
            pass
        self._summarise(kernel)

    def _round(self, kernel: Progress, asked: tuple[Config, ...], station: Station) -> Round:
        """One time of each config that was asked for and of the built-in one, from the journal or from the GPU."""
        number = len(kernel.rounds)
        running = [config for config in dict.fromkeys((*asked, kernel.default)) if self._stands(kernel, config)]
        record = self._journal.get(self._key(kernel, number, running))
        if record is None:
            record = self._measured(kernel, number, running, station)
            if kernel.trouble is None:
                # with the survivors' key: that is what the next run asks for, which knows who is out
                survivors = [config for config in running if self._stands(kernel, config)]
                self._journal.add([(self._key(kernel, number, survivors), record)])
        found: dict[Config, float | None] = dict.fromkeys(asked)
        for config in running:
            samples_us = record["samples_us"].get(config_fields(config))
            if samples_us is not None and self._believed(kernel, config, Timing.of(samples_us)):
                found[config] = Timing.of(samples_us).median_us
                kernel.samples.setdefault(config, {})[number] = samples_us
        kernel.states.append(record["state"])
        kernel.rounds.append(found)
        kernel.timed = len(kernel.samples)
        return found

    def _key(self, kernel: Progress, number: int, running: list[Config]) -> Key:
        """A round's key: the same configs in the same round are the same trial, in whichever order."""
        digest = hashlib.sha256("; ".join(sorted(map(config_fields, running))).encode()).hexdigest()[:16]
        key = self._keys.of("measure", kernel.tunable, kernel.default)
        return replace(key, phase="round", config=f"round {number} of {len(running)}: {digest}")

    def _stands(self, kernel: Progress, config: Config) -> bool:
        """Whether a config is to be timed; what an earlier run has against it is recalled."""
        trial = kernel.trials.get(config)
        if trial is None or trial.refusal is not None:
            return False
        record = self._journal.get(self._keys.of("measure", kernel.tunable, config))
        if record is None or record.get("failed") is None:
            return True
        self._put_out(kernel, config, record, "measure")
        return False

    def _measured(self, kernel: Progress, number: int, running: list[Config], station: Station) -> dict[str, Any]:
        """A round that the GPU does now, and its state; it is done over while the clocks are held back."""
        for _ in range(PATIENCE):
            samples_us = self._time(kernel, number, running, station.pool)
            state = station.state()
            if state is None or not state.unfit or kernel.trouble is not None:
                break
            time.sleep(COOL_DOWN_S)
            running = [config for config in running if self._stands(kernel, config)]
        return {"samples_us": samples_us, "state": None if state is None else asdict(state)}

    def _time(self, kernel: Progress, number: int, running: list[Config], pool: Pool) -> dict[str, list[float]]:
        """Samples of the configs, taken in an order that the seed and the round's number fix."""
        samples: dict[str, list[float]] = {}
        lost = 0
        for config in random.Random(f"{self._request.seed} {number}").sample(running, len(running)):
            args = (kernel.tunable.config.__module__, kernel.name, config, self._request.problem)
            ((_, outcome),) = pool.run([Job(config, self._request.sample, args)], self._request.limit_s["measure"])
            key = self._keys.of("measure", kernel.tunable, config)
            if isinstance(outcome, Done):
                samples[config_fields(config)] = outcome.value
                if self._journal.forgot(key):
                    self._journal.add([(key, {"failed": None})])
                continue
            if NO_ROOM_FOR_TENSORS in outcome.message:
                kernel.trouble = outcome.message
                break
            record = record_of(outcome, "measure")
            self._journal.add([(key, record)])
            self._put_out(kernel, config, record, "measure")
            lost += 1
            if lost >= MOST_LOST and not samples and not kernel.samples:
                kernel.trouble = f"the first {lost} configs could not be timed: {record['failed']}: {record['message']}"
                break
        return samples

    def _believed(self, kernel: Progress, config: Config, timing: Timing) -> bool:
        """Whether the hardware can have done that; a config whose time is impossible is out."""
        work = kernel.tunable.work(self._request.problem, config)
        refusal = timing.refusal(roofline_us(self._request.device, self._request.problem, work))
        if refusal is not None:
            kernel.failed["implausible timing"] += 1
            kernel.trials[config] = replace(kernel.trials[config], refusal=refusal)
            kernel.samples.pop(config, None)
        return refusal is None

    def _summarise(self, kernel: Progress) -> None:
        """Enter each config's time, and the built-in one's in the same rounds, in its trial."""
        builtin = kernel.samples.get(kernel.default, {})
        for config, samples in kernel.samples.items():
            beside = [us for number in samples for us in builtin.get(number, [])]
            timing = Timing.of([us for own in samples.values() for us in own])
            baseline = Timing.of(beside) if beside else None
            kernel.trials[config] = replace(kernel.trials[config], timing=timing, baseline=baseline)
