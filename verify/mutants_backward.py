"""B1 to B6: faults of the backward."""

from __future__ import annotations

from .mutant import Mutant, Patch, fault, small

DKV, DQ, POOLING = "kernels/backward_dkv.py", "kernels/backward_dq.py", "kernels/pooling.py"
PRIMITIVES = "kernels/primitives.py"

CORE_DS = "ds = weights * (da - pool_delta) * SCALE"
POOLED_DK = "dk += weights[:, None] * dk_core + ds[:, None] * q"
POOLED_DV = "dv += weights[:, None] * dv_core\n    return"
SCORED = "        dq += load_rows(dq_tile, scored, HEAD_DIM, BLOCK_D, True).to(wide)"
NOT_SCORED = "        dq += 0.0 * scored[:, None].to(wide)"
CHECK = "backward_equals_oracle"

BACKWARD: dict[str, Mutant] = {
    "pooling_weights_detached": fault(
        "B1",
        "the pooling weights are taken for constants",
        Patch(PRIMITIVES, CORE_DS, f"{CORE_DS} * 0.0"),
        Patch(DQ, SCORED, NOT_SCORED),
        check="directional_derivatives",
    ),
    "pooling_lost_for_queries": fault(
        "B2",
        "dq lacks what the pooling weights give",
        Patch(DQ, SCORED, NOT_SCORED),
        check="pooling_reaches_the_last_query",
    ),
    "pooling_lost_for_keys": fault(
        "B2",
        "dk lacks what the pooling weights give",
        Patch(PRIMITIVES, CORE_DS, f"{CORE_DS} * 0.0"),
        check="directional_derivatives",
    ),
    "pooling_delta_counted_twice": fault(
        "B2",
        "the mean that the gradient of the pooling scores lacks is taken off twice",
        Patch(POOLING, "ds = weights * (da - mean[:, None])", "ds = weights * da"),
        check=CHECK,
    ),
    "core_keys_lost": fault(
        "B3",
        "the core keys pass nothing on to the keys of their groups",
        Patch(PRIMITIVES, POOLED_DK, POOLED_DK.replace("weights[:, None] * dk_core + ", "")),
        check="gradient_sums",
    ),
    "core_values_lost": fault(
        "B3",
        "the core values pass nothing on to the values of their groups",
        Patch(PRIMITIVES, POOLED_DV, POOLED_DV.replace("weights", "0.0 * weights")),
        check="gradient_sums",
    ),
    "delta_missing_in_the_first_tile": fault(
        "B4",
        "the first tile of queries gives dk without its delta",
        Patch(
            DKV,
            "ds = probs * (dprobs - delta[None, :])",
            "ds = probs * (dprobs - tl.where(tile == 0, 0.0, delta)[None, :])",
        ),
        check="gauge_of_gradients",
    ),
    "delta_missing_in_a_tile_of_keys": fault(
        "B4",
        "the first tile of keys gives dq without delta",
        Patch(
            DQ,
            "ds = probs * (dprobs - delta[:, None])",
            "ds = probs * (dprobs - tl.where(tile == 0, 0.0, delta)[:, None])",
        ),
        check=CHECK,
    ),
    "delta_without_the_gradient_of_lse": fault(
        "B4",
        "the gradient that arrives at lse is dropped",
        Patch(DQ, "        delta -= tl.load(", "        delta -= 0.0 * tl.load("),
        check=CHECK,
    ),
    "last_of_a_group_counted_twice": fault(
        "B5",
        "the last token of a group gets its core's dk twice",
        Patch(
            DKV,
            "dk += dk_pooled",
            "dk += dk_pooled * (1 + (offs_k % GROUP_SIZE == GROUP_SIZE - 1).to(tl.int32))[:, None]",
        ),
        check="gradient_sums",
    ),
    "core_gradients_over_the_last_query": fault(
        "B5",
        "in groups of two the gradients of cores lie over what the pooling gives dq",
        Patch("kernels/layout.py", "if 2 * parts >= group_size", "if 2 * parts > group_size"),
        check=CHECK,
        case=small(seq_len=41, group_size=2),
    ),
    "one_query_head_left_out": fault(
        "B5",
        "dk and dv lack the last query head of each key head",
        Patch(DKV, "    for r in range(heads):\n", "    for r in range(heads - (heads > 1)):\n"),
        check=CHECK,
        case=small(seq_len=19, q_heads=4),
    ),
    "dout_assumed_contiguous": fault(
        "B6",
        "dq is made as if dout had the strides of a contiguous tensor",
        Patch(
            DQ,
            "k_core.stride(), dout.stride(), lse.stride(), dq.stride(),",
            "k_core.stride(), dout.to('meta').contiguous().stride(), lse.stride(), dq.stride(),",
        ),
        check="layout_changes_no_bit",
        case=small(more={"layout": "transposed"}),
    ),
    "dout_of_keys_assumed_contiguous": fault(
        "B6",
        "dk and dv are made as if the rows of dout lay head_dim apart",
        Patch(
            DKV,
            "dout_stride = tl.zeros((), tl.int64) + dout_strides[2]",
            "dout_stride = tl.zeros((), tl.int64) + HEAD_DIM",
        ),
        check=CHECK,
        case=small(more={"layout": "transposed"}),
    ),
}
"""By name."""
