"""What a person sees of a run while it goes on: a live table on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Protocol

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from .progress import Progress
from .remaining import Remaining, standing
from .report import config_text, counted, time_text, trouble_kinds

LINE_EVERY_S = 15.0
SETTLED = ("done", "failed")


class Display(Protocol):
    """Shows a run while it goes on."""

    def __enter__(self) -> Display: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def __call__(self, kernel: Progress) -> None:
        """`kernel` has come further."""


def display_for(console: Console, kernels: Sequence[Progress], quiet: bool) -> Display:
    """The display that suits `console`."""
    if quiet:
        return _Silence()
    return _LiveTable(console, kernels) if console.is_terminal else _Lines(console, kernels)


class _Silence:
    def __enter__(self) -> _Silence:
        return self

    def __exit__(self, *_: object) -> None:
        return

    def __call__(self, kernel: Progress) -> None:
        return


class _LiveTable:
    """A row for each kernel, redrawn in place; the last drawing stays."""

    def __init__(self, console: Console, kernels: Sequence[Progress]) -> None:
        self._console = console
        self._kernels = kernels
        self._started = time.monotonic()
        self._remaining = Remaining(kernels)
        self._spinner = Spinner("dots")
        self._live = Live(console=console, get_renderable=self._draw, refresh_per_second=5)

    def __enter__(self) -> _LiveTable:
        self._live.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.__exit__(kind, error, trace)

    def __call__(self, kernel: Progress) -> None:
        return

    def _draw(self) -> RenderableType:
        seconds = time.monotonic() - self._started
        if all(kernel.stage in SETTLED for kernel in self._kernels):
            line: RenderableType = Text(f"all kernels settled in {duration(seconds)}")
        else:
            words = [stage_of(self._kernels), duration(seconds), left_text(self._remaining())]
            self._spinner.update(text=Text(" · ".join(filter(None, words)), style="bold"))
            line = self._spinner
        counts = [Text(text, style="dim") for text in space_lines(self._kernels)]
        return Group(state_table(self._kernels, self._console.width), *counts, line)


class _Lines:
    """A line whenever a kernel enters a stage, and every few seconds while something ends."""

    def __init__(self, console: Console, kernels: Sequence[Progress]) -> None:
        self._console = console
        self._kernels = kernels
        self._remaining = Remaining(kernels)
        self._stages = {id(kernel): "waiting" for kernel in kernels}
        self._last = time.monotonic()

    def __enter__(self) -> _Lines:
        return self

    def __exit__(self, *_: object) -> None:
        return

    def __call__(self, kernel: Progress) -> None:
        now, left_s = time.monotonic(), self._remaining()
        if self._stages[id(kernel)] != kernel.stage:
            self._stages[id(kernel)] = kernel.stage
            self._last = now
            self._say(f"{title(kernel, self._kernels)}: {kernel.stage}{_details(kernel)}")
        elif now - self._last >= LINE_EVERY_S:
            self._last = now
            self._say("; ".join(filter(None, (stage_of(self._kernels), left_text(left_s)))))

    def _say(self, line: str) -> None:
        self._console.print(line, soft_wrap=True, markup=False, highlight=False)


def title(kernel: Progress, kernels: Sequence[Progress]) -> str:
    """The kernel's name, with the context's length where `kernels` have several."""
    return kernel.name if len({k.seq_len for k in kernels}) < 2 else f"{kernel.name} {kernel.seq_len}"


def duration(seconds: float) -> str:
    """Seconds, or minutes and seconds."""
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds // 60:.0f} min {seconds % 60:.0f} s"


def left_text(seconds: float | None) -> str:
    """How much is left, no more exactly than an estimate deserves; nothing where it is not known or used up."""
    if not seconds:
        return ""
    return f"about {max(5, 5 * round(seconds / 5))} s left" if seconds < 100 else f"about {seconds / 60:.0f} min left"


def _details(kernel: Progress) -> str:
    if kernel.stage == "examining":
        return f" {kernel.legal} configs, {kernel.refused} more refused by the kernel's own rules"
    if kernel.stage == "compiling":
        out = counted(kernel.ruled_out) or "none"
        return (
            f" {kernel.to_compile} configs ({kernel.cached} cached); cannot fit: {out}; "
            f"same as another: {kernel.same}; expected slower: {kernel.outranked}"
        )
    if kernel.stage in ("checking", "timing", "verifying"):
        best = best_text(kernel)
        return f"; compiled {kernel.compiled}, out: {counted(trouble_kinds(kernel)) or 'none'}; best so far {best}"
    if kernel.stage == "done" and kernel.chosen is not None:
        return f": {config_text(kernel.chosen.config)}, {best_text(kernel)}"
    return f": {kernel.trouble}" if kernel.trouble else ""


def stage_of(kernels: Sequence[Progress]) -> str:
    """The run's stage in a few words, with how far it is."""
    stages = Counter(kernel.stage for kernel in kernels)
    if stages["compiling"]:
        return f"compiling {sum(k.compiled for k in kernels)} of {sum(k.to_compile for k in kernels)} configs"
    if stages["checking"] and not stages["timing"]:
        checked = sum(len(k.checked) + len(k.quarantined) for k in kernels)
        return f"verifying {sum(k.compiled for k in kernels)} configs before they are timed, {checked} done"
    if stages["timing"]:
        return f"timing {sum(k.timed for k in kernels)} configs"
    if stages["verifying"]:
        return f"verifying the choice, {sum(stages[s] for s in SETTLED)} of {len(kernels)} kernels settled"
    if stages["examining"]:
        return f"examining {sum(k.legal for k in kernels)} configs, {sum(len(k.sketches) for k in kernels)} done"
    return "starting"


def state_table(kernels: Sequence[Progress], width: int) -> Table:
    """How far each kernel is, and its best config against the built-in one; the narrower, the fewer columns."""
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    table.add_column("kernel", no_wrap=True)
    table.add_column("stage", no_wrap=True, min_width=9)
    measures = any(kernel.at_hand for kernel in kernels)
    columns = {
        name: cell for name, (least, cell) in COLUMNS.items() if width >= least and (measures or name != "timed")
    }
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    for kernel in kernels:
        style = {"done": "green", "failed": "red"}.get(kernel.stage, "")
        cells = (cell(kernel) for cell in columns.values())
        table.add_row(title(kernel, kernels), Text(kernel.stage, style=style), *cells)
    return table


def space_lines(kernels: Sequence[Progress]) -> list[str]:
    """Why configs were not compiled, and what was wrong with others, over all kernels."""
    unfit = sum((Counter(k.ruled_out) for k in kernels), Counter[str]())
    parts = [
        f"{unfit.total()} cannot fit ({counted(unfit)})" if unfit else "",
        f"{same} launch what another does" if (same := sum(k.same for k in kernels)) else "",
        f"{slower} were expected to be slower" if (slower := sum(k.outranked for k in kernels)) else "",
    ]
    legal, refused = sum(k.legal for k in kernels), sum(k.refused for k in kernels)
    lines = [f"{legal} of {legal + refused} configs are legal: {', '.join(filter(None, parts))}"] if any(parts) else []
    out = sum((trouble_kinds(k) for k in kernels), Counter[str]())
    return [*lines, *([f"out: {counted(out)}"] if out else [])]


def best_text(kernel: Progress) -> str:
    """The least time so far, or of the choice, and how many times as long the built-in config takes."""
    own, builtin = standing(kernel)
    gain = f", {builtin / own:.2f}x the built-in" if own and builtin and builtin != own else ""
    return f"{time_text(own)}{gain}"


def _gain(kernel: Progress) -> str:
    own, builtin = standing(kernel)
    return f"{builtin / own:.2f}x" if own and builtin else ""


def _compiled(kernel: Progress) -> str:
    return f"{kernel.compiled}/{kernel.to_compile}" if kernel.compiled < kernel.to_compile else str(kernel.compiled)


COLUMNS: dict[str, tuple[int, Callable[[Progress], str]]] = {
    "legal": (90, lambda k: f"{k.legal}/{k.legal + k.refused}"),
    "cached": (100, lambda k: str(k.cached)),
    "compiled": (0, _compiled),
    "verified": (72, lambda k: str(max(len(k.checked), int(k.chosen is not None)))),
    "timed": (0, lambda k: str(k.timed)),
    "out": (0, lambda k: str(trouble_kinds(k).total())),
    "best": (0, lambda k: "" if (own := standing(k)[0]) is None else time_text(own)),
    "to built-in": (72, _gain),
}
"""Each column, the least width of a terminal that has room for it, and what it says."""
