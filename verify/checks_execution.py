"""The same call in another way: chunked, split, tiled, laid out, replayed (P27 to P36; some are in `checks`)."""

from __future__ import annotations

from dataclasses import replace

import torch

from ..cache import CCACache
from ..kernels.decode import DecodeConfig
from ..kernels.tunable import Schedule
from .calls import (
    Results,
    agree_all,
    compare_all,
    dense,
    feed,
    generator_of,
    make_cache,
    oracle,
    run,
    same_bits,
)
from .cases import Case, same_tiles
from .inputs import Inputs, make_inputs
from .registry import check
from .rounding import Bounded
from .tolerance import Comparison, compare, compare_bitwise


def _cores(cache: CCACache) -> Results:
    return {"k_core": cache.k_core, "v_core": cache.v_core}


@check("decode", "P28")
def any_chunks_give_the_same_state(case: Case) -> list[Comparison]:
    """However a sequence is cut, prefill and decode each build the same bits of cores, and their rows are right."""
    case = dense(case)
    inputs, tokens = make_inputs(case), case.problem.seq_len
    out, found = oracle(case, inputs)["out"], []
    cuts = sorted(torch.randint(0, tokens + 1, (3,), generator=generator_of(case, 0)).tolist())
    chunks = [end - first for first, end in zip([0, *cuts], [*cuts, tokens], strict=True)]
    steps = [2, 1, 4, 3] * tokens
    while sum(steps) > tokens:
        steps.pop()
    ways = {"prefill": ([tokens], chunks), "decode": ([1] * tokens, [*steps, *[1] * (tokens - sum(steps))])}
    for name, sizes in ways.items():
        caches = [make_cache(case, rollback=3) for _ in sizes]
        for cache, each in zip(caches, sizes, strict=True):
            first, rows = 0, []
            for size in each:
                chunk = [x[:, :, first : first + size] for x in inputs[:3]]
                rows.append(getattr(cache, name)(*chunk))
                first += size
            found.append(compare(f"out of {name} in {len(each)}", torch.cat(rows, dim=2), out))
        found += same_bits(_cores(caches[1]), _cores(caches[0]), f" of {name}")
    return found


@check("decode", "P29")
def cached_row_alone(case: Case) -> list[Comparison]:
    """A row of a cache has the bits that it has alone, whatever its neighbours hold."""
    case = dense(case)
    inputs, batch, tokens = make_inputs(case), case.problem.batch, case.problem.seq_len
    new = min(2, tokens)
    old = tokens - new
    held = [old - row * old // (2 * batch) for row in range(batch)]  # a left-padded batch: the rows' tokens end alike
    bounds = torch.tensor([[old - length, old] for length in held], dtype=torch.int32, device=case.device)
    together = make_cache(case, rollback=1)
    q, k, v = (x[:, :, :old] for x in inputs[:3])
    together.prefill(q, k, v, seq_bounds=bounds)
    out, found = together.decode(*(x[:, :, old:] for x in inputs[:3])), []
    for row, length in enumerate(held):
        part, cache = inputs.part(slice(row, row + 1), slice(old - length, None)), make_cache(dense(case, batch=1), 1)
        cache.prefill(*(x[:, :, :length] for x in part[:3]))
        alone = cache.decode(*(x[:, :, length:] for x in part[:3]))
        found.append(compare_bitwise(f"out of row {row}", out[row : row + 1], alone))
        groups = (length + new) // case.problem.group_size
        cores = {name: x[row : row + 1, :, :groups] for name, x in _cores(together).items()}
        found += same_bits(cores, _cores(cache), f" of row {row}")
    return found


@check("decode", "P30")
def split_invariance(case: Case) -> list[Comparison]:
    """Decode gives the oracle's rows however many programs share the keys, more than there are keys included."""
    case = dense(case)
    inputs, tokens = make_inputs(case), case.problem.seq_len
    old = tokens - min(2, tokens)
    expected = Bounded(*(x[:, :, old:] for x in oracle(case, inputs)["out"]))
    found = []
    for core, raw in ((1, 1), (2, 3), (5, 2)):
        config = DecodeConfig(block_k=16, splits_core=core, splits_raw=raw)
        split = replace(case, schedule=Schedule({**(case.schedule or {}), "decode": config}))
        cache = make_cache(split, rollback=1)
        cache.prefill(*(x[:, :, :old] for x in inputs[:3]))
        found.append(compare(f"out of {core} + {raw} splits", feed(cache, inputs, old, [tokens - old]), expected))
    return found


@check("backward", "P32")
def schedules_agree(case: Case) -> list[Comparison]:
    """Every choice of tiles gives the same function: all agree with the oracle and with each other.

    Compiled, another depth of the software pipeline alone changes no bit.
    """
    inputs = make_inputs(case)
    expected = oracle(case, inputs, grads=True)
    first = run(case, inputs, grads=True)
    found = compare_all(first, expected)
    for note, schedule in (("default tiles", None), ("16 x 32", same_tiles(16, 32, groups=2, members=8))):
        other = run(replace(case, schedule=schedule), inputs, grads=True)
        found += agree_all(other, first, expected, expected, note=f" of {note}")
    if case.schedule is not None and case.device != "cpu":
        deeper = {name: replace(config, num_stages=config.num_stages % 3 + 1) for name, config in case.schedule.items()}
        found += same_bits(run(replace(case, schedule=Schedule(deeper)), inputs, grads=True), first, " of other stages")
    return found


@check("backward", "P34")
def layout_changes_no_bit(case: Case) -> list[Comparison]:
    """Strided, transposed, shared and offset tensors give the bits of contiguous ones; so do upstream gradients."""
    inputs = make_inputs(replace(case, layout="different") if case.layout == "contiguous" else case)
    expected = run(case, Inputs(*(x.contiguous().clone() for x in inputs)), grads=True)
    found = same_bits(run(case, inputs, grads=True), expected)
    spread = torch.stack([inputs.dout, torch.full_like(inputs.dout, torch.nan)], dim=-1)[..., 0]
    turned = inputs.dlse.mT.contiguous().mT
    return found + same_bits(
        run(case, inputs._replace(dout=spread, dlse=turned), grads=True), expected, " of spread dout"
    )


@check("backward", "P35", "P36")
def new_contents_in_the_same_storage(case: Case) -> list[Comparison]:
    """A call on tensors that were filled anew gives what fresh tensors give, and what was returned before stays.

    On a GPU a captured CUDA graph of the forward, replayed on the new contents, gives these bits, too.
    """
    inputs, other = make_inputs(case), make_inputs(replace(case, seed=case.seed + 1))
    expected = run(case, other, grads=True)
    held = Inputs(*(x.contiguous().clone() for x in inputs))
    first = run(case, held, grads=True)
    kept = {name: x.clone() for name, x in first.items()}
    for x, y in zip(held, other, strict=True):
        x.copy_(y)
    found = same_bits(run(case, held, grads=True), expected, " of new contents") + same_bits(first, kept, " of the old")
    return found + _replayed(dense(case)) if case.device != "cpu" else found


def _replayed(case: Case) -> list[Comparison]:
    inputs, other = (Inputs(*(x.contiguous().clone() for x in make_inputs(replace(case, seed=s)))) for s in (1, 2))
    expected = run(case, other)
    run(case, inputs)  # compiles what the capture cannot
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run(case, inputs)
    for x, y in zip(inputs, other, strict=True):
        x.copy_(y)
    graph.replay()
    torch.cuda.synchronize()
    return same_bits(results, expected, " of a replayed graph")
