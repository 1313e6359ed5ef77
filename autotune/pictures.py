"""The pictures of a run as PNG files, drawn by matplotlib: one for each kernel, and one of the front."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from . import figures
from .report import time_text

SIZE, DPI = (10.0, 7.0), 110
MARK, SOFT, BAD = "#0072B2", "#777777", "#D55E00"


def draw(record: Mapping[str, Any], folder: Path) -> Iterator[Path]:
    """Write KERNEL-TOKENS.png with history, tiles, roofline and failures of each kernel, and front.png; their paths.

    Raises:
        OSError: if a file cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for run in record["runs"]:
        for name, kernel in run["kernels"].items():
            tokens = run["problem"]["seq_len"]
            figure, axes = _figure(2, f"{name}, {tokens} tokens, {record['device']}, {record['evidence']}")
            (top_left, top_right), (bottom_left, bottom_right) = axes
            _history(top_left, kernel)
            _tiles(top_right, kernel)
            _roofline(bottom_left, figures.roofline(name, kernel, run["problem"], record["device"]))
            _failures(bottom_right, kernel)
            path = folder / f"{name}-{tokens}.png"
            figure.savefig(path)
            yield path
    if record["semantics"]:
        figure, axes = _figure(1, f"group and window size, {record['device']}; errors on {record['semantics']['data']}")
        _front(axes[0][0], record["semantics"], "latency_us", "latency (us)")
        _front(axes[0][1], record["semantics"], "error", "relative L2 from full attention")
        figure.savefig(folder / "front.png")
        yield folder / "front.png"


def _figure(rows: int, title: str) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(SIZE[0], SIZE[1] * rows / 2), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=11)
    axes = figure.subplots(rows, 2, squeeze=False)
    for each in axes.flat:
        each.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _nothing(axes: Any, why: str) -> None:
    axes.set_axis_off()
    axes.text(0.5, 0.5, why, ha="center", va="center", color=SOFT)


def _history(axes: Any, kernel: Mapping[str, Any]) -> None:
    times = figures.history(kernel)
    if not times:
        return _nothing(axes, "no config has a time")
    axes.plot(range(1, len(times) + 1), times, color=MARK, marker="o", markersize=4)
    measured = bool(kernel["rounds"])
    axes.set(
        title="best so far" if measured else "predictions, in order", xlabel="round" if measured else "config",
        ylabel="us",
    )  # fmt: skip
    return None


def _tiles(axes: Any, kernel: Mapping[str, Any]) -> None:
    found = figures.tiles(kernel)
    if found is None:
        return _nothing(axes, "no two tile fields were tried")
    grid = [[found.best_us.get((row, column), math.nan) for column in found.columns] for row in found.rows]
    axes.imshow(grid, aspect="auto", cmap="viridis_r")
    low, high = min(found.best_us.values()), max(found.best_us.values())
    for (row, column), us in found.best_us.items():
        place = found.columns.index(column), found.rows.index(row)
        pale = high == low or (us - low) / (high - low) < 0.5
        colour = "black" if pale else "white"
        axes.text(*place, time_text(us), ha="center", va="center", fontsize=8, color=colour)
    axes.set_xticks(range(len(found.columns)), map(str, found.columns))
    axes.set_yticks(range(len(found.rows)), map(str, found.rows))
    axes.set(title="least time by tile", xlabel=found.across, ylabel=found.down)
    return None


def _roofline(axes: Any, found: figures.Roofline | None) -> None:
    if found is None:
        return _nothing(axes, "no work to compare with the GPU's rates")
    knee = found.peak_tflops / found.peak_tbps
    intensities = [x for x, _ in found.points.values()]
    across = sorted({min(*intensities, knee) / 2, knee, max(*intensities, knee) * 2})
    axes.plot(across, [found.roof(x) for x in across], color=SOFT)
    for name, (intensity, rate) in found.points.items():
        chosen = name == "chosen"
        fill = MARK if chosen else "none"
        axes.plot(intensity, rate, "o", markerfacecolor=fill, color=MARK, label=f"{name}, {rate:.3g} TFLOP/s")
    axes.set(xscale="log", yscale="log", title="under the GPU's stated rates", xlabel="FLOP/byte", ylabel="TFLOP/s")
    axes.legend(fontsize=8)
    return None


def _failures(axes: Any, kernel: Mapping[str, Any]) -> None:
    counted = figures.failures(kernel)
    if not counted.total():
        return _nothing(axes, "no config was lost")
    kinds = [kind for kind, _ in reversed(counted.most_common())]
    bars = axes.barh(kinds, [counted[kind] for kind in kinds], color=BAD, height=0.4)
    axes.bar_label(bars, padding=3)
    axes.set(title="configs that were lost", xticks=[])
    return None


def _front(axes: Any, found: Mapping[str, Any], field: str, label: str) -> None:
    for point in found["points"]:
        fill = MARK if point in found["front"] else "none"
        axes.plot(100 * point["kv_ratio"], point[field], "o", color=MARK, markerfacecolor=fill)
    knee, chosen = found["knee"], found["preferred"]
    axes.plot(100 * knee["kv_ratio"], knee[field], "o", markersize=14, color="#009E73", markerfacecolor="none")
    words = f"g {chosen['group_size']}, w {chosen['window_size']}"
    axes.annotate(words, (100 * chosen["kv_ratio"], chosen[field]), textcoords="offset points", xytext=(12, -4))
    axes.set(xscale="log", xlabel="cache, % of full attention's", ylabel=label, title=f"{label} over cache")
