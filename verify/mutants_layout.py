"""F12 to F16: what is written, for which head, at which address, in which precision."""

from __future__ import annotations

from .mutant import Mutant, Patch, fault, small
from .mutants_forward import FORWARD_FILE, POOLING, PRIMITIVES, RESCALE, STRIDES

WIDE = small(q_heads=5, kv_heads=5, seq_len=5, group_size=2, window_size=1, dtype="float16")
GROUPED = small(q_heads=6)
V_HEAD = "v_at = offset((batch, head // q_per_kv, k_base), v_strides)"
K_HEAD = "k_at = offset((batch, head // q_per_kv, k_base), k_strides)"
PRODUCT = "acc = tl.dot(probs.to(v.dtype), v, acc=acc,"

LAYOUT: dict[str, Mutant] = {
    "last_row_unwritten": fault(
        "F12",
        "the last row of a sequence is never written",
        Patch(
            FORWARD_FILE,
            "store_rows(out_tile, acc / row_sum[:, None], mask_q, HEAD_DIM",
            "store_rows(out_tile, acc / row_sum[:, None], mask_q & (offs_q < length - 1), HEAD_DIM",
        ),
        check="forward_equals_oracle",
    ),
    "last_column_unwritten": fault(
        "F12",
        "the last column is never written where head_dim is no power of two",
        Patch(
            PRIMITIVES,
            "inside = inside & (tl.arange(0, BLOCK_D)[None, :] < HEAD_DIM)",
            "inside = inside & (tl.arange(0, BLOCK_D)[None, :] < HEAD_DIM - 1)",
        ),
        check="forward_memory",
        case=small(head_dim=24),
    ),
    "last_head_unwritten": fault(
        "F12",
        "the grid is one head short",
        Patch(FORWARD_FILE, "forward_kernel, (tiles, q_heads, batch)", "forward_kernel, (tiles, q_heads - 1, batch)"),
        check="forward_memory",
    ),
    "heads_dealt_out_in_turns": fault(
        "F13",
        "query head h reads key head h % Hkv",
        Patch(FORWARD_FILE, K_HEAD, K_HEAD.replace("head // q_per_kv", "head % (tl.num_programs(1) // q_per_kv)")),
        check="shared_keys_are_repeated_keys",
        case=GROUPED,
    ),
    "values_of_another_row": fault(
        "F13",
        "the values are those of another row of the batch",
        Patch(FORWARD_FILE, V_HEAD, V_HEAD.replace("batch,", "tl.num_programs(2) - 1 - batch,")),
        check="forward_equals_oracle",
        case=small(batch=2),
    ),
    "strides_of_heads_and_tokens_exchanged": fault(
        "F14",
        "q's strides of heads and tokens are exchanged",
        Patch(FORWARD_FILE, STRIDES, STRIDES.replace("q.stride()", "q.transpose(1, 2).stride()")),
        check="forward_memory",
    ),
    "queries_assumed_contiguous": fault(
        "F14",
        "the rows of q are taken to lie head_dim apart",
        Patch(FORWARD_FILE, "BLOCK_Q, BLOCK_D, q_strides[2])", "BLOCK_Q, BLOCK_D, HEAD_DIM)"),
        check="layout_changes_no_bit",
        case=small(more={"layout": "transposed"}),
    ),
    "offsets_in_32_bits": fault(
        "F15",
        "the offset of a head is a product of 32 bits",
        Patch(PRIMITIVES, "total += index[axis].to(tl.int64) * strides[axis]", "total += index[axis] * strides[axis]"),
        check="wide_offsets",
        case=WIDE,
    ),
    "rows_in_32_bits": fault(
        "F15",
        "the offset of a row of a tile is a product of 32 bits",
        Patch(PRIMITIVES, "rows = tl.arange(0, BLOCK).to(tl.int64)", "rows = tl.arange(0, BLOCK)"),
        check="wide_offsets",
        case=WIDE,
    ),
    "members_in_32_bits": fault(
        "F15",
        "the offset of a member of a group is a product of 32 bits",
        Patch(POOLING, "head_ptr + (tokens * stride)", "head_ptr + (tokens.to(tl.int32) * stride)"),
        check="wide_offsets",
        case=WIDE,
    ),
    "weights_in_half_precision": fault(
        "F16",
        "the weights are rounded to half precision before they meet float32 values",
        Patch(PRIMITIVES, PRODUCT, PRODUCT.replace("probs.to(", "probs.to(tl.float16).to(")),
        check="forward_equals_oracle",
    ),
    "weights_truncated": fault(
        "F16",
        "the weights lose the lower half of their bits, always downwards, as the interpreter's bfloat16",
        Patch(
            PRIMITIVES,
            PRODUCT,
            "cut = (probs.to(tl.float32).to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)\n"
            "    acc = tl.dot(cut.to(v.dtype), v, acc=acc,",
        ),
        check="forward_equals_oracle",
    ),
    "accumulated_in_half_precision": fault(
        "F16",
        "the accumulator is kept in half precision between tiles",
        Patch(PRIMITIVES, RESCALE, "acc = (acc * rescale[:, None]).to(tl.float16).to(acc.dtype)"),
        check="forward_equals_oracle",
    ),
    "tf32": fault(
        "F16",
        "float32 queries enter the product with the 10 bits of TF32",
        Patch(
            PRIMITIVES,
            "scores = tl.dot(q, tl.trans(k), input",
            "cut = (q.to(tl.float32).to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)\n"
            "    scores = tl.dot(cut.to(q.dtype), tl.trans(k), input",
        ),
        check="forward_equals_oracle",
    ),
}
"""By name."""
