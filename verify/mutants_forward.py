"""F1 to F11: faults of the visibility, the pooling, the softmax and the masks. `mutants_layout` has F12 to F16."""

from __future__ import annotations

from .mutant import STEPS, Mutant, Patch, fault, small

PRIMITIVES, FORWARD_FILE = "kernels/primitives.py", "kernels/forward.py"
POOLING, DECODE = "kernels/pooling.py", "kernels/decode.py"

END_KEY = """end_key = tl.where(is_core, visible_cores(offs_q, GROUP_SIZE, WINDOW_SIZE), offs_q + 1)
    inside = offs < tl.where(is_core, visible_cores(end_q - 1, GROUP_SIZE, WINDOW_SIZE), end_q)"""
CORES = "return tl.maximum(position + 1 - WINDOW_SIZE, 0) // GROUP_SIZE"
LOCAL = "return visible_cores(position, GROUP_SIZE, WINDOW_SIZE) * GROUP_SIZE"
MASK = 'scores = tl.where(visible, scores, -float("inf"))'
TOTAL = "row_sum = row_sum * rescale + tl.sum(probs, axis=1)"
RESCALE = "acc = acc * rescale[:, None]"
STRIDES = "q.stride(), k.stride(), v.stride(), k_core.stride(), out.stride(), lse.stride(),"
LOAD = "return tl.load(pointers, mask=mask[:, None], other=0.0)"
STORE = "tl.store(pointers, value.to(pointers.dtype.element_ty), mask=inside)"
POOL_QUERY = "        last = q_base + offs_c * GROUP_SIZE + GROUP_SIZE - 1"
POOL_SCORES = "tl.zeros([BLOCK_C, BLOCK_T], wide) if MEAN else tl.sum(k * q[:, None, :], axis=2) * SCALE_LOG2"
SPLIT_WEIGHTS = "weights = tl.exp2(tops - pivot)"
ONE_HOT = small(head_dim=32)

FORWARD: dict[str, Mutant] = {
    "one_core_too_many": fault(
        "F1",
        "each query sees one core token more: its group counts twice",
        Patch(
            PRIMITIVES,
            END_KEY,
            """end_key = tl.where(is_core, visible_cores(offs_q, GROUP_SIZE, WINDOW_SIZE) + 1, offs_q + 1)
    inside = offs < tl.where(is_core, visible_cores(end_q - 1, GROUP_SIZE, WINDOW_SIZE) + 1, end_q)""",
        ),
        check="partition",
        case=ONE_HOT,
    ),
    "newest_core_lost": fault(
        "F2",
        "each query sees one core token less: a group is lost",
        Patch(PRIMITIVES, END_KEY, END_KEY.replace("WINDOW_SIZE), offs_q", "WINDOW_SIZE) - 1, offs_q")),
        check="partition",
        case=ONE_HOT,
    ),
    "window_starts_late": fault(
        "F3",
        "the oldest raw token is left out",
        Patch(PRIMITIVES, LOCAL, f"{LOCAL} + (position >= WINDOW_SIZE + GROUP_SIZE)"),
        check="partition",
        case=ONE_HOT,
    ),
    "window_starts_early": fault(
        "F3",
        "one raw token of the newest core is seen as well",
        Patch(PRIMITIVES, LOCAL, f"{LOCAL} - (position >= WINDOW_SIZE + GROUP_SIZE)"),
        check="partition",
        case=ONE_HOT,
    ),
    "window_and_group_exchanged": fault(
        "F3",
        "the window counts as group size, the group size as window",
        Patch(PRIMITIVES, CORES, "return tl.maximum(position + 1 - GROUP_SIZE, 0) // WINDOW_SIZE"),
        check="partition",
        case=ONE_HOT,
    ),
    "positions_from_one": fault(
        "F3",
        "the rule of 1-based positions is given 0-based ones",
        Patch(PRIMITIVES, CORES, "return tl.maximum(position - WINDOW_SIZE, 0) // GROUP_SIZE"),
        check="partition",
        case=ONE_HOT,
    ),
    "cores_first_query_early": fault(
        "F3",
        "the backward lets a query see a core one row before the forward does",
        Patch(
            PRIMITIVES,
            "return (core + 1) * GROUP_SIZE + WINDOW_SIZE - 1",
            "return (core + 1) * GROUP_SIZE + WINDOW_SIZE - 2",
        ),
        check="backward_equals_oracle",
    ),
    "last_row_of_a_tile_sees_the_next": fault(
        "F4",
        "the last query of a tile sees the token after it",
        Patch(
            PRIMITIVES,
            END_KEY,
            """last = (offs_q == end_q - 1).to(tl.int32)
    end_key = tl.where(is_core, visible_cores(offs_q, GROUP_SIZE, WINDOW_SIZE), offs_q + 1 + last)
    inside = offs < tl.where(is_core, visible_cores(end_q - 1, GROUP_SIZE, WINDOW_SIZE), end_q + 1)""",
        ),
        check="causality",
        case=small(seq_len=33, q_heads=1, kv_heads=1, more={"layout": "slab"}),
    ),
    "core_of_an_unfinished_group": fault(
        "F5",
        "a core is seen while its group is still partly in the window",
        Patch(
            PRIMITIVES,
            CORES,
            "return (tl.maximum(position + 1 - WINDOW_SIZE, 0) + GROUP_SIZE - 1) // GROUP_SIZE",
        ),
        check="partition",
        case=ONE_HOT,
    ),
    "last_group_not_pooled": fault(
        "F5",
        "the last complete group gets no core token",
        Patch(
            POOLING,
            "mask_c = offs_c < length // GROUP_SIZE\n    offs_d, offs_t = tl.arange(0, BLOCK_D), "
            "tl.arange(0, BLOCK_T)\n    wide = pool_lse_ptr.dtype.element_ty\n    k_head",
            "mask_c = offs_c < length // GROUP_SIZE - 1\n    offs_d, offs_t = tl.arange(0, BLOCK_D), "
            "tl.arange(0, BLOCK_T)\n    wide = pool_lse_ptr.dtype.element_ty\n    k_head",
        ),
        check="forward_equals_oracle",
        case=small(window_size=1),
    ),
    "pooled_by_the_first_query": fault(
        "F6",
        "the first query of a group scores it, not the last",
        Patch(POOLING, POOL_QUERY, POOL_QUERY.replace(" + GROUP_SIZE - 1", "")),
        check="order_within_groups",
    ),
    "pooled_by_the_mean": fault(
        "F6",
        "a group is pooled by its mean",
        Patch(POOLING, POOL_SCORES, "tl.zeros([BLOCK_C, BLOCK_T], wide)"),
        check="forward_equals_oracle",
    ),
    "pooled_without_the_scale": fault(
        "F6",
        "the pooling scores lack 1 / sqrt(head_dim)",
        Patch(POOLING, POOL_SCORES, POOL_SCORES.replace("SCALE_LOG2", "1.4426950408889634")),
        check="forward_equals_oracle",
    ),
    "two_softmaxes": fault(
        "F7",
        "the tiles seen whole are normalised before the others join",
        Patch(
            FORWARD_FILE,
            "masked == 1,\n        )  # fmt: skip\n\n    row_sum",
            "masked == 1,\n        )  # fmt: skip\n        if masked == 0:\n"
            "            acc = tl.where(row_sum[:, None] > 0, acc / row_sum[:, None], acc)\n"
            "            row_sum = tl.where(row_sum > 0, 1.0, 0.0)\n\n    row_sum",
        ),
        check="one_softmax",
        case=small(seq_len=61, window_size=33),
    ),
    "splits_averaged": fault(
        "F7",
        "decode normalises each split on its own and takes the mean",
        Patch(DECODE, SPLIT_WEIGHTS, "weights = tl.where(sums > 0, 1.0 / sums, 0.0)"),
        check="decode_equals_prefill",
        case=STEPS,
    ),
    "splits_merged_without_their_maxima": fault(
        "F7",
        "decode adds up splits as if they had one maximum",
        Patch(DECODE, SPLIT_WEIGHTS, "weights = tl.where(inside, 1.0, 0.0)"),
        check="decode_equals_prefill",
        case=STEPS,
    ),
    "scale_one_percent_off": fault(
        "F8",
        "the softmax scale is 1 % too large",
        Patch(PRIMITIVES, "* math.log2(math.e)\n", "* math.log2(math.e) * 1.01\n"),
        check="forward_equals_oracle",
    ),
    "scale_without_log2_e": fault(
        "F8",
        "base-2 exponentials of logits for base e",
        Patch(
            PRIMITIVES, "return spec.softmax_scale(head_dim) * math.log2(math.e)", "return spec.softmax_scale(head_dim)"
        ),
        check="forward_equals_oracle",
    ),
    "lse_in_base_2": fault(
        "F8",
        "lse lacks ln 2, and so do the weights that the backward makes of it",
        Patch(FORWARD_FILE, "lse = (row_max + tl.log2(row_sum)) * LN_2", "lse = row_max + tl.log2(row_sum)"),
        check="backward_equals_oracle",
    ),
    "accumulator_not_rescaled": fault(
        "F9",
        "a new maximum rescales the sum of the weights, not that of the values",
        Patch(PRIMITIVES, f"    {RESCALE}\n", ""),
        check="constant_values",
        case=small(more={"family": "rising"}),
    ),
    "sum_not_rescaled": fault(
        "F9",
        "a new maximum rescales the sum of the values, not that of the weights",
        Patch(PRIMITIVES, TOTAL, TOTAL.replace("row_sum * rescale", "row_sum")),
        check="forward_equals_oracle",
        case=small(more={"family": "rising"}),
    ),
    "padding_in_the_denominator": fault(
        "F10",
        "hidden keys count in the sum of the weights with a logit of 0",
        Patch(
            PRIMITIVES,
            TOTAL,
            "row_sum = row_sum * rescale + tl.sum("
            "tl.where(visible, probs, tl.exp2(-pivot)[:, None]) if MASKED else probs, axis=1)",
        ),
        check="constant_values",
    ),
    "hidden_keys_at_minus_10000": fault(
        "F10",
        "hidden keys get the logit -1e4 instead of none: wrong where the visible ones are below that",
        Patch(PRIMITIVES, MASK, MASK.replace('-float("inf")', "-1.0e4 / SCALE_LOG2")),
        check="forward_equals_oracle",
        case=small(more={"scale": 5000.0}),
    ),
    "masked_lanes_without_other": fault(
        "F11",
        "what masked lanes hold is left open, and used",
        Patch(PRIMITIVES, LOAD, "return tl.load(pointers, mask=mask[:, None])"),
        check="forward_memory",
    ),
    "load_without_mask": fault(
        "F11",
        "rows behind the end are read",
        Patch(PRIMITIVES, LOAD, "return tl.load(pointers)"),
        check="forward_memory",
    ),
    "store_without_mask": fault(
        "F11",
        "rows behind the end are written",
        Patch(PRIMITIVES, STORE, STORE.replace(", mask=inside", "")),
        check="forward_memory",
    ),
}
"""By name."""
