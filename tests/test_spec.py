"""The integers of CCA attention, and what `CCASpec` and `Problem` refuse."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from cca_attention.problem import Problem
from cca_attention.spec import CCASpec

CoreRule = Callable[[int, int, int], int]  # position, group size, window size -> number of visible cores


def count_past(position: int, tokens: int, group_size: int, cores: int) -> list[int]:
    """How often each of `tokens` is represented when `position` sees `cores` cores and the raw tokens after them."""
    counts = [0] * tokens
    for core in range(cores):
        for token in range(core * group_size, (core + 1) * group_size):
            counts[token] += 1
    for token in range(cores * group_size, position + 1):
        counts[token] += 1
    return counts


def test_every_past_token_is_represented_exactly_once() -> None:
    """P1, for 10,948 (T, g, w): g = 1, w < g, g not dividing w and w >= T among them."""
    shapes = [(t, g, w) for t in range(34) for g in range(1, 15) for w in range(1, 24)]
    for tokens, group_size, window_size in shapes:
        spec = CCASpec(group_size, window_size)
        for i in range(tokens):
            cores, raw = spec.visible_cores(i), spec.local_range(i)
            assert raw == range(cores * group_size, i + 1), (tokens, spec, i)
            assert count_past(i, tokens, group_size, cores) == [1] * (i + 1) + [0] * (tokens - i - 1), (tokens, spec, i)
            assert cores <= spec.num_groups(tokens), (tokens, spec, i)
            assert len(raw) <= spec.max_local_tokens(), (tokens, spec, i)
            assert len(raw) == i + 1 if i + 1 < window_size else len(raw) >= window_size, (tokens, spec, i)


def test_a_core_appears_as_soon_as_the_window_can_spare_its_group() -> None:
    """The rule in other words: the smallest raw part that holds w tokens and starts at a group."""
    for group_size in range(1, 15):
        for window_size in range(1, 24):
            spec = CCASpec(group_size, window_size)
            for i in range(60):
                starts = [c for c in range(i + 1) if i + 1 - c * group_size >= window_size]
                assert spec.visible_cores(i) == max(starts, default=0), (spec, i)


WRONG_RULES: dict[str, CoreRule] = {
    "truncating division": lambda i, g, w: int((i - w) / g) + 1 if i >= w else 0,
    "one token early": lambda i, g, w: max(0, (i + 2 - w) // g),
    "one core late": lambda i, g, w: max(0, (i + 1 - w) // g - 1),
    "rounded window": lambda i, g, w: max(0, (i + 1 - w // g * g) // g),
}


@pytest.mark.parametrize("rule", WRONG_RULES.values(), ids=WRONG_RULES)
def test_a_wrong_rule_is_not_the_rule(rule: CoreRule) -> None:
    """The comparison can fail: other rules differ from `visible_cores` somewhere in what the tests above walk over."""
    shapes = [(g, w) for g in range(1, 15) for w in range(1, 24)]
    assert any(rule(i, g, w) != CCASpec(g, w).visible_cores(i) for g, w in shapes for i in range(34))


def test_large_positions_by_hand() -> None:
    spec = CCASpec(group_size=16, window_size=1024)
    assert spec.visible_cores(1022) == spec.visible_cores(1023) == spec.visible_cores(1038) == 0
    assert spec.visible_cores(1039) == 1
    assert spec.local_range(1039) == range(16, 1040)
    assert spec.visible_cores(131_071) == 8128
    assert spec.local_range(131_071) == range(130_048, 131_072)
    assert spec.num_groups(131_087) == 8192
    assert spec.max_local_tokens() == 1039


def test_scale_and_core_heads() -> None:
    assert CCASpec().softmax_scale(64) == 0.125
    assert CCASpec(scale=2).softmax_scale(64) == 2.0
    assert CCASpec(core_heads="query").num_core_heads(28, 4) == 28
    assert CCASpec(core_heads="kv").num_core_heads(28, 4) == 4


# saved = 1 - (Hc / g / Hkv + (w + g - 1) / T), in tenths of a percent; spec.md section 1 names at least these savings
SAVINGS = [
    pytest.param("kv", 32, 8, 128, 93.0, 93, id="Llama-3.1-8B, kv"),
    pytest.param("kv", 28, 4, 128, 93.0, 93, id="Qwen2.5-7B, kv"),
    pytest.param("kv", 9, 3, 64, 93.0, 93, id="SmolLM-135M, kv"),
    pytest.param("query", 32, 8, 128, 74.2, 73, id="Llama-3.1-8B, query"),
    pytest.param("query", 28, 4, 128, 55.5, 53, id="Qwen2.5-7B, query"),
]


@pytest.mark.parametrize(("core_heads", "q_heads", "kv_heads", "head_dim", "saved", "promised"), SAVINGS)
@pytest.mark.parametrize(("batch", "element_bytes"), [(1, 2), (3, 4)])
def test_cache_savings(
    core_heads: Any,
    q_heads: int,
    kv_heads: int,
    head_dim: int,
    saved: float,
    promised: int,
    batch: int,
    element_bytes: int,
) -> None:
    spec, seq_len = CCASpec(16, 1024, core_heads), 131_072
    used = spec.cache_bytes(
        seq_len, batch=batch, q_heads=q_heads, kv_heads=kv_heads, head_dim=head_dim, element_bytes=element_bytes
    )
    percent = 100 * (1 - used / (2 * element_bytes * batch * kv_heads * seq_len * head_dim))
    assert round(percent, 1) == saved
    assert round(percent) >= promised


def test_cache_bytes_by_hand() -> None:
    spec = CCASpec(group_size=4, window_size=6)
    # 2 tensors x 2 bytes x batch 3 x (6 heads x 5 cores + 2 heads x 9 raw tokens) x 16
    assert spec.cache_bytes(23, batch=3, q_heads=6, kv_heads=2, head_dim=16, element_bytes=2) == 2 * 2 * 3 * 48 * 16


SPEC_REFUSALS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"group_size": 0}, ValueError, "group_size must be at least 1, got 0"),
    ({"group_size": -4}, ValueError, "group_size must be at least 1, got -4"),
    ({"group_size": 16.0}, TypeError, r"group_size must be an int of at least 1, got 16\.0 \(float\)"),
    ({"group_size": True}, TypeError, r"group_size must be an int of at least 1, got True \(bool\)"),
    ({"group_size": float("nan")}, TypeError, r"group_size must be an int of at least 1, got nan \(float\)"),
    ({"window_size": 0}, ValueError, "window_size must be at least 1, got 0"),
    ({"window_size": "1024"}, TypeError, r"window_size must be an int of at least 1, got '1024' \(str\)"),
    ({"window_size": None}, TypeError, r"window_size must be an int of at least 1, got None \(NoneType\)"),
    ({"core_heads": "both"}, ValueError, "core_heads must be one of 'query', 'kv', got 'both'"),
    ({"pooling": "max"}, ValueError, "pooling must be one of 'last_query', 'mean', got 'max'"),
    ({"scale": 0.0}, ValueError, r"scale must be a positive finite number or None, got 0\.0"),
    ({"scale": -1}, ValueError, "scale must be a positive finite number or None, got -1"),
    ({"scale": float("nan")}, ValueError, "scale must be a positive finite number or None, got nan"),
    ({"scale": float("inf")}, ValueError, "scale must be a positive finite number or None, got inf"),
    ({"scale": "0.5"}, ValueError, r"scale must be a positive finite number or None, got '0\.5'"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), SPEC_REFUSALS, ids=str)
def test_spec_refuses(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{message}$"):
        CCASpec(**arguments)


PROBLEM = {"batch": 2, "q_heads": 6, "kv_heads": 2, "seq_len": 64, "head_dim": 32}
SIZES = ["batch", "q_heads", "kv_heads", "seq_len", "head_dim", "group_size", "window_size"]
PROBLEM_REFUSALS: list[tuple[dict[str, Any], type[Exception], str]] = [
    *(({name: 0}, ValueError, f"{name} must be at least 1, got 0") for name in SIZES),
    *(({name: 2.0}, TypeError, rf"{name} must be an int of at least 1, got 2\.0 \(float\)") for name in SIZES),
    ({"kv_heads": 4}, ValueError, "q_heads must be a multiple of kv_heads, got q_heads=6 and kv_heads=4"),
    ({"kv_heads": 12}, ValueError, "q_heads must be a multiple of kv_heads, got q_heads=6 and kv_heads=12"),
    ({"head_dim": 15}, ValueError, r"head_dim must be in 16\.\.256, got 15"),
    ({"head_dim": 257}, ValueError, r"head_dim must be in 16\.\.256, got 257"),
    ({"core_heads": "head"}, ValueError, "core_heads must be one of 'query', 'kv', got 'head'"),
    ({"pooling": "first"}, ValueError, "pooling must be one of 'last_query', 'mean', got 'first'"),
    (
        {"dtype": "int8"},
        ValueError,
        "dtype must be one of 'float16', 'bfloat16', 'float32', 'float64', got 'int8'",
    ),
]


@pytest.mark.parametrize(("arguments", "error", "message"), PROBLEM_REFUSALS, ids=str)
def test_problem_refuses(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{message}$"):
        Problem(**(PROBLEM | arguments))


def test_problem_takes_the_limits() -> None:
    for head_dim in (16, 59, 256):
        assert Problem(**(PROBLEM | {"head_dim": head_dim})).head_dim == head_dim


def test_problem_names_itself() -> None:
    problem = Problem(**PROBLEM, group_size=4, window_size=6, core_heads="kv", pooling="mean", dtype="float16")
    assert str(problem) == "B2-H6.2-T64-D32-g4-w6-kv-mean-float16"
    assert Problem(**problem.as_dict()) == problem
    assert problem.spec == CCASpec(4, 6, "kv", "mean")
    assert (problem.num_core_heads, problem.element_bytes) == (2, 2)
    with pytest.raises(dataclasses.FrozenInstanceError):
        problem.batch = 3  # type: ignore[misc]
