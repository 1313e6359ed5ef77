"""A1 to A4 and H1 to H6: faults of candidates, of the tuner's rules and of the gate itself."""

from __future__ import annotations

from .mutant import BASE, Mutant, Patch, fault, small

FORWARD_FILE, FUSED = "kernels/forward.py", "fused.py"
GATE_FILE, GATE_CASES = "verify/gate.py", "verify/gate_cases.py"
TOLERANCE, CANARY, ROUNDING, CALLS = "verify/tolerance.py", "verify/canary.py", "verify/rounding.py", "verify/calls.py"

TILES = "tiles = tiles_to_launch(tokens, sequences.count, config.block_q, sequences.is_packed)"
STORED = "store_rows(out_tile, acc / row_sum[:, None], mask_q, HEAD_DIM, BLOCK_D)"
ATTEND = """spec=spec, sequences=sequences, config=configs["forward"])
    return out, lse"""
KEPT = """spec=spec, sequences=sequences, config=configs["forward"])
    kept = attend.__dict__.setdefault("kept", {{}}).setdefault({key}, (out, lse))
    return kept[0].clone(), kept[1].clone()"""
OK = "ok = bool((use <= 1.0).all())"
NO_CANARY = Patch(CANARY, "if not trusted:", "if trusted is None:")
CANDIDATE = small(q_heads=2, kv_heads=2, seq_len=61, group_size=4, window_size=6, head_dim=16)

GATE: dict[str, Mutant] = {
    "half_of_the_grid": fault(
        "A1",
        "with some configs only half of the tiles are launched",
        Patch(FORWARD_FILE, TILES, f"{TILES}\n    tiles = (tiles + 1) // 2 if config.num_stages == 2 else tiles"),
        check="gate_of_a_candidate",
        case=CANDIDATE,
    ),
    "adds_to_what_is_there": fault(
        "A2",
        "the kernel adds to its output, which nobody has reset",
        Patch(
            FORWARD_FILE,
            STORED,
            STORED.replace("acc /", "load_rows(out_tile, mask_q, HEAD_DIM, BLOCK_D, True) + acc /"),
        ),
        check="gate_of_a_candidate",
        case=CANDIDATE,
    ),
    "name_without_the_group_size": fault(
        "A3",
        "problems that differ in the group size share a record",
        Patch("problem.py", "-g{self.group_size}-w", "-w"),
        check="configs_are_keyed",
    ),
    "config_of_another_dtype": fault(
        "A3",
        "a config serves every dtype",
        Patch(
            "profiles/schema.py",
            "if (own.head_dim, own.dtype) != (problem.head_dim, problem.dtype):",
            "if own.head_dim != problem.head_dim:",
        ),
        check="configs_are_keyed",
    ),
    "winner_not_verified": fault(
        "A4",
        "the fastest config wins, whatever its check said",
        Patch(
            "autotune/tune.py",
            'if "failed" in record or not record["ok"]:',
            'if "failed" in record:',
        ),
        check="only_the_verified_win",
    ),
    "crash_is_no_evidence": fault(
        "A4",
        "a candidate that raises is passed over by its gate",
        Patch(
            GATE_FILE,
            'return [], "crash", f"{type(error).__name__}: {error}"',
            'return [], "passed", ""',
        ),
        check="gate_refuses",
        case=CANDIDATE,
    ),
    "always_equal": fault(
        "H1",
        "every comparison passes",
        Patch(TOLERANCE, OK, "ok = True"),
        check="gate_refuses",
        case=CANDIDATE,
    ),
    "always_equal_and_no_canary": fault(
        "H1",
        "every comparison passes, and no rule is tried on known pairs",
        Patch(TOLERANCE, OK, "ok = True"),
        NO_CANARY,
        check="gate_refuses",
        case=CANDIDATE,
    ),
    "nan_is_not_greater": fault(
        "H2",
        "an error counts where it is greater than the bound, which NaN never is, and no rule is tried on known pairs",
        Patch(TOLERANCE, "torch.where(both, error, math.inf))", "(actual - value).abs())"),
        Patch(TOLERANCE, OK, "ok = not bool((use > 1.0).any())"),
        NO_CANARY,
        check="gate_refuses",
        case=CANDIDATE,
    ),
    "kernel_as_oracle": fault(
        "H3",
        "the kernels are held to what they give themselves",
        Patch(
            CALLS,
            "out, lse = attend(case, q, k, v)",
            "out, lse = cca_attention(*inputs[:3], **case.arguments(), return_lse=True)",
        ),
        check="gate_refuses",
        case=CANDIDATE,
    ),
    "kernel_as_oracle_of_a_check": fault(
        "H3",
        "what is right comes from the kernels",
        Patch(
            CALLS,
            "out, lse = attend(case, q, k, v)",
            "out, lse = cca_attention(*inputs[:3], **case.arguments(), return_lse=True)",
        ),
        check="oracle_is_independent",
        case=CANDIDATE,
    ),
    "tolerance_times_100": fault(
        "H4",
        "all bounds are 100 times as wide",
        Patch(ROUNDING, "return 1.0 + 16 * (self.store + self.cast)", "return 100.0 + 16 * (self.store + self.cast)"),
        check="gate_refuses",
        case=CANDIDATE,
    ),
    "no_cases": fault(
        "H5",
        "no case is run, and nobody minds",
        Patch(GATE_FILE, "    if not count:\n", "    if count < 0:\n"),
        Patch(GATE_CASES, "    for dtype in dtypes:\n", "    for dtype in ():\n"),
        check="gate_of_a_candidate",
        case=CANDIDATE,
    ),
    "no_comparisons": fault(
        "H5",
        "the checks compare nothing, and nobody minds",
        Patch(GATE_FILE, "comparisons = look(trial, kernel)", "comparisons = []"),
        Patch(
            GATE_FILE,
            "if not comparisons or all(comparison.empty for comparison in comparisons):",
            "if comparisons and all(comparison.empty for comparison in comparisons):",
        ),
        check="gate_refuses",
        case=CANDIDATE,
    ),
    "the_last_result_again": fault(
        "H6",
        "the kernel gives the first result that it had for the shape",
        Patch(FUSED, ATTEND, KEPT.format(key="q.shape")),
        check="gate_of_a_candidate",
        case=CANDIDATE,
    ),
    "zeros": fault(
        "H6",
        "the kernel gives zeros",
        Patch(FUSED, ATTEND, ATTEND.replace("return out, lse", "return out.zero_(), lse")),
        check="forward_equals_oracle",
        case=small(more={"family": "small_values"}),
    ),
    "results_by_address": fault(
        "H6",
        "the kernel gives the result that it had for these addresses",
        Patch(FUSED, ATTEND, KEPT.format(key="(q.data_ptr(), k.data_ptr(), v.data_ptr(), q.shape)")),
        check="new_contents_in_the_same_storage",
        case=CANDIDATE,
    ),
    "inputs_written": fault(
        "H6",
        "the kernel destroys its queries",
        Patch(FUSED, ATTEND, ATTEND.replace("    return", "    q.zero_()\n    return")),
        check="bitwise_repeat",
        case=BASE,
    ),
}
"""By name."""
