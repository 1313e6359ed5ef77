"""Write the modelled profiles that come with the package: the built-in configs, compiled for GPUs that are not here.

Example: python benchmarks/bundled_profiles.py --output profiles/data/modelled

Nothing is timed and nothing is searched. For each kernel and head layout the built-in config is compiled for the GPU's
architecture; one that does not compile, or lacks shared memory or registers there, is left out and said. The cost model
predicts its time at one length, and its entry stands for all lengths at which the kernel's built-in config is the same.
The records say so: evidence "modelled", or "default" for a kernel in Gluon, which there is no model of; strategy
"built-in", one config compiled, none measured, no verification. What is there already of the same kernels and the same
Triton is kept, so that it can be interrupted between two architectures. Needs no GPU.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import triton
import typer

from cca_attention import Problem, __version__
from cca_attention.autotune import jobs, space
from cca_attention.autotune.binary import Resources
from cca_attention.autotune.compile import Sketch, aim
from cca_attention.autotune.devices import Device, find_device
from cca_attention.autotune.options import model_shape
from cca_attention.autotune.pool import Pool
from cca_attention.autotune.predict import predict
from cca_attention.autotune.traits import UNKNOWN
from cca_attention.autotune.worker import Done, Job
from cca_attention.kernels.tunable import Tunable
from cca_attention.profiles.bundled import bundled_profiles
from cca_attention.profiles.configs import source_hash, tunables
from cca_attention.profiles.live import fp_fusion, minor_version
from cca_attention.profiles.schema import (
    Baseline,
    DeviceIdentity,
    Entry,
    Interval,
    KernelResources,
    Predicted,
    Profile,
    SearchRecord,
    Semantics,
    Software,
)
from cca_attention.profiles.store import make_profile, write_profile

GPUS = "a100-80gb,a100-40gb,h100-sxm,h200,l40s,rtx4090,b200,rtx5090,mi300x"
MODELS = ("llama2-7b", "llama3.1-8b", "llama3.1-70b", "qwen2.5-7b", "qwen3-8b", "mistral-7b")
CONTEXTS = tuple(4096 * 2**step for step in range(9))  # 4K to 1M
LIMIT_S = 180.0
TAKEN = [name for name, field in KernelResources.model_fields.items() if field.is_required()]
"""What a kernel takes of its GPU; what else is known of it only the cost model asks for."""

Compiled = tuple[Tunable, Problem, Interval, Sketch, tuple[Resources, ...]]


def problems_of(tunable: Tunable, arch: str) -> Iterator[tuple[Problem, Interval]]:
    """For each head layout the stretches of lengths with one built-in config, each by its middle length."""
    shapes = dict.fromkeys((m.q_heads, m.kv_heads, m.head_dim) for m in map(model_shape, MODELS))
    for q_heads, kv_heads, head_dim in shapes:
        stretches: dict[Any, list[Problem]] = {}
        for ctx in CONTEXTS:
            problem = Problem(q_heads=q_heads, kv_heads=kv_heads, head_dim=head_dim, seq_len=ctx)
            stretches.setdefault(tunable.default(problem, arch), []).append(problem)
        for stretch in stretches.values():
            lengths = (stretch[0].seq_len, stretch[-1].seq_len)
            yield stretch[len(stretch) // 2], Interval(seq_len=lengths, batch=(1, 16))


def compiled(arch: str, wanted: Sequence[Tunable], workers: int) -> Iterator[Compiled]:
    """What the built-in config of each of these kernels takes on `arch`."""
    waiting = []
    for tunable in wanted:
        for problem, interval in problems_of(tunable, arch):
            config = (tunable.default(problem, arch),)
            args = (tunable.config.__module__, tunable.name, problem, config)
            for function in (jobs.sketch_job, jobs.compile_job):
                waiting.append(Job((tunable, problem, interval, function.__name__), function, args))
    found: dict[tuple[str, Problem], dict[str, Any]] = {}
    with Pool(workers, aim, arch) as pool:
        for job, outcome in pool.run(waiting, LIMIT_S):
            tunable, problem, interval, what = job.tag
            if not isinstance(outcome, Done):
                typer.echo(f"{arch}: no entry for {tunable.name} on {problem}: {outcome.message}", err=True)
                continue
            record = found.setdefault((tunable.name, problem), {"tunable": tunable, "interval": interval})
            record[what] = outcome.value[0]
    whole = {key: record for key, record in found.items() if {"sketch_job", "compile_job"} <= record.keys()}
    for (_, problem), record in sorted(whole.items(), key=str):
        resources = tuple(Resources(**values) for values in record["compile_job"]["resources"])
        yield record["tunable"], problem, record["interval"], Sketch.from_dict(record["sketch_job"]), resources


def entry_of(
    device: Device,
    tunable: Tunable,
    problem: Problem,
    interval: Interval,
    sketch: Sketch,
    resources: tuple[Resources, ...],
) -> Entry | str:
    """The entry, or why the built-in config cannot run there."""
    config = tunable.default(problem, device.arch)
    if refusal := config.refusal(problem):
        return refusal
    shortage = space.shortage(device, resources)
    if shortage is not None and shortage != "spills":
        return f"it lacks {shortage}"
    predicted = None
    if UNKNOWN not in (launch.traits for launch in sketch.launches):
        launches = list(zip(sketch.launches, resources, strict=True))
        prediction = predict(device, problem, config, tunable.work(problem, config), launches)
        parts = {name: float(f"{value:.4g}") for name, value in prediction.parts.items()}
        predicted = Predicted(total_us=float(f"{prediction.total_us:.4g}"), parts=parts)
    return Entry(
        kernel=tunable.name,
        problem=problem,
        interval=interval,
        config=asdict(config),
        evidence="modelled" if predicted else "default",
        predicted=predicted,
        resources=tuple(KernelResources(**{name: getattr(kernel, name) for name in TAKEN}) for kernel in resources),
        baseline=Baseline(config=asdict(config), time_us=predicted.total_us if predicted else None),
    )


def profile_of(device: Device, entries: Sequence[Entry]) -> Profile:
    """The profile with these entries."""
    search = {}
    for name in dict.fromkeys(entry.kernel for entry in entries):
        refusals = [refusal for _, refusal in Tunable.REGISTRY[name].candidates(entries[0].problem)]
        legal = refusals.count(None)
        search[name] = SearchRecord(strategy="built-in", space_size=len(refusals), legal=legal, compiled=1, measured=0)
    return make_profile(
        device=DeviceIdentity(**{name: getattr(device, name) for name in DeviceIdentity.model_fields}),
        software=Software(
            cca_attention=__version__, triton=triton.__version__, torch=torch.__version__,
            python=platform.python_version(), cuda=None, fp_fusion=fp_fusion(),
        ),
        semantic=Semantics.of(entries[0].problem),
        search=search,
        kernels={name: source_hash(name) for name in search},
        entries=entries,
    )  # fmt: skip


def kept(path: Path) -> list[Entry]:
    """The entries at `path` that are of the kernels and the Triton of this checkout; of others nothing is validated."""
    held = bundled_profiles(path.parent).get(path)
    if held is None or minor_version(held.software.triton) != minor_version(triton.__version__):
        return []
    current = {kernel for kernel, source in held.kernels.items() if source.source_hash == source_hash(kernel)}
    return [entry.whole() for entry in held.entries if entry.kernel in current]


def write(device: Device, path: Path, old: Sequence[Entry], known: Sequence[Compiled]) -> None:
    """Write the profile of `device`: the old entries, and those of what was compiled now."""
    entries = list(old)
    for tunable, problem, interval, sketch, resources in known:
        entry = entry_of(device, tunable, problem, interval, sketch, resources)
        if isinstance(entry, Entry):
            entries.append(entry)
        else:
            typer.echo(f"{device.name}: no entry for {tunable.name} on {problem}: {entry}", err=True)
    entries.sort(key=lambda entry: (entry.kernel, str(entry.problem)))
    write_profile(profile_of(device, entries), path)
    typer.echo(f"{path}: {len(entries)} entries, {len(old)} as they were")


def main(
    output: Annotated[Path, typer.Option("--output", help="Folder for the files, one for each GPU.")],
    gpu: Annotated[str, typer.Option("--gpu", help="GPUs, with commas between.")] = GPUS,
    workers: Annotated[int, typer.Option("--jobs", help="Worker processes.")] = 1,
) -> None:
    """Write a modelled profile for each GPU; what is there of these kernels and this Triton is kept."""
    output.mkdir(parents=True, exist_ok=True)
    by_arch: dict[str, dict[Device, list[Entry]]] = {}
    for device in map(find_device, gpu.split(",")):
        by_arch.setdefault(device.arch, {})[device] = kept(output / f"{device.name}.yaml")
    for arch, devices in by_arch.items():
        missing = [
            tunable
            for name, tunable in tunables(arch).items()
            if not all(name in {entry.kernel for entry in entries} for entries in devices.values())
        ]
        known = list(compiled(arch, missing, workers))
        for device, entries in devices.items():
            old = [entry for entry in entries if entry.kernel not in {tunable.name for tunable in missing}]
            if missing:
                write(device, output / f"{device.name}.yaml", old, known)


if __name__ == "__main__":
    typer.run(main)
