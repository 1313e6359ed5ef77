"""What `cca-bench` measures and by which formulas, and the samples that it holds against float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from cca_attention import CCASpec, fused
from cca_attention.bench import peers, samples
from cca_attention.bench.plan import BOTH, DECODE, FORWARD, MEMORY, POOLING, SUITES, UNORDERED, Options, cases
from cca_attention.bench.samples import Pass
from cca_attention.bench.work import flops, held_bytes, moved_bytes, step_keys
from cca_attention.kernels import reference
from cca_attention.problem import Problem
from cca_attention.profiles.configs import tunables
from cca_attention.verify.rounding import ErrorModel
from cca_attention.verify.tolerance import compare

TINY = Problem(batch=2, q_heads=4, kv_heads=2, seq_len=37, head_dim=16, group_size=4, window_size=9, dtype="float16")


# --- the plan ---------------------------------------------------------------------------------------------------------


def test_the_suites_have_every_row_of_the_issue() -> None:
    problem = {"q_heads": 32, "head_dim": 128, "dtype": "bfloat16"}
    planned = cases(tuple(SUITES), Options(problem=problem))
    found = {
        (c.suite, what, c.problem.seq_len, c.problem.batch, c.problem.core_heads) for c in planned for what in c.whats
    }
    assert {("prefill", what, 131072, 1, "query") for what in (POOLING, FORWARD, BOTH, UNORDERED)} <= found
    assert {("decode", DECODE, 131072, b, heads) for b in (1, 8, 64) for heads in ("kv", "query")} <= found
    assert {("growth", BOTH, t, 1, "query") for t in (262144, 524288, 1048576)} <= found
    assert {("short", FORWARD, t, b, "query") for t in (512, 8192) for b in (1, 32)} <= found
    assert ("memory", MEMORY, 131072, 1, "query") in found
    assert {c.problem.kv_heads for c in planned if c.suite == "decode"} == {8}
    assert not any("flex" in c.peers for c in planned if c.suite == "decode")


def test_options_replace_what_is_usual() -> None:
    problem = {"q_heads": 4, "head_dim": 64, "group_size": 8, "window_size": 100, "dtype": "float16"}
    options = Options(contexts=(7, 9), batches=(3,), kv_heads=2, core_heads="kv", peers=("flex",), problem=problem)
    planned = cases(["prefill", "decode"], options)
    assert [c.problem.seq_len for c in planned] == [7, 9, 7, 9]
    assert planned[0].problem == Problem(batch=3, seq_len=7, kv_heads=2, core_heads="kv", **problem)
    assert [c.peers for c in planned] == [("flex",)] * 2 + [()] * 2


# --- the formulas -----------------------------------------------------------------------------------------------------


def by_counting(problem: Problem) -> tuple[int, int]:
    """(query, core) and (query, raw token) pairs of one head, one by one."""
    spec = problem.spec
    rows = range(problem.seq_len)
    return sum(map(spec.visible_cores, rows)), sum(len(spec.local_range(row)) for row in rows)


@pytest.mark.parametrize("tokens", [1, 8, 9, 37, 100])
def test_operations_are_those_of_the_visible_pairs(tokens: int) -> None:
    problem = replace(TINY, seq_len=tokens)
    pairs = 2 * 4 * sum(by_counting(problem))
    assert flops(FORWARD, problem) == 2 * 2 * 16 * pairs
    assert flops(BOTH, problem) == flops(UNORDERED, problem) == 7 * 2 * 16 * pairs
    assert flops(FORWARD, problem, dense=True) == 2 * 2 * 16 * 2 * 4 * tokens * (tokens + 1) // 2
    assert flops(DECODE, problem) == 2 * 2 * 16 * 2 * 4 * step_keys(problem)


def test_a_step_sees_what_the_next_query_of_a_sequence_sees() -> None:
    assert step_keys(replace(TINY, seq_len=131072, window_size=1024, group_size=16)) == 9153
    assert [step_keys(replace(TINY, seq_len=t)) for t in (1, 8, 12, 13)] == [2, 9, 10, 11]


@pytest.mark.parametrize("kernel", ["pooling", "forward", "decode"])
@pytest.mark.parametrize("core_heads", ["query", "kv"])
def test_bytes_agree_with_what_the_kernels_say_of_themselves(kernel: str, core_heads: Any) -> None:
    problem = replace(TINY, core_heads=core_heads, seq_len=3700)
    own = tunables()[kernel].work(problem, tunables()[kernel].default(problem, "cpu"))
    what = {"pooling": POOLING, "forward": FORWARD, "decode": DECODE}[kernel]
    cores = 2 * 2 * problem.num_core_heads * problem.spec.num_groups(3700) * 16 * 2  # written by one, read by the other
    written_by_pooling = cores if kernel == "forward" else 0
    assert moved_bytes(what, problem) - written_by_pooling == pytest.approx(own.bytes, rel=1e-3)
    assert flops(what, problem) == pytest.approx(own.flops, rel=1e-3)


def test_a_dense_step_reads_its_keys_once() -> None:
    assert moved_bytes(DECODE, TINY, keys=38) == 2 * 16 * 2 * (2 * 2 * 38 + 2 * (4 + 2))


def test_memory_is_cores_and_two_numbers_a_query() -> None:
    assert held_bytes(TINY) == 2 * (2 * 4 * 9 * 16 * 2 + 2 * 4 * 37 * 4)
    assert held_bytes(replace(TINY, core_heads="kv")) == 2 * (2 * 2 * 9 * 16 * 2 + 2 * 4 * 37 * 4)


# --- the samples ------------------------------------------------------------------------------------------------------


def exact_pass(spec: CCASpec, tokens: int = 29) -> Pass:
    """A pass of the oracle, two query heads for each key/value head."""
    generator = torch.Generator().manual_seed(5)
    q, dout = (torch.randn(2, 4, tokens, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    k, v = (torch.randn(2, 2, tokens, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, lse = reference.attention_dense(
        *leaves, group_size=spec.group_size, window_size=spec.window_size, core_heads=spec.core_heads,
        pooling=spec.pooling,
    )  # fmt: skip
    grads = torch.autograd.grad(out, leaves, dout)
    return Pass(*(x.detach() for x in (q, k, v, out, lse, dout)), grads)


SPECS = [
    CCASpec(4, 6), CCASpec(4, 6, "kv"), CCASpec(4, 6, "query", "mean"), CCASpec(4, 6, "kv", "mean"), CCASpec(1, 3),
    CCASpec(16, 40), CCASpec(5, 1),
]  # fmt: skip


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_samples_of_an_exact_pass_have_no_error(spec: CCASpec) -> None:
    run = exact_pass(spec)
    for errors in (samples.forward_errors(run, spec), samples.backward_errors(run, spec)):
        found = list(errors)
        assert found and max(found) < 1e-12
    cores = reference.pool(*run[:3], group_size=spec.group_size, core_heads=spec.core_heads, pooling=spec.pooling)
    assert max(samples.pooling_errors(*run[:3], cores, spec)) < 1e-12


@pytest.mark.parametrize("which", range(4), ids=["out", "dq", "dk", "dv"])
def test_samples_see_a_slip_in_the_last_rows(which: int) -> None:
    spec, run = CCASpec(4, 6), exact_pass(CCASpec(4, 6), tokens=28)
    assert run.grads is not None
    (run.out, *run.grads)[which][:, :, -4:] *= 1.05
    check = samples.backward_errors if which else samples.forward_errors
    assert samples.evidence("x", check(run, spec), torch.bfloat16).worst > 1


def test_a_nan_is_over_every_bound() -> None:
    assert samples.evidence("x", iter([0.0, float("nan"), 0.0]), torch.float16).worst > 1


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(("core_heads", "tokens"), [("query", 37), ("kv", 37), ("query", 9)])
def test_flex_attention_is_asked_for_the_same_function(
    core_heads: Any, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Uncompiled here: FlexAttention's own definition of what its compiled kernel computes."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    problem = replace(TINY, core_heads=core_heads, dtype="float32", seq_len=tokens)
    shapes = [(2, heads, tokens, 16) for heads in (4, 2, 2)]
    q, k, v = (torch.randn(s, generator=torch.Generator().manual_seed(n)) for n, s in enumerate(shapes))
    k_core, v_core = reference.pool(q, k, v, group_size=4, core_heads=core_heads)
    pooled = fused.groups_to_pool(problem.spec, tokens)
    assert bool(pooled) == (tokens == 37)
    out = peers.flex(problem, k_core[:, :, :pooled].float(), v_core[:, :, :pooled].float())(q, k, v)
    found = compare("out", out, ErrorModel(q, k, v, problem.spec, torch.float32).out)
    assert found.ok, found


def test_every_peer_has_a_title() -> None:
    assert {*peers.BACKENDS, "flex", "cca", "eager"} == set(peers.TITLES)
