"""The pictures of a record, drawn by matplotlib: time, rate and memory against context length, and the roofline."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from .peers import CCA, EAGER, FLEX, TITLES
from .plan import BOTH, DECODE, FORWARD, MEMORY, POOLING, UNORDERED
from .record import Record, Row, matching
from .table import heading

SIZE, DPI = (9.0, 4.2), 110
# Okabe and Ito's colours, told apart with any colour vision; a marker each as well
STYLE = {
    CCA: ("#0072B2", "o"), "cudnn": ("#D55E00", "s"), "flash": ("#E69F00", "^"), FLEX: ("#009E73", "D"),
    EAGER: ("#CC79A7", "v"),
}  # fmt: skip
MARKS = {FORWARD: "o", BOTH: "s", UNORDERED: "D", POOLING: "^", DECODE: "v"}
GIB = 2**30

Value = Callable[[Row], float | None]
Line = tuple[str, bool]
"""A system, and whether its backward may add up in any order."""


def draw(record: Record, folder: Path) -> list[Path]:
    """Write latency.png, rate.png, memory.png and roofline.png, those of them that the record has figures for."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [row for row in record.rows if row.suite != "short" and row.problem["batch"] == 1]
    both = {"forward": (FORWARD,), "forward and backward": (BOTH, UNORDERED)}
    top = record.header.ceilings.tflops
    drawn = [
        _against_context(record, rows, both, lambda row: row.ms, "milliseconds", folder / "latency.png"),
        _against_context(record, rows, both, lambda row: row.tflops, "useful TFLOP/s", folder / "rate.png", top),
        _against_context(
            record, rows, {"forward and backward": (MEMORY, BOTH)}, lambda row: (row.extra_bytes or 0) / GIB,
            "GiB over inputs, outputs and gradients", folder / "memory.png",
        ),
        _roofline(record, folder / "roofline.png"),
    ]  # fmt: skip
    return [path for path in drawn if path is not None]


def _figure(record: Record, panels: int, title: str) -> tuple[Any, list[Any]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE, dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"{title}\n{heading(record)}", fontsize=10)
    axes = figure.subplots(1, panels, squeeze=False)[0]
    for each in axes:
        each.grid(True, which="major", alpha=0.3)
        each.spines[["top", "right"]].set_visible(False)
    return figure, list(axes)


def _lines(rows: Iterable[Row], whats: tuple[str, ...], value: Value) -> dict[Line, dict[int, float]]:
    """A value for each system and context length; the first that was measured counts."""
    found: dict[Line, dict[int, float]] = {}
    for row in matching(rows):
        if row.what in whats and (number := value(row)):
            found.setdefault((row.system, row.what == UNORDERED), {}).setdefault(row.ctx, number)
    return found


def _against_context(
    record: Record,
    rows: list[Row],
    panels: dict[str, tuple[str, ...]],
    value: Value,
    label: str,
    path: Path,
    ceiling: float | None = None,
) -> Path | None:
    shown = {title: lines for title, whats in panels.items() if (lines := _lines(rows, whats, value))}
    if not shown:
        return None
    figure, axes = _figure(record, len(shown), f"{label} against context length, one layer, batch 1")
    for each, (title, lines) in zip(axes, shown.items(), strict=True):
        for (system, unordered), points in lines.items():
            colour, mark = STYLE[system]
            name = TITLES[system] + (", deterministic=False" if unordered else "")
            style = {"color": colour, "marker": mark, "linestyle": "--" if unordered else "-", "label": name}
            each.plot(sorted(points), [points[t] for t in sorted(points)], **style)
        contexts = sorted({t for points in lines.values() for t in points})
        each.set(xscale="log", yscale="linear" if ceiling else "log", xlabel="tokens", ylabel=label, title=title)
        each.set_xticks(contexts, [_short(t) for t in contexts])
        each.set_xticks([], minor=True)
        if ceiling:
            each.axhline(ceiling, color="black", linestyle=":", linewidth=1, label="matrix product of PyTorch")
            each.set_ylim(bottom=0)
        each.legend(fontsize=8)
    figure.savefig(path)
    return path


def _short(tokens: int) -> str:
    return f"{tokens // 1024}K" if tokens % 1024 == 0 else str(tokens)


def _roofline(record: Record, path: Path) -> Path | None:
    """Operations for each byte that must move, against the rate that was reached, under the measured ceilings."""
    rows = [row for row in matching(record.rows) if row.tflops and row.flops and row.bytes]
    if not rows:
        return None
    figure, (axes,) = _figure(record, 1, "roofline: useful work under the ceilings measured in the run")
    ceilings = record.header.ceilings
    intensities = [(row.flops or 0) / (row.bytes or 1) for row in rows]
    low, high, knee = min(intensities) / 2, max(intensities) * 2, ceilings.tflops / ceilings.tbps
    roof = [low, min(max(knee, low), high), high]
    axes.plot(roof, [min(ceilings.tflops, ceilings.tbps * x) for x in roof], color="black", linewidth=1)
    for row, intensity in zip(rows, intensities, strict=True):
        axes.plot(intensity, row.tflops, MARKS[row.what], color=STYLE[row.system][0], markersize=6, alpha=0.8)
    handles = [axes.plot([], [], "o", color=STYLE[s][0])[0] for s in dict.fromkeys(row.system for row in rows)]
    names = [TITLES[s] for s in dict.fromkeys(row.system for row in rows)]
    for what in dict.fromkeys(row.what for row in rows):
        handles.append(axes.plot([], [], MARKS[what], color="grey")[0])
        names.append(what)
    axes.legend(handles, names, fontsize=8, loc="lower right")
    axes.set(xscale="log", yscale="log", xlabel="useful operations / byte that must move", ylabel="useful TFLOP/s")
    figure.savefig(path)
    return path
