"""Every kernel against the oracle: forward, log-sum-exp, backward and decode, in every dtype that runs here."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cca_attention import Problem
from cca_attention.kernels.backward_dkv import BackwardDcoreConfig, BackwardDkvConfig
from cca_attention.kernels.backward_dq import BackwardDqConfig
from cca_attention.kernels.forward import ForwardConfig
from cca_attention.kernels.pooling import PoolingConfig
from cca_attention.kernels.tunable import Config, Schedule
from cca_attention.verify.cases import Case, same_tiles
from cca_attention.verify.inputs import FAMILIES, LAYOUTS
from cca_attention.verify.registry import checks

HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"
DTYPES = ("bfloat16", "float16", "float32") if HAS_GPU else ("float32", "float64", "float16")


SMALL = same_tiles(16, 16)
BASE: dict[str, Any] = {
    "batch": 2, "q_heads": 2, "kv_heads": 2, "seq_len": 37, "head_dim": 16, "group_size": 4, "window_size": 6,
    "dtype": "float32",
}  # fmt: skip


def make(tiles: Schedule | None = SMALL, *, case: dict[str, Any] | None = None, **problem: Any) -> Case:
    return Case(problem=Problem(**{**BASE, **problem}), schedule=tiles, device=DEVICE, **(case or {}))


def passes(check: str, case: Case) -> None:
    comparisons = checks()[check](case)
    assert comparisons and all(comparison.ok for comparison in comparisons), "\n".join(map(str, comparisons))


# --- forward and backward against the oracle ---------------------------------------------------------------------

# why each shape is there; `BASE` has several tiles, a ragged last one, an unfinished group, and g does not divide w
SHAPES: dict[str, dict[str, Any]] = {
    "base": {},
    # g - 1, g, g + 1, w - 1, w, w + 1, the first core still hidden and just seen, the edges of a tile
    **{f"tokens_{tokens}": {"seq_len": tokens} for tokens in (1, 2, 3, 4, 5, 6, 7, 9, 10, 15, 16, 17)},
    "more_cores_than_a_tile": {"seq_len": 41, "group_size": 2, "window_size": 3},
    "groups_of_one": {"seq_len": 19, "group_size": 1, "window_size": 5},
    "groups_of_one_window_of_one": {"seq_len": 18, "group_size": 1, "window_size": 1},
    "window_of_one": {"seq_len": 23, "window_size": 1},
    "window_below_a_group": {"seq_len": 29, "group_size": 5, "window_size": 3},
    "window_far_below_a_group": {"seq_len": 53, "group_size": 24, "window_size": 2},
    "groups_longer_than_a_step": {"seq_len": 50, "group_size": 20, "window_size": 7},
    "odd_groups": {"seq_len": 31, "group_size": 3, "window_size": 7},
    "groups_divide_window": {"seq_len": 31, "group_size": 3, "window_size": 6},
    "groups_beyond_the_end": {"seq_len": 11, "group_size": 16, "window_size": 2},
    "window_beyond_the_end": {"seq_len": 21, "window_size": 100},
    "heads_2_to_1": {"seq_len": 19, "q_heads": 4},
    "heads_2_to_1_kv_cores": {"seq_len": 19, "q_heads": 4, "core_heads": "kv"},
    "heads_3_to_1": {"seq_len": 19, "q_heads": 3, "kv_heads": 1},
    "heads_3_to_1_kv_cores": {"seq_len": 19, "q_heads": 6, "core_heads": "kv"},
    "heads_7_to_1": {"seq_len": 14, "q_heads": 7, "kv_heads": 1},
    "heads_7_to_1_kv_cores": {"seq_len": 14, "q_heads": 7, "kv_heads": 1, "core_heads": "kv"},
    "heads_16_to_1": {"seq_len": 7, "q_heads": 16, "kv_heads": 1, "group_size": 2, "window_size": 2},
    "heads_16_to_1_kv_cores": {"seq_len": 9, "q_heads": 16, "kv_heads": 1, "group_size": 2, "core_heads": "kv"},
    "kv_cores": {"core_heads": "kv"},
    "mean": {"seq_len": 23, "pooling": "mean"},
    "mean_heads_2_to_1": {"seq_len": 23, "q_heads": 4, "pooling": "mean"},
    "mean_kv_cores": {"seq_len": 23, "q_heads": 4, "pooling": "mean", "core_heads": "kv"},
    "mean_groups_longer_than_a_step": {"seq_len": 50, "group_size": 20, "window_size": 7, "pooling": "mean"},
    "head_dim_17": {"seq_len": 21, "head_dim": 17},
    "head_dim_40": {"seq_len": 21, "head_dim": 40},
    "head_dim_64": {"seq_len": 21, "head_dim": 64},
    "head_dim_96": {"seq_len": 21, "head_dim": 96},
    "head_dim_111": {"seq_len": 21, "head_dim": 111},
    "head_dim_128": {"seq_len": 21, "head_dim": 128},
    "head_dim_256": {"seq_len": 21, "head_dim": 256},
}  # fmt: skip
# what the dtype can change; the interpreter runs the other shapes in one dtype
IN_EVERY_DTYPE = ("base", "window_below_a_group", "heads_3_to_1_kv_cores", "mean", "head_dim_40")


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [(s, d) for s in SHAPES for d in (DTYPES if HAS_GPU or s in IN_EVERY_DTYPE else DTYPES[:1])],
)
def test_gradients_and_outputs_equal_the_oracle(shape: str, dtype: str) -> None:
    passes("backward_equals_oracle", make(dtype=dtype, **SHAPES[shape]))


@pytest.mark.parametrize("core_heads", ["query", "kv"])
@pytest.mark.parametrize("family", FAMILIES)
def test_adversarial_values(family: str, core_heads: str) -> None:
    case = make(
        q_heads=4, seq_len=29, core_heads=core_heads, dtype=DTYPES[-1 if HAS_GPU else 0], case={"family": family}
    )
    passes("backward_equals_oracle", case)


@pytest.mark.parametrize("family", FAMILIES)
def test_adversarial_values_in_half_precision(family: str) -> None:
    passes("forward_equals_oracle", make(seq_len=29, dtype="float16", case={"family": family}))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("head_dim", [16, 24])
def test_memory_layouts(layout: str, head_dim: int) -> None:
    case = make(q_heads=4, seq_len=21, head_dim=head_dim, case={"layout": layout})
    passes("backward_equals_oracle", case)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [0.02, 0.25, 1.5])
def test_a_scale_that_is_given(scale: float, dtype: str) -> None:
    passes("backward_equals_oracle", make(seq_len=21, dtype=dtype, case={"scale": scale}))


@pytest.mark.skipif(HAS_GPU, reason="on a GPU bfloat16 runs as itself, in the tests above")
def test_bfloat16_emulated_in_the_interpreter() -> None:
    """The host rounds around float32 kernels; this says nothing about bfloat16 kernels."""
    passes("backward_equals_oracle", make(q_heads=4, seq_len=21, dtype="bfloat16"))


TILES = {
    "default": None,
    "larger_than_all": same_tiles(64, 64, groups=16, members=32),
    "wide": same_tiles(16, 64, groups=1),
    "tall": same_tiles(64, 16, groups=2, members=8),
    "middle": same_tiles(32, 32, groups=8),
}


@pytest.mark.parametrize("shape", [{}, {"group_size": 20, "window_size": 9, "seq_len": 70}, {"group_size": 1}], ids=str)
@pytest.mark.parametrize("tiles", TILES)
def test_every_tile_size_gives_the_same_function(tiles: str, shape: dict[str, Any]) -> None:
    passes("backward_equals_oracle", make(TILES[tiles], **shape))


FORCED: dict[str, tuple[dict[str, Any], Config]] = {
    "pooling": ({"group_size": 20}, PoolingConfig(block_t=4)),
    "pooling_backward": ({"group_size": 20}, PoolingConfig(block_t=4)),
    "forward": ({}, ForwardConfig(block_q=16, block_k=16)),
    "backward_dq": ({}, BackwardDqConfig(block_q=16, block_k=16)),
    "backward_dkv": ({}, BackwardDkvConfig(block_k=16, block_q=16)),
    "backward_dcore": ({}, BackwardDcoreConfig(block_c=16, block_q=16)),
}


# compiled, these add up keys or queries in the same order whatever the tile, so that no bit can tell
SAME_BITS_ON_GPU = ("backward_dq", "backward_dcore")


@pytest.mark.parametrize("kernel", FORCED)
def test_a_schedule_reaches_its_kernel(kernel: str) -> None:
    shape, config = FORCED[kernel]
    check = "backward_equals_oracle" if HAS_GPU and kernel in SAME_BITS_ON_GPU else "schedule_is_used"
    passes(check, make(Schedule({kernel: config}), seq_len=70, **shape))


# --- packed documents and padded batches -------------------------------------------------------------------------

LENGTHS = {
    "ragged": (5, 13, 19),
    "empty_ones": (0, 7, 0, 0, 21, 0),
    "single_tokens": (1, 1, 9, 1),
    "group_edges": (3, 4, 5, 8, 7),
    "one": (26,),
    "all_but_one_empty": (0, 0, 18),
}
BOUNDS = {
    "right": ((0, 30), (0, 11)),
    "left": ((7, 37), (33, 37)),
    "both": ((3, 29), (16, 32)),
    "empty_row": ((5, 5), (2, 36)),
    "one_token": ((36, 37), (0, 1)),
    "none": ((0, 37), (0, 37)),
}


def sequences(layout: str) -> Case:
    problem: dict[str, Any] = {"q_heads": 4, "core_heads": "kv"} if layout in ("ragged", "both") else {}
    if layout in LENGTHS:
        lengths = LENGTHS[layout]
        return make(batch=1, seq_len=sum(lengths), **problem, case={"lengths": lengths, "layout": "different"})
    return make(**problem, case={"bounds": BOUNDS[layout], "layout": "transposed"})


@pytest.mark.parametrize("layout", [*LENGTHS, *BOUNDS])
def test_packed_and_padded_equal_the_oracle(layout: str) -> None:
    passes("backward_equals_oracle", sequences(layout))


@pytest.mark.parametrize("layout", ["ragged", "empty_ones", "group_edges", "left", "both", "empty_row"])
def test_a_sequence_does_not_depend_on_its_neighbours(layout: str) -> None:
    passes("sequences_equal_alone", sequences(layout))


# --- properties that need no oracle ------------------------------------------------------------------------------

WINDOWS = [(1, 1), (1, 5), (4, 6), (4, 8), (4, 1), (5, 3), (3, 7), (16, 2), (7, 50)]


@pytest.mark.parametrize(("group_size", "window_size"), WINDOWS)
def test_every_past_token_is_seen_once(group_size: int, window_size: int) -> None:
    passes(
        "partition", make(q_heads=4, batch=2, seq_len=35, group_size=group_size, window_size=window_size, head_dim=35)
    )


def test_packed_documents_see_their_own_tokens_once() -> None:
    passes("partition", make(batch=1, seq_len=30, head_dim=32, case={"lengths": (9, 0, 1, 20)}))


@pytest.mark.parametrize(("group_size", "window_size"), [(4, 6), (5, 2), (1, 1)])
def test_the_future_has_no_effect(group_size: int, window_size: int) -> None:
    passes("causality", make(seq_len=22, group_size=group_size, window_size=window_size))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_bits_again(dtype: str) -> None:
    passes("bitwise_repeat", make(q_heads=4, seq_len=29, dtype=dtype, case={"layout": "slab"}))


@pytest.mark.filterwarnings("ignore:All-NaN slice encountered")  # the interpreter's maximum of a NaN row
@pytest.mark.parametrize("core_heads", ["query", "kv"])
def test_nan_stays_in_its_head(core_heads: str) -> None:
    passes("isolation", make(q_heads=4, seq_len=21, core_heads=core_heads))


# --- decode ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("core_heads", ["query", "kv"])
def test_decode_equals_prefill(core_heads: str, dtype: str) -> None:
    passes("decode_equals_prefill", make(q_heads=4, seq_len=25, core_heads=core_heads, dtype=dtype))


@pytest.mark.parametrize(
    "shape",
    [
        {"group_size": 5, "window_size": 2},
        {"group_size": 1, "window_size": 3},
        {"group_size": 3, "window_size": 6, "pooling": "mean", "head_dim": 40},
        {"q_heads": 3, "kv_heads": 1, "group_size": 2, "window_size": 1},
    ],
    ids=str,
)
def test_decode_of_odd_shapes(shape: dict[str, Any]) -> None:
    passes("decode_equals_prefill", make(seq_len=19, **shape))


@pytest.mark.parametrize("core_heads", ["query", "kv"])
def test_cropped_tokens_leave_no_trace(core_heads: str) -> None:
    passes("crop_equals_fresh", make(seq_len=17, group_size=3, window_size=2, core_heads=core_heads, batch=1))


def test_a_reordered_cache_goes_on_as_its_new_rows() -> None:
    passes("reorder_equals_fresh", make(seq_len=21))


# --- any structure -----------------------------------------------------------------------------------------------


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Structure is drawn, values come from a seed: what fails shrinks to a small shape."""
    kv_heads, ratio = draw(st.integers(1, 2)), draw(st.sampled_from([1, 2, 3]))
    lengths = draw(st.none() | st.lists(st.integers(0, 14), min_size=1, max_size=4).map(tuple).filter(sum))
    seq_len = sum(lengths) if lengths else draw(st.integers(1, 40))
    problem = Problem(
        batch=1 if lengths else 2,
        q_heads=kv_heads * ratio,
        kv_heads=kv_heads,
        seq_len=seq_len,
        head_dim=draw(st.sampled_from([16, 24, 33])),
        group_size=draw(st.integers(1, 9)),
        window_size=draw(st.integers(1, 20)),
        core_heads=draw(st.sampled_from(["query", "kv"])),
        pooling=draw(st.sampled_from(["last_query", "mean"])),
        dtype=draw(st.sampled_from(DTYPES)),
    )
    return Case(
        problem=problem,
        family=draw(st.sampled_from(sorted(FAMILIES))),
        layout=draw(st.sampled_from(sorted(LAYOUTS))),
        lengths=lengths,
        schedule=TILES[draw(st.sampled_from(sorted(TILES)))],
        device=DEVICE,
        seed=draw(st.integers(0, 2**32 - 1)),
    )


@given(case=cases())
def test_any_structure_equals_the_oracle(case: Case) -> None:
    passes("backward_equals_oracle", case)
