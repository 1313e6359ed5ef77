"""What sees the mutants that no check of `registry` is for: memory, wide offsets, and the gate's tests of itself.

A trial is called like a check. Those of the gate hand it kernels that are known to be wrong and fail if one passes;
they never judge with what they test.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from triton.runtime import interpreter

from .. import fused
from ..attention import cca_attention
from ..kernels.forward import ForwardConfig
from ..problem import Problem
from ..profiles.schema import Entry, Semantics
from . import gate, shadow
from .calls import feed, make_cache, oracle, run
from .cases import Case
from .inputs import make_inputs
from .tolerance import Comparison, compare_bitwise

Launch = Callable[..., None]
CANDIDATE = ForwardConfig(block_q=16, block_k=16)
SMALL_ERROR = 2.0**-14
"""Of a result in float32 that no gate may let through: some hundred units in the last place."""


def found(name: str, ok: bool, detail: str = "") -> Comparison:
    """A yes or no as a `Comparison`."""
    return Comparison(name, 0.0 if ok else math.inf, (), ok, detail="" if ok else detail)


# --- memory -----------------------------------------------------------------------------------------------------------


def forward_memory(case: Case) -> list[Comparison]:
    """The forward's accesses under the shadow checker."""
    inputs = make_inputs(case)
    return _faults(lambda: run(case, inputs), inputs._asdict())


def backward_memory(case: Case) -> list[Comparison]:
    """Those of forward and backward."""
    inputs = make_inputs(case)
    return _faults(lambda: run(case, inputs, grads=True), inputs._asdict())


def decode_memory(case: Case) -> list[Comparison]:
    """Those of a prefill and of two steps with a cache."""
    inputs = make_inputs(case)
    tokens = case.problem.seq_len
    return _faults(lambda: feed(make_cache(case), inputs, 0, [tokens - 2, 1, 1]), inputs._asdict())


def _faults(launch: Callable[[], Any], inputs: dict[str, Tensor]) -> list[Comparison]:
    faults = shadow.check(launch, inputs=inputs)
    return [found(fault.kind, False, str(fault)) for fault in faults] or [found("memory", True)]


def wide_offsets(case: Case) -> list[Comparison]:
    """Heads, and then tokens, that lie 2^29 elements apart give the bits of ones close by, and no product overflows.

    The memory between them is never touched, so that it takes none. The interpreter's checks of arithmetic are on.
    """
    inputs = make_inputs(case)
    options = replace(interpreter.interpreter_builder.options, debug=True, sanitize_overflow=True)
    expected, results = run(case, inputs), []
    for axis, what in ((1, "heads"), (2, "tokens")):
        wide = inputs._replace(**{name: _spread(getattr(inputs, name), axis) for name in ("q", "k", "v")})
        try:
            with mock.patch.object(interpreter.interpreter_builder, "options", options):
                actual = run(case, wide)
        except Exception as error:  # the interpreter wraps an assertion in an error of its own
            if "overflow" not in f"{error} {error.__cause__}":
                raise
            return [found(f"offsets of {what}", False, str(error))]
        results += [compare_bitwise(f"{name}, {what} apart", actual[name], expected[name]) for name in expected]
    return results


def _spread(x: Tensor, axis: int) -> Tensor:
    """x [B, H, T, D], B = 1, with 2^29 elements between its heads or tokens, in memory of zeros not given out yet."""
    apart, count, dim = 2**29, x.shape[axis], x.shape[3]
    dtype = np.dtype(str(x.dtype).removeprefix("torch."))
    memory = torch.from_numpy(np.zeros((count - 1) * apart + x.numel(), dtype))
    strides = (0, apart, dim, 1) if axis == 1 else (0, dim, apart, 1)
    return memory.as_strided(x.shape, strides).copy_(x)


# --- the gate ---------------------------------------------------------------------------------------------------------


def gate_of_a_candidate(case: Case) -> list[Comparison]:
    """The forward kernel as it is passes the gate of a config."""
    evidence = gate.run_trials("forward", CANDIDATE, case.problem, case.device)
    ran = evidence.cases >= 3 and 0 < evidence.worst_budget_use <= 1
    return [found("the gate", evidence.ok and ran, evidence.message or f"{evidence}")]


def gate_refuses(case: Case) -> list[Comparison]:
    """The gate refuses every wrong kernel, up to the first that it lets through, and then passes the right one."""
    results = []
    for name, launch in wrong_launches().items():
        with mock.patch.object(fused, "launch_forward", launch):
            evidence = gate.run_trials("forward", CANDIDATE, case.problem, case.device)
        results.append(found(f"refuses {name}", not evidence.ok, "it was let through"))
        if evidence.ok:
            return results
    return results + gate_of_a_candidate(case)


def wrong_launches() -> dict[str, Launch]:
    """Forward launches that nobody may let through."""
    right: Launch = vars(fused)["launch_forward"]
    kept: dict[Any, Tensor] = {}

    def after(change: Callable[..., object]) -> Launch:
        def launch(*tensors: Tensor, **options: Any) -> None:
            right(*tensors, **options)
            change(*tensors)

        return launch

    def stale(*tensors: Tensor) -> None:
        old = kept.setdefault(tensors[5].shape, tensors[5].clone())
        tensors[5].copy_(old)

    def refuse(*tensors: Tensor, **options: Any) -> None:
        raise RuntimeError("out of resources")

    return {
        "a small error": after(lambda *x: x[5].mul_(1 + SMALL_ERROR)),
        "zeros": after(lambda *x: x[5].zero_()),
        "NaN in one row": after(lambda *x: x[5][:, :, -1:].fill_(math.nan)),
        "nothing written": lambda *tensors, **options: None,
        "half of the heads": lambda *x, **options: right(*(y[:, : y.shape[1] // 2] for y in x), **options),
        "the first result of its shape": after(stale),
        "an exception": refuse,
        "inputs that are changed": after(lambda *x: x[0].zero_()),
    }


def oracle_is_independent(case: Case) -> list[Comparison]:
    """What is right does not come from the kernels: the oracle is the same when they give nothing but zeros."""
    inputs = make_inputs(case)
    expected = oracle(case, inputs)["out"].value
    with mock.patch.object(fused, "launch_forward", wrong_launches()["zeros"]):
        again = oracle(case, inputs)["out"].value
        out = cca_attention(*inputs[:3], **case.arguments())
    return [
        found("the kernels give zeros", not bool(out.any()), "they do not"),  # type: ignore[union-attr]
        found("oracle", torch.equal(again, expected) and bool(again.any()), "it follows the kernels"),
    ]


# --- the tuner and its profiles ---------------------------------------------------------------------------------------


def configs_are_keyed(case: Case) -> list[Comparison]:
    """Problems that differ in anything have other names, and no config is for another dtype, head_dim or semantics."""
    p = case.problem
    changes: dict[str, Any] = {
        "batch": 7, "q_heads": 8, "kv_heads": 1, "seq_len": 77, "head_dim": 77, "group_size": 7, "window_size": 77,
        "core_heads": "kv", "pooling": "mean", "dtype": "float16",
    }  # fmt: skip
    others = [Problem(**{**p.as_dict(), name: value}) for name, value in changes.items()]
    results = [found(f"name of {other}", str(other) != str(p), f"that of {p}") for other in others]
    entry = Entry.model_construct(problem=p)
    for other in (replace(p, dtype="float16"), replace(p, head_dim=77)):
        results.append(found(f"config for {other}", entry.distance(other) is None, f"that of {p}"))
    for other in (replace(p, group_size=7), replace(p, window_size=77), replace(p, pooling="mean")):
        results.append(found(f"semantics of {other}", Semantics.of(other) != Semantics.of(p), f"those of {p}"))
    return results


def only_the_verified_win(case: Case) -> list[Comparison]:
    """A config with no evidence for it, or with evidence against it, is never the tuner's choice.

    The tuner stands above the verifier: its module is looked up here and imported by nothing in this folder.
    """
    tune = importlib.import_module(f"{fused.__package__}.autotune.tune")
    results = []
    for what, record in {
        "refused": {"ok": False, "message": "wrong"},
        "crashed": {"failed": "crash", "message": ""},
    }.items():
        kernel = SimpleNamespace(
            quarantined={}, checked={}, trials={CANDIDATE: tune.Trial(CANDIDATE)}, chosen=None, stage="verifying"
        )
        tune.Tuner._absorb_evidence(SimpleNamespace(), kernel, CANDIDATE, record)
        results.append(
            found(f"a {what} config", kernel.chosen is None and CANDIDATE in kernel.quarantined, "it was chosen")
        )
    return results


TRIALS: dict[str, Callable[[Case], list[Comparison]]] = {
    trial.__name__: trial
    for trial in (
        forward_memory, backward_memory, decode_memory, wide_offsets, gate_of_a_candidate, gate_refuses,
        oracle_is_independent, configs_are_keyed, only_the_verified_win,
    )
}  # fmt: skip
"""Every trial by name."""
