"""D1 to D5 and R1 to R3: faults of the decode state, and of programs that meet in memory."""

from __future__ import annotations

from .mutant import STEPS, Mutant, Patch, fault, small

DECODE, STATE, FUSED = "kernels/decode.py", "cache_state.py", "fused.py"

COMPLETES = "if (core + 1) * GROUP_SIZE <= end:"
RAW_HEAD = "offset((batch, kv_head), raw_strides)"
COUNT = """    if row == 0:
        tl.store(next_seen_ptr + batch, tl.minimum(tl.load(seen_ptr + batch) + NUM_NEW, max_tokens))"""
SHORT = small(seq_len=17, group_size=3, window_size=2)
GROUPED = small(q_heads=2, kv_heads=1, seq_len=13)

CACHE: dict[str, Mutant] = {
    "core_not_made_when_complete": fault(
        "D1",
        "a step whose last token completes a group does not pool it",
        Patch(DECODE, COMPLETES, "if (core + 1) * GROUP_SIZE < end:"),
        check="decode_equals_prefill",
        case=STEPS,
    ),
    "stale_core_after_rollback": fault(
        "D2",
        "a group that was completed before a rollback keeps its old core",
        Patch(
            DECODE,
            COMPLETES,
            "old = tl.load(k_core_ptr + offset((batch, core_head, core), core_strides))\n"
            "    if ((core + 1) * GROUP_SIZE <= end) & (old == 0.0):",
        ),
        check="crop_equals_fresh",
        case=SHORT,
    ),
    "rollback_forgets_the_counter": fault(
        "D2",
        "a rollback is noted by the host and not by the device",
        Patch("cache.py", "self._state.seen.copy_(torch.tensor(kept, dtype=torch.int32))", "pass"),
        check="crop_equals_fresh",
        case=SHORT,
    ),
    "raw_token_given_up_early": fault(
        "D3",
        "decode leaves out the oldest raw token",
        Patch(
            DECODE,
            "oldest = tl.where(is_core, 0, first_local(seen, GROUP_SIZE, WINDOW_SIZE))",
            "oldest = tl.where(is_core, 0, first_local(seen, GROUP_SIZE, WINDOW_SIZE) + (seen >= WINDOW_SIZE))",
        ),
        check="decode_equals_prefill",
        case=STEPS,
    ),
    "ring_overwritten_early": fault(
        "D3",
        "a prefill puts its last tokens one slot further round the ring",
        Patch(
            STATE,
            "slot = torch.arange(self.ring, device=q.device)",
            "slot = torch.arange(1, self.ring + 1, device=q.device)",
        ),
        check="any_chunks_give_the_same_state",
        case=STEPS,
    ),
    "first_prompt_shifted_round_the_ring": fault(
        "D3",
        "the prefill of an empty cache puts its last tokens one slot further round the ring",
        Patch(STATE, "torch.arange(tokens - kept, tokens,", "1 + torch.arange(tokens - kept, tokens,"),
        check="decode_equals_prefill",
        case=STEPS,
    ),
    "behind_the_newest_token": fault(
        "D4",
        "decode reads the slot behind the newest token of the ring",
        Patch(
            DECODE,
            "visible_cores(end_of_new - 1, GROUP_SIZE, WINDOW_SIZE), seen)",
            "visible_cores(end_of_new - 1, GROUP_SIZE, WINDOW_SIZE), seen + 1)",
        ),
        check="dropped_tokens_leave_no_nan",
        case=STEPS,
    ),
    "slot_of_the_neighbour": fault(
        "D5",
        "a raw token is looked up in the next slot of the ring",
        Patch(DECODE, "keys % RING_SIZE)", "(keys + 1) % RING_SIZE)"),
        check="decode_equals_prefill",
        case=STEPS,
    ),
    "raw_tokens_of_another_row": fault(
        "D5",
        "the raw tokens are those of another row of the batch",
        Patch(DECODE, RAW_HEAD, RAW_HEAD.replace("(batch,", "(tl.num_programs(2) - 1 - batch,")),
        check="cached_row_alone",
        case=STEPS,
    ),
    "counter_added_to_by_all": fault(
        "R1",
        "every program adds to the counter of tokens, without an atomic: right by luck, and in the interpreter",
        Patch(
            DECODE,
            COUNT,
            "    more = tl.where(row == 0, NUM_NEW, 0)\n"
            "    tl.store(next_seen_ptr + batch, tl.minimum(tl.load(seen_ptr + batch) + more, max_tokens))",
        ),
        check="decode_memory",
        case=GROUPED,
    ),
    "ring_filled_by_every_core_head": fault(
        "R2",
        "all core heads of a key head store the new tokens: the same values, at the same time",
        Patch(
            DECODE,
            "if (part == 0) & (core_head % CORES_PER_KV == 0):",
            "if part == 0:",
        ),
        check="decode_memory",
        case=GROUPED,
    ),
    "tiles_that_overlap": fault(
        "R2",
        "each tile of queries also computes and stores the first row of the next",
        Patch(
            "kernels/forward.py",
            "mask_q = offs_q < length\n    core_base",
            "offs_q = tl.maximum(offs_q - 1, 0)\n    mask_q = offs_q < length\n    core_base",
        ),
        check="forward_memory",
    ),
    "padding_rows_not_zeroed": fault(
        "R3",
        "out is not zeroed where no sequence is",
        Patch(FUSED, "out, lse = torch.zeros_like(q), q.new_full(", "out, lse = torch.empty_like(q), q.new_full("),
        check="forward_equals_oracle",
        case=small(batch=2, more={"bounds": ((0, 20), (9, 29))}),
    ),
    "empty_split_leaves_its_scratch": fault(
        "R3",
        "a split without keys does not store its part, which the merge reads",
        Patch(
            DECODE,
            "    step = tl.where(is_core, SPLITS_CORE, SPLITS_RAW) * BLOCK_K\n",
            "    step = tl.where(is_core, SPLITS_CORE, SPLITS_RAW) * BLOCK_K\n"
            "    if (first >= newest) & (split < SPLITS_CORE):\n        return\n",
        ),
        check="decode_memory",
        case=GROUPED,
    ),
}
"""By name."""
