"""A run as one HTML page that needs nothing else: choices and why, the search, tiles, failures, the front."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from typing import Any

from .explain import against_builtin, named
from .figures import failures, roofline
from .page_plots import bounds_plot, front_plot, history_plot, roofline_plot, tile_map
from .report import time_text

LONG = 40
"""Characters beyond which a cell's text is broken."""
STYLE = """
:root { color-scheme: light dark; --back: #fbfbfa; --card: #fff; --ink: #1c1f23; --soft: #5d646d; --line: #dfe2e6;
  --good: #1a7f4b; --bad: #b3261e; --mark: #2458c9; --low: #d7e5fb; --high: #1d4fa8; }
@media (prefers-color-scheme: dark) { :root { --back: #15171a; --card: #1d2024; --ink: #e7e9ec; --soft: #a0a7b0;
  --line: #343940; --good: #57c78c; --bad: #ff8a80; --mark: #7da7ff; --low: #22324d; --high: #8db4ff; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 24px 16px 64px; }
h1 { font-size: 1.5rem; margin: 0 0 8px; } h2 { font-size: 1.15rem; margin: 0 0 8px; }
h3 { font-size: .95rem; margin: 16px 0 4px; color: var(--soft); font-weight: 600; }
section, header { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 16px 20px;
  margin: 0 0 16px; }
p { margin: 4px 0; overflow-wrap: anywhere; }
.soft { color: var(--soft); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .87rem; }
th { text-align: left; color: var(--soft); font-weight: 500; }
th, td { padding: 4px 14px 4px 0; border-bottom: 1px solid var(--line); vertical-align: top; white-space: nowrap; }
td.text { white-space: normal; min-width: 260px; overflow-wrap: anywhere; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(360px, 100%), 1fr)); gap: 8px 24px; }
svg { width: 100%; max-width: 520px; height: auto; display: block; }
svg text { fill: var(--soft); font: 11px system-ui, sans-serif; }
svg text.cell { fill: var(--ink); }
@media (max-width: 640px) {
  section, header { padding: 12px 14px; }
  table, tbody, tr, td { display: block; } th { display: none; } table { width: 100%; }
  tr { border-bottom: 1px solid var(--line); padding: 6px 0; }
  td, td.text { border: 0; padding: 1px 0; min-width: 0; white-space: normal; overflow-wrap: anywhere; }
  td:empty { display: none; } td::before { content: attr(data-head) ": "; color: var(--soft); }
}
"""


def as_html(record: Mapping[str, Any]) -> str:
    """The page, without scripts or anything from the network."""
    title = f"cca-tune: {record['device']}"
    body = "".join(f"<section>{part}</section>" for part in _parts(record))
    facts = f"{record['evidence']} · {record['created']} · cca-attention {record['version']}"
    profile = f"profile: {record['profile']}" if record["profile"] else "no profile was written"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body><main><header><h1>{escape(title)}</h1>"
        f'<p class="soft">{escape(facts)}</p><p>{escape(profile)}</p></header>{body}</main></body></html>\n'
    )


def _parts(record: Mapping[str, Any]) -> Iterator[str]:
    for run in record["runs"]:
        yield _summary(run)
    if record.get("peers"):
        yield _peers(record["peers"])
    if record["semantics"]:
        yield _front(record["semantics"])
    for run in record["runs"]:
        for name, kernel in run["kernels"].items():
            yield _kernel(name, kernel, run["problem"], record["device"])


def _summary(run: Mapping[str, Any]) -> str:
    heads = ("kernel", "chosen", "time", "built-in", "legal", "compiled", "timed", "out")
    rows = [
        (
            name,
            named(name, kernel["chosen"]) if kernel["chosen"] else kernel["trouble"],
            time_text(kernel["time_us"]),
            time_text(kernel["default_time_us"]),
            kernel["legal"],
            kernel["compiled"],
            kernel["timed"],
            len(kernel["quarantined"]) + sum(kernel["failed"].values()) + sum(kernel["dropped"].values()),
        )
        for name, kernel in run["kernels"].items()
    ]
    problem = ", ".join(f"{name} {value}" for name, value in run["problem"].items())
    return f'<h2>{run["problem"]["seq_len"]} tokens</h2><p class="soft">{escape(problem)}</p>{_table(heads, rows)}'


def _peers(rows: Sequence[Mapping[str, Any]]) -> str:
    """What PyTorch's attentions take beside what was tuned."""
    cells = [
        (
            f"{row['what']}, {row['problem']['seq_len']} tokens",
            row["system"],
            row["status"] if row["ms"] is None else time_text(1e3 * row["ms"]),
            row["note"],
        )
        for row in rows
    ]
    about = "flash and cudnn are PyTorch's dense attention, flex is FlexAttention with the same mask and ready cores"
    heads = ("whole pass", "by", "time", "why")
    return f'<h2>Beside other attentions</h2><p class="soft">{about}</p>{_table(heads, cells)}'


def _front(found: Mapping[str, Any]) -> str:
    heads = ("group", "window", "latency", "of full cache", "error", "reached")
    rows = [
        (
            point["group_size"],
            point["window_size"],
            time_text(point["latency_us"]),
            f"{point['kv_ratio']:.1%}",
            f"{point['error']:.3f}",
            f"{point['reached']:.0%}",
        )
        for point in found["front"]
    ]
    chosen = found["preferred"]
    picked = f"ringed: the knee; preferred: group size {chosen['group_size']}, window size {chosen['window_size']}"
    about = f"errors are proxies, on {found['data']}; {picked}"
    plots = {
        "latency over cache": front_plot(found, "latency_us", time_text),
        "error over cache": front_plot(found, "error", "{:.3f}".format),
    }
    return f'<h2>Group and window size</h2><p class="soft">{escape(about)}</p>{_drawn(plots)}{_table(heads, rows)}'


def _drawn(plots: Mapping[str, str]) -> str:
    found = "".join(f"<div><h3>{title}</h3>{plot}</div>" for title, plot in plots.items() if plot)
    return f'<div class="plots">{found}</div>'


def _kernel(name: str, kernel: Mapping[str, Any], problem: Mapping[str, Any], device: str) -> str:
    parts = [f"<h2>{escape(name)}, {problem['seq_len']} tokens</h2>"]
    if kernel["chosen"] is None:
        parts.append(f"<p>{escape(str(kernel['trouble']))}</p>")
    else:
        parts.append(f"<p><b>{escape(named(name, kernel['chosen']))}</b>, {time_text(kernel['time_us'])}</p>")
        parts.append(f'<p class="soft">{escape(against_builtin(name, kernel))}</p>')
    plots = {
        "best so far, by round" if kernel["rounds"] else "predicted, by config": history_plot(kernel),
        "least time by tile": tile_map(kernel),
        "useful work under the GPU's stated rates": roofline_plot(roofline(name, kernel, problem, device)),
        "what bounds the choice, by the model": bounds_plot(kernel),
    }
    return "".join([*parts, _drawn(plots), _failures(name, kernel)])


def _failures(name: str, kernel: Mapping[str, Any]) -> str:
    counted = failures(kernel)
    for entry in kernel["quarantined"]:
        counted[entry["outcome"]] -= 1  # they have a line of their own
    rows: list[tuple[Any, ...]] = [("", kind, f"{count} configs") for kind, count in counted.items() if count]
    rows += [(named(name, q["config"]), q["outcome"], q["message"]) for q in kernel["quarantined"]]
    return f"<h3>failures</h3>{_table(('config', 'kind', 'what'), rows)}" if rows else ""


def _table(heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    top = "".join(f"<th>{escape(head)}</th>" for head in heads)
    body = "".join(f"<tr>{''.join(map(_cell, heads, row))}</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{top}</tr>{body}</table></div>'


def _cell(head: str, value: Any) -> str:
    text = escape(str(value))
    kind = ' class="text"' if len(text) > LONG else ""
    return f'<td{kind} data-head="{escape(head)}">{text}</td>'
