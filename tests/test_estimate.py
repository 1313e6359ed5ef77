"""What is expected of a kernel before the compiler has seen it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cca_attention.autotune.binary import words_in_a_bank
from cca_attention.autotune.compile import Launch, Sketch
from cca_attention.autotune.devices import find_device
from cca_attention.autotune.estimate import ASSUMED_EXCHANGES, estimated
from cca_attention.autotune.space import certain_shortage
from cca_attention.autotune.traits import Traits
from cca_attention.kernels.pooling import PoolingConfig
from cca_attention.kernels.tunable import Config, Work
from cca_attention.problem import Problem

A100 = find_device("a100")
PROBLEM = Problem(q_heads=32, kv_heads=8, seq_len=32768, head_dim=128)
CONFIG = Config(num_warps=4, num_stages=2)
WORK = Work(flops=1e12, bytes=1e9, exp2=2e9)
TRAITS = Traits(
    dot_flops=4.0 * 128 * 64 * 128, dot_rows=128, load_bytes=32768.0, stage_bytes=32768, live_bytes=98304,
    working_bytes=98304,
)  # fmt: skip
LAUNCH = Launch("another_kernel", (256, 32, 1), TRAITS)


def test_an_estimate_grows_into_spills() -> None:
    small = estimated(A100, PROBLEM, replace(CONFIG, num_warps=8), WORK, LAUNCH)
    large = estimated(A100, PROBLEM, CONFIG, WORK, LAUNCH)
    assert small.spill_bytes == 0 and small.registers < 255
    assert large.spill_bytes > 0 and large.registers == 255


def test_what_is_only_likely_to_be_held_decides_and_rules_nothing_out() -> None:
    large = estimated(A100, PROBLEM, CONFIG, WORK, LAUNCH)
    more = replace(LAUNCH, traits=replace(TRAITS, working_bytes=2 * TRAITS.working_bytes))
    assert estimated(A100, PROBLEM, CONFIG, WORK, more).spill_bytes > large.spill_bytes
    assert certain_shortage(A100, CONFIG, Sketch("key", (more,))) is None


def test_a_warp_with_less_than_two_groups_is_expected_to_hand_words_on() -> None:
    launch = Launch("pooling_kernel", (1024, 32, 1), replace(TRAITS, dot_flops=0.0, dot_rows=0))
    few, enough = (
        estimated(A100, PROBLEM, PoolingConfig(block_c=c, block_t=16, num_warps=2, num_stages=1), WORK, launch)
        for c in (2, 4)
    )
    assert few.loop_exchanges > enough.loop_exchanges == 0


@pytest.mark.parametrize(
    ("groups", "warps", "head_dim", "dtype", "words"),
    [
        (1, 2, 128, "bfloat16", 8),  # 16 lanes have words of a row, 64 bytes apart: two banks
        (1, 4, 128, "bfloat16", 16),  # 128 bytes apart: one bank
        (2, 2, 128, "bfloat16", 16),  # 32 lanes, two banks
        (2, 4, 128, "bfloat16", 32),
        (4, 4, 128, "bfloat16", 16),  # a warp has two groups, and two warps sum each
        (1, 2, 64, "bfloat16", 4),
        (1, 2, 128, "float32", 8),  # 32 lanes, 32 bytes apart: four banks
    ],
)
def test_words_that_are_handed_on_wait_for_others_of_their_bank(
    groups: int, warps: int, head_dim: int, dtype: str, words: int
) -> None:
    problem = replace(PROBLEM, head_dim=head_dim, dtype=dtype)
    config = PoolingConfig(block_c=groups, block_t=16, num_warps=warps, num_stages=1)
    launch = Launch("pooling_kernel", (1024, 32, 1), replace(TRAITS, dot_flops=0.0, dot_rows=0))
    assert estimated(A100, problem, config, WORK, launch).loop_exchanges == ASSUMED_EXCHANGES * words


def layout(lanes: tuple[int, int, int], warps: tuple[int, int, int], order: str) -> str:
    return (
        f"#blocked = #ttg.blocked<{{sizePerThread = [1, 1, 8], threadsPerWarp = {list(lanes)}, "
        f"warpsPerCTA = {list(warps)}, order = {order}}}>\n"
    )


ROWS = (
    "#blocked1 = #ttg.blocked<{sizePerThread = [1, 8], threadsPerWarp = [2, 16], warpsPerCTA = [2, 1], order = [1, 0]}>"
)


@pytest.mark.parametrize(
    ("tiles", "words"),
    [
        ("", 1),
        (layout((2, 1, 16), (2, 1, 1), "[2, 0, 1]"), 1),  # a group is one warp's
        (layout((1, 2, 16), (1, 2, 1), "[2, 1, 0]"), 8),
        (layout((2, 1, 16), (1, 4, 1), "[2, 0, 1]"), 32),
        (layout((2, 1, 16), (2, 1, 1), "[2, 0, 1]") + layout((2, 1, 16), (1, 2, 1), "[2, 0, 1]"), 16),
    ],
)
def test_how_many_words_meet_in_a_bank_is_read_from_the_layout(tiles: str, words: int) -> None:
    assert words_in_a_bank(tiles + ROWS) == words
