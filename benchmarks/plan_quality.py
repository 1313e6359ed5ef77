"""Fit the cost model's constants to a sweep, and say how good the plans are that it makes.

    python benchmarks/plan_quality.py fit
    python benchmarks/plan_quality.py table

The sweep is that of `benchmarks/plan_sweep.py`; `fit` looks at its problems with the role "fit" alone, `table` at those
with the role "judge". Neither needs a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import typer

from cca_attention.autotune.devices import Device, find_device
from cca_attention.autotune.plan import SHORT
from cca_attention.autotune.plan_quality import Cell, Timed, judged, read_sweep
from cca_attention.autotune.predict import POOLED
from cca_attention.autotune.tile_model import REUSED, STREAMED

SWEEP = Path(__file__).parents[1] / "tests" / "data" / "plan_h200.jsonl.gz"
STEPS = 25
LEVEL = 0.15
"""How much the time itself counts beside the order of configs."""
PRIOR = 0.01
"""How much a constant is held where it began, for those that the sweep says nothing of."""

Vector = npt.NDArray[np.float64]
Sweep = Annotated[Path, typer.Option("--sweep", help="The sweep's file.")]
Gpu = Annotated[str, typer.Option("--gpu", help="The GPU that it was taken on.")]
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


def residuals(cells: Iterable[list[Timed]], device: Device, constants: Any) -> Vector:
    """How far the model is from each time of each cell, as logarithms about the cell's mean; the fast count most."""
    found: list[float] = []
    for cell in cells:
        logs = np.array([math.log(timed.predicted_us(device, constants) / timed.us) for timed in cell])
        weights = np.array([1.0 / timed.us for timed in cell])
        weights /= weights.max()
        level = float((weights * logs).sum() / weights.sum())
        found += [*(np.sqrt(weights / len(cell)) * (logs - level)), LEVEL * level]
    return np.array(found)


def fitted(cells: list[list[Timed]], device: Device, begin: Any) -> Any:
    """The constants that leave least of the residuals' squares, by Levenberg's and Marquardt's method.

    Constants are fitted as logarithms; those that begin at zero stay there.
    """
    names = [field.name for field in fields(begin) if getattr(begin, field.name) > 0]
    origin = np.log([getattr(begin, name) for name in names])

    def constants(x: Vector) -> Any:
        return replace(begin, **{n: float(v) for n, v in zip(names, np.exp(x), strict=True)})

    def left(x: Vector) -> Vector:
        return np.concatenate([residuals(cells, device, constants(x)), PRIOR * (x - origin)])

    x, damping, now = origin, 1e-2, left(origin)
    for _ in range(STEPS):
        slopes = np.stack([(left(x + 1e-4 * unit) - now) / 1e-4 for unit in np.eye(len(x))], axis=1)
        square, slope, tries = slopes.T @ slopes, slopes.T @ now, 0
        while tries < 8:
            move = np.linalg.solve(square + damping * np.diag(np.diag(square)), -slope)
            then = left(x + move)
            if then @ then < now @ now:
                break
            damping, tries = damping * 5, tries + 1
        else:
            break
        gain = 1 - (then @ then) / (now @ now)
        x, now, damping = x + move, then, damping / 5
        if gain < 1e-5:
            break
    return constants(x)


@app.command()
def fit(sweep: Sweep = SWEEP, gpu: Gpu = "h200") -> None:
    """Fit the sets of constants, and print them."""
    kinds: dict[str, list[list[Timed]]] = {"REUSED": [], "STREAMED": [], "POOLED": []}
    for (kernel, _), rows in read_sweep(sweep).items():
        if rows[0].role == "fit":
            kind = "STREAMED" if kernel == "decode" else "POOLED" if kernel.startswith("pooling") else "REUSED"
            kinds[kind].append(rows)
    for name, begin in (("REUSED", REUSED), ("STREAMED", STREAMED), ("POOLED", POOLED)):
        found = fitted(kinds[name], find_device(gpu), begin)
        typer.echo(f"{name}: " + ", ".join(f"{key}={value:.4g}" for key, value in asdict(found).items()))


@app.command()
def table(sweep: Sweep = SWEEP, gpu: Gpu = "h200") -> None:
    """Print the quality of every plan of the judged problems, as Markdown."""
    for line in table_lines(read_sweep(sweep), find_device(gpu)):
        typer.echo(line)


def table_lines(cells: dict[Cell, list[Timed]], device: Device) -> list[str]:
    """A line for each kernel and length; columns for each group and window size."""
    found = {cell: judged(rows, device, SHORT) for cell, rows in cells.items() if rows[0].role == "judge"}
    sizes = sorted({(problem.group_size, problem.window_size) for _, problem in found})
    heads = " | ".join(f"g = {g}, w = {w}" for g, w in sizes)
    lines = [f"| kernel | T | {heads} |", "|---" * (2 + len(sizes)) + "|"]
    for kernel, length in dict.fromkeys(sorted((kernel, problem.seq_len) for kernel, problem in found)):
        row: list[str] = []
        for g, w in sizes:
            here = [
                quality for (name, p), quality in found.items()
                if (name, p.seq_len, p.group_size, p.window_size) == (kernel, length, g, w)
            ]  # fmt: skip
            row.append(", ".join(f"{x:.2f}" for q in here for x in (q.regret, q.short_regret, q.correlation)))
        lines.append(f"| `{kernel}` | {length} | {' | '.join(cell or 'not timed' for cell in row)} |")
    return lines


if __name__ == "__main__":
    app()
