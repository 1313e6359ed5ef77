"""The model of kernels that walk over tiles: how its times move with their causes, and what they cannot be below."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from cca_attention.autotune.binary import Resources
from cca_attention.autotune.compile import Launch
from cca_attention.autotune.devices import Device, device_table, find_device
from cca_attention.autotune.predict import Prediction, predict, roofline_us
from cca_attention.autotune.tile_model import smooth_max
from cca_attention.autotune.traits import UNKNOWN
from cca_attention.kernels.tunable import Config
from cca_attention.problem import Problem
from cca_attention.profiles.configs import tunables

H200 = find_device("h200")
PROBLEM = Problem(q_heads=32, kv_heads=8, seq_len=32768, head_dim=128)
CODE = {
    "tile_instructions": 450, "tile_exponentials": 34, "tile_loads": 16, "tile_products": 12, "tile_spills": 0,
    "edge_instructions": 700, "edge_spills": 0, "outside_instructions": 1600, "outside_spills": 0,
    "group_products": True,
}  # fmt: skip
RESOURCES = Resources("forward_kernel", 112 * 1024, 240, 0, 4, 1150, 0, 0, **CODE)
CONFIG = {"num_warps": 4, "num_stages": 3, "block_q": 64, "block_k": 64}


def predicted(
    kernel: str = "forward", config: dict[str, int] | None = None, device: Device = H200, problem: Problem = PROBLEM,
    grid: tuple[int, int, int] = (512, 32, 1), **changes: Any,
) -> Prediction:  # fmt: skip
    """What the model says of a kernel with this code."""
    tunable = tunables("sm_90")[kernel]
    made: Config = tunable.config(**{**CONFIG, **(config or {})}) if kernel == "forward" else tunable.config(**config)
    used = replace(RESOURCES, kernel=f"{kernel}_kernel", num_warps=made.num_warps, **changes)
    launch = Launch(f"{kernel}_kernel", grid, UNKNOWN)
    return predict(device, problem, made, tunable.work(problem, made), [(launch, used)])


@pytest.mark.parametrize(
    "worse",
    [
        {"tile_instructions": 900},
        {"edge_instructions": 1400},
        {"tile_exponentials": 68},
        {"tile_spills": 20},
        {"edge_spills": 40},
        {"outside_instructions": 6000},
        {"outside_spills": 200},
        {"tile_products": 60},
        {"group_products": False},
        {"registers": 255, "shared_bytes": 200_000},
        {"config": {"num_stages": 2}},
        {"config": {"num_stages": 1}},
        {"config": {"num_stages": 2}, "tile_loads": 64},
        {"device": find_device("h100-pcie")},
    ],
    ids=str,
)
def test_a_worse_cause_predicts_a_longer_time(worse: dict[str, Any]) -> None:
    better = {"config": {"num_stages": 2}} if "tile_loads" in worse else {}
    assert predicted(**worse).total_us > predicted(**better).total_us * 1.001


def test_a_load_that_is_waited_for_costs_more_than_one_begun_earlier() -> None:
    one, two, three, four = (predicted(config={"num_stages": n}).total_us for n in (1, 2, 3, 4))
    assert one > two > three == four


def test_what_is_a_groups_own_hides_behind_the_other_groups() -> None:
    alone, together = (predicted(shared_bytes=size, tile_spills=50) for size in (200_000, 70_000))
    assert alone.parts["warps_per_scheduler"] == 1 and together.parts["warps_per_scheduler"] == 2
    assert alone.parts["exposed_us"] > 1.9 * together.parts["exposed_us"]
    assert alone.parts["tensor_us"] == pytest.approx(together.parts["tensor_us"], rel=0.05)


def test_products_of_single_warps_are_slow_on_hopper_alone() -> None:
    a100 = find_device("a100")
    for device, slow in ((H200, True), (a100, False)):
        group, warp = (
            predicted(device=device, group_products=flag, tile_products=8).parts["tensor_us"] for flag in (True, False)
        )
        assert (warp > 1.5 * group) == slow


def test_a_ring_of_two_stalls_and_a_longer_one_hardly_does() -> None:
    two, three, four = (
        predicted("forward_hopper", {"num_warps": 4, "num_stages": n, "block_k": 64}, grid=(132, 1, 1)).total_us
        for n in (2, 3, 4)
    )
    assert two > 1.05 * three > 1.05 * four > 0.98 * three


def test_decoding_is_bounded_by_device_memory_or_by_its_longest_share() -> None:
    config = {"num_warps": 4, "num_stages": 3, "block_k": 64, "splits_core": 8, "splits_raw": 4}
    grid, code = (12, 32, 1), {"group_products": False, "registers": 95, "shared_bytes": 71_000}
    short = predicted("decode", config, grid=grid, **code)
    lonely = predicted("decode", {**config, "splits_core": 1}, grid=(5, 32, 1), **code)
    assert lonely.total_us > 1.5 * short.total_us
    large = replace(PROBLEM, batch=64)
    streamed = predicted("decode", config, grid=(12, 32, 64), problem=large, **code)
    assert streamed.parts["hbm_us"] > 0.2 * streamed.total_us


@pytest.mark.parametrize("device", device_table().values(), ids=lambda device: device.name)
def test_no_prediction_is_below_the_roofline(device: Device) -> None:
    tunable = tunables()["forward"]
    work = tunable.work(PROBLEM, tunable.config(**CONFIG))
    for code in ({}, {"tile_exponentials": 0, "tile_instructions": 1, "edge_instructions": 1}):
        assert predicted(device=device, **code).total_us >= roofline_us(device, PROBLEM, work)


def test_the_parts_make_the_total() -> None:
    found = predicted()
    terms = sum(found.parts[f"{name}_us"] for name in ("tensor", "exp2", "issue", "exposed"))
    assert found.total_us == pytest.approx(smooth_max(terms, found.parts["hbm_us"]) + found.parts["dispatch_us"])
    assert found.parts["quantisation"] >= 1 and found.parts["further_launches_us"] == 0
    assert smooth_max(3.0, 4.0) == pytest.approx(smooth_max(4.0, 3.0)) and 4.0 < smooth_max(3.0, 4.0) < 4.4
