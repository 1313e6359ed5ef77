"""The pictures of a run's page, as SVG; an empty string where there is nothing to draw."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from .report import time_text

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 420, 220, 64, 12, 12, 30


def _svg(body: str, height: int = HEIGHT) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img">{body}</svg>'


def _scaled(values: Sequence[float], low: float, high: float) -> list[float]:
    """Positions between `low` and `high`, by the values' logarithms."""
    logs = [math.log(value) for value in values]
    span = max(logs) - min(logs)
    return [low + (high - low) * ((x - min(logs)) / span if span else 0.5) for x in logs]


def _text(x: float, y: float, words: str, anchor: str = "start", kind: str = "") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'


def _y_labels(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    if low == high:
        return _text(LEFT - 8, (HEIGHT - BOTTOM + TOP) / 2 + 4, time_text(low), "end")
    return _text(LEFT - 8, HEIGHT - BOTTOM + 4, time_text(low), "end") + _text(
        LEFT - 8, TOP + 4, time_text(high), "end"
    )


def history_plot(kernel: Mapping[str, Any]) -> str:
    """The least time so far after each round; without rounds, each compiled config's prediction, best first."""
    times: list[float] = []
    for found in kernel["rounds"]:
        known = [time_us for time_us in found.values() if time_us is not None]
        if known:
            times.append(min([*known, *times[-1:]]))
    times = times or sorted(t["predicted_us"] for t in kernel["trials"] if t["predicted_us"] is not None)
    if not times:
        return ""
    ys = _scaled(times, HEIGHT - BOTTOM, TOP)
    step = (WIDTH - LEFT - RIGHT) / max(1, len(times) - 1)
    points = [(LEFT + i * step, y) for i, y in enumerate(ys)]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="var(--mark)"/>' for x, y in points)
    drawn = f'<polyline points="{line}" fill="none" stroke="var(--mark)" stroke-width="1.5"/>{dots}'
    ends = _text(LEFT, HEIGHT - 8, "1") + _text(WIDTH - RIGHT, HEIGHT - 8, str(len(times)), "end")
    return _svg(drawn + _y_labels(times) + ends)


def tile_map(kernel: Mapping[str, Any]) -> str:
    """A cell for each pair of values of the two tile fields that vary most: the least time of its configs."""
    key = "time_us" if kernel["rounds"] else "predicted_us"
    trials = [trial for trial in kernel["trials"] if trial["refusal"] is None and trial[key] is not None]
    names = [name for name in (trials[0]["config"] if trials else ()) if not name.startswith("num_")]
    varied = sorted(names, key=lambda name: -len({trial["config"][name] for trial in trials}))[:2]
    if len(varied) < 2:
        return ""
    rows, columns = (sorted({trial["config"][name] for trial in trials}) for name in varied)
    best: dict[tuple[int, int], float] = {}
    for trial in trials:
        cell = (trial["config"][varied[0]], trial["config"][varied[1]])
        best[cell] = min(trial[key], best.get(cell, math.inf))
    shades = dict(zip(best, _scaled(list(best.values()), 0.5, 0.06), strict=True))
    wide, high = (WIDTH - LEFT - RIGHT) / len(columns), 26
    cells = []
    for r, row in enumerate(rows):
        cells.append(_text(LEFT - 6, TOP + r * high + 17, str(row), "end"))
        for c, column in enumerate(columns):
            if (row, column) in best:
                x, y = LEFT + c * wide, TOP + r * high
                shade = f'fill="var(--high)" fill-opacity="{shades[row, column]:.2f}"'
                cells.append(f'<rect x="{x:.1f}" y="{y}" width="{wide - 2:.1f}" height="{high - 2}" {shade}/>')
                cells.append(_text(x + wide / 2, y + 17, time_text(best[row, column]), "middle", "cell"))
    bottom = TOP + len(rows) * high + 14
    cells += [_text(LEFT + (c + 0.5) * wide, bottom, str(column), "middle") for c, column in enumerate(columns)]
    cells.append(_text(LEFT, bottom + 16, f"{varied[0]} down, {varied[1]} across"))
    return _svg("".join(cells), bottom + 22)


def roofline_plot(kernel: Mapping[str, Any]) -> str:
    """A bar for each term of the model of the chosen config."""
    chosen = next((trial for trial in kernel["trials"] if trial["config"] == kernel["chosen"]), None)
    parts = {} if chosen is None else chosen["parts"]
    skipped = ("exposed_us", "further_launches_us")
    terms = {name.removesuffix("_us"): us for name, us in parts.items() if name.endswith("_us") and name not in skipped}
    most = max(terms.values(), default=0.0)
    if most <= 0:
        return ""
    bars = []
    for i, (name, us) in enumerate(sorted(terms.items(), key=lambda term: -term[1])):
        y, length = TOP + 24 * i, (WIDTH - LEFT - 90) * us / most
        bars.append(_text(LEFT - 6, y + 13, name, "end"))
        bars.append(
            f'<rect x="{LEFT}" y="{y}" width="{length:.1f}" height="18" fill="var(--mark)" fill-opacity="0.6"/>'
        )
        bars.append(_text(LEFT + length + 6, y + 13, time_text(us)))
    return _svg("".join(bars), TOP + 24 * len(terms) + 8)


def front_plot(found: Mapping[str, Any]) -> str:
    """Latency over cache bytes: points of the front filled, the knee ringed, the preferred one labelled."""
    points = found["points"]
    xs = _scaled([point["kv_ratio"] for point in points], LEFT + 12, WIDTH - RIGHT - 60)
    ys = _scaled([point["latency_us"] for point in points], HEIGHT - BOTTOM, TOP)
    marks = []
    for point, x, y in zip(points, xs, ys, strict=True):
        fill = "var(--mark)" if point in found["front"] else "none"
        marks.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{fill}" stroke="var(--mark)"/>')
        if point == found["knee"]:
            marks.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="9" fill="none" stroke="var(--good)" stroke-width="2"/>')
        if point == found["preferred"]:
            marks.append(_text(x + 12, y + 4, f"g {point['group_size']}, w {point['window_size']}"))
    axis = _text(LEFT, HEIGHT - 8, f"cache from {min(p['kv_ratio'] for p in points):.1%} of full attention's (log)")
    return _svg("".join(marks) + _y_labels([point["latency_us"] for point in points]) + axis)
