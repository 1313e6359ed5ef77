"""A whole command: one run after the other, one for each problem, into one profile."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from ..profiles.store import ProfileError, merged, read_profile, update_profile
from .journal import Journal
from .live import display_for
from .outcome import speaks_against
from .pool import LostError
from .progress import Progress, Request, plan
from .recommend import Found
from .report import choice_table, reasons
from .result import profile_of, summary_of
from .stations import Station
from .tune import Tuner
from .workshop import Workshop


class SessionError(ValueError):
    """A session that must not begin; the message says why."""


class Session:
    """The runs of a command.

    Args:
        requests: what to tune, for one device; at least one.
        output: the profile to write or to add to, after each run.
        words: where to say what goes on. `quiet`: say nothing there.
        found: the front over group and window size that the requests come from, to be kept in the profile.

    Raises:
        SessionError: if there is a file at `output` that cannot be added to.
    """

    def __init__(
        self, requests: Sequence[Request], output: Path, words: Console, *, quiet: bool, found: Found | None = None
    ) -> None:
        self._requests = requests
        self._output = output
        self._words = words
        self._quiet = quiet
        self._found = found
        _check_held(requests[0], output)
        self.runs: list[tuple[Request, list[Progress]]] = []
        self.stations: list[Station] = []
        self.written = False

    def run(self) -> bool:
        """Do all runs; whether every kernel has a verified config for every problem.

        With several GPUs, or a budget to share, the runs go on at the same time, else one after the other.

        Raises:
            JournalError: if the journal cannot be used.
            SessionError: if no worker can be had, or the profile cannot be written.
        """
        first = self._requests[0]
        at_once = len(first.cards) > 1 or first.budget_s is not None
        together = [self._requests] if at_once else [[request] for request in self._requests]
        try:
            with Journal(first.cache_folder) as journal, Workshop(first) as workshop:
                self.stations = workshop.stations
                if first.retry_failed:
                    count = journal.forget(lambda _, record: speaks_against(record))
                    self._say(f"{count} trials that failed before may be tried again")
                for requests in together:
                    self._run(requests, journal, workshop)
        except LostError as error:
            raise SessionError(str(error)) from error
        return all(kernel.chosen is not None for _, kernels in self.runs for kernel in kernels)

    def _run(self, requests: Sequence[Request], journal: Journal, workshop: Workshop) -> None:
        """Some runs at the same time."""
        runs = [(request, plan(request)) for request in requests]
        for request in requests:
            self._say(f"{request.device.name}, {request.problem}; times are {_how(request)}")
        with display_for(self._words, [kernel for _, kernels in runs for kernel in kernels], self._quiet) as display:
            workshop.run([Tuner(request, journal, kernels, display) for request, kernels in runs])
        for request, kernels in runs:
            self.runs.append((request, kernels))
            for kernel in kernels:
                if kernel.left_out:
                    self._say(f"the budget left no time for {kernel.left_out} configs of {kernel.name}")
            self._write(request, kernels)

    def _write(self, request: Request, kernels: list[Progress]) -> None:
        """Add what was found to the profile, whatever others have added to it meanwhile."""
        settled = [kernel for kernel in kernels if kernel.chosen is not None]
        if not settled:
            return
        profile = profile_of(request, settled, () if self._found is None else self._found.pareto)
        try:
            update_profile(self._output, lambda held: profile if held is None else merged(held, profile))
        except (OSError, ProfileError) as error:
            message = f"--output {self._output} cannot be written: {error}"
            raise SessionError(f"{message}; what was found is kept, the same command writes it without work") from error
        self.written = True

    def summary(self) -> dict[str, Any]:
        """The session for machines; where the profile is (None: nowhere)."""
        request = self._requests[0]
        return {
            "device": request.device.name,
            "evidence": "measured" if request.at_hand else "modelled",
            "profile": str(self._output) if self.written else None,
            "devices": [{"index": s.name, "lost": s.lost, "raced": s.done} for s in self._used()],
            "semantics": None if self._found is None else self._found.summary,
            "runs": [summary_of(request, kernels) for request, kernels in self.runs],
        }

    def _used(self) -> list[Station]:
        """The GPUs that races were run on."""
        return self.stations if self._requests[0].at_hand else []

    def show(self, results: Console) -> None:
        """The tables of what was chosen, and how to use it, on `results`; trouble goes to where the words go."""
        for request, kernels in self.runs:
            if len(self.runs) > 1:
                results.print(f"\n{request.problem}", style="bold", highlight=False)
            results.print(choice_table(kernels, results.width))
            for line in reasons(kernels):
                results.print(line, markup=False, highlight=False, soft_wrap=not results.is_terminal)
            for kernel in kernels:
                if kernel.trouble is not None:
                    self._say(f"{kernel.name} has no config: {kernel.trouble}", style="red")
        if self.written:
            use = f'cca_attention(..., profile="{self._output}")'
            results.print(f"wrote {self._output}; use it with {use}", markup=False, highlight=False, soft_wrap=True)
        else:
            self._say("no profile was written", style="red")

    def _say(self, line: str, style: str | None = None) -> None:
        wraps = not self._words.is_terminal
        self._words.print(line, style=style, markup=False, highlight=False, soft_wrap=wraps)


def _how(request: Request) -> str:
    """How a run's times come about."""
    if not request.at_hand:
        return "predicted: that GPU is not in this machine"
    others = "" if len(request.cards) < 2 else f", on GPUs {', '.join(str(card.index) for card in request.cards)}"
    return f"measured here{others}"


def _check_held(request: Request, output: Path) -> None:
    """See that the runs can be added to the profile that may be at `output`."""
    if not output.exists():
        return
    try:
        merged(read_profile(output), profile_of(request, []))
    except ProfileError as error:
        raise SessionError(f"--output {output} exists and cannot be added to: {error}") from error
