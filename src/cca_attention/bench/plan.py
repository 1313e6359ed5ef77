"""What a run measures: the suites, their usual sizes, and the cases that follow from the options."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from ..problem import Problem
from ..spec import CoreHeads

PEERS = ("flash", "cudnn", "flex")
FORWARD, BOTH, UNORDERED = "forward", "forward+backward", "forward+backward, deterministic=False"
POOLING, MEMORY, DECODE = "pooling", "memory", "decode"


@dataclass(frozen=True, slots=True, kw_only=True)
class Suite:
    """One group of cases: what is measured, the usual sizes, and the peers that are asked unless others are named."""

    says: str
    whats: tuple[str, ...]
    contexts: tuple[int, ...]
    batches: tuple[int, ...] = (1,)
    kv_heads: int = 32
    core_heads: tuple[CoreHeads, ...] = ("query",)
    peers: tuple[str, ...] = PEERS


SUITES: Mapping[str, Suite] = {
    "prefill": Suite(
        says="Forward, forward and backward, and the pooling alone.",
        whats=(POOLING, FORWARD, BOTH, UNORDERED),
        contexts=(32768, 65536, 131072),
    ),
    "decode": Suite(
        says="One decode step in a CUDA graph, cache update and pooling included.",
        whats=(DECODE,),
        contexts=(131072,),
        batches=(1, 8, 64),
        kv_heads=8,
        core_heads=("kv", "query"),
        peers=("flash", "cudnn"),
    ),
    "memory": Suite(
        says="Peak memory of forward and backward over inputs, outputs and gradients.",
        whats=(MEMORY,),
        contexts=(32768, 131072),
        peers=("cudnn",),
    ),
    "growth": Suite(
        says="Time and memory of long contexts, up to where the peers end.",
        whats=(FORWARD, BOTH),
        contexts=(262144, 524288, 1048576),
        peers=("cudnn",),
    ),
    "short": Suite(
        says="Short contexts in batches, where sparse kernels usually lose.",
        whats=(FORWARD, BOTH, UNORDERED),
        contexts=(512, 1024, 2048, 4096, 8192),
        batches=(1, 8, 32),
    ),
}


@dataclass(frozen=True, slots=True)
class Case:
    """Tensors of one problem, what is measured on them, and the peers that are measured beside."""

    suite: str
    problem: Problem
    whats: tuple[str, ...]
    peers: tuple[str, ...]

    def __str__(self) -> str:
        p = self.problem
        return f"{self.suite} T={p.seq_len} B={p.batch} H={p.q_heads}/{p.kv_heads} {p.core_heads}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What the command line asks for; None stands for what is usual in each suite."""

    contexts: tuple[int, ...] | None = None
    batches: tuple[int, ...] | None = None
    kv_heads: int | None = None
    core_heads: CoreHeads | None = None
    peers: tuple[str, ...] | None = None
    problem: Mapping[str, Any]


def cases(names: Sequence[str], options: Options) -> list[Case]:
    """The cases of these suites, in order.

    Raises:
        TypeError, ValueError: for sizes that no `Problem` can have.
    """
    return [case for name in names for case in _cases(name, SUITES[name], options)]


def _cases(name: str, suite: Suite, options: Options) -> Iterator[Case]:
    chosen: tuple[CoreHeads, ...] = suite.core_heads if options.core_heads is None else (options.core_heads,)
    peers = suite.peers if options.peers is None else options.peers
    allowed = tuple(peer for peer in peers if peer != "flex") if name == "decode" else peers
    for core_heads, batch, ctx in product(chosen, options.batches or suite.batches, options.contexts or suite.contexts):
        problem = Problem(
            batch=batch, seq_len=ctx, core_heads=core_heads,
            kv_heads=suite.kv_heads if options.kv_heads is None else options.kv_heads, **options.problem,
        )  # fmt: skip
        yield Case(name, problem, suite.whats, allowed)
