"""What hypothesis draws: the structure of a call; its values follow from a seed, so that what fails shrinks to little.

Sizes are what the interpreter does in a fraction of a second. `classes` says what is special about a case; a run that
never met one of `REQUIRED` proves less than it seems to, and has to fail.
"""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

from ..kernels.tunable import Schedule
from ..problem import Problem
from .cases import Case, same_tiles
from .inputs import FAMILIES, LAYOUTS
from .registry import checks

DTYPES = {"cpu": ("float32", "float16", "float64"), "cuda": ("bfloat16", "float16", "float32")}
"""What runs where, bfloat16 in no interpreter."""
HEAD_DIMS = (16, 24, 33, 64)
ALL_HEAD_DIMS = (16, 17, 40, 59, 64, 80, 96, 111, 128, 192, 256)
WORK = {"forward": 60, "backward": 28, "decode": 16}
"""Tokens times heads times batch rows of the largest case, by what a check runs."""
MANY_CALLS = frozenset(
    {
        "causality", "power_of_two_gauge", "linear_in_upstream", "schedules_agree", "gradients_accumulate",
        "shared_keys_are_repeated_keys", "any_chunks_give_the_same_state", "finite_differences", "padded_head_dim",
        "crop_equals_fresh", "decode_equals_prefill", "split_invariance", "head_permutation",
    }
)  # fmt: skip
"""Checks that call the operator so often that their cases have half the size."""
FEWEST_TOKENS = 5

REQUIRED = frozenset(
    {
        "partial group", "crosses tile", "group does not divide window", "no cores", "many cores", "window of one",
        "window below a group", "window beyond the end", "group of one", "group beyond the end", "packed", "padded",
        "empty sequence", "single token", "group edge", "shared keys", "odd ratio", "kv cores", "mean pooling",
        "strided", "expanded", "padded head dim", "half precision", "given scale", "default tiles", "uneven tiles",
    }
)  # fmt: skip
"""The classes that a run over all checks must have met."""


def cases(check_name: str, *, device: str = "cpu", dtypes: tuple[str, ...] | None = None) -> SearchStrategy[Case]:
    """Cases for the check of that name, small enough for the interpreter.

    Args:
        device: of the tensors. dtypes: to draw from; default: all that run there.

    Raises:
        KeyError: for a check that there is not.
    """
    check = checks()[check_name]
    if check_name == "schedule_is_used":
        return _more_than_a_tile(device)
    work = WORK[check.direction] // (2 if check_name in MANY_CALLS else 1)
    dims = ALL_HEAD_DIMS if check_name == "padded_head_dim" else HEAD_DIMS
    return _cases(work, check.direction != "decode", dims, device, dtypes or DTYPES[device])


def _more_than_a_tile(device: str) -> SearchStrategy[Case]:
    """Cases in which other tiles must change some bits."""
    problem = Problem(
        batch=1, q_heads=1, kv_heads=1, seq_len=40, head_dim=16, group_size=4, window_size=6, dtype="float32"
    )
    seeds = st.integers(0, 2**64 - 1)
    return seeds.map(lambda seed: Case(problem=problem, schedule=same_tiles(16, 16), device=device, seed=seed))


@st.composite
def _cases(
    draw: DrawFn, work: int, any_layout: bool, head_dims: tuple[int, ...], device: str, dtypes: tuple[str, ...]
) -> Case:
    kind = draw(st.sampled_from(["dense", "packed", "padded"] if any_layout else ["dense"]))
    ratio, kv_heads = draw(st.sampled_from([1, 1, 2, 2, 3, 7])), draw(st.integers(1, 2))
    kv_heads = 1 if ratio > 2 else kv_heads
    batch = 1 if kind == "packed" or ratio > 3 else draw(st.integers(1, 2))
    longest = max(FEWEST_TOKENS, work // (batch * ratio * kv_heads))
    tokens = draw(st.integers(1, longest))
    small = draw(st.sampled_from([True, True, True, False]))  # so that most cases have visible cores
    g, w = (draw(st.integers(1, 1 + tokens // 4 if small else tokens + 1)) for _ in range(2))
    g = g if small else draw(st.sampled_from([g, 2, 3, 17]))
    lengths = draw(_lengths(tokens, g)) if kind == "packed" else None
    problem = Problem(
        batch=batch,
        q_heads=kv_heads * ratio,
        kv_heads=kv_heads,
        seq_len=tokens,
        head_dim=draw(st.sampled_from(head_dims)),
        group_size=g,
        window_size=w,
        core_heads=draw(st.sampled_from(["query", "kv"])),
        pooling=draw(st.sampled_from(["last_query", "mean"])),
        dtype=draw(st.sampled_from(dtypes)),
    )
    return Case(
        problem=problem,
        family=draw(st.sampled_from(list(FAMILIES))),
        # rows that share their memory cannot be padded each in its own way
        layout=draw(st.sampled_from([name for name in LAYOUTS if (kind, name) != ("padded", "expanded")])),
        lengths=lengths,
        bounds=draw(_bounds(batch, tokens)) if kind == "padded" else None,
        scale=draw(st.none() | st.sampled_from([0.05, 0.5])),
        schedule=draw(st.none() | _tiles()),
        device=device,
        seed=draw(st.integers(0, 2**64 - 1)),
    )


@st.composite
def _lengths(draw: DrawFn, tokens: int, g: int) -> tuple[int, ...]:
    """Lengths of packed documents that add up to `tokens`, some of them on the edges of groups, some 0 or 1."""
    lengths: list[int] = []
    while (left := tokens - sum(lengths)) and len(lengths) < 4:
        length = draw(st.sampled_from([0, 1, g - 1, g, g + 1]) | st.integers(0, left))
        lengths.append(min(length, left))
    return (*lengths, left) if left else tuple(lengths)


def _bounds(batch: int, tokens: int) -> SearchStrategy[tuple[tuple[int, int], ...]]:
    """First and one-past-last real token of each row: padded on the left, the right or both, or nothing but padding."""
    ends = st.tuples(st.integers(0, tokens), st.integers(0, tokens)).map(lambda pair: (min(pair), max(pair)))
    return st.lists(ends, min_size=batch, max_size=batch).map(tuple)


def _tiles() -> SearchStrategy[Schedule]:
    side = st.sampled_from([16, 32, 64])
    return st.builds(
        same_tiles,
        side,
        side,
        groups=st.sampled_from([2, 1, 4, 8]),
        members=st.sampled_from([16, 4, 8]),
        splits=st.integers(1, 3),
    )


def classes(case: Case) -> frozenset[str]:
    """What is special about `case`."""
    p, spec = case.problem, case.spec
    lengths = [tokens.stop - tokens.start for _, tokens in case.sequences()]
    longest = max(lengths)
    cores = spec.visible_cores(longest - 1)
    forward = case.schedule["forward"] if case.schedule else None
    block_q, block_k = (getattr(forward, name, 32) for name in ("block_q", "block_k"))
    met = {
        "partial group": any(length > p.group_size and length % p.group_size for length in lengths),
        "crosses tile": longest > block_q,
        "group does not divide window": cores > 0 and p.window_size % p.group_size != 0,
        "no cores": cores == 0,
        "many cores": cores >= 4,
        "window of one": p.window_size == 1 and cores > 0,
        "window below a group": p.window_size < p.group_size and cores > 0,
        "window beyond the end": p.window_size >= longest,
        "group of one": p.group_size == 1 and cores > 0,
        "group beyond the end": p.group_size > longest,
        "packed": case.lengths is not None and sum(length > 0 for length in lengths) > 1,
        "padded": case.bounds is not None and any(length < p.seq_len for length in lengths),
        "empty sequence": 0 in lengths,
        "single token": 1 in lengths,
        "group edge": p.group_size > 1 and any(length % p.group_size in (0, 1, p.group_size - 1) for length in lengths),
        "shared keys": p.q_heads > p.kv_heads,
        "odd ratio": p.q_heads // p.kv_heads in (3, 7),
        "kv cores": p.core_heads == "kv" and p.q_heads > p.kv_heads and cores > 0,
        "mean pooling": p.pooling == "mean" and cores > 0,
        "strided": case.layout != "contiguous",
        "expanded": case.layout == "expanded",
        "padded head dim": p.head_dim & (p.head_dim - 1) != 0,
        "half precision": p.dtype in ("float16", "bfloat16"),
        "given scale": case.scale is not None,
        "default tiles": case.schedule is None,
        "uneven tiles": block_q != block_k,
    }
    return frozenset(name for name, is_met in met.items() if is_met)
