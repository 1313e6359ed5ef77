"""One config after the other on the GPU, each held against the built-in one: the timing worker of plan_sweep."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cca_attention.autotune.compile import find_tunable
from cca_attention.autotune.measure import FLUSH_BYTES, SEED, policy_of
from cca_attention.kernels.tunable import Config
from cca_attention.problem import Problem

TOLERANCE = 0.03
"""The distance between two configs' outputs, over their norm, beyond which one is wrong: bfloat16 rounds at 0.004."""
FLUSHES = 3
"""Writes of the whole L2 cache before a launch: a host that is busy compiling must still be ahead of the GPU."""
OUTPUTS = {
    "pooling": ("k_core", "v_core", "pool_lse"), "pooling_backward": ("pool_delta",), "forward": ("out", "lse"),
    "backward_dq": (), "backward_dcore": ("dk_core", "dv_core"), "backward_dkv": ("dk", "dv"), "decode": ("out",),
}  # fmt: skip
ADDED_TO = {"pooling_backward": ("dq",), "backward_dq": ("dq",)}
"""Outputs that are read as well."""


class Bench:
    """In the timing worker: the tensors of one problem, and what the built-in config makes of them."""

    last: Bench | None = None

    def __init__(self, module: str, name: str, problem: Problem, default: Config) -> None:
        self.key, self.tunable = (name, problem), find_tunable(module, name)
        self.tensors = self.tunable.allocate(problem, torch.device("cuda"), torch.Generator("cuda").manual_seed(SEED))
        self.flush = torch.empty(FLUSH_BYTES // 4, dtype=torch.int32, device="cuda")
        self.runs: dict[Config, Any] = {}
        family = name.removesuffix("_hopper")
        self.written = OUTPUTS[family]
        self.before = {output: self.tensors[output].clone() for output in ADDED_TO.get(family, ())}
        self.launch(default)
        self.right = {output: self.tensors[output].clone() for output in (*self.written, *self.before)}

    def launch(self, config: Config) -> None:
        """Launch on outputs that hold nothing of use, or what is to be added to."""
        for output in self.written:
            self.tensors[output].fill_(float("nan"))
        for output, content in self.before.items():
            self.tensors[output].copy_(content)
        self.tunable.launch(self.key[1], self.tensors, config)
        torch.cuda.synchronize()

    def prepare(self, config: Config) -> None:
        """Make it ready to be timed.

        Raises:
            ValueError: if its output is wrong.
        """
        self.launch(config)
        distance = max(_distance(self.tensors[output], right) for output, right in self.right.items())
        if not distance <= TOLERANCE:
            raise ValueError(f"wrong by {distance:.3g}")
        self.runs[config] = lambda: self.tunable.launch(self.key[1], self.tensors, config)
        if policy_of(self.key[0]).mode == "cuda_graph":
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self.runs[config]()
            self.runs[config] = graph.replay


def _distance(made: Tensor, right: Tensor) -> float:
    worst = 0.0
    for a, b in zip(made.flatten(0, -2).split(2**18), right.flatten(0, -2).split(2**18), strict=True):
        if not torch.equal(a.isnan(), b.isnan()):
            return float("inf")
        a, b = a.float().nan_to_num(), b.float().nan_to_num()
        scale = max(b.norm().item(), 1e-3 * b.numel() ** 0.5)
        worst = max(worst, (a - b).norm().item() / scale)
    return worst


def sample(module: str, name: str, problem: Problem, default: Config, config: Config, launches: int) -> list[float]:
    """In the timing worker: microseconds of some launches, each with a cold L2 cache."""
    if Bench.last is None or Bench.last.key != (name, problem):
        Bench.last = None
        torch.cuda.empty_cache()
        Bench.last = Bench(module, name, problem, default)
    bench = Bench.last
    if config not in bench.runs:
        bench.prepare(config)
    pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(launches)]
    for start, end in pairs:
        for _ in range(FLUSHES):
            bench.flush.zero_()
        start.record()
        bench.runs[config]()
        end.record()
    torch.cuda.synchronize()
    return [round(1e3 * start.elapsed_time(end), 2) for start, end in pairs]
