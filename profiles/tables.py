"""Profiles in rows of words, and rows on a terminal, for `cca-profile`."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from .compare import Cell, Staleness
from .places import Place
from .reading import ProfileError, parse_profile
from .schema import Profile
from .store import profiles_in

Row = dict[str, str]


def semantics_in_words(profile: Profile) -> str:
    """ "g16 w1024 query last_query"."""
    s = profile.semantic
    return f"g{s.group_size} w{s.window_size} {s.core_heads} {s.pooling}"


def evidence_in_words(profile: Profile) -> str:
    """ "9 measured, 36 modelled"."""
    counts = Counter(entry.evidence for entry in profile.entries)
    return ", ".join(f"{count} {evidence}" for evidence, count in counts.items()) or "no entries"


def config_in_words(config: Mapping[str, object]) -> str:
    """ "block_q=128 num_warps=4"."""
    return " ".join(f"{name}={value}" for name, value in config.items())


def file_rows(looked: Sequence[Place]) -> tuple[list[Row], list[str]]:
    """A row for each profile in these places, and what is wrong with those that are damaged."""
    rows: list[Row] = []
    errors: list[str] = []
    for place, path, data in profiles_in(looked, lambda error: errors.append(str(error))):
        row = {"place": place.what, "file": str(path), "gpu": "", "model": "", "entries": "damaged"}
        try:
            found = parse_profile(data, str(path))
        except ProfileError as error:
            errors.append(str(error))
        else:
            row |= {"gpu": found.device.name, "model": semantics_in_words(found), "entries": evidence_in_words(found)}
        rows.append(row)
    return rows, errors


def entry_rows(profile: Profile) -> list[Row]:
    """A row for each entry."""
    return [
        {
            "kernel": entry.kernel,
            "problem": str(entry.problem),
            "config": config_in_words(entry.config),
            "evidence": entry.evidence,
            "time": "" if entry.time_us is None else f"{entry.time_us:.1f} us",
            "built-in": "" if entry.baseline.time_us is None else f"{entry.baseline.time_us:.1f} us",
            "verified": "no" if entry.verification is None else entry.verification.mode,
        }
        for entry in profile.entries
    ]


def level_rows(cells: Iterable[Cell]) -> list[Row]:
    """A row for each kernel, with the level at each context."""
    rows: dict[str, Row] = {}
    for cell in cells:
        rows.setdefault(cell.kernel, {"kernel": cell.kernel})[f"{cell.problem.seq_len // 1024}K"] = cell.level
    return list(rows.values())


def stale_rows(affected: Iterable[Staleness]) -> list[Row]:
    """A row for each entry that is affected."""
    return [
        {"kernel": s.entry.kernel, "problem": str(s.entry.problem), "effect": s.effect, "because": s.reason}
        for s in affected
    ]


def print_rows(rows: Sequence[Row], as_json: bool = False) -> None:
    """Print to stdout: JSON, a table on a terminal, and elsewhere lines with tabs between, the names first."""
    if as_json:
        sys.stdout.write(json.dumps(list(rows), indent=2) + "\n")
        return
    if not rows:
        return
    names = list(dict.fromkeys(name for row in rows for name in row))
    if not sys.stdout.isatty():
        lines = [names, *([row.get(name, "") for name in names] for row in rows)]
        sys.stdout.write("".join("\t".join(line) + "\n" for line in lines))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*names)
    for row in rows:
        table.add_row(*(Text(row.get(name, "")) for name in names))
    Console().print(table)
