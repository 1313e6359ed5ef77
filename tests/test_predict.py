"""The cost model's parts: the traits read from Triton IR, occupancy, and how predictions move with their causes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from cca_attention.autotune.binary import Resources, loop_costs, tile_costs
from cca_attention.autotune.compile import Launch, Sketch
from cca_attention.autotune.devices import Device, device_table, find_device
from cca_attention.autotune.measure import Timing
from cca_attention.autotune.predict import Prediction, blocks_per_sm, predict, roofline_us
from cca_attention.autotune.search import Trial, ranked
from cca_attention.autotune.space import MAX_SPILL_BYTES, certain_shortage, distinct, shortage
from cca_attention.autotune.traits import Traits, read_traits
from cca_attention.kernels.tunable import Config, Work
from cca_attention.problem import Problem

A100, H100, MI300X = find_device("a100"), find_device("h100"), find_device("mi300x")
PROBLEM = Problem(q_heads=32, kv_heads=8, seq_len=32768, head_dim=128)
CONFIG = Config(num_warps=4, num_stages=2)
TRAITS = Traits(
    dot_flops=4.0 * 128 * 64 * 128, dot_rows=128, load_bytes=32768.0, stage_bytes=32768, live_bytes=98304,
    working_bytes=98304,
)  # fmt: skip
LAUNCH = Launch("forward_kernel", (256, 32, 1), TRAITS)
RESOURCES = Resources("forward_kernel", 65536, 200, 0, 4, 1000, 0)
WORK = Work(flops=1e12, bytes=1e9, exp2=2e9)

# the shape of a Triton module: a loop over keys with its two products, one straight-line load before it
TTIR = """
module {
  tt.func public @toy(%x: !tt.ptr<bf16>, %n: i32) attributes {noinline = false} {
    %q = tt.load %p, %m, %c : tensor<64x128x!tt.ptr<bf16>>
    %s = tt.load %x : !tt.ptr<f32>
    %r:3 = scf.for %i = %a to %n step %b iter_args(%l = %o, %acc = %z, %kp = %k0) -> (tensor<64xf32>, tensor<64x128xf32>, tensor<32x128x!tt.ptr<bf16>>)  : i32 {
      %k = tt.load %kp, %mk, %c : tensor<32x128x!tt.ptr<bf16>>
      %w = tt.load %wp, %mw : tensor<32x!tt.ptr<f32>>
      %kt = tt.trans %k {order = array<i32: 1, 0>} : tensor<32x128xbf16> -> tensor<128x32xbf16>
      %d = tt.dot %q, %kt, %zero, inputPrecision = ieee : tensor<64x128xbf16> * tensor<128x32xbf16> -> tensor<64x32xf32>
      %cond = scf.if %flag -> (tensor<64x32xf32>) {
        scf.yield %d : tensor<64x32xf32>
      } else {
        scf.yield %zero : tensor<64x32xf32>
      }
      %e = tt.dot %pr, %k, %acc, inputPrecision = ieee : tensor<64x32xbf16> * tensor<32x128xbf16> -> tensor<64x128xf32>
      scf.yield %l2, %e, %kp2 : tensor<64xf32>, tensor<64x128xf32>, tensor<32x128x!tt.ptr<bf16>>
    }
    tt.store %out, %r#1, %m : tensor<64x128x!tt.ptr<bf16>>
    tt.return
  }
}
"""  # noqa: E501


def test_traits_are_those_of_the_loops() -> None:
    assert read_traits(TTIR) == Traits(
        dot_flops=2.0 * 64 * 32 * 128 * 2,
        dot_rows=64,
        load_bytes=32 * 128 * 2 + 32 * 4,
        stage_bytes=32 * 128 * 2,
        live_bytes=4 * (64 + 64 * 128) + 4 * 64 * 32,
        working_bytes=4 * (64 + 64 * 128) + 4 * 64 * 32,
    )


def test_traits_without_a_loop_are_those_of_straight_line_code() -> None:
    straight = "\n".join(line for line in TTIR.splitlines() if line.startswith("    %q") or line.startswith("    %s"))
    assert read_traits(straight) == Traits(0.0, 0, 64 * 128 * 2.0, 0, 0, 0)


def test_the_largest_tile_of_arithmetic_is_live() -> None:
    tile = "      %m = arith.mulf %a, %b : tensor<4x64x128xf32>\n"
    assert read_traits(tile).live_bytes == 4 * 64 * 128 * 4
    assert read_traits(TTIR.replace("      %kt", tile + "      %kt", 1)).live_bytes == 4 * 64 * 128 * 4


def test_products_of_a_backward_are_held_together_where_the_compiler_likes() -> None:
    (product,) = (line for line in TTIR.splitlines() if line.startswith("      %d = tt.dot"))
    least, both = read_traits(TTIR), read_traits(TTIR.replace(product, f"{product}\n{product.replace('%d', '%dp')}", 1))
    assert both.live_bytes == least.live_bytes
    assert both.working_bytes == least.working_bytes + 4 * 64 * 32


def test_a_loop_within_a_loop_keeps_its_own_loads() -> None:
    nested = TTIR.replace("      %w = tt.load", "      scf.for %j = %a to %n step %b  : i32 {\n      %w = tt.load", 1)
    nested = nested.replace("      %kt = ", "      }\n      %kt = ", 1)
    assert read_traits(nested) == read_traits(TTIR)


@pytest.mark.parametrize(
    ("resources", "blocks"),
    [
        (RESOURCES, 2),  # 65536 registers / (200 * 128), 164 KiB / 64 KiB
        (replace(RESOURCES, shared_bytes=100_000), 1),
        (replace(RESOURCES, shared_bytes=0, registers=32), 16),  # 64 warps
        (replace(RESOURCES, shared_bytes=0, registers=16, num_warps=1), 32),
        (replace(RESOURCES, shared_bytes=A100.shared_bytes_per_block + 1), 0),
        (replace(RESOURCES, registers=255, num_warps=16), 0),  # 255 * 512 registers
    ],
)
def test_occupancy_is_the_tightest_limit(resources: Resources, blocks: int) -> None:
    assert blocks_per_sm(A100, resources) == blocks


SASS = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;                       /* 0x00 */
        /*0010*/                   STL.64 [R1], R4 ;                            /* 0x00 */
        /*0020*/                   HMMA.16816.F32.BF16 R4, R8, R10, R4 ;        /* 0x00 */
        /*0030*/                   LDL.128 R8, [R1+0x8] ;                       /* 0x00 */
        /*0040*/              @P0 BRA 0x30 ;                                    /* 0x00 */
        /*0050*/                   STL [R1+0x4], R5 ;                           /* 0x00 */
        /*0060*/              @!P1 BRA 0x20 ;                                   /* 0x00 */
        /*0070*/                   EXIT ;                                       /* 0x00 */
        /*0080*/                   BRA 0x80 ;                                   /* 0x00 */
"""


def test_only_what_is_in_a_loop_costs() -> None:
    assert loop_costs(SASS) == (5, 16 + 4, 0)
    assert loop_costs(SASS.replace("BRA 0x30", "BRA 0x70").replace("BRA 0x20", "BRA 0x70")) == (9, 8 + 16 + 4, 0)
    assert loop_costs(SASS.replace("LDL.128", "LDS.128").replace("STL [", "@P1 STS.U16 [")) == (5, 0, 1)


WALK = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;                       /* 0x00 */
        /*0010*/                   LDGSTS.E.BYPASS.128 [R2], [R4.64] ;          /* 0x00 */
        /*0020*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4] ;    /* 0x00 */
        /*0030*/                   MUFU.EX2 R8, R9 ;                            /* 0x00 */
        /*0040*/              @!P1 BRA 0x10 ;                                   /* 0x00 */
        /*0050*/                   LDL R5, [R1+0x4] ;                           /* 0x00 */
        /*0060*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4] ;    /* 0x00 */
        /*0070*/                   STL [R1+0x4], R5 ;                           /* 0x00 */
        /*0080*/                   FSEL R8, R9, R10, P0 ;                       /* 0x00 */
        /*0090*/              @!P2 BRA 0x60 ;                                   /* 0x00 */
        /*00a0*/              @!P3 BRA 0x10 ;                                   /* 0x00 */
        /*00b0*/                   EXIT ;                                       /* 0x00 */
"""


def test_the_shortest_loop_with_a_product_walks_over_whole_tiles() -> None:
    assert tile_costs(WALK) == {
        "tile_instructions": 4, "tile_exponentials": 1, "tile_loads": 1, "tile_products": 1, "tile_spills": 0,
        "edge_instructions": 4, "edge_spills": 1, "outside_instructions": 4, "outside_spills": 1,
        "group_products": True,
    }  # fmt: skip
    assert tile_costs(WALK.replace("HGMMA", "HMMA"))["group_products"] is False
    assert tile_costs(WALK.replace("HGMMA", "FFMA")) == {}


def time_us(**changes: Any) -> float:
    """The predicted time with one thing changed."""
    device, config = changes.pop("device", A100), changes.pop("config", CONFIG)
    traits = replace(TRAITS, **{name: changes.pop(name) for name in list(changes) if name in Traits.__slots__})
    launch = replace(LAUNCH, traits=traits, grid=changes.pop("grid", LAUNCH.grid))
    work = replace(WORK, **{name: changes.pop(name) for name in list(changes) if name in Work.__slots__})
    return predict(device, PROBLEM, config, work, [(launch, replace(RESOURCES, **changes))]).total_us


@pytest.mark.parametrize(
    "worse",
    [
        {"loop_spill_bytes": 400},
        {"loop_instructions": 4000},
        {"registers": 255, "shared_bytes": 160_000},
        {"flops": 2e12},
        {"bytes": 4e10},
        {"exp2": 8e9},
        {"load_bytes": 65536.0},
        {"dot_rows": 32},
        {"config": replace(CONFIG, num_stages=1)},
        {"grid": (109, 1, 1)},
        {"device": find_device("a10g")},
    ],
    ids=lambda worse: ",".join(worse),
)
def test_a_worse_cause_predicts_a_longer_time(worse: dict[str, Any]) -> None:
    assert time_us(**worse) > time_us()


@pytest.mark.parametrize("device", device_table().values(), ids=lambda device: device.name)
def test_no_prediction_is_below_the_roofline(device: Device) -> None:
    for work in (WORK, replace(WORK, flops=1.0), replace(WORK, bytes=1.0)):
        found = predict(device, PROBLEM, CONFIG, work, [(LAUNCH, RESOURCES)])
        assert found.total_us >= roofline_us(device, PROBLEM, work)


def test_the_parts_make_the_total() -> None:
    found = predict(A100, PROBLEM, CONFIG, WORK, [(LAUNCH, RESOURCES), (LAUNCH, RESOURCES)])
    parts = found.parts
    slowest = max(parts[f"{name}_us"] for name in ("tensor", "issue", "exp2", "shared", "l2", "hbm"))
    loop = (slowest + parts["exposed_us"]) * parts["quantisation"]
    assert found.total_us == pytest.approx(loop + parts["further_launches_us"])
    assert parts["further_launches_us"] > 0


def test_what_cannot_fit_is_known_before_compiling() -> None:
    def sketch_of(**changes: Any) -> Sketch:
        return Sketch("key", (replace(LAUNCH, traits=replace(TRAITS, **changes)),))

    assert certain_shortage(A100, CONFIG, sketch_of()) is None
    deep = replace(CONFIG, num_stages=7)
    assert certain_shortage(A100, deep, sketch_of()) == "shared memory"
    assert certain_shortage(H100, deep, sketch_of()) is None
    large = sketch_of(live_bytes=4 * 255 * 128)
    assert certain_shortage(A100, CONFIG, large) == "registers"
    assert certain_shortage(MI300X, CONFIG, large) is None
    assert certain_shortage(find_device("b200"), CONFIG, large) is None


def test_what_does_not_fit_is_known_after_compiling() -> None:
    assert shortage(A100, (RESOURCES,)) is None
    too_much = replace(RESOURCES, shared_bytes=200_000)
    assert shortage(A100, (RESOURCES, too_much)) == "shared memory"
    assert shortage(H100, (RESOURCES, too_much)) is None
    assert shortage(A100, (replace(RESOURCES, registers=255, num_warps=16),)) == "registers"
    assert shortage(A100, (replace(RESOURCES, spill_bytes=MAX_SPILL_BYTES),)) is None
    assert shortage(A100, (replace(RESOURCES, spill_bytes=MAX_SPILL_BYTES + 1),)) == "spills"


def test_configs_that_launch_the_same_are_one() -> None:
    configs = [replace(CONFIG, num_stages=n) for n in (1, 2, 3)]
    sketches = dict(zip(configs, (Sketch(key, ()) for key in ("a", "b", "a")), strict=True))
    assert list(distinct(sketches)) == configs[:2]


def predicted(stages: int, time_us: float, registers: int = 100) -> Trial:
    """A trial with nothing but a prediction."""
    config = replace(CONFIG, num_stages=stages)
    return Trial(config, (replace(RESOURCES, registers=registers),), Prediction(time_us, {}))


def measured(stages: int, median_us: float, baseline_us: float) -> Trial:
    """A trial that was timed in turns with the built-in config."""
    timing, baseline = (Timing(t, t, t, 10) for t in (median_us, baseline_us))
    return replace(predicted(stages, 1.0), timing=timing, baseline=baseline)


def stages_of(trials: list[Trial]) -> list[int]:
    """The trials by their configs."""
    return [trial.config.num_stages for trial in trials]


def test_the_fastest_leads_and_what_is_out_is_out() -> None:
    out = replace(predicted(4, 1.0), refusal="timeout: not done after 60 s")
    trials = [predicted(1, 30.0), predicted(2, 20.0), predicted(3, 25.0), out]
    assert stages_of(ranked(trials, replace(CONFIG, num_stages=1))) == [2, 3, 1]


def test_the_built_in_config_is_kept_unless_it_is_beaten_by_more_than_noise() -> None:
    trials = [predicted(1, 10.0), predicted(2, 9.9), predicted(3, 9.0)]
    default = replace(CONFIG, num_stages=1)
    assert stages_of(ranked(trials[:2], default)) == [1, 2]
    assert stages_of(ranked(trials, default)) == [3, 2, 1]
    assert stages_of(ranked(trials[1:], default)) == [3, 2]


def test_equal_times_are_ranked_alike_whatever_their_order() -> None:
    trials = [predicted(3, 5.0), predicted(2, 5.0), predicted(4, 5.0, registers=90)]
    default = replace(CONFIG, num_stages=9)
    assert stages_of(ranked(trials, default)) == stages_of(ranked(trials[::-1], default)) == [4, 2, 3]


def test_measured_times_are_compared_by_the_baseline_next_to_each() -> None:
    """A GPU that slowed down half-way must not decide: 12 against 20 beats 11 against 11."""
    trials = [measured(1, 11.0, 11.0), measured(2, 12.0, 20.0)]
    assert stages_of(ranked(trials, replace(CONFIG, num_stages=1))) == [2, 1]


@pytest.mark.parametrize("median_us", [float("nan"), float("inf"), 0.0, -1.0])
def test_a_timing_that_is_no_time_is_refused(median_us: float) -> None:
    assert "not a positive finite number" in str(Timing(median_us, median_us, median_us, 9).refusal(1.0))


def test_a_timing_that_the_hardware_cannot_reach_is_refused() -> None:
    timing = Timing.of([100.0, 101.0, 102.0])
    assert timing == Timing(101.0, pytest.approx(100.4), pytest.approx(101.6), 3)
    assert timing.refusal(110.0) is None
    assert "faster than the hardware can be" in str(timing.refusal(150.0))
