"""The small shapes that every kernel is run on in a fixed order; the random ones are in `strategies`."""

from __future__ import annotations

from typing import Any

from ..kernels.tunable import Schedule
from ..problem import Problem
from .cases import Case, same_tiles

BASE: dict[str, Any] = {
    "batch": 2, "q_heads": 4, "kv_heads": 2, "seq_len": 37, "head_dim": 16, "group_size": 4, "window_size": 6,
}  # fmt: skip
# why each is there; BASE has several tiles, a ragged last one, an unfinished group, and g does not divide w
SHAPES: dict[str, dict[str, Any]] = {
    "base": {},
    "two_tiles": {"seq_len": 21},
    "one_token": {"seq_len": 1},
    "a_token_less_than_a_group": {"seq_len": 3},
    "all_raw": {"seq_len": 9},
    "first_core_seen": {"seq_len": 10},
    "a_tile_and_a_token": {"seq_len": 17},
    "more_cores_than_a_tile": {"seq_len": 41, "group_size": 2, "window_size": 3},
    "full_attention": {"seq_len": 19, "group_size": 1, "window_size": 5},
    "window_below_a_group": {"seq_len": 29, "group_size": 5, "window_size": 3},
    "window_beyond_the_end": {"seq_len": 21, "window_size": 100},
    "groups_longer_than_a_step": {"seq_len": 50, "group_size": 20, "window_size": 7},
    "kv_cores": {"core_heads": "kv"},
    "heads_3_to_1": {"seq_len": 19, "q_heads": 6, "core_heads": "kv"},
    "heads_7_to_1": {"seq_len": 14, "q_heads": 7, "kv_heads": 1},
    "mean": {"seq_len": 23, "pooling": "mean"},
    "mean_kv_cores": {"seq_len": 23, "pooling": "mean", "core_heads": "kv"},
    "head_dim_40": {"seq_len": 21, "head_dim": 40},
    "head_dim_128": {"seq_len": 21, "head_dim": 128},
    "head_dim_256": {"seq_len": 21, "head_dim": 256},
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "strides": {"layout": "different"},
    "sharp": {"family": "sharp"},
    "rising": {"family": "rising", "layout": "slab"},
    "needle": {"family": "needle", "layout": "transposed"},
    "offset_values": {"family": "offset_values"},
    "padded": {"bounds": ((0, 20), (9, 37))},
}
PACKED = {"lengths": (0, 11, 1, 4, 21)}
FEW = ("base", "window_below_a_group", "heads_7_to_1", "mean_kv_cores", "head_dim_40", "strides", "rising")
"""What a dtype can change."""


def fixed_case(name: str, dtype: str, **options: Any) -> Case:
    """The case of SHAPES or LAYOUTS, or "packed", of this name."""
    tiles: Schedule | None = options.pop("schedule", same_tiles(16, 16))
    shape = {**BASE, **SHAPES.get(name, {}), **({"batch": 1} if name == "packed" else {})}
    more = PACKED if name == "packed" else LAYOUTS.get(name, {})
    return Case(problem=Problem(**shape, dtype=dtype), schedule=tiles, **{**more, **options})


def fixed_names() -> list[str]:
    """Every name that `fixed_case` knows."""
    return [*SHAPES, *LAYOUTS, "packed"]
