"""The pictures of a run's page, as SVG; an empty string where there is nothing to draw."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

from . import figures
from .figures import Roofline
from .report import time_text

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 420, 220, 64, 12, 12, 30
LEAST_SPAN = math.log(1.02)
"""Values closer than this are drawn as close as they are."""


def _svg(body: str, title: str, height: int = HEIGHT) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title)}">{body}</svg>'


def _scaled(values: Sequence[float], low: float, high: float) -> list[float]:
    """Positions between `low` and `high`, by the values' logarithms."""
    logs = [math.log(value) for value in values]
    middle, span = (max(logs) + min(logs)) / 2, max(LEAST_SPAN, max(logs) - min(logs))
    return [low + (high - low) * ((x - middle) / span + 0.5) for x in logs]


def _text(x: float, y: float, words: str, anchor: str = "start", kind: str = "") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'


def _dot(x: float, y: float, radius: float, fill: str = "var(--mark)", stroke: str = "var(--mark)") -> str:
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" fill="{fill}" stroke="{stroke}"/>'


def _y_labels(values: Sequence[float], ys: Sequence[float], written: Callable[[float], str]) -> str:
    """The least and the greatest value beside their places; one of them where they are close."""
    ends = sorted({min(zip(values, ys, strict=True)), max(zip(values, ys, strict=True))})
    shown = ends if abs(ends[0][1] - ends[-1][1]) > 14 else ends[:1]
    return "".join(_text(LEFT - 8, y + 4, written(value), "end") for value, y in shown)


def history_plot(kernel: Mapping[str, Any]) -> str:
    """The least time so far after each round, or predictions in order."""
    times = figures.history(kernel)
    if not times:
        return ""
    ys = _scaled(times, HEIGHT - BOTTOM - 6, TOP)
    step = (WIDTH - LEFT - RIGHT) / max(1, len(times) - 1)
    points = [(LEFT + i * step, y) for i, y in enumerate(ys)]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    drawn = f'<polyline points="{line}" fill="none" stroke="var(--mark)" stroke-width="1.5"/>'
    drawn += "".join(_dot(x, y, 3) for x, y in points)
    across = "round" if kernel["rounds"] else "config, the fastest first"
    ends = _text(LEFT, HEIGHT - 8, f"1 ({across})") + _text(WIDTH - RIGHT, HEIGHT - 8, str(len(times)), "end")
    return _svg(drawn + _y_labels(times, ys, time_text) + ends, "history of the search")


def tile_map(kernel: Mapping[str, Any]) -> str:
    """A cell for each pair of values of the two tile fields that vary most: the least time of its configs."""
    found = figures.tiles(kernel)
    if found is None:
        return ""
    shades = dict(zip(found.best_us, _scaled(list(found.best_us.values()), 0.5, 0.06), strict=True))
    wide, high = (WIDTH - LEFT - RIGHT) / len(found.columns), 26
    cells = []
    for r, row in enumerate(found.rows):
        cells.append(_text(LEFT - 6, TOP + r * high + 17, str(row), "end"))
        for c, column in enumerate(found.columns):
            if (row, column) in found.best_us:
                x, y = LEFT + c * wide, TOP + r * high
                shade = f'fill="var(--high)" fill-opacity="{shades[row, column]:.2f}"'
                cells.append(f'<rect x="{x:.1f}" y="{y}" width="{wide - 2:.1f}" height="{high - 2}" {shade}/>')
                words = time_text(found.best_us[row, column])
                cells.append(_text(x + wide / 2, y + 17, words if wide > 52 else words.split()[0], "middle", "cell"))
    bottom = TOP + len(found.rows) * high + 14
    cells += [_text(LEFT + (c + 0.5) * wide, bottom, str(n), "middle") for c, n in enumerate(found.columns)]
    cells.append(_text(LEFT, bottom + 16, f"{found.down} down, {found.across} across"))
    return _svg("".join(cells), "least time by tile", bottom + 22)


def bounds_plot(kernel: Mapping[str, Any]) -> str:
    """A bar for each term of the model of the chosen config."""
    terms = figures.bounds(kernel)
    bars = []
    for i, (name, us) in enumerate(terms.items()):
        y, length = TOP + 24 * i, (WIDTH - LEFT - 90) * us / max(terms.values())
        bars.append(_text(LEFT - 6, y + 13, name, "end"))
        shape = f'x="{LEFT}" y="{y}" width="{length:.1f}" height="18"'
        bars.append(f'<rect {shape} fill="var(--mark)" fill-opacity="0.6"/>')
        bars.append(_text(LEFT + length + 6, y + 13, time_text(us)))
    return _svg("".join(bars), "what bounds the choice", TOP + 24 * len(terms) + 8) if terms else ""


def roofline_plot(found: Roofline | None) -> str:
    """The choice, filled, and the built-in config under what the GPU can do at most; both axes logarithmic."""
    if found is None:
        return ""
    knee = found.peak_tflops / found.peak_tbps
    intensities = [x for x, _ in found.points.values()]
    across = sorted({min(*intensities, knee) / 2, knee, max(*intensities, knee) * 2})
    roof = [found.roof(x) for x in across]
    rates = [rate for _, rate in found.points.values()]
    xs = _scaled([*across, *intensities], LEFT + 4, WIDTH - RIGHT)
    ys = _scaled([*roof, *rates], HEIGHT - BOTTOM - 6, TOP + 4)
    corners, places = len(across), list(zip(xs, ys, strict=True))
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places[:corners])
    drawn = f'<polyline points="{line}" fill="none" stroke="var(--soft)" stroke-width="1.5"/>'
    for (name, (_, rate)), (x, y) in reversed(list(zip(found.points.items(), places[corners:], strict=True))):
        first = name == "chosen"
        drawn += _dot(x, y, 5, "var(--mark)" if first else "none")
        left = x > WIDTH / 2
        words = f"{name}, {rate:.3g} TFLOP/s"
        drawn += _text(x - 9 if left else x + 9, y + (-4 if first else 14), words, "end" if left else "start")
    labels = _y_labels([*roof, *rates], ys, lambda rate: f"{rate:.3g}")
    axis = _text(LEFT, HEIGHT - 8, f"TFLOP/s by FLOP/byte; the roof bends at {knee:.0f} (both logarithmic)")
    return _svg(drawn + labels + axis, "roofline")


def front_plot(found: Mapping[str, Any], field: str, written: Callable[[float], str]) -> str:
    """A field over cache bytes: points of the front filled, the knee ringed, the preferred one labelled."""
    points = found["points"]
    xs = _scaled([point["kv_ratio"] for point in points], LEFT + 12, WIDTH - RIGHT - 20)
    ys = _scaled([max(point[field], 1e-9) for point in points], HEIGHT - BOTTOM - 12, TOP + 8)
    marks = []
    for point, x, y in zip(points, xs, ys, strict=True):
        marks.append(_dot(x, y, 5, "var(--mark)" if point in found["front"] else "none"))
        if point == found["knee"]:
            marks.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="9" fill="none" stroke="var(--good)" stroke-width="2"/>')
        if point == found["preferred"]:
            left = x > WIDTH / 2
            words = f"g {point['group_size']}, w {point['window_size']}"
            marks.append(_text(x - 12 if left else x + 12, y + 4, words, "end" if left else "start"))
    least, most = min(p["kv_ratio"] for p in points), max(p["kv_ratio"] for p in points)
    axis = _text(LEFT, HEIGHT - 8, f"cache, {least:.1%} to {most:.1%} of full attention's (logarithmic)")
    labels = _y_labels([point[field] for point in points], ys, written)
    return _svg("".join(marks) + labels + axis, f"front: {field} over cache bytes")
