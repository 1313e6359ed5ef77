"""The eight mistakes of the published code (spec.md section 8); the seventh is three, the eighth two."""

from __future__ import annotations

from ..kernels.forward import ForwardConfig
from ..kernels.tunable import Schedule
from .mutant import BASE, STEPS, Mutant, Patch, small

EIGHT: dict[str, Mutant] = {
    "truncated_division_shows_core_0": Mutant(
        id="1",
        says="// truncates toward zero: rows w .. w+g-2 see core 0",
        patches=(
            Patch(
                "kernels/primitives.py",
                "return tl.maximum(position + 1 - WINDOW_SIZE, 0) // GROUP_SIZE",
                "return tl.maximum((position + 1 - WINDOW_SIZE - GROUP_SIZE) // GROUP_SIZE + 1, 0)",
            ),
        ),
        check="partition",
        case=small(group_size=5, window_size=3, head_dim=32),
    ),
    "window_in_whole_groups": Mutant(
        id="2",
        says="where g does not divide w, rows lose tokens or count them twice",
        patches=(
            Patch(
                "kernels/primitives.py",
                "return visible_cores(position, GROUP_SIZE, WINDOW_SIZE) * GROUP_SIZE",
                "return tl.maximum((position + 1) // GROUP_SIZE - WINDOW_SIZE // GROUP_SIZE, 0) * GROUP_SIZE",
            ),
        ),
        check="partition",
        case=small(head_dim=32),
    ),
    "strides_of_k_and_v_exchanged": Mutant(
        id="3",
        says="right only where k and v have the same strides",
        patches=(
            Patch(
                "kernels/forward.py",
                "q.stride(), k.stride(), v.stride(), k_core.stride(), out.stride(), lse.stride(),",
                "q.stride(), v.stride(), k.stride(), k_core.stride(), out.stride(), lse.stride(),",
            ),
        ),
        check="forward_equals_oracle",
        case=small(more={"layout": "different"}),
    ),
    "backward_of_whole_core_tiles": Mutant(
        id="4",
        says="the number of cores must be a multiple of the tile",
        patches=(
            Patch(
                "kernels/backward_dkv.py",
                "end_c = tl.minimum(first_c + BLOCK_C, length // GROUP_SIZE)",
                "end_c = tl.minimum(first_c + BLOCK_C, length // GROUP_SIZE // BLOCK_C * BLOCK_C)",
            ),
        ),
        check="backward_equals_oracle",
        case=small(seq_len=41, group_size=2),
    ),
    "training_rounds_the_number_of_groups": Mutant(
        id="5",
        says="training has another window than inference",
        patches=(
            Patch(
                "attention.py",
                "    packed = cu_seqlens is not None\n",
                "    packed = cu_seqlens is not None\n"
                "    groups = max(0, q.shape[2] - window_size) // group_size // 4 * 4\n"
                "    window_size = max(window_size, q.shape[2] - groups * group_size)\n",
            ),
        ),
        check="decode_equals_prefill",
        case=STEPS,
    ),
    "group_0_pooled_again": Mutant(
        id="6",
        says="decode pools the first group whenever a group is complete",
        patches=(
            Patch(
                "kernels/decode.py",
                "tokens = core * GROUP_SIZE + offs_t",
                "tokens = offs_t",
            ),
        ),
        check="decode_equals_prefill",
        case=STEPS,
    ),
    "padding_ignored": Mutant(
        id="7",
        says="padding takes part as if it were tokens",
        patches=(
            Patch(
                "attention.py",
                "return Sequences.padded(bounds.clamp(0, q.shape[2]))",
                "return Sequences.dense(q.shape[0])",
            ),
        ),
        check="forward_equals_oracle",
        case=small(batch=2, more={"bounds": ((0, 20), (9, 29))}),
    ),
    "several_tokens_a_step_see_alike": Mutant(
        id="7",
        says="all tokens of a step see what the last one sees",
        patches=(
            Patch(
                "kernels/decode.py",
                "position = seen + index",
                "position = seen + NUM_NEW - 1 + 0 * index",
            ),
        ),
        check="decode_equals_prefill",
        case=STEPS,
    ),
    "reorder_forgets_the_cores": Mutant(
        id="7",
        says="beam search moves the raw tokens and not the cores",
        patches=(
            Patch(
                "cache_state.py",
                "for storage, axis in ((self.core, 1), (self.raw, 1), (self.seen, 0)):",
                "for storage, axis in ((self.raw, 1), (self.seen, 0)):",
            ),
        ),
        check="reorder_equals_fresh",
        case=STEPS,
    ),
    "tiles_that_no_config_changes": Mutant(
        id="8",
        says="32 x 32 tiles whatever the config says",
        patches=(
            Patch(
                "kernels/forward.py",
                "        **config.launch_args(),\n",
                "        **{**config.launch_args(), 'BLOCK_Q': 32, 'BLOCK_K': 32},\n",
            ),
        ),
        check="schedule_is_used",
        case=small(seq_len=41, more={"schedule": Schedule({"forward": ForwardConfig(block_q=16, block_k=16)})}),
    ),
    "float32_through_float16": Mutant(
        id="8",
        says="float32 is computed in half precision",
        patches=(
            Patch(
                "kernels/primitives.py",
                "acc = tl.dot(probs.to(v.dtype), v, acc=acc,",
                "acc = tl.dot(probs.to(tl.float16), v.to(tl.float16), acc=acc,",
            ),
        ),
        check="forward_equals_oracle",
        case=BASE,
    ),
}
