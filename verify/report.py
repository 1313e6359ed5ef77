"""A record as one HTML page that needs nothing else: failures first, budget use, mutants, and what was not run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from importlib.resources import files

from .layers import TITLES
from .record import MEANINGS, Record, Result, counts
from .report_plots import budget_plot, legend, status_bar

MUTANTS = "L5"


def as_html(record: Record) -> str:
    """The page, without scripts or anything from the network."""
    style = (files(__package__) / "report.css").read_text()
    body = "".join(f"<section>{part}</section>" for part in _parts(record) if part)
    title = f"cca-verify: {_verdict(record)}"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{style}</style></head><body><main>{_top(record)}{body}</main></body></html>\n"
    )


def _verdict(record: Record) -> str:
    code = record.footer.exit_code
    return "pass" if code == 0 else MEANINGS.get(code, f"exit code {code}")


def _top(record: Record) -> str:
    header, footer = record.header, record.footer
    kind = "pass" if footer.exit_code == 0 else "fail"
    facts = {
        "started": header.started, "took": f"{footer.duration_s:.0f} s", "commit": header.commit or "not in a checkout",
        "GPU": header.gpu or "none: what needs one was not run",
        "layers": ", ".join(header.layers) or "the profile only",
        "random examples": f"seed {header.seed}" + (f", {header.examples} each" if header.examples else ""),
        "mode": "strict" if header.strict else "suspicions warn",
        **{name: version for name, version in header.versions.items() if version},
    }  # fmt: skip
    rows = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(str(value))}</dd></div>" for name, value in facts.items())
    return (
        f'<header><h1>cca-verify</h1><p class="verdict {kind}">{escape(_verdict(record))}'
        f" <small>exit code {footer.exit_code}</small></p><dl>{rows}</dl></header>"
    )


def _parts(record: Record) -> Iterator[str]:
    results = record.results
    yield _section("Wrong", _findings([r for r in results if r.status in ("fail", "error")]))
    yield _section("Suspicions", _list(f"{r.id}: {warning}" for r in results for warning in r.warnings))
    yield _section("Classes of inputs that were never hit", _list(record.footer.missing_classes))
    yield _section("Budget use that grew", _list(record.footer.ratchet))
    yield _section("Layers", _layers(record))
    yield _section("Budget use", _budgets(results))
    yield _section("Planted mistakes", _mutants([r for r in results if r.layer == MUTANTS]))
    yield _section("Not run", _not_run([r for r in results if r.status in ("not-run", "skip")]))
    yield _section("Classes of inputs", _coverage(record))
    yield _section("Every check", _everything(results))
    yield _section("What decided", _list(f"{name}: sha256 {value}" for name, value in record.footer.sha256.items()))


def _section(title: str, body: str) -> str:
    return f"<h2>{escape(title)}</h2>{body}" if body else ""


def _list(lines: Iterable[str]) -> str:
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f"<ul>{items}</ul>" if items else ""


def _findings(results: Sequence[Result]) -> str:
    return "".join(
        f'<article class="finding"><h3>{escape(r.id)} <span class="tag {r.status}">{r.trouble or r.status}</span></h3>'
        f"<p>{escape(r.message)}</p>{_repeat(r)}</article>"
        for r in results
    )


def _repeat(result: Result) -> str:
    lines = {"case": result.case, "config": result.config or "", "hypothesis": result.blob}
    steps = "".join(f"\n  {step}" for step in result.facts.get("steps", ()))
    lines |= {"where": result.facts.get("where", ""), "steps": steps}
    text = "\n".join(f"{name}: {value}" for name, value in lines.items() if value)
    return f"<details><summary>to repeat it</summary><pre>{escape(text)}</pre></details>" if text else ""


def _layers(record: Record) -> str:
    rows = []
    for layer in dict.fromkeys(result.layer for result in record.results):
        results = [result for result in record.results if result.layer == layer]
        found = counts(results)
        said = ", ".join(f"{n} {status}" for status, n in found.items() if n)
        seconds = sum(result.duration_s for result in results)
        cells = (layer, TITLES.get(layer, "the profile's configs"), said, f"{seconds:.0f} s")
        texts = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        rows.append(f"<tr>{texts}<td class='wide'>{status_bar(found)}</td></tr>")
    return _table(("layer", "what", "results", "process time", ""), rows)


def _table(heads: Sequence[str], rows: Sequence[str]) -> str:
    if not rows:
        return ""
    head = "".join(f"<th>{escape(name)}</th>" for name in heads)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def _row(*cells: object) -> str:
    return f"<tr>{''.join(f'<td>{escape(str(cell))}</td>' for cell in cells)}</tr>"


def _budgets(results: Sequence[Result]) -> str:
    parts = []
    for layer in dict.fromkeys(result.layer for result in results):
        shown = [r for r in results if r.layer == layer and r.budget_use is not None and r.dtype and r.comparisons]
        shown = [r for r in shown if r.layer != MUTANTS and not r.id.startswith(f"{layer}/config/")]
        if shown:
            dtypes = list(dict.fromkeys(r.dtype for r in shown))
            title = f"<h3>{layer}: {escape(TITLES.get(layer, 'the profile'))}</h3>"
            parts.append(f"{title}{legend(dtypes)}{budget_plot(shown)}")
    note = "<p>The largest error of a check over its bound. Everything left of the line is within it.</p>"
    return note + "".join(parts) if parts else ""


def _mutants(results: Sequence[Result]) -> str:
    if not results:
        return ""
    killed = Counter(r.facts.get("family", "") for r in results if r.facts.get("killed"))
    total = Counter(r.facts.get("family", "") for r in results)
    said = ", ".join(f"{family} {killed[family]}/{n}" for family, n in total.items() if family)
    ordered = sorted(results, key=lambda r: bool(r.facts.get("killed")))
    rows = [
        _row(
            r.facts.get("id", ""),
            r.id.rpartition("/")[2],
            "killed" if r.facts.get("killed") else r.trouble or "SURVIVED",
            r.facts.get("check", r.check),
            ", ".join(r.facts.get("seen", ())[:2]),
            r.facts.get("says", r.message),
        )
        for r in ordered
    ]
    table = _table(("id", "mistake", "", "by", "saw", "what is wrong"), rows)
    return f"<p>{sum(killed.values())} of {len(results)} killed; {escape(said)}</p><details open>" + (
        f"<summary>all of them</summary>{table}</details>"
    )


def _not_run(results: Sequence[Result]) -> str:
    parts = []
    for reason in dict.fromkeys(r.message for r in results):
        names = [r.id for r in results if r.message == reason]
        summary = escape(f"{len(names)}: {reason}")
        parts.append(f"<details><summary>{summary}</summary>{_list(names)}</details>")
    return "".join(parts)


def _coverage(record: Record) -> str:
    rows = [_row(name, number) for name, number in sorted(record.footer.coverage.items())]
    return (
        f"<details><summary>{len(rows)} classes</summary>{_table(('class', 'examples'), rows)}</details>"
        if rows
        else ""
    )


def _everything(results: Sequence[Result]) -> str:
    rows = [
        _row(
            r.id,
            r.status,
            r.mode,
            r.cases,
            r.comparisons,
            "" if r.budget_use is None else f"{r.budget_use:.3g}",
            r.tensor,
            r.shape,
            f"{r.duration_s:.1f} s",
        )
        for r in results
    ]
    heads = ("id", "", "mode", "cases", "comparisons", "budget use", "worst in", "of", "took")
    return f"<details><summary>{len(rows)} results</summary>{_table(heads, rows)}</details>"
