"""The tables of a record: for a terminal, as lines with tabs, and in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.table import Table

from .peers import CCA, TITLES
from .plan import DECODE, POOLING
from .record import Record, Row

MIB = 2**20
COLUMNS = ("context", "batch", "system", "ms", "× CCA", "rate", "of ceiling", "extra MiB", "× needed")
SYSTEM = COLUMNS.index("system")


@dataclass(frozen=True, slots=True)
class Part:
    """The rows of one table: a title, the columns that are in use, cells, and what is to be said of some rows."""

    title: str
    columns: tuple[str, ...]
    lines: list[tuple[str, ...]]
    notes: list[str]


def parts_of(record: Record) -> list[Part]:
    """A table for each suite, kind of work and number of heads."""
    titles = dict.fromkeys(map(_title, record.rows))
    return [_part(title, [row for row in record.rows if _title(row) == title], record) for title in titles]


def heading(record: Record) -> str:
    """Card, versions and date in one line."""
    h = record.header
    parts = [
        h.device,
        *(f"{name} {h.versions[name]}" for name in ("torch", "triton", "driver") if h.versions.get(name)),
    ]
    return ", ".join([*parts, h.date[:10]])


def footing(record: Record) -> Iterator[str]:
    """What a reader must know of the figures."""
    c = record.header.ceilings
    yield f"ceilings measured in this run: {c.tflops:.0f} TFLOP/s (matrix product), {c.tbps:.2f} TB/s (copy)"
    worst = [e.worst for row in record.rows if row.status == "measured" for e in row.evidence]
    if worst:
        yield f"checks that CCA's figures rest on: {len(worst)}, the closest used {max(worst):.2f} of its bound"
    if not record.complete:
        yield f"incomplete: {len(record.missing)} cases were not finished: {'; '.join(record.missing)}"


def _title(row: Row) -> str:
    p = row.problem
    shape = f"{p['q_heads']}/{p['kv_heads']} heads of {p['head_dim']}, {p['dtype']}"
    what = "" if row.what == row.suite else f"{row.what}, "
    semantics = f'g = {p["group_size"]}, w = {p["window_size"]}, core_heads="{p["core_heads"]}"'
    return f"{row.suite}: {what}{shape}, {semantics}" + (", mean pooling" if p["pooling"] == "mean" else "")


def _part(title: str, rows: list[Row], record: Record) -> Part:
    lines = [_cells(row, record) for row in rows]
    used = [n for n in range(len(COLUMNS)) if any(cells[n] for cells in lines)]
    where = ((row, f"T={row.ctx} B={row.problem['batch']} {_system(row)}") for row in rows)
    notes = [f"{place}: {row.status}: {row.note}" for row, place in where if row.note]
    kept = [tuple(cells[n] for n in used) for cells in lines]
    return Part(title, tuple(COLUMNS[n] for n in used), kept, notes)


def _system(row: Row) -> str:
    return TITLES[row.system] + (f", {row.keys} keys" if row.keys else "")


def _cells(row: Row, record: Record) -> tuple[str, ...]:
    ms = "" if row.ms is None else f"{row.ms:.4f}" if row.ms < 1 else f"{row.ms:.4g}"
    head = (str(row.ctx), str(row.problem["batch"]), _system(row), ms if row.status == "measured" else row.status)
    extra = "" if row.extra_bytes is None else f"{row.extra_bytes / MIB:.1f}"
    needed = f"{row.extra_bytes / row.held_bytes:.2f}" if row.extra_bytes and row.held_bytes else ""
    return (*head, _ratio(row, record), *_rate(row, record), extra, needed)


def _ratio(row: Row, record: Record) -> str:
    base = next((r for r in record.rows if r.system == CCA and r.what == row.what and r.same_case(row)), None)
    if base is None or row is base:
        return ""
    if row.ms and base.ms:
        return f"{row.ms / base.ms:.2f}"
    return f"{row.extra_bytes / base.extra_bytes:.2f}" if row.extra_bytes and base.extra_bytes else ""


def _rate(row: Row, record: Record) -> tuple[str, str]:
    """Of what limits the work: bytes for decode and pooling, operations elsewhere."""
    ceilings = record.header.ceilings
    if row.what in (DECODE, POOLING):
        return ("", "") if row.tbps is None else (f"{row.tbps:.2f} TB/s", f"{row.tbps / ceilings.tbps:.0%}")
    return ("", "") if row.tflops is None else (f"{row.tflops:.0f} TFLOP/s", f"{row.tflops / ceilings.tflops:.0%}")


def show(record: Record, console: Console) -> None:
    """Print the tables; without a terminal, as lines with tabs between the cells."""
    console.print(heading(record), style="bold", highlight=False, soft_wrap=True)
    for part in parts_of(record):
        if console.is_terminal:
            _say(["", part.title], console)
            console.print(_table(part))
        else:
            lines = ["", part.title, *("\t".join(cells) for cells in (part.columns, *part.lines))]
            console.file.write("\n".join(lines) + "\n")
        _say(part.notes, console)
    console.print()
    _say(footing(record), console)


def _say(lines: Iterable[str], console: Console) -> None:
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _table(part: Part) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in part.columns:
        table.add_column(name, justify="left" if name == COLUMNS[SYSTEM] else "right", no_wrap=True)
    for cells in part.lines:
        table.add_row(*cells, style="bold" if cells[SYSTEM] == TITLES[CCA] else "")
    return table


def markdown(record: Record) -> Iterator[str]:
    """The tables as Markdown, a line at a time."""
    yield f"{heading(record)}."
    for part in parts_of(record):
        yield from ("", f"### {part.title}", "", _piped(part.columns))
        yield _piped("---" if name == COLUMNS[SYSTEM] else "---:" for name in part.columns)
        for cells in part.lines:
            mine = cells[SYSTEM] == TITLES[CCA]
            yield _piped(f"**{cell}**" if mine and n == SYSTEM else cell for n, cell in enumerate(cells))
        if part.notes:
            yield from ("", f"{'; '.join(part.notes)}.")
    yield ""
    yield from (f"{line}." for line in footing(record))


def _piped(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"
