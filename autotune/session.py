"""A whole command: one run after the other, one for each problem, into one profile."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from ..profiles.schema import Profile
from ..profiles.store import ProfileError, merged, read_profile, write_profile
from .journal import Journal
from .live import display_for
from .progress import Progress, Request, plan
from .recommend import Found
from .report import choice_table, reasons
from .result import profile_of, summary_of
from .tune import Tuner


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
        self._held = _held(requests[0], output)
        self.runs: list[tuple[Request, list[Progress]]] = []
        self.written = False

    def run(self) -> bool:
        """Do all runs; whether every kernel has a verified config for every problem.

        Raises:
            JournalError: if the journal cannot be used.
        """
        with Journal(self._requests[0].cache_folder) as journal:
            for request in self._requests:
                how = "measured here" if request.at_hand else "predicted: that GPU is not in this machine"
                self._say(f"{request.device.name}, {request.problem}; times are {how}")
                kernels = plan(request)
                with display_for(self._words, kernels, self._quiet) as display:
                    Tuner(request, journal, kernels, display).run()
                self.runs.append((request, kernels))
                self._write(request, kernels)
        return all(kernel.chosen is not None for _, kernels in self.runs for kernel in kernels)

    def _write(self, request: Request, kernels: list[Progress]) -> None:
        settled = [kernel for kernel in kernels if kernel.chosen is not None]
        if settled:
            profile = profile_of(request, settled, () if self._found is None else self._found.pareto)
            self._held = profile if self._held is None else merged(self._held, profile)
            write_profile(self._held, self._output)
            self.written = True

    def summary(self) -> dict[str, Any]:
        """The session for machines; where the profile is (None: nowhere)."""
        request = self._requests[0]
        return {
            "device": request.device.name,
            "evidence": "measured" if request.at_hand else "modelled",
            "profile": str(self._output) if self.written else None,
            "semantics": None if self._found is None else self._found.summary,
            "runs": [summary_of(request, kernels) for request, kernels in self.runs],
        }

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


def _held(request: Request, output: Path) -> Profile | None:
    """The profile that is at `output` already, to which the runs add."""
    if not output.exists():
        return None
    try:
        held = read_profile(output)
        merged(held, profile_of(request, []))
    except ProfileError as error:
        raise SessionError(f"--output {output} exists and cannot be added to: {error}") from error
    return held
