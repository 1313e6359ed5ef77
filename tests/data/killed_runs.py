"""Kill a run of the tuner at random moments, and look each time whether every finished round is in its journal.

    python tests/data/killed_runs.py 200

prints how often it was killed, how often it came to its end between kills, and how many rounds were found. The run is a
contest of twelve configs, one of which fails; it goes on in the same folder until it is complete, then in a new one.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import toy_tunable as toy

from cca_attention.autotune.contest import Contest
from cca_attention.autotune.devices import find_device
from cca_attention.autotune.journal import Journal
from cca_attention.autotune.keys import Keys
from cca_attention.autotune.progress import Progress, Request
from cca_attention.autotune.search import Trial
from cca_attention.autotune.stations import Station
from cca_attention.autotune.tune import _put_out
from cca_attention.autotune.worker import Done, Failed, Job
from cca_attention.problem import Problem

PROBLEM = Problem(q_heads=1, kv_heads=1, seq_len=4096, head_dim=64)


class Here:
    """A pool of this process."""

    def run(self, jobs: Iterable[Job], limit_s: float) -> Iterator[tuple[Job, Done | Failed]]:
        """A time for every config but one."""
        for job in jobs:
            time.sleep(random.uniform(0, 2e-4))
            fails = toy.fate_of(job.tag) == "oom"
            yield job, Failed("error", "out of memory", 0.1) if fails else Done([100.0 + job.tag.block_q] * 3, 0.1)


def run(folder: Path, report: int) -> Progress:
    """One contest; a byte to `report` for every round that is finished."""
    request = Request(
        device=find_device("a100"), problem=PROBLEM, tunables=(toy.HARMFUL,), cache_folder=folder, at_hand=True, jobs=1,
        most_compiled=0, strategy="exhaustive",
    )  # fmt: skip
    default = toy.default(PROBLEM, "sm_80")
    configs = [default, *(config for config, _ in toy.HARMFUL.candidates(PROBLEM) if config != default)]
    kernel = Progress(toy.HARMFUL, default, space=tuple(configs), trials={config: Trial(config) for config in configs})
    watch: Any = lambda _: os.write(report, b".")  # noqa: E731
    with Journal(folder) as journal:
        contest = Contest(request, journal, Keys(request.device, PROBLEM, "a card"), lambda *_: None, _put_out, watch)
        contest.run(kernel, Station("0", Here()), float("inf"))  # type: ignore[arg-type]
    return kernel


def killed(folder: Path, after_s: float) -> tuple[bool, int]:
    """Whether a run in a process of its own was complete before it was killed, and the rounds that it reported."""
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(ours)
        run(folder, theirs)
        os._exit(0)
    os.close(theirs)
    time.sleep(after_s)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    reported = b""
    while piece := os.read(ours, 4096):
        reported += piece
    os.close(ours)
    return os.WIFEXITED(status), len(reported)


def rounds_in(folder: Path) -> int:
    """The rounds in a journal, which must be readable."""
    with Journal(folder) as journal:
        return sum(key.phase == "round" for key in journal)


def main(kills: int) -> None:
    """Kill until it was done `kills` times."""
    random.seed(11)
    scratch = Path(tempfile.mkdtemp())
    whole = run(scratch / "whole", os.open(os.devnull, os.O_WRONLY))
    started = time.monotonic()
    run(scratch / "timed", os.open(os.devnull, os.O_WRONLY))
    takes_s = time.monotonic() - started
    done, completed, found = 0, 0, 0
    while done < kills:
        folder = scratch / str(completed)
        ended, reported = killed(folder, random.uniform(0, 0.6 * takes_s))
        held = rounds_in(folder)
        assert held >= reported, f"{reported} rounds were finished, {held} are found"
        found += held
        done += not ended
        if ended:
            resumed = run(folder, os.open(os.devnull, os.O_WRONLY))
            assert resumed.rounds == whole.rounds and resumed.quarantined == whole.quarantined
            completed += 1
    sys.stdout.write(f"{done} {completed} {found}\n")


if __name__ == "__main__":
    main(int(sys.argv[1]))
