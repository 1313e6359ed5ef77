"""The search over group and window size, and the files of activations that it may use."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from cca_attention import CCACache, Problem
from cca_attention.autotune.devices import find_device
from cca_attention.autotune.progress import Request
from cca_attention.autotune.proxies import Activations, quality
from cca_attention.autotune.recommend import BuiltIn, Found, LatencyError, front_table, recommend
from cca_attention.autotune.result import profile_of
from cca_attention.autotune.semantics import (
    EmptyError,
    Limits,
    cache_bytes,
    generated,
    grid,
    kv_ratio,
    long_enough,
    qualities,
    search,
)
from cca_attention.autotune.tensors_file import Heads, TensorsFileError, read_activations, write_layers

PROBLEM = Problem(q_heads=4, kv_heads=2, seq_len=1024, head_dim=32)
DATA = Path(__file__).parent / "data"
LONG = Problem(q_heads=32, kv_heads=32, seq_len=131072, head_dim=128)


def test_the_grid_is_below_the_context() -> None:
    pairs = [(p.group_size, p.window_size) for p in grid(PROBLEM, (4, 2048), (256, 1024))]
    assert pairs == [(4, 256)]
    with pytest.raises(
        EmptyError, match=r"--group-sizes from 4 and --window-sizes from 1024 leave no pair below .* 1024"
    ):
        grid(PROBLEM, (4,), (1024,))


@pytest.mark.parametrize(("g", "w", "per_cent"), [(16, 1024, 7.04), (32, 1024, 3.93), (8, 512, 12.9), (64, 4096, 4.74)])
def test_the_cache_in_closed_form(g: int, w: int, per_cent: float) -> None:
    assert 100 * kv_ratio(replace(LONG, group_size=g, window_size=w)) == pytest.approx(per_cent, abs=0.006 * per_cent)


@pytest.mark.parametrize("core_heads", ["query", "kv"])
@pytest.mark.parametrize(("g", "w"), [(4, 16), (16, 24), (7, 5)])
def test_the_closed_form_is_what_a_cache_holds(core_heads: str, g: int, w: int) -> None:
    sizes = {"q_heads": 4, "kv_heads": 2, "head_dim": 16}
    semantics = {"group_size": g, "window_size": w, "core_heads": core_heads}
    problem = Problem(seq_len=61, dtype="float32", **sizes, **semantics)  # type: ignore[arg-type]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    cache = CCACache(problem.spec, batch=1, **sizes, dtype=torch.float32, device=device)
    cache.prefill(*(torch.randn(1, heads, 61, 16, device=device) for heads in (4, 2, 2)))
    assert cache.nbytes == cache_bytes(problem)


def test_limits_come_before_any_latency() -> None:
    problems, data = grid(PROBLEM, (4, 8, 16), (64, 128)), generated(PROBLEM)
    asked: list[Problem] = []

    def latency(problem: Problem) -> float:
        asked.append(problem)
        return float(problem.window_size)

    with pytest.raises(
        EmptyError, match=r"--max-kv-ratio 0.01 leaves none of the 6 pairs .* the least is 0.2\d* \(group size 16,"
    ):
        search(problems, data, Limits(kv_ratio=0.01), latency, "knee")
    with pytest.raises(EmptyError, match=r"--max-error 1e-09 leaves none of the 4 pairs .* the least is"):
        search(problems, data, Limits(kv_ratio=0.5, error=1e-9), latency, "knee")
    assert asked == []
    found = search(problems, data, Limits(kv_ratio=0.5), latency, "quality")
    assert {(p.group_size, p.window_size) for p in found.points} == {(8, 64), (8, 128), (16, 64), (16, 128)}
    assert len(asked) == 4 and set(found.front) <= set(found.points) and found.preferred in found.front
    assert found.preferred.error == min(point.error for point in found.points)


def test_a_recommendation_becomes_the_problem_that_is_tuned(toy: Any, tmp_path: Path) -> None:
    problem = replace(PROBLEM, q_heads=1, kv_heads=1, head_dim=64)
    request = Request(
        device=find_device("a100"), problem=problem, tunables=(toy.TOY,), cache_folder=tmp_path, at_hand=False, jobs=1,
        most_compiled=1,
    )  # fmt: skip
    said: list[str] = []
    with BuiltIn(request) as latency:
        outcome = recommend(request, ((4, 16), (64, 128)), Limits(kv_ratio=0.35), "memory", None, latency, said.append)
    assert said[0] == "3 of 4 pairs of group and window size are small enough; errors are proxies"
    assert said[1] == "taking errors on 1024 tokens: gaussian, needles, sinks, local, heavy_tails" and len(said) == 2
    assert all(point.latency_us > 0 for point in outcome.points)
    found = Found.of(request, outcome, "generated data")
    assert (found.request.problem.group_size, found.request.problem.window_size) == (16, 64)
    assert json.loads(json.dumps(found.summary))["preferred"]["cache_bytes"] == cache_bytes(found.request.problem)
    console = Console(file=io.StringIO(), width=100)
    console.print(front_table(outcome))
    assert "preferred" in console.file.getvalue() and "knee" in console.file.getvalue()  # type: ignore[attr-defined]
    profile = profile_of(found.request, [], found.pareto)
    assert [(p.group_size, p.window_size) for p in profile.pareto] == [
        (p.group_size, p.window_size) for p in outcome.front
    ]
    assert "generated data" in profile.pareto[0].quality_proxy


def test_a_built_in_config_without_a_time_is_an_error(toy: Any, tmp_path: Path) -> None:
    broken = replace(toy.TOY, default=lambda problem, arch: toy.ToyConfig(block_k=1024))
    request = Request(
        device=find_device("a100"), problem=PROBLEM, tunables=(broken,), cache_folder=tmp_path, at_hand=False, jobs=1,
        most_compiled=1,
    )  # fmt: skip
    with (
        BuiltIn(request) as latency,
        pytest.raises(LatencyError, match="the built-in config of toy gave no time for B1-"),
    ):
        latency(PROBLEM)


def test_a_point_has_the_worst_of_its_data() -> None:
    data = generated(PROBLEM)
    (point,) = search(grid(PROBLEM, (8,), (64,)), data, Limits(), lambda _: 5.0, "knee").points
    found = qualities(replace(PROBLEM, group_size=8, window_size=64), data)
    assert point.error == max(q.error for q in found.values()) and point.reached == min(
        q.reached for q in found.values()
    )
    assert point.recall == found["needles"].recall is not None
    assert (point.latency_us, point.cache_bytes) == (5.0, cache_bytes(replace(PROBLEM, group_size=8, window_size=64)))


def test_windows_that_the_data_cannot_show_are_left_out(tmp_path: Path) -> None:
    layers = {
        n: Heads(*(torch.randn(h, 64, 8, generator=torch.Generator().manual_seed(n)) for h in (4, 2, 2)))
        for n in (2, 11)
    }
    write_layers(tmp_path / "dump.safetensors", layers, {"model": "mine"})
    data = read_activations(tmp_path / "dump.safetensors")
    assert list(data) == ["dump.safetensors, layer 2", "dump.safetensors, layer 11"]
    assert all(torch.equal(x.q, layers[int(name.split()[-1])].q) for name, x in data.items())
    problems = grid(PROBLEM, (4,), (16, 32, 33, 512))
    assert [p.window_size for p in long_enough(problems, data)] == [16, 32]
    as_long = grid(replace(PROBLEM, seq_len=64), (4,), (16, 33))
    assert long_enough(as_long, data) == as_long
    with pytest.raises(EmptyError, match="has 64 tokens, in which no window of 512 or more can be judged: --window-si"):
        long_enough(problems[3:], data)


def test_the_generated_data_is_the_same_every_time() -> None:
    one, other = generated(PROBLEM), generated(PROBLEM)
    assert all(torch.equal(one[name].q, other[name].q) for name in one) and len(one) == 5
    assert one["local"].q.shape == (2, 1024, 32) and one["local"].k.shape == (1, 1024, 32)


# --- files of activations -----------------------------------------------------------------------------------------


def safetensors(tensors: dict[str, Tensor]) -> bytes:
    names = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64"}
    header, data = {"__metadata__": {"model": "mine"}}, b""
    for name, x in tensors.items():
        raw = bytes(x.contiguous().view(torch.uint8).flatten().tolist())
        header[name] = {
            "dtype": names[x.dtype],
            "shape": list(x.shape),
            "data_offsets": [len(data), len(data) + len(raw)],
        }  # type: ignore[assignment]
        data += raw
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


QKV = {"q": torch.randn(4, 9, 8), "k": torch.randn(2, 9, 8), "v": torch.randn(2, 9, 8)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_activations_from_a_file(tmp_path: Path, dtype: torch.dtype) -> None:
    (tmp_path / "dump.safetensors").write_bytes(safetensors({n: x.to(dtype) for n, x in QKV.items()}))
    (found,) = read_activations(tmp_path / "dump.safetensors").values()
    assert isinstance(found, Activations) and found.needles is None
    assert all(torch.equal(getattr(found, name), QKV[name].to(dtype).float()) for name in QKV)
    assert quality(found, replace(PROBLEM, group_size=2, window_size=3).spec).error > 0


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is no safetensors file: its header would have 0 bytes"),
        (b"\xff" * 64, "is no safetensors file: its header would have"),
        (safetensors(QKV)[:-1], "is no safetensors file: v lies outside of the file"),
        ((3).to_bytes(8, "little") + b"[1]", "is no safetensors file"),
        (safetensors({"q": QKV["q"]}), "has no tensor k, v; it needs q"),
        (
            safetensors({**QKV, "k": QKV["k"].long()}),
            "is no safetensors file: k is I64, not one of F64, F32, F16, BF16",
        ),
        (safetensors({**QKV, "k": QKV["k"][:, :5]}), r"must have q \[Hq, T, D\] and k, v \[Hkv, T, D\], got q"),
        (safetensors({**QKV, "q": QKV["q"][:3]}), "the 3 heads of q are no multiple of the 2 of k and v"),
        (safetensors({**QKV, "v": QKV["v"] / 0}), "v must be finite everywhere"),
    ],
)
def test_a_file_that_is_none(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "dump.safetensors"
    path.write_bytes(content)
    with pytest.raises(TensorsFileError, match=said):
        read_activations(path)
    with pytest.raises(TensorsFileError, match="cannot be read: No such file"):
        read_activations(tmp_path / "none")
