"""What a person sees of a run of `cca-verify`: a live table on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from .layers import TITLES
from .record import Result
from .units import Unit

LINE_EVERY_S = 20.0
STYLES = {"pass": "green", "fail": "bold red", "error": "bold red", "skip": "yellow", "not-run": "dim"}


class Board:
    """The state of a run, drawn in place on a terminal and written as lines elsewhere; a context manager."""

    def __init__(self, console: Console, units: Sequence[Unit]) -> None:
        self._console = console
        self._total = Counter(unit.layer for unit in units)
        self._counts = {layer: Counter[str]() for layer in self._total}
        self._running: dict[str, float] = {}
        self._begun = self._spoke = time.monotonic()
        live = Live(console=console, get_renderable=self._draw, refresh_per_second=4, transient=False)
        self._live = live if console.is_terminal and not console.quiet else None

    def __enter__(self) -> Board:
        if self._live is not None:
            self._live.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.__exit__(None, None, None)

    def started(self, unit: Unit) -> None:
        """A worker began `unit`."""
        self._running[unit.id] = time.monotonic()

    def ended(self, result: Result) -> None:
        """Count a result, and say at once what is wrong with it."""
        self._running.pop(result.id, None)
        counts = self._counts[result.layer]
        counts[result.status] += 1
        if result.status in ("fail", "error"):
            self._say(f"{result.status.upper()} {result.id}: {result.message}", STYLES[result.status])
        for warning in result.warnings if result.status == "pass" else ():
            self._say(f"WARNING {result.id}: {warning}", "yellow")
        if self._live is None:
            self._say_progress(result.layer)

    def _say_progress(self, layer: str) -> None:
        now, counts = time.monotonic(), self._counts[layer]
        if counts.total() == self._total[layer] or now - self._spoke >= LINE_EVERY_S:
            self._spoke = now
            said = ", ".join(f"{number} {status}" for status, number in counts.items())
            done = f"{counts.total()} of {self._total[layer]}"
            self._say(f"{layer} ({TITLES.get(layer, 'the profile')}): {done}, {said}; {now - self._begun:.0f} s", "")

    def _say(self, line: str, style: str) -> None:
        self._console.print(line, style=style or None, markup=False, highlight=False, soft_wrap=True)

    def _draw(self) -> RenderableType:
        table = Table.grid(padding=(0, 2))
        for layer, counts in self._counts.items():
            done = counts.total()
            numbers = Text(", ").join(Text(f"{n} {status}", STYLES[status]) for status, n in counts.items())
            bar = ProgressBar(total=max(1, self._total[layer]), completed=done, width=20)
            title = Text(TITLES.get(layer, "the profile"), overflow="ellipsis", no_wrap=True)
            table.add_row(Text(layer, "bold"), title, bar, Text(f"{done}/{self._total[layer]}"), numbers)
        now = time.monotonic()
        lines = [Text(f"  {name} · {now - begun:.0f} s", "dim") for name, begun in list(self._running.items())]
        return Group(table, Text(f"{now - self._begun:.0f} s"), *lines)
