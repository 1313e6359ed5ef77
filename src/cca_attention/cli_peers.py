"""After a run of `cca-tune`: what PyTorch's attentions take beside what was tuned, timed by `bench` on the same GPU."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from .autotune.progress import Progress, Request
    from .bench.lab import Lab
    from .bench.record import Row
    from .problem import Problem

LIMIT_S = 300.0
LONGEST_CALL_MS = 5e3
NOT_HERE = "SDPA and FlexAttention were not measured: that GPU is not in this machine"

Run = tuple["Request", list["Progress"]]


def timed(runs: Sequence[Run], profile: Path, words: Console) -> list[dict[str, Any]]:
    """Rows of `bench`, as JSON, for each problem whose kernels were measured; trouble is told to `words`.

    It is done in a process of its own: what PyTorch compiles or runs there cannot harm a run that is over.
    """
    from .verify.child import Child, ChildFailedError

    rows: list[dict[str, Any]] = []
    for request, kernels in runs:
        evidence = {k.name: [asdict(k.chosen.config), k.evidence] for k in kernels if k.chosen and k.rounds}
        if not evidence:
            continue
        words.print(f"timing SDPA and FlexAttention beside them, {request.problem}", highlight=False, soft_wrap=True)
        index = request.cards[0].index if request.cards else 0
        asked = {"problem": request.problem.as_dict(), "profile": str(profile), "index": index, "evidence": evidence}
        try:
            with Child(interpret=False) as child:
                rows += child.call(measure, asked, timeout_s=LIMIT_S)
        except ChildFailedError as error:
            words.print(f"SDPA and FlexAttention were not measured: {error}", markup=False, soft_wrap=True)
    return rows


def measure(asked: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows for one problem, on the GPU of this process."""
    import torch

    from .bench.lab import Lab
    from .bench.timing import GpuMeter
    from .configs import register_profile
    from .problem import Problem

    torch.cuda.set_device(asked["index"])
    gate = _tuned_gate(asked["evidence"])
    profile = register_profile(asked["profile"])
    lab = Lab(GpuMeter(), gate, torch.device("cuda"), profile, LONGEST_CALL_MS, lambda line: None)
    try:
        rows = rows_beside(Problem(**asked["problem"]), list(asked["evidence"]), lab)
        return [row.model_dump(include={"what", "system", "problem", "status", "keys", "ms", "note"}) for row in rows]
    finally:
        gate.close()


def rows_beside(problem: Problem, kernels: Sequence[str], lab: Lab) -> list[Row]:
    """CCA and its peers on what `kernels` make up: the forward pass, the backward pass with it, a decode step."""
    from .bench.attention import attention_rows
    from .bench.plan import BOTH, DECODE, FORWARD, PEERS, Case
    from .bench.steps import decode_rows
    from .verify.gate_cases import DIRECTION_OF

    directions = {DIRECTION_OF[name] for name in kernels}
    whats = tuple(what for what, by in ((FORWARD, "forward"), (BOTH, "backward")) if by in directions)
    rows = list(attention_rows(Case("prefill", problem, whats, PEERS), lab)) if whats else []
    if "decode" in directions:
        found = decode_rows(Case("decode", problem, (DECODE,), ("flash", "cudnn")), lab)
        rows += [row for row in found if row.keys in (None, problem.seq_len + 1)]
    return rows


def _tuned_gate(evidence: Mapping[str, Sequence[Any]]) -> Any:
    """A gate that knows what the run has just verified, and asks for the rest itself."""
    from .bench.admission import Gate
    from .bench.record import Evidence

    class TunedGate(Gate):
        def admit(self, configs: dict[str, Any], problem: Problem) -> list[Evidence]:
            known = {name for name, config in configs.items() if evidence.get(name, ("",))[0] == asdict(config)}
            others = {name: config for name, config in configs.items() if name not in known}
            tuned = [(name, evidence[name][1]) for name in sorted(known)]
            return [
                *(
                    Evidence(check=f"gate of {name}", count=e["cases"], worst=e["worst_budget_use"])
                    for name, e in tuned
                ),
                *(super().admit(others, problem) if others else []),
            ]

    return TunedGate()


def show(rows: Sequence[Mapping[str, Any]], at_hand: bool, results: Console) -> None:
    """A table of each system's time for each problem and pass, and how many times as long as ours that is."""
    from rich.table import Table

    from .bench.peers import TITLES

    if not at_hand:
        results.print(NOT_HERE, highlight=False, soft_wrap=not results.is_terminal)
    if not rows:
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("whole pass", "by", "time", "to ours"):
        table.add_column(title, justify="right" if title in ("time", "to ours") else "left", no_wrap=True)
    last = ""
    for row in rows:
        place = f"{row['what']}, {row['problem']['seq_len']}"
        table.add_row("" if place == last else place, TITLES[row["system"]], *_figures(row, rows))
        last = place
    results.print(table)
    for line in _notes(rows):
        results.print(line, markup=False, highlight=False, soft_wrap=not results.is_terminal)


def _figures(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    from .autotune.report import time_text
    from .bench.peers import CCA

    if row["ms"] is None:
        return str(row["status"]), ""
    same = [r["ms"] for r in rows if (r["system"], r["what"], r["problem"]) == (CCA, row["what"], row["problem"])]
    return time_text(1e3 * row["ms"]), f"{row['ms'] / same[0]:.2f}x" if same and same[0] else ""


def _notes(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    from .bench.peers import TITLES

    for row in rows:
        if row["ms"] is None and row["note"]:
            yield f"{TITLES[row['system']]}, {row['what']}: {row['note']}"
