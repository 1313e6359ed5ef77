"""The pictures of the report, as SVG whose colours come from the page's style, so that it can be light or dark."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from .record import STATUSES, Result

TOP, MARK = 34, 4.5
DECADES = (1e-3, 1e-2, 1e-1, 1.0)
SHAPES = {
    "float32": '<circle cx="{x}" cy="{y}" r="{r}"',
    "float16": '<rect x="{x0}" y="{y0}" width="{d}" height="{d}"',
    "bfloat16": '<path d="M{x} {y0}l{r} {d}h-{d}z"',
    "float64": '<path d="M{x} {y0}l{r} {r}l-{r} {r}l-{r} -{r}z"',
}
"""A shape for each dtype, so that colour is not the only difference."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Sizes of a plot: of a row, from the left to the axis, of all. `above`: names are above their rows."""

    row: int
    left: int
    width: int
    above: bool

    def x(self, use: float) -> float:
        """Where a budget use is on the axis, which ends at 2.5 on the right."""
        share = (math.log10(min(max(use, DECADES[0]), 2.5)) + 3) / (math.log10(2.5) + 3)
        return self.left + share * (self.width - 40 - self.left)


WIDE, NARROW = Layout(20, 250, 860, above=False), Layout(36, 20, 360, above=True)


def budget_plot(results: Sequence[Result]) -> str:
    """Budget use on a logarithmic axis: a row for each check, a mark for each dtype; the line at 1 is the bound.

    Uses of less than a thousandth, most of them exactly 0, are marked at the left edge. It is drawn twice, for wide and
    for narrow screens, of which the page's style shows one.
    """
    return _drawn(results, WIDE, "wide") + _drawn(results, NARROW, "narrow")


def _drawn(results: Sequence[Result], layout: Layout, kind: str) -> str:
    checks = list(dict.fromkeys(result.check for result in results))
    height = TOP + layout.row * len(checks) + 12
    about = f'role="img" aria-label="budget use of each check and dtype" class="plot {kind}"'
    parts = [f'<svg viewBox="0 0 {layout.width} {height}" {about}>']
    for decade in DECADES:
        x, name = layout.x(decade), "1 (the bound)" if decade == 1 else f"{decade:g}"
        line = "bound" if decade == 1 else "grid"
        parts.append(f'<line class="{line}" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP - 6}" y2="{height - 8}"/>')
        parts.append(f'<text class="axis" x="{x:.1f}" y="{TOP - 12}" text-anchor="middle">{name}</text>')
    for number, check in enumerate(checks):
        y = TOP + layout.row * (number + (0.75 if layout.above else 0.5))
        place = f'x="{layout.left - 8}" y="{y - 10:.1f}"' if layout.above else f'x="{layout.left - 14}" y="{y + 4:.1f}"'
        anchor = "start" if layout.above else "end"
        parts.append(f'<text {place} text-anchor="{anchor}">{escape(check)}</text>')
        parts.append(f'<line class="row" x1="{layout.left}" x2="{layout.width - 20}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts += [_mark(result, layout, y) for result in results if result.check == check]
    return "".join([*parts, "</svg>"])


def _mark(result: Result, layout: Layout, y: float) -> str:
    use = math.inf if result.budget_use is None or math.isnan(result.budget_use) else result.budget_use
    x, r = layout.x(use), MARK
    places = {"x": x, "y": y, "r": r, "d": 2 * r, "x0": x - r, "y0": y - r}
    shape = SHAPES.get(result.dtype, SHAPES["float32"]).format(**{name: f"{n:.1f}" for name, n in places.items()})
    kind = "failed" if result.status in ("fail", "error") else f"dtype-{result.dtype}"
    label = escape(f"{result.id}: {use:.3g} at {result.tensor}{list(result.worst_index)}, {result.shape}")
    return f'{shape} class="mark {kind}"><title>{label}</title>{_end(shape)}'


def _end(shape: str) -> str:
    return f"</{shape[1:].split(' ')[0]}>"


def legend(dtypes: Sequence[str]) -> str:
    """The marks of the dtypes, by name."""
    parts = []
    for dtype in dtypes:
        r = MARK
        places = {"x": 8, "y": 8, "r": r, "d": 2 * r, "x0": 8 - r, "y0": 8 - r}
        shape = SHAPES.get(dtype, SHAPES["float32"]).format(**places)
        mark = f'<svg width="16" height="16" aria-hidden="true">{shape} class="mark dtype-{dtype}"/></svg>'
        parts.append(f'<span class="key">{mark}{escape(dtype)}</span>')
    return f'<p class="legend">{"".join(parts)}</p>'


def status_bar(counts: Mapping[str, int]) -> str:
    """One bar whose parts are the results of each status."""
    total, x, parts = sum(counts.values()) or 1, 0.0, []
    for status in STATUSES:
        width = 100 * counts.get(status, 0) / total
        if width:
            title = f"<title>{counts[status]} {status}</title>"
            parts.append(f'<rect x="{x:.2f}" width="{width:.2f}" height="8" class="bar {status}">{title}</rect>')
        x += width
    body = "".join(parts)
    return (
        f'<svg viewBox="0 0 100 8" preserveAspectRatio="none" class="bars" role="img" aria-label="results">{body}</svg>'
    )
