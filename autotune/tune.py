"""One run of the tuner: problem -> space -> compile -> predict -> verify, or -> verify -> measure -> verify again.

Every stage does the same: what the journal knows is taken from there, the rest is done by worker processes and
recorded as it ends, so that an interrupted run goes on where it was.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import astuple, replace
from functools import partial
from itertools import chain, zip_longest
from typing import Any

from ..kernels.tunable import Config
from . import jobs, space
from .binary import Resources
from .compile import Sketch
from .contest import Contest, Prepare
from .host import kind_here
from .journal import Journal, Phase
from .keys import Keys, config_fields
from .outcome import against, record_of
from .pool import LostError, Pool
from .predict import predict
from .progress import Progress, Request
from .race import ranking
from .search import Trial, preference, ranked
from .stations import Station
from .strategies import IN_ORDER
from .worker import Done, Job
from .workshop import Workshop

MOST_REJECTED = 4
"""Wrong results in a row after which the kernel itself is suspected, and no further config is tried."""

Group = tuple[Progress, tuple[Config, ...]]
Absorb = Callable[[Progress, Config, dict[str, Any]], None]


class Tuner:
    """One run over `kernels`, as `plan` made them. `watch` is told of a kernel whenever it has come further."""

    def __init__(
        self, request: Request, journal: Journal, kernels: Sequence[Progress], watch: Callable[[Progress], None]
    ) -> None:
        self._request = request
        self._journal = journal
        self._watch = watch
        self.kernels = kernels
        self.problem = request.problem
        self.budget_s = math.inf if request.budget_s is None else request.budget_s
        self._keys = Keys(request.device, request.problem, kind_here(request.cards))

    def run(self) -> None:
        """Take every kernel from its space to a verified choice, or to the trouble that prevents one.

        Raises:
            LostError: if no worker can be had that compiles.
            ValueError: if a built-in config cannot run the problem.
        """
        with Workshop(self._request) as workshop:
            workshop.run([self])

    def compile(self, compilers: Pool, until: float) -> None:
        """Find and compile what may be timed, best first; after `until` nothing begins but the built-in configs."""
        self._sketch(compilers, until)
        self._compile(compilers, until)

    def check(self, checkers: Pool, until: float) -> None:
        """Verify what compiled and fits; after `until` only the built-in configs."""
        for kernel in self.kernels:
            kernel.stage = "checking"
        try:
            self._check(checkers, self.kernels, until)
        except LostError as error:
            self._give_up(error)

    def prepare(self, kernel: Progress, configs: tuple[Config, ...], compilers: Pool, checkers: Pool) -> None:
        """Compile and verify what a search asks for besides."""
        new = [(kernel, (config,)) for config in configs if config not in kernel.trials]
        if new:
            kernel.to_compile += len(new)
            self._settle(compilers, "compile", new, jobs.compile_job, self._absorb_compiled)
            self._check(checkers, [kernel])

    def race(self, kernel: Progress, station: Station, prepare: Prepare, until: float) -> None:
        """Time what is right of one kernel."""
        kernel.stage = "timing"
        contest = Contest(self._request, self._journal, self._keys, prepare, _put_out, self._watch)
        contest.run(kernel, station, until)

    def settle(self, checkers: Pool) -> None:
        """Verify the choice, or the next best, of each kernel."""
        try:
            self._verify(checkers)
        except LostError as error:
            self._give_up(error)
        self._remember()

    def _give_up(self, error: LostError) -> None:
        for kernel in self.kernels:
            if kernel.stage not in ("done", "failed"):
                kernel.stage, kernel.trouble = "failed", f"nothing is left to verify on: {error}"

    def _settle(
        self, pool: Pool, phase: Phase, groups: Sequence[Group], job: Callable[..., Any], absorb: Absorb,
        until: float = math.inf,
    ) -> None:  # fmt: skip
        """Absorb a record for every config of `groups`: the journal's, or the one that `job` makes now.

        What had not begun at `until` is left out, built-in configs apart.
        """
        self._journal.refresh()
        waiting = []
        for kernel, group in groups:
            unknown = tuple(config for config in group if not self._recall(phase, kernel, config, absorb))
            if unknown:
                module = kernel.tunable.config.__module__
                args = (module, kernel.name, self._request.problem, unknown)
                waiting.append(Job((kernel, unknown), job, args, must=kernel.default in unknown))
                kernel.left_out += len(unknown)
        for kernel in self.kernels:
            self._watch(kernel)
        for done, outcome in pool.run(waiting, self._request.limit_s[phase], until):
            kernel, configs = done.tag
            kernel.left_out -= len(configs)
            records = outcome.value if isinstance(outcome, Done) else [record_of(outcome, phase)] * len(configs)
            # a check that raised, or was lost though a child runs the config, says nothing of it: it is not remembered
            known = isinstance(outcome, Done) or (outcome.kind != "error" and self._request.at_hand)
            if known or phase not in ("check", "verify", "recheck"):
                keys = (self._keys.of(phase, kernel.tunable, config) for config in configs)
                self._journal.add(zip(keys, records, strict=True))
            for config, record in zip(configs, records, strict=True):
                absorb(kernel, config, record)
            self._watch(kernel)

    def _recall(self, phase: Phase, kernel: Progress, config: Config, absorb: Absorb) -> bool:
        record = self._journal.get(self._keys.of(phase, kernel.tunable, config))
        if record is None:
            return False
        kernel.cached += phase == "compile"
        absorb(kernel, config, dict(record))
        return True

    def _sketch(self, pool: Pool, until: float) -> None:
        groups = []
        for kernel in self.kernels:
            configs, kernel.refused = space.legal_configs(kernel.tunable, self._request.problem, kernel.default)
            if self._request.only is not None:
                configs = [c for c in configs if c == kernel.default or c in self._request.only[kernel.name]]
            kernel.legal, kernel.stage = len(configs), "examining"
            groups += [(kernel, group) for group in space.tile_groups(configs)]
        self._settle(pool, "sketch", groups, jobs.sketch_job, self._absorb_sketch, until)

    def _absorb_sketch(self, kernel: Progress, config: Config, record: dict[str, Any]) -> None:
        if "failed" in record:
            kernel.failed[record["failed"]] += 1
        else:
            kernel.sketches[config] = Sketch.from_dict(record)

    def _compile(self, pool: Pool, until: float) -> None:
        queues: list[list[Group]] = []
        for kernel in self.kernels:
            shortlist = self._shortlist(kernel)
            kernel.stage, kernel.to_compile = "compiling", len(shortlist)
            queues.append([(kernel, (config,)) for config in shortlist])
        self._settle(pool, "compile", list(_in_turns(queues)), jobs.compile_job, self._absorb_compiled, until)

    def _shortlist(self, kernel: Progress) -> list[Config]:
        """The default, then those that may fit, each launch only once, from the one that the model expects most of."""
        request, tunable = self._request, kernel.tunable
        # sketches come in the order that workers finish: the choice among equals must not depend on it
        default_first = sorted(kernel.sketches, key=lambda config: (config != kernel.default, astuple(config)))
        different = space.distinct({config: kernel.sketches[config] for config in default_first})
        kernel.same = len(kernel.sketches) - len(different)
        estimates: dict[Config, float] = {}
        for config, sketch in different.items():
            shortage = space.certain_shortage(request.device, config, sketch)
            if shortage is None or config == kernel.default:
                estimates[config] = space.estimate_us(request.device, request.problem, tunable, config, sketch)
            else:
                kernel.ruled_out[shortage] += 1
        best = sorted(estimates, key=lambda config: (config != kernel.default, estimates[config]))
        kernel.space = tuple(best)
        # a strategy that goes its own way begins with the built-in config and compiles what it asks for
        at_once = 1 if request.at_hand and request.strategy not in IN_ORDER else request.most_compiled
        kept = best[: at_once or None]
        kernel.outranked = len(best) - len(kept)
        return kept

    def _absorb_compiled(self, kernel: Progress, config: Config, record: dict[str, Any]) -> None:
        request = self._request
        if "failed" in record:
            kernel.failed[record["failed"]] += 1
            kernel.trials[config] = Trial(config, refusal=f"{record['failed']}: {record['message']}")
            return
        resources = tuple(Resources(**values) for values in record["resources"])
        shortage = space.shortage(request.device, resources)
        if shortage is not None and not (shortage == "spills" and config == kernel.default):
            kernel.dropped[shortage] += 1
            kernel.trials[config] = Trial(
                config, resources, refusal=f"{shortage} beyond what {request.device.name} has"
            )
            return
        launches = list(zip(kernel.sketches[config].launches, resources, strict=True))
        work = kernel.tunable.work(request.problem, config)
        prediction = predict(request.device, request.problem, config, work, launches)
        kernel.trials[config] = Trial(config, resources, prediction)

    def _check(self, pool: Pool, kernels: Sequence[Progress], until: float = math.inf) -> None:
        """Verify whatever compiled and fits, best first: nothing is timed before it gave right results."""
        queues: list[list[Group]] = []
        for kernel in kernels:
            place = {config: number for number, config in enumerate(kernel.space)}
            open_trials = [t for t in kernel.trials.values() if t.refusal is None and t.config not in kernel.checked]
            open_trials.sort(key=lambda trial: place.get(trial.config, len(place)))
            queues.append([(kernel, (trial.config,)) for trial in open_trials])
        job = partial(jobs.verify_job, verify=self._request.check)
        self._settle(pool, "check", list(_in_turns(queues)), job, self._absorb_check, until)
        for kernel in kernels:
            for config in [c for c, t in kernel.trials.items() if t.refusal is None and c not in kernel.checked]:
                kernel.trials[config] = replace(kernel.trials[config], refusal="there was no time to verify it")

    def _absorb_check(self, kernel: Progress, config: Config, record: dict[str, Any]) -> None:
        if record.get("ok"):
            kernel.checked[config] = record
        else:
            _put_out(kernel, config, record, "check")

    def _verify(self, pool: Pool) -> None:
        """Check the best config of each kernel, then the next of those whose check it failed.

        One that was timed was checked before: it is checked again, for what repeated use may have brought out.
        """
        candidates, rejected = {}, {kernel.name: len(kernel.quarantined) for kernel in self.kernels}
        for kernel in self.kernels:
            kernel.stage = "verifying"
            candidates[kernel.name] = iter(self._order(kernel))
        request = self._request
        phase: Phase = "recheck" if request.at_hand else "verify"
        job = partial(jobs.verify_job, verify=request.recheck if request.at_hand else request.verify)
        while unsettled := [kernel for kernel in self.kernels if kernel.stage == "verifying"]:
            groups = []
            for kernel in unsettled:
                trial = next(candidates[kernel.name], None)
                if kernel.trouble is not None:
                    kernel.stage = "failed"
                elif trial is None or len(kernel.quarantined) - rejected[kernel.name] >= MOST_REJECTED:
                    kernel.stage, kernel.trouble = "failed", _trouble(kernel)
                else:
                    groups.append((kernel, (trial.config,)))
            self._settle(pool, phase, groups, job, self._absorb_evidence)

    def _remember(self) -> None:
        """Keep what was chosen by its time: it is preferred when these kernels are timed again."""
        for kernel in self.kernels:
            if kernel.chosen is not None and kernel.rounds:
                key, record = self._keys.choice(kernel.tunable), {"config": config_fields(kernel.chosen.config)}
                if self._journal.get(key) != record:
                    self._journal.add([(key, record)])

    def _order(self, kernel: Progress) -> list[Trial]:
        """The trials that are not out, the choice first."""
        if not kernel.rounds:
            return ranked(list(kernel.trials.values()), kernel.default)
        last = self._journal.get(self._keys.choice(kernel.tunable)) or {"config": ""}
        previous = next((config for config in kernel.trials if config_fields(config) == last["config"]), None)
        configs = ranking(kernel.rounds, kernel.default, lambda config: preference(kernel.trials[config]), previous)
        return [trial for config in configs if (trial := kernel.trials[config]).refusal is None]

    def _absorb_evidence(self, kernel: Progress, config: Config, record: dict[str, Any]) -> None:
        if "failed" in record or not record["ok"]:
            _put_out(kernel, config, record, "recheck" if config in kernel.checked else "verify")
        else:
            kernel.chosen, kernel.evidence, kernel.stage = kernel.trials[config], record, "done"
            if first := kernel.checked.get(config):
                worst = max(first["worst_budget_use"], record["worst_budget_use"])
                kernel.evidence = {**first, "cases": first["cases"] + record["cases"], "worst_budget_use": worst}


def _put_out(kernel: Progress, config: Config, record: Mapping[str, Any], phase: Phase) -> None:
    """Quarantine a config for what a record says against it."""
    kernel.quarantined[config] = reason = against(record, phase)
    kernel.trials[config] = replace(kernel.trials[config], refusal=f"{reason.outcome}: {reason.message}")


def _trouble(kernel: Progress) -> str:
    if kernel.quarantined:
        reasons = "; ".join(sorted({f"{reason.outcome}: {reason.message}" for reason in kernel.quarantined.values()}))
        return f"the {len(kernel.quarantined)} best configs are in quarantine: {reasons}"
    return f"no config runs: {', '.join(f'{n} {kind}' for kind, n in (kernel.failed + kernel.dropped).items())}"


def _in_turns(queues: list[list[Group]]) -> Iterator[Group]:
    """One of each queue, then the next of each: whatever ends early has served every kernel alike."""
    return (group for group in chain.from_iterable(zip_longest(*queues)) if group is not None)
