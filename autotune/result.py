"""A finished run as a profile and as JSON."""

from __future__ import annotations

import math
import platform
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
import triton

from .. import __version__
from ..kernels.tunable import Config
from ..profiles.configs import source_hash
from ..profiles.live import driver_version, fp_fusion
from ..profiles.schema import (
    Baseline,
    DeviceIdentity,
    Entry,
    Interval,
    KernelResources,
    Latency,
    Margin,
    MeasurementPolicy,
    ParetoPoint,
    Predicted,
    Profile,
    SearchRecord,
    Semantics,
    Software,
    Verification,
)
from ..profiles.store import make_profile
from .devices import Device
from .measure import policy_of
from .plan import short_list
from .predict import Prediction
from .progress import Progress, Request
from .race import speedup
from .report import baseline_us


def profile_of(request: Request, kernels: Sequence[Progress], pareto: tuple[ParetoPoint, ...] = ()) -> Profile:
    """The profile of the kernels that have a verified choice; `pareto`: where its semantics come from."""
    settled = [kernel for kernel in kernels if kernel.chosen is not None]
    return make_profile(
        device=_identity(request.device),
        software=Software(
            cca_attention=__version__,
            triton=triton.__version__,
            torch=torch.__version__,
            python=platform.python_version(),
            cuda=torch.version.cuda,
            driver=driver_version() if request.at_hand else None,
            fp_fusion=fp_fusion(),
        ),
        policy={k.name: MeasurementPolicy(**asdict(policy_of(k.name))) for k in settled if k.rounds},
        search={kernel.name: _search(request, kernel) for kernel in settled},
        semantic=Semantics.of(request.problem),
        pareto=pareto,
        kernels={kernel.name: source_hash(kernel.name) for kernel in settled},
        entries=[_entry(request, kernel) for kernel in settled],
    )


def _identity(device: Device) -> DeviceIdentity:
    return DeviceIdentity(**{name: getattr(device, name) for name in DeviceIdentity.model_fields})


def _entry(request: Request, kernel: Progress) -> Entry:
    chosen, evidence = kernel.chosen, kernel.evidence
    if chosen is None or evidence is None:
        raise ValueError(f"{kernel.name} has no verified choice")
    timing = chosen.timing
    return Entry(
        kernel=kernel.name,
        problem=request.problem,
        interval=_interval(request),
        config=asdict(chosen.config),
        evidence="modelled" if timing is None else "measured",
        latency=None if timing is None else Latency(**asdict(timing)),
        predicted=None if chosen.prediction is None else _rounded(chosen.prediction),
        resources=tuple(KernelResources(**asdict(kernel)) for kernel in chosen.resources),
        shortlist=None if timing is not None else tuple(map(asdict, short_list(kernel))),
        baseline=Baseline(config=asdict(kernel.default), time_us=baseline_us(kernel), margin=_margin(kernel)),
        verification=_verification(kernel, evidence),
    )


def _verification(kernel: Progress, evidence: dict[str, Any]) -> Verification:
    """What was checked; a config that was timed gave the same bits again in new memory."""
    said = {name: evidence[name] for name in Verification.model_fields if name in evidence}
    return Verification(**said, bitwise_repeatable=True if kernel.rounds else None)


def _interval(request: Request) -> Interval | None:
    """The bucket of contexts whose longest was tuned, if it was asked for by a range."""
    problem = request.problem
    if request.least_ctx is None:
        return None
    return Interval(seq_len=(request.least_ctx, problem.seq_len), batch=(problem.batch, problem.batch))


def _margin(kernel: Progress) -> Margin | None:
    if kernel.chosen is None or (found := speedup(kernel.rounds, kernel.default, kernel.chosen.config)) is None:
        return None
    ratio, least, most = found
    return Margin(speedup=ratio, ci95=(least, most) if math.isfinite(most) else None)


def _search(request: Request, kernel: Progress) -> SearchRecord:
    failed = kernel.failed + Counter(reason.outcome for reason in kernel.quarantined.values())
    return SearchRecord(
        strategy=request.strategy if kernel.rounds else "model",
        space_size=kernel.legal + kernel.refused,
        legal=kernel.legal,
        compiled=kernel.compiled,
        measured=kernel.timed,
        failed=dict(failed),
        seed=request.seed if kernel.rounds else None,
    )


def _rounded(prediction: Prediction) -> Predicted:
    """No more digits than a model deserves."""
    parts = {name: float(f"{value:.4g}") for name, value in prediction.parts.items()}
    return Predicted(total_us=float(f"{prediction.total_us:.4g}"), parts=parts)


def summary_of(request: Request, kernels: Sequence[Progress]) -> dict[str, Any]:
    """A run for machines: what was chosen, and what became of every config."""
    return {
        "problem": request.problem.as_dict(),
        "kernels": {kernel.name: _kernel_summary(request, kernel) for kernel in kernels},
    }


def _kernel_summary(request: Request, kernel: Progress) -> dict[str, Any]:
    counts = ("refused", "legal", "same", "outranked", "to_compile", "compiled", "cached", "timed")
    chosen = kernel.chosen
    return {
        **{name: getattr(kernel, name) for name in counts},
        **{name: dict(getattr(kernel, name)) for name in ("ruled_out", "dropped", "failed")},
        "quarantined": [_quarantined(request, kernel, config) for config in kernel.quarantined],
        "chosen": None if chosen is None else asdict(chosen.config),
        "time_us": None if chosen is None else chosen.time_us,
        "default": asdict(kernel.default),
        "default_time_us": baseline_us(kernel),
        "verification": kernel.evidence,
        "measurement": _measurement(kernel) if kernel.rounds else None,
        "trouble": kernel.trouble,
    }


def _measurement(kernel: Progress) -> dict[str, Any]:
    """How the kernel was timed, and how much faster the choice is than the built-in config, with its 95 % interval."""
    states = [state for state in kernel.states if state is not None]
    read = ("sm_mhz", "memory_mhz", "temperature_c", "power_w")
    return {
        "policy": asdict(policy_of(kernel.name)),
        "rounds": len(kernel.rounds),
        "out_of_time": kernel.out_of_time,
        "speedup": None if kernel.chosen is None else speedup(kernel.rounds, kernel.default, kernel.chosen.config),
        "least_and_most": {
            name: [min(values), max(values)]
            for name in read
            if (values := [state[name] for state in states if state[name] is not None])
        },
        "throttled_rounds": dict(Counter(reason for state in states for reason in state["throttled"])),
    }


def _quarantined(request: Request, kernel: Progress, config: Config) -> dict[str, Any]:
    """One config that did harm or was wrong, with what a report of a compiler's mistake needs."""
    problem = request.problem
    return {
        "config": asdict(config),
        **asdict(kernel.quarantined[config]),
        "arch": request.device.arch,
        "triton": triton.__version__,
        "dtype": problem.dtype,
        "head_dim": problem.head_dim,
        "group_size": problem.group_size,
        "kernel_hash": source_hash(kernel.name),
    }
