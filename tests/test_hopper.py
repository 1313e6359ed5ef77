"""The kernels for Hopper: when they take a call, that they compile anywhere, and on the card that they are right."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from typing import Any

import pytest
import torch

from cca_attention import Problem
from cca_attention.kernels import hopper
from cca_attention.kernels.hopper import limits
from cca_attention.kernels.layout import Sequences
from cca_attention.profiles.configs import tunables
from cca_attention.verify.cases import Case
from cca_attention.verify.registry import checks

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
NAMES = ("forward_hopper", "backward_dcore_hopper", "backward_dkv_hopper", "backward_dq_hopper")
BASE: dict[str, Any] = {
    "batch": 2, "q_heads": 4, "kv_heads": 2, "seq_len": 701, "head_dim": 128, "group_size": 4, "window_size": 70,
    "dtype": "bfloat16",
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "several tiles of queries and of cores": {},
    "a whole number of tiles": {"seq_len": 640, "group_size": 5},
    "no more than one tile": {"seq_len": 100},
    "no core is seen": {"seq_len": 64, "window_size": 64},
    "every token a core": {"group_size": 1, "window_size": 3, "seq_len": 333},
    "the smallest window": {"window_size": 1},
    "float16": {"dtype": "float16"},
    "half the head dimension": {"head_dim": 64},
    "cores of key/value heads": {"core_heads": "kv"},
    "one key/value head": {"kv_heads": 1, "q_heads": 7},
    "pooled by the mean": {"pooling": "mean"},
    "an even number of tiles of cores, in pairs": {"q_heads": 66, "kv_heads": 33},
    "an odd number of tiles of cores, in pairs": {"q_heads": 66, "kv_heads": 33, "batch": 1, "seq_len": 1201},
}


def test_only_the_portable_kernels_are_tuned_without_their_gpu() -> None:
    assert not set(NAMES) & set(tunables()) and not set(NAMES) & set(tunables("sm_80"))
    assert set(NAMES) <= set(tunables("sm_90"))


@pytest.mark.parametrize(
    ("change", "said"),
    [({"dtype": "float32"}, "float16 and bfloat16"), ({"head_dim": 96}, "head_dim 96.*64 and 128"), ({}, None)],
)
def test_what_they_cannot_run_is_said(change: dict[str, Any], said: str | None) -> None:
    found = limits.refusal(Problem(**{**BASE, **change}))
    assert found is None if said is None else re.search(said, found or "")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("values", "said"), [({"num_stages": 1}, "num_stages 1 is below 2"), ({"num_warps": 8}, "num_warps 8 is not 4")]
)
def test_a_config_that_cannot_work_is_refused(name: str, values: dict[str, int], said: str) -> None:
    found = tunables("sm_90")[name].config(**values).refusal(Problem(**BASE))
    assert found is not None and said in found


def test_tiles_of_cores_go_in_pairs_where_that_leaves_few_programs_idle() -> None:
    default = tunables("sm_90")["backward_dcore_hopper"].default
    long = {"q_heads": 32, "kv_heads": 32, "group_size": 16, "window_size": 1024}
    found = {t: default(Problem(**{**BASE, "batch": 1, **long, "seq_len": t}), "sm_90") for t in (8192, 32768, 131072)}
    assert [config.item_tiles for config in found.values()] == [1, 2, 2]
    for name in CASES:
        config = default(Problem(**{**BASE, **CASES[name]}), "sm_90")
        assert config.item_tiles == (2 if "in pairs" in name else 1), name
    assert "3 is not 1 or 2" in str(dataclasses.replace(config, item_tiles=3).refusal(Problem(**BASE)))


COMPILE = """
import json
from cca_attention import Problem
from cca_attention.autotune.compile import aim, compile_config
from cca_attention.profiles.configs import tunables

aim("sm_90")
problem = Problem(q_heads=32, kv_heads=8, seq_len=131072, head_dim=128)
for name in ("forward_hopper", "backward_dcore_hopper", "backward_dkv_hopper", "backward_dq_hopper"):
    kernel = tunables("sm_90")[name]
    (found,) = compile_config(kernel.config.__module__, name, problem, kernel.default(problem, "sm_90"))
    print(json.dumps([found.num_warps, found.shared_bytes, found.loop_spill_bytes]))
"""


def test_they_compile_for_it_anywhere() -> None:
    """In a process of its own: this one may be interpreting."""
    command = ["env", "-u", "TRITON_INTERPRET", sys.executable, "-c", COMPILE]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for line in done.stdout.splitlines():
        num_warps, shared_bytes, _ = json.loads(line)
        assert num_warps == 12, "two groups that compute, and a third for the warp that feeds"
        assert shared_bytes <= 227 * 1024
    assert len(done.stdout.splitlines()) == len(NAMES)


def test_no_call_is_theirs_without_their_gpu() -> None:
    x = torch.zeros(1, 1, 256, 128, dtype=torch.bfloat16, device="cuda" if torch.cuda.is_available() else "cpu")
    assert hopper.usable(Sequences.dense(1), 1e12, x) == (HOPPER and limits.TESTED)


@pytest.mark.gpu
@pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")
class TestOnTheCard:
    @pytest.mark.parametrize("name", CASES)
    def test_they_equal_the_oracle_and_repeat_their_bits(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """Both in one test, as a worker that has compiled the kernels of a case (half a minute) may as well do both."""
        monkeypatch.setattr(limits, "LEAST_FLOPS", 0.0)
        problem = Problem(**{**BASE, **CASES[name]})
        case = Case(problem=problem, device="cuda")
        wanted = {"forward", "backward_dkv", "backward_dq"}
        if problem.seq_len >= problem.window_size + problem.group_size:
            wanted.add("backward_dcore")
        for check in ("backward_equals_oracle", "bitwise_repeat"):
            launched = spied(monkeypatch)
            comparisons = checks()[check](case)
            assert comparisons and all(comparison.ok for comparison in comparisons), "\n".join(map(str, comparisons))
            assert launched == wanted

    @pytest.mark.parametrize("layout", ["transposed", "slab", "different", "expanded"])
    def test_memory_that_tma_cannot_address_goes_elsewhere(self, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(limits, "LEAST_FLOPS", 0.0)
        case = Case(problem=Problem(**{**BASE, "seq_len": 200}), device="cuda", layout=layout)
        assert all(comparison.ok for comparison in checks()["backward_equals_oracle"](case))


def spied(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The modules whose launchers were called, from now on."""
    seen: set[str] = set()

    def watched(name: str, launch: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> None:
            seen.add(name)
            launch(*args, **kwargs)

        return call

    for name in ("forward", "backward_dcore", "backward_dkv", "backward_dq"):
        module = getattr(hopper, name)
        launcher = f"launch_{name}_hopper"
        monkeypatch.setattr(module, launcher, watched(name, getattr(module, launcher)))
    return seen
