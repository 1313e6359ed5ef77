"""The tables of a record: for a terminal, as plain lines, and in Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.table import Table

from .peers import CCA, TITLES
from .plan import DECODE, POOLING
from .record import Record, Row

MIB = 2**20
COLUMNS = ("context", "batch", "heads", "what", "system", "ms", "× CCA", "rate", "of ceiling", "extra MiB", "note")
TEXT_COLUMNS = ("what", "system", "note")


@dataclass(frozen=True, slots=True)
class Lines:
    """One suite as text: a line of cells, named by `COLUMNS`, for each row."""

    suite: str
    cells: list[tuple[str, ...]]


def lines_of(record: Record) -> list[Lines]:
    """The cells of every suite."""
    suites = dict.fromkeys(row.suite for row in record.rows)
    return [Lines(s, [_cells(row, record) for row in record.rows if row.suite == s]) for s in suites]


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
        yield f"held against float64 before they were timed: {len(worst)} times, at most {max(worst):.2f} of a bound"
    if not record.complete:
        yield f"incomplete: {len(record.missing)} cases were not finished: {'; '.join(record.missing)}"


def _cells(row: Row, record: Record) -> tuple[str, ...]:
    title = TITLES[row.system] + (f", {row.keys} keys" if row.keys else "")
    p = row.problem
    heads = f"{p['q_heads']}/{p['kv_heads']} {p['core_heads']}"
    head = (str(row.ctx), str(p["batch"]), heads, row.what, title)
    note = row.note if row.status == "measured" else f"{row.status}: {row.note}"
    return (*head, _ms(row), _ratio(row, record), *_rate(row, record), _memory(row), note)


def _ms(row: Row) -> str:
    return "" if row.ms is None else f"{row.ms:.4f}" if row.ms < 1 else f"{row.ms:.4g}"


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


def _memory(row: Row) -> str:
    if row.extra_bytes is None:
        return ""
    by_formula = f" ({row.extra_bytes / row.held_bytes:.2f} × needed)" if row.held_bytes else ""
    return f"{row.extra_bytes / MIB:.0f}{by_formula}"


def _used(lines: Lines) -> list[int]:
    """The columns that are not empty; the memory suite has no times."""
    return [n for n in range(len(COLUMNS)) if any(cells[n] for cells in lines.cells)]


def show(record: Record, console: Console) -> None:
    """Print the tables; without a terminal, as lines with tabs between the cells."""
    console.print(heading(record), style="bold", highlight=False, soft_wrap=True)
    for lines in lines_of(record):
        used = _used(lines)
        if console.is_terminal:
            console.print(_table(lines, used))
            continue
        for cells in (COLUMNS, *lines.cells):
            console.out("\t".join([lines.suite, *(cells[n] for n in used)]), highlight=False)
    for text in footing(record):
        console.print(text, highlight=False, markup=False, soft_wrap=True)


def _table(lines: Lines, used: Sequence[int]) -> Table:
    table = Table(title=lines.suite, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for n in used:
        left = COLUMNS[n] in TEXT_COLUMNS
        table.add_column(COLUMNS[n], justify="left" if left else "right", overflow="fold")
    for cells in lines.cells:
        table.add_row(*(cells[n] for n in used), style="bold" if cells[4] == TITLES[CCA] else "")
    return table


def markdown(record: Record) -> Iterator[str]:
    """The tables as Markdown, a line at a time."""
    yield heading(record) + "."
    for lines in lines_of(record):
        used = _used(lines)
        yield from ("", f"### {lines.suite}", "")
        yield _piped(COLUMNS[n] for n in used)
        yield _piped("---" if COLUMNS[n] in TEXT_COLUMNS else "---:" for n in used)
        for cells in lines.cells:
            yield _piped(
                f"**{cells[n]}**" if cells[4] == TITLES[CCA] and COLUMNS[n] == "ms" else cells[n] for n in used
            )
    yield ""
    yield from (f"{text}." for text in footing(record))


def _piped(cells: Iterator[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"
