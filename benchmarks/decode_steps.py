"""Ways to run a model's decode step again and again, eager, in a CUDA graph or compiled, and what each step takes."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch._inductor.compile_fx import compile_fx
from torch._inductor.decomposition import select_decomp_table

Step = Callable[[Tensor], Tensor]
"""From a token [1, 1] to the logits [1, 1, V] of the next."""

GRAPHS = {"triton.cudagraphs": True}
ROWS = {
    **GRAPHS,
    "combo_kernels": True,  # q, k and v in one kernel, and their rotations in one
    "realize_reads_threshold": 1,  # what is read twice is written out, not computed twice
    "max_autotune_pointwise": True,  # tiles are timed: a few, and then the neighbours of the best
    "coordinate_descent_tuning": True,
    "fx_graph_cache": False,  # it does not know of other decompositions
}


def graph_step(step: Step, token: Tensor) -> Step:
    """`step` captured in a CUDA graph."""
    static = token.clone()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step(static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = step(static)

    def replay(token: Tensor) -> Tensor:
        static.copy_(token)
        graph.replay()
        return logits

    return replay


def row_product(row: Tensor, matrix: Tensor) -> Tensor:
    """aten.mm of one row as a reduction, which Inductor fuses with its neighbours; of more rows as it is.

    cuBLAS computes it as a product of matrices, on H200 at 2.7 to 3.9 TB/s, and cannot join those of the same row.
    """
    if row.shape[0] != 1:
        return NotImplemented
    written = row.as_strided(row.shape, row.stride())  # else every program would compute its own copy of the row
    return (written.float().t() * matrix.float()).sum(0, keepdim=True).to(row.dtype)


def by_rows(graph: Any, inputs: Any) -> Any:
    """A backend of ``torch.compile``: Inductor with `row_product`."""
    table = {**select_decomp_table(), torch.ops.aten.mm.default: row_product}
    return compile_fx(graph, inputs, config_patches=ROWS, decompositions=table)


def compiled_step(step: Step, token: Tensor, **how: Any) -> Step:
    """`step` compiled whole, in CUDA graphs of Inductor's; `how`: further arguments of ``torch.compile``."""
    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, **(how if token.is_cuda else {"backend": "aot_eager"}))

    def call(token: Tensor) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        logits: Tensor = compiled(token.clone()).clone()
        return logits

    for _ in range(4):
        call(token)
    return call


def timed(step: Step, token: Tensor, count: int) -> tuple[list[float], Tensor]:
    """Milliseconds of each of `count` steps, one after the other, and the tokens (count,) that went into them."""
    gc.collect()  # of what was compiled before, or it is done while the clock runs
    made, marks = [token], [_mark(token)]
    for _ in range(count):
        made.append(step(made[-1]).argmax(-1))
        marks.append(_mark(token))
    if token.is_cuda:
        torch.cuda.synchronize()
        times = [first.elapsed_time(last) for first, last in pairwise(marks)]
    else:
        times = [(last - first) * 1e3 for first, last in pairwise(marks)]
    return times, torch.cat(made[:count])[:, 0]


def _mark(token: Tensor) -> Any:
    """Where the device of `token` is now."""
    if not token.is_cuda:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


DECODINGS: dict[str, Callable[[Step, Tensor], Step]] = {
    "eager": lambda step, _: step,
    "CUDA graph": graph_step,
    "torch.compile": partial(compiled_step, options=GRAPHS),
    "torch.compile, row products": partial(compiled_step, backend=by_rows),
}
