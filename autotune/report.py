"""What a person sees of a run: a live table on a terminal, plain lines elsewhere, and the table of what was chosen."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from types import TracebackType
from typing import Protocol

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from ..kernels.tunable import Config
from .progress import Progress

LINE_EVERY_S = 15.0
WIDE = 110
LEGEND = "unfit: cannot fit; same: as another; slower: expected so; dropped: once compiled"


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
        running = any(kernel.stage not in ("done", "failed") for kernel in self._kernels)
        self._spinner.update(text=Text(f"{stage_of(self._kernels)} · {seconds:.0f} s", style="bold"))
        line: RenderableType = self._spinner if running else Text(f"all kernels settled in {seconds:.0f} s")
        return Group(space_table(self._kernels, self._console.width), line)


class _Lines:
    """A line whenever a kernel enters a stage, and while compiling every few seconds."""

    def __init__(self, console: Console, kernels: Sequence[Progress]) -> None:
        self._console = console
        self._kernels = kernels
        self._stages = {kernel.name: "waiting" for kernel in kernels}
        self._last = time.monotonic()

    def __enter__(self) -> _Lines:
        return self

    def __exit__(self, *_: object) -> None:
        return

    def __call__(self, kernel: Progress) -> None:
        now = time.monotonic()
        if self._stages[kernel.name] != kernel.stage:
            self._stages[kernel.name] = kernel.stage
            self._last = now
            self._say(f"{kernel.name}: {kernel.stage}{_details(kernel)}")
        elif now - self._last >= LINE_EVERY_S:
            self._last = now
            self._say(stage_of(self._kernels))

    def _say(self, line: str) -> None:
        self._console.print(line, soft_wrap=True, markup=False, highlight=False)


def _details(kernel: Progress) -> str:
    if kernel.stage == "examining":
        return f" {kernel.legal} configs, {kernel.refused} more refused by the kernel's own rules"
    if kernel.stage == "compiling":
        out = _counted(kernel.ruled_out) or "none"
        return (
            f" {kernel.to_compile} configs ({kernel.cached} cached); cannot fit: {out}; "
            f"same as another: {kernel.same}; expected slower: {kernel.outranked}"
        )
    if kernel.stage in ("checking", "timing", "verifying"):
        return f"; compiled {kernel.compiled}, dropped: {_counted(_lost(kernel)) or 'none'}"
    if kernel.stage == "done" and kernel.chosen is not None:
        return f": {config_text(kernel.chosen.config)}, {time_text(kernel.chosen.time_us)}"
    return f": {kernel.trouble}" if kernel.trouble else ""


def stage_of(kernels: Sequence[Progress]) -> str:
    """The run's stage in a few words, with how far it is."""
    stages = Counter(kernel.stage for kernel in kernels)
    if stages["compiling"]:
        return f"compiling {sum(k.compiled for k in kernels)} of {sum(k.to_compile for k in kernels)} configs"
    if stages["checking"]:
        settled = sum(len(k.checked) + len(k.quarantined) for k in kernels)
        return f"verifying {sum(k.compiled for k in kernels)} configs before they are timed, {settled} done"
    if stages["timing"]:
        return f"timing {sum(k.timed for k in kernels)} configs"
    if stages["verifying"]:
        return f"verifying the choice, {stages['done'] + stages['failed']} of {len(kernels)} kernels settled"
    if stages["examining"]:
        return f"examining {sum(k.legal for k in kernels)} configs, {sum(len(k.sketches) for k in kernels)} done"
    return "starting"


def space_table(kernels: Sequence[Progress], width: int) -> Table:
    """What became of each kernel's configs; the less there is room for, the fewer columns.

    The rest of the legal configs is compiled; what the other columns mean is in the legend.
    """
    caption = LEGEND if width >= 80 else None
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold", caption=caption)
    table.caption_justify = "left"
    table.add_column("kernel", no_wrap=True)
    table.add_column("stage", no_wrap=True, min_width=9)
    columns = [title for title in SPACE_COLUMNS if width >= 80 or title in ("legal", "compiled", "dropped")]
    for title in columns:
        table.add_column(title, justify="right", no_wrap=True)
    if width >= WIDE:
        table.add_column("why", ratio=1)
    for kernel in kernels:
        style = {"done": "green", "failed": "red"}.get(kernel.stage, "")
        cells = [SPACE_COLUMNS[title](kernel) for title in columns]
        why = [_reasons(kernel)] if width >= WIDE else []
        table.add_row(kernel.name, Text(kernel.stage, style=style), *cells, *why)
    return table


def _lost(kernel: Progress) -> Counter[str]:
    return kernel.dropped + kernel.failed + Counter(reason.outcome for reason in kernel.quarantined.values())


def _reasons(kernel: Progress) -> str:
    parts = {"unfit": _counted(kernel.ruled_out), "dropped": _counted(_lost(kernel))}
    return "; ".join(f"{name}: {text}" for name, text in parts.items() if text)


SPACE_COLUMNS: dict[str, Callable[[Progress], str]] = {
    "legal": lambda k: f"{k.legal}/{k.legal + k.refused}",
    "unfit": lambda k: str(k.ruled_out.total()),
    "same": lambda k: str(k.same),
    "slower": lambda k: str(k.outranked),
    "compiled": lambda k: f"{k.compiled}/{k.to_compile}" if k.compiled < k.to_compile else str(k.compiled),
    "cached": lambda k: str(k.cached),
    "dropped": lambda k: str(_lost(k).total()),
}


def choice_table(kernels: Sequence[Progress], width: int) -> Table:
    """What was chosen for each kernel, how fast it is against the built-in config, and how it was verified.

    What the kernels take of an SM is left out where `width` columns have no room for it.
    """
    settled = [kernel for kernel in kernels if kernel.chosen is not None]
    measured = any(kernel.chosen and kernel.chosen.timing for kernel in settled)
    columns: dict[str, Callable[[Progress], str]] = {
        "measured" if measured else "predicted": lambda kernel: time_text(
            kernel.chosen.time_us if kernel.chosen else None
        ),
        "built-in": _builtin_text,
        "registers": lambda kernel: str(_most(kernel, "registers")),
        "shared": lambda kernel: f"{_most(kernel, 'shared_bytes') / 1024:.0f} KiB",
        "spilled": lambda kernel: f"{_most(kernel, 'spill_bytes')} B",
        "verified": lambda kernel: "{cases} cases, {mode}".format(**kernel.evidence or {}),
    }
    if width < WIDE:
        for title in ("registers", "shared", "spilled"):
            del columns[title]
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("kernel", no_wrap=True)
    table.add_column("config")
    for title in columns:
        table.add_column(title, justify="left" if title == "verified" else "right")
    for kernel in settled:
        config = config_text(kernel.chosen.config) if kernel.chosen else ""
        table.add_row(kernel.name, config, *(text(kernel) for text in columns.values()))
    return table


def _builtin_text(kernel: Progress) -> str:
    if kernel.chosen is None or kernel.chosen.config == kernel.default:
        return "the same"
    own, builtin = kernel.chosen.time_us, baseline_us(kernel)
    return f"{time_text(builtin)}, {builtin / own:.2f}x" if own and builtin else "unknown"


def _most(kernel: Progress, resource: str) -> int:
    return max((getattr(used, resource) for used in kernel.chosen.resources), default=0) if kernel.chosen else 0


def baseline_us(kernel: Progress) -> float | None:
    """The built-in config's time: measured in turns with the chosen one, else predicted."""
    if kernel.chosen is not None and kernel.chosen.baseline is not None:
        return kernel.chosen.baseline.median_us
    default = kernel.trials.get(kernel.default)
    return None if default is None or default.prediction is None else default.prediction.total_us


def config_text(config: Config) -> str:
    """A config in one line, tiles first."""
    fields = asdict(config)
    tiles = [f"{name.removeprefix('block_')}={n}" for name, n in fields.items() if not name.startswith("num_")]
    return f"{' '.join(tiles)} warps={config.num_warps} stages={config.num_stages}"


def time_text(time_us: float | None) -> str:
    """A time with a unit that suits it."""
    if time_us is None:
        return "unknown"
    return f"{time_us / 1e3:.2f} ms" if time_us >= 1e3 else f"{time_us:.1f} us"


def _counted(counter: Counter[str]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in counter.most_common() if count)
