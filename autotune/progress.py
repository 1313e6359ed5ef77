"""What is asked of a run, and how far each of its kernels has come."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..kernels.tunable import Config, Tunable
from ..problem import Problem
from ..verify.gate import TIMEOUT_S
from .compile import Sketch
from .devices import Device
from .host import HostCard, take_card
from .jobs import Sample, Verify, check_by_gate, recheck_by_gate, verify_by_gate
from .journal import Phase
from .measure import sample
from .outcome import Quarantined
from .race import Round
from .search import Trial

LIMIT_S: dict[Phase, float] = {
    "sketch": 60.0, "compile": 60.0, "check": 120.0, "measure": 120.0, "recheck": 120.0, "verify": TIMEOUT_S + 60.0
}  # fmt: skip
"""Seconds for a job, compiling included: what a GPU has not done by then hangs. `verify` may be interpreted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What to tune. `at_hand`: the GPU is in this machine, so configs are timed, not predicted.

    `most_compiled`: configs looked at for each kernel, by the model's estimate or by the `strategy`; 0 for all.
    `rounds`: how often the best are timed; `budget_s`: seconds after which all search ends, None for no limit; `seed`
    of the order in a round and of what a strategy draws; `least_ctx`: the shortest context that the problem's stands
    for, None for itself alone. `only`: by kernel, what is tried beside the built-in config, None for the whole space.
    `cards`: the GPUs to time on, all alike; with none, the one that PyTorch uses; `take` makes a worker process use
    one of them; `ray`: the address of the Ray cluster whose workers do it all, None for this machine's own.
    `retry_failed`: what earlier runs put out is tried again. `check`, `sample` and `recheck` are called in worker
    processes in this order where the GPU is at hand, elsewhere `verify` alone; `limit_s` is the time that a job of
    each phase has.
    """

    device: Device
    problem: Problem
    tunables: tuple[Tunable, ...]
    cache_folder: Path
    at_hand: bool
    jobs: int
    most_compiled: int
    strategy: str = "racing"
    rounds: int = 12
    budget_s: float | None = None
    seed: int = 0
    least_ctx: int | None = None
    only: Mapping[str, tuple[Config, ...]] | None = None
    cards: tuple[HostCard, ...] = ()
    take: Callable[[str], None] = take_card
    ray: str | None = None
    retry_failed: bool = False
    check: Verify = check_by_gate
    sample: Sample = sample
    recheck: Verify = recheck_by_gate
    verify: Verify = verify_by_gate
    limit_s: Mapping[Phase, float] = field(default_factory=lambda: LIMIT_S)


@dataclass
class Progress:
    """One kernel: the stage it is at, what became of its configs, and what was chosen.

    Of `legal` configs (`refused` more broke their own rules), `same` launch what another does, `ruled_out` cannot fit,
    `outranked` were expected to be slower than those compiled, for `left_out` the budget had no time, `failed` did not
    compile or gave no believable time, `dropped` do not fit once compiled, `quarantined` did harm or were wrong when
    they ran, whatever the next run is. `checked` has the evidence for a config before it was timed, `space` what may
    be timed, the best by the model first, `rounds` and `samples` (by round) what was, `states` how the GPU was after
    each, `out_of_time` that the budget ended it. `trouble` says why nothing was chosen. `seq_len` is the problem's,
    `at_hand` says that configs are timed.
    """

    tunable: Tunable
    default: Config
    seq_len: int = 0
    at_hand: bool = False
    stage: str = "waiting"
    legal: int = 0
    refused: int = 0
    same: int = 0
    ruled_out: Counter[str] = field(default_factory=Counter)
    outranked: int = 0
    to_compile: int = 0
    left_out: int = 0
    cached: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    timed: int = 0
    out_of_time: bool = False
    space: tuple[Config, ...] = ()
    rounds: list[Round] = field(default_factory=list)
    samples: dict[Config, dict[int, list[float]]] = field(default_factory=dict)
    states: list[dict[str, Any] | None] = field(default_factory=list)
    sketches: dict[Config, Sketch] = field(default_factory=dict)
    trials: dict[Config, Trial] = field(default_factory=dict)
    checked: dict[Config, dict[str, Any]] = field(default_factory=dict)
    quarantined: dict[Config, Quarantined] = field(default_factory=dict)
    chosen: Trial | None = None
    evidence: dict[str, Any] | None = None
    trouble: str | None = None

    @property
    def name(self) -> str:
        """The kernel's."""
        return self.tunable.name

    @property
    def compiled(self) -> int:
        """Configs whose compilation has an outcome."""
        return len(self.trials)


def plan(request: Request) -> list[Progress]:
    """The kernels of a run that has not begun."""
    problem, arch = request.problem, request.device.arch
    return [Progress(t, t.default(problem, arch), problem.seq_len, request.at_hand) for t in request.tunables]
