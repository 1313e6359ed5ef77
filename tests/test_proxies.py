"""The proxies of quality, the front over them, and the constraints on it."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import pytest
import torch

from cca_attention import CCASpec
from cca_attention.autotune.front import PREFERENCES, Point, front, knee, preferred
from cca_attention.autotune.proxies import GENERATORS, Activations, quality, rows_of
from cca_attention.kernels.reference import attention_dense

SIZES = (4, 2, 640, 32)


def data(name: str, seed: int = 3) -> Activations:
    return GENERATORS[name](*SIZES, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", GENERATORS)
@pytest.mark.parametrize("spec", [CCASpec(1, 64), CCASpec(16, 640), CCASpec(8, 2000)])
def test_full_attention_has_no_error(name: str, spec: CCASpec) -> None:
    found = quality(data(name), spec)
    assert found.error < 1e-12 and found.reached == pytest.approx(1)
    assert found.recall == (None if name != "needles" else pytest.approx(1, abs=0.02))


@pytest.mark.parametrize("name", GENERATORS)
@pytest.mark.parametrize("core_heads", ["query", "kv"])
@pytest.mark.parametrize("pooling", ["last_query", "mean"])
def test_the_error_is_that_of_the_oracle(name: str, core_heads: str, pooling: str) -> None:
    spec = CCASpec(16, 100, core_heads, pooling)  # type: ignore[arg-type]
    found = data(name)
    tensors = [x[None] for x in (found.q, found.k, found.v)]
    semantics = {"core_heads": core_heads, "pooling": pooling}
    out, _ = attention_dense(*tensors, group_size=16, window_size=100, **semantics)  # type: ignore[arg-type]
    full, _ = attention_dense(*tensors, group_size=1, window_size=1)
    rows = found.rows
    expected = (out[0, :, rows] - full[0, :, rows]).norm() / full[0, :, rows].norm()
    assert quality(found, spec).error == pytest.approx(float(expected), rel=1e-9)


@pytest.mark.parametrize("name", GENERATORS)
def test_the_mass_that_arrives_is_a_share_and_all_of_it_in_a_window_of_everything(name: str) -> None:
    """It need not grow with the window: raw tokens crowd out the cores, each of which stands for many."""
    *parts, whole = (quality(data(name), CCASpec(16, window)).reached for window in (16, 64, 256, 640))
    assert all(0 < part < 1 for part in parts) and whole == pytest.approx(1)


def test_needles_are_found_in_the_window_and_some_in_cores() -> None:
    fine, coarse = (quality(data("needles"), CCASpec(g, 64)).recall for g in (2, 32))
    assert fine is not None and coarse is not None and 1 > fine > coarse > 0.1
    full = quality(data("needles"), CCASpec(1, 64)).recall
    assert full == pytest.approx(1, abs=0.02), "each needle is what full attention looks at"


def test_the_generators_have_their_structures() -> None:
    entropies = {}
    for name in GENERATORS:
        found = data(name)
        rows = found.rows
        logits = found.q[:, rows] @ found.k.repeat_interleave(2, 0).mT / 32**0.5
        probs = logits.masked_fill(torch.arange(640) > rows[:, None], -torch.inf).softmax(-1)
        entropies[name] = float(-(probs * probs.clamp(min=1e-30).log()).sum(-1).mean())
        if name == "sinks":
            assert float(probs[..., :4].sum(-1).mean()) > 0.5
        if name == "local":
            assert float(quality(found, CCASpec(16, 64)).reached) > float(
                quality(data("gaussian"), CCASpec(16, 64)).reached
            )
    assert max(entropies, key=entropies.__getitem__) == "gaussian"


def test_rows_are_in_the_second_half() -> None:
    for tokens in (1, 2, 63, 640):
        rows = rows_of(tokens).tolist()
        assert rows[-1] == tokens - 1 and rows[0] == tokens // 2 and rows == sorted(rows)


# --- the front ----------------------------------------------------------------------------------------------------


def point(latency: float, cache: int, error: float, g: int = 16, w: int = 1024) -> Point:
    return Point(g, w, cache, cache / 1000, error, 1 - error, None, latency)


def test_the_front_is_exact() -> None:
    drawn = random.Random(4)
    for _ in range(50):
        points = [
            point(drawn.randint(1, 6), drawn.randint(1, 6), drawn.randint(1, 6), g, w)
            for g, w in itertools.product((4, 8, 16), (1, 2, 3))
        ]
        found = front(points)
        assert found
        for p in points:
            beaten = any(
                all(a <= b for a, b in zip(q.objectives, p.objectives, strict=True)) and q.objectives != p.objectives
                for q in points
            )
            assert (p in found) != beaten
        assert front(points[::-1]) == found
        assert knee(found) in found
        assert preferred(found, "latency").latency_us == min(p.latency_us for p in points)
        assert preferred(found, "memory").cache_bytes == min(p.cache_bytes for p in points)
        assert preferred(found, "quality").error == min(p.error for p in points)


def test_the_knee_is_near_the_best_of_everything() -> None:
    corner = point(11, 11, 0.11, g=8)
    points = [point(10, 100, 0.9), point(100, 10, 0.9, g=4), point(100, 100, 0.1, g=32), corner]
    assert knee(front(points)) == corner == preferred(points, "knee")
    assert knee([corner]) == corner
    with pytest.raises(ValueError, match="points must have at least one"):
        knee([])


def test_equals_are_picked_alike() -> None:
    one = point(10, 20, 0.5, g=8)
    other = replace(one, group_size=4)
    for preference in PREFERENCES:
        assert preferred([one, other], preference) == preferred([other, one], preference) == other  # type: ignore[arg-type]
