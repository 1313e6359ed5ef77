"""One run of the tuner: problem -> space -> compile -> measure or predict -> verify.

Every stage does the same: what the journal knows is taken from there, the rest is done by worker processes and
recorded as it ends, so that an interrupted run goes on where it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, astuple, replace
from functools import partial
from itertools import chain, zip_longest
from typing import Any

import torch
import triton

from ..kernels.tunable import Config
from ..profiles.configs import source_hash
from ..verify.gate import SUITE, TIMEOUT_S
from . import jobs, space
from .binary import Resources
from .compile import Sketch, aim
from .journal import Journal, Key, Phase
from .measure import Timing
from .pool import Done, Job, Pool
from .predict import predict, roofline_us
from .progress import Progress, Request
from .search import Trial, ranked

LIMIT_S: dict[Phase, float] = {"sketch": 60.0, "compile": 60.0, "measure": 120.0, "verify": TIMEOUT_S + 60.0}
REVISION = 3
"""Part of the key of what is read from the compiler: to be raised when the meaning of a figure changes."""
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
        self._kernels = kernels
        self._watch = watch
        self._gpu_here = torch.cuda.get_device_name() if torch.cuda.is_available() else None

    def run(self) -> None:
        """Take every kernel from its space to a verified choice, or to the trouble that prevents one.

        Raises:
            ValueError: if a built-in config cannot run the problem.
        """
        request = self._request
        with Pool(request.jobs, aim, request.device.arch) as compilers:
            self._sketch(compilers)
            self._compile(compilers)
        if request.at_hand:
            with Pool(1, jobs.no_setup, renew=True) as timer:
                self._measure(timer)
        with Pool(1 if self._gpu_here else request.jobs, jobs.no_setup, renew=True) as verifiers:
            self._verify(verifiers)

    def _key(self, phase: Phase, kernel: Progress, config: Config) -> Key:
        request = self._request
        where = {
            "sketch": f"{request.device.arch}, revision {REVISION}",
            "compile": f"{request.device.arch}, revision {REVISION}",
            "measure": request.device.name,
            "verify": f"{self._gpu_here or 'interpreter'}, suite {SUITE}",
        }[phase]
        fields = ",".join(f"{name}={value}" for name, value in asdict(config).items())
        source = source_hash(kernel.name)
        return Key(phase, kernel.name, source, str(request.problem), fields, where, triton.__version__)

    def _settle(
        self, pool: Pool, phase: Phase, groups: Sequence[Group], job: Callable[..., Any], absorb: Absorb
    ) -> None:
        """Absorb a record for every config of `groups`: the journal's, or the one that `job` makes now."""
        waiting = []
        for kernel, group in groups:
            unknown = tuple(config for config in group if not self._recall(phase, kernel, config, absorb))
            if unknown:
                module = kernel.tunable.config.__module__
                waiting.append(Job((kernel, unknown), job, (module, kernel.name, self._request.problem, unknown)))
        for kernel in self._kernels:
            self._watch(kernel)
        for done, outcome in pool.run(waiting, LIMIT_S[phase]):
            kernel, configs = done.tag
            if isinstance(outcome, Done):
                records = outcome.value
            else:
                records = [{"failed": outcome.kind, "message": outcome.message}] * len(configs)
            # a check that raised says nothing of the config: it is not remembered
            if phase != "verify" or isinstance(outcome, Done):
                keys = (self._key(phase, kernel, config) for config in configs)
                self._journal.add(zip(keys, records, strict=True))
            for config, record in zip(configs, records, strict=True):
                absorb(kernel, config, record)
            self._watch(kernel)

    def _recall(self, phase: Phase, kernel: Progress, config: Config, absorb: Absorb) -> bool:
        record = self._journal.get(self._key(phase, kernel, config))
        if record is None:
            return False
        kernel.cached += phase == "compile"
        absorb(kernel, config, dict(record))
        return True

    def _sketch(self, pool: Pool) -> None:
        groups = []
        for kernel in self._kernels:
            configs, kernel.refused = space.legal_configs(kernel.tunable, self._request.problem, kernel.default)
            kernel.legal, kernel.stage = len(configs), "examining"
            groups += [(kernel, group) for group in space.tile_groups(configs)]
        self._settle(pool, "sketch", groups, jobs.sketch_job, self._absorb_sketch)

    def _absorb_sketch(self, kernel: Progress, config: Config, record: dict[str, Any]) -> None:
        if "failed" in record:
            kernel.failed[record["failed"]] += 1
        else:
            kernel.sketches[config] = Sketch.from_dict(record)

    def _compile(self, pool: Pool) -> None:
        queues: list[list[Group]] = []
        for kernel in self._kernels:
            shortlist = self._shortlist(kernel)
            kernel.stage, kernel.to_compile = "compiling", len(shortlist)
            queues.append([(kernel, (config,)) for config in shortlist])
        self._settle(pool, "compile", list(_in_turns(queues)), jobs.compile_job, self._absorb_compiled)

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
        kept = best[: request.most_compiled or None]
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

    def _measure(self, pool: Pool) -> None:
        for kernel in self._kernels:
            kernel.stage = "timing"
            standing = [(kernel, (trial.config,)) for trial in kernel.trials.values() if trial.refusal is None]
            job = partial(jobs.measure_job, default=kernel.default)
            self._settle(pool, "measure", standing, job, self._absorb_timing)

    def _absorb_timing(self, kernel: Progress, config: Config, record: dict[str, Any]) -> None:
        request, kernel.timed = self._request, kernel.timed + 1
        if "failed" in record:
            kernel.failed[record["failed"]] += 1
            changes: dict[str, Any] = {"refusal": f"{record['failed']}: {record['message']}"}
        else:
            timing, baseline = Timing(**record["timing"]), Timing(**record["baseline"])
            work = kernel.tunable.work(request.problem, config)
            refusal = timing.refusal(roofline_us(request.device, request.problem, work))
            kernel.failed["implausible timing"] += refusal is not None
            changes = {"timing": timing, "baseline": baseline, "refusal": refusal}
        kernel.trials[config] = replace(kernel.trials[config], **changes)

    def _verify(self, pool: Pool) -> None:
        """Check the best config of each kernel, then the next of those whose check it failed."""
        candidates = {}
        for kernel in self._kernels:
            kernel.stage = "verifying"
            candidates[kernel.name] = iter(ranked(list(kernel.trials.values()), kernel.default))
        job = partial(jobs.verify_job, verify=self._request.verify)
        while unsettled := [kernel for kernel in self._kernels if kernel.stage == "verifying"]:
            groups = []
            for kernel in unsettled:
                trial = next(candidates[kernel.name], None)
                if trial is None or len(kernel.quarantined) >= MOST_REJECTED:
                    kernel.stage, kernel.trouble = "failed", _trouble(kernel)
                else:
                    groups.append((kernel, (trial.config,)))
            self._settle(pool, "verify", groups, job, self._absorb_evidence)

    def _absorb_evidence(self, kernel: Progress, config: Config, record: dict[str, Any]) -> None:
        if "failed" in record or not record["ok"]:
            kernel.quarantined[config] = record["message"]
        else:
            kernel.chosen, kernel.evidence, kernel.stage = kernel.trials[config], record, "done"


def _trouble(kernel: Progress) -> str:
    if kernel.quarantined:
        reasons = "; ".join(sorted(set(kernel.quarantined.values())))
        return f"the {len(kernel.quarantined)} best configs failed verification: {reasons}"
    return f"no config runs: {', '.join(f'{n} {kind}' for kind, n in (kernel.failed + kernel.dropped).items())}"


def _in_turns(queues: list[list[Group]]) -> Iterator[Group]:
    """One of each queue, then the next of each: whatever ends early has served every kernel alike."""
    return (group for group in chain.from_iterable(zip_longest(*queues)) if group is not None)
