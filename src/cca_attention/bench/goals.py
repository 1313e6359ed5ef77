"""The goals of an H200 in bfloat16 (head dimension 128, g = 16, w = 1024), each beside what a record has for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

from .peers import CCA, FLEX
from .plan import BOTH, DECODE, FORWARD, MEMORY, POOLING, UNORDERED
from .record import Record, Row, matching

Found = tuple[float, str]
"""How far a record is: a value that meets the goal at 1 or more, and what was measured in words."""


@dataclass(frozen=True, slots=True)
class Goal:
    """What is to be reached, and how to read it from a record; None where it was not measured."""

    what: str
    reach: str
    look: Callable[[Record], Found | None]


def _row(record: Record, what: str, system: str, ctx: int, **wanted: object) -> Row | None:
    return record.find(what=what, system=system, seq_len=ctx, **wanted)


def _at_most(limit_ms: float, what: str, ctx: int, **wanted: object) -> Callable[[Record], Found | None]:
    def look(record: Record) -> Found | None:
        row = _row(record, what, CCA, ctx, **wanted)
        return None if row is None or not row.ms else (limit_ms / row.ms, f"{row.ms:.3g} ms")

    return look


def _times(factor: float, peer: str, what: str, ctx: int) -> Callable[[Record], Found | None]:
    def look(record: Record) -> Found | None:
        row = _row(record, what, CCA, ctx, suite="prefill")
        other = _row(record, BOTH if what == UNORDERED else what, peer, ctx, suite="prefill")
        if row is None or other is None or not row.ms or not other.ms:
            return None
        return other.ms / row.ms / factor, f"{other.ms / row.ms:.2f}x ({other.ms:.4g} ms)"

    return look


def _rate(least: float, unit: str, what: str, ctx: int, **wanted: object) -> Callable[[Record], Found | None]:
    def look(record: Record) -> Found | None:
        row = _row(record, what, CCA, ctx, **wanted)
        rate = None if row is None else row.tflops if unit == "TFLOP/s" else row.tbps
        return None if rate is None else (rate / least, f"{rate:.3g} {unit}")

    return look


def _memory(most: float) -> Callable[[Record], Found | None]:
    def look(record: Record) -> Found | None:
        rows = [row for row in matching(record.rows, what=MEMORY, system=CCA) if row.extra_bytes and row.held_bytes]
        shares = [row.extra_bytes / row.held_bytes for row in rows if row.extra_bytes and row.held_bytes]
        return (most / max(shares), f"{max(shares):.2f} x needed") if shares else None

    return look


def _against_cudnn(record: Record, suites: tuple[str, ...]) -> dict[int, float]:
    """How many times as long cuDNN's dense forward takes, at every length of batch 1 at which both were measured."""
    ratios = {}
    for row in matching(record.rows, what=FORWARD, system=CCA, batch=1):
        other = next((r for r in matching(record.rows, what=FORWARD, system="cudnn") if r.same_case(row)), None)
        if row.suite in suites and other is not None and row.ms and other.ms:
            ratios[row.ctx] = other.ms / row.ms
    return ratios


def _rising(record: Record) -> Found | None:
    """The least factor by which the ratio grows from one length to the next."""
    ratios = _against_cudnn(record, ("prefill", "growth"))
    if len(ratios) < 2:
        return None
    ordered = [ratios[ctx] for ctx in sorted(ratios)]
    said = ", ".join(f"{ratios[ctx]:.1f}x at {ctx}" for ctx in sorted(ratios))
    return min(after / before for before, after in pairwise(ordered)), said


def _short(peer: str, factor: float, what: str, *, within: bool) -> Callable[[Record], Found | None]:
    """The worst case of the short suite, within the window or beyond it."""
    of_peer = BOTH if what == UNORDERED else what

    def look(record: Record) -> Found | None:
        ratios = {}
        for row in matching(record.rows, suite="short", system=CCA, what=what):
            other = next((r for r in matching(record.rows, system=peer, what=of_peer) if r.same_case(row)), None)
            if (row.ctx <= int(row.problem["window_size"])) == within and other and row.ms and other.ms:
                ratios[row.ms / other.ms] = f"T={row.ctx} B={row.problem['batch']}"
        return (factor / max(ratios), f"{max(ratios):.2f} of its time, {ratios[max(ratios)]}") if ratios else None

    return look


def _break_even(record: Record) -> Found | None:
    """The shortest context of batch 1 from which on every forward is faster than cuDNN's dense one."""
    ratios = _against_cudnn(record, ("short", "prefill", "growth"))
    if not ratios:
        return None
    slower = [ctx for ctx, ratio in ratios.items() if ratio < 1]
    faster = [ctx for ctx in sorted(ratios) if not slower or ctx > max(slower)]
    return 1.0, f"faster from T={faster[0]} on" if faster else f"slower up to T={max(ratios)}"


KV = {"core_heads": "kv", "kv_heads": 8}
GOALS = (
    Goal("forward with pooling, T=131072", "at most 18.5 ms", _at_most(18.5, FORWARD, 131072)),
    Goal("", "14x cuDNN dense", _times(14, "cudnn", FORWARD, 131072)),
    Goal("", "1.55x FlexAttention", _times(1.55, FLEX, FORWARD, 131072)),
    Goal("", "600 TFLOP/s", _rate(600, "TFLOP/s", FORWARD, 131072)),
    Goal("forward, T=32768", "7x cuDNN dense", _times(7, "cudnn", FORWARD, 32768)),
    Goal("forward, T=65536", "11x cuDNN dense", _times(11, "cudnn", FORWARD, 65536)),
    Goal("forward and backward, T=131072, deterministic", "at most 95 ms", _at_most(95, BOTH, 131072)),
    Goal("", "9.6x cuDNN dense", _times(9.6, "cudnn", BOTH, 131072)),
    Goal("", "1.45x FlexAttention", _times(1.45, FLEX, BOTH, 131072)),
    Goal("the same, deterministic=False", "at most 75 ms", _at_most(75, UNORDERED, 131072)),
    Goal("", "12x cuDNN dense", _times(12, "cudnn", UNORDERED, 131072)),
    Goal("", "1.85x FlexAttention", _times(1.85, FLEX, UNORDERED, 131072)),
    Goal("pooling alone, T=131072", "at most 0.65 ms", _at_most(0.65, POOLING, 131072)),
    Goal("", "3.5 TB/s", _rate(3.5, "TB/s", POOLING, 131072)),
    Goal("decode, T=131072, cores of kv heads, batch 1", "0.013 ms", _at_most(0.013, DECODE, 131072, batch=1, **KV)),
    Goal("batch 8", "0.080 ms", _at_most(0.080, DECODE, 131072, batch=8, **KV)),
    Goal("batch 64", "90 % of 4.3 TB/s", _rate(3.87, "TB/s", DECODE, 131072, batch=64, **KV)),
    Goal(
        "decode, cores of query heads, batch 8", "85 % of 4.3 TB/s",
        _rate(3.655, "TB/s", DECODE, 131072, batch=8, core_heads="query"),
    ),
    Goal("memory of forward and backward", "at most 1.1 x cores + LSE + delta", _memory(1.1)),
    Goal("growth, forward against cuDNN dense", "rising with T", _rising),
    Goal("forward, T <= w, every batch", "at most 1.1 of SDPA flash", _short("flash", 1.1, FORWARD, within=True)),
    Goal("forward and backward", "at most 1.1 of SDPA flash", _short("flash", 1.1, BOTH, within=True)),
    Goal("the same, deterministic=False", "at most 1.1 of SDPA flash", _short("flash", 1.1, UNORDERED, within=True)),
    Goal("forward, w < T <= 8192, every batch", "at most FlexAttention", _short(FLEX, 1.0, FORWARD, within=False)),
    Goal("forward and backward", "at most FlexAttention", _short(FLEX, 1.0, BOTH, within=False)),
    Goal("forward against cuDNN dense, batch 1", "break-even stated", _break_even),
)  # fmt: skip


def goal_table(record: Record) -> Iterator[str]:
    """Goal beside measured, as Markdown."""
    yield from ("| what | reach | measured | reached |", "|---|---|---|---|")
    for goal in GOALS:
        found = goal.look(record)
        measured, reached = ("not measured", "") if found is None else (found[1], "yes" if found[0] >= 1 else "no")
        yield f"| {goal.what} | {goal.reach} | {measured} | {reached} |"
