"""The commands. Words go to stderr, results to stdout; options are checked before anything is loaded or begun."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .problem import Problem
from .terminal import INTERRUPTED, NO_DEVICE, OK, WRONG, Refused, check_output, choice, new_app, number, run_app

if TYPE_CHECKING:
    from rich.console import Console

    from .autotune.devices import Device
    from .autotune.progress import Progress, Request
    from .profiles.schema import Profile

MOST_JOBS = 8
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
OPTIONS = {
    "seq_len": "--ctx", "batch": "--batch", "q_heads": "--heads", "kv_heads": "--kv-heads", "head_dim": "--head-dim",
    "group_size": "--group-size", "window_size": "--window-size", "core_heads": "--core-heads", "pooling": "--pooling",
}  # fmt: skip
EPILOG = """Example: cca-tune --gpu a100 --ctx 131072

It writes a100-80gb.yaml: predicted on a machine without that GPU, measured on one with it.

Exit codes: 0 done; 1 a kernel has no config that passed verification; 2 wrong usage, nothing was begun;
3 no usable GPU; 130 interrupted, what was finished is kept and the same command goes on from there."""


app = new_app()


@app.command(epilog=EPILOG)
def tune(
    ctx: Annotated[int, number("--ctx", "Context length in tokens.")],
    gpu: Annotated[str | None, typer.Option("--gpu", help="GPU to tune for; default: the one at hand.")] = None,
    group_size: Annotated[int, number("--group-size", "Tokens of one core token.")] = 16,
    window_size: Annotated[int, number("--window-size", "Recent tokens that are seen raw.")] = 1024,
    heads: Annotated[int, number("--heads", "Query heads.")] = 32,
    kv_heads: Annotated[int, number("--kv-heads", "Key/value heads.")] = 8,
    head_dim: Annotated[int, number("--head-dim", "Head dimension, 16 to 256.")] = 128,
    batch: Annotated[int, number("--batch", "Sequences of a batch.")] = 1,
    dtype: Annotated[str, choice("--dtype", "Element type of q, k and v.", *DTYPES)] = "bf16",
    core_heads: Annotated[str, choice("--core-heads", "Which heads have cores.", "query", "kv")] = "query",
    pooling: Annotated[str, choice("--pooling", "How groups are pooled.", "last_query", "mean")] = "last_query",
    kernels: Annotated[str, typer.Option("--kernels", help="Kernels, with commas between.")] = "all",
    candidates: Annotated[int, number("--candidates", "Configs compiled for a kernel at most; 0: every one.")] = 24,
    output: Annotated[Path | None, typer.Option("--output", help="Profile to write; default: ./GPU.yaml.")] = None,
    cache_dir: Annotated[Path | None, typer.Option("--cache-dir", help="Where finished trials are kept.")] = None,
    jobs: Annotated[int | None, number("--jobs", "Worker processes; default: one for each core.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Say nothing but errors and results.")] = False,
) -> int:
    """Find the fastest verified launch configs of the CCA attention kernels for a GPU, and write them to a profile.

    On a machine with that GPU every config is timed. Without it, configs are compiled for it, those that cannot run
    there are dropped, and the rest is ranked by a model; the profile says which it was.
    """
    if dtype not in DTYPES:
        raise Refused(f"--dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    problem = _problem(
        batch=batch, q_heads=heads, kv_heads=kv_heads, seq_len=ctx, head_dim=head_dim, group_size=group_size,
        window_size=window_size, core_heads=core_heads, pooling=pooling, dtype=DTYPES[dtype],
    )  # fmt: skip
    device = _device(gpu)
    output = output or Path(f"{device.name}.yaml")
    check_output("--output", output)
    request = _request(device, problem, kernels, cache_dir, _default_jobs() if jobs is None else jobs, candidates)
    return _run(request, output, as_json=as_json, quiet=quiet)


def tune_main(arguments: Sequence[str] | None = None) -> None:
    """The command `cca-tune`; ends the process with its exit code."""
    sys.exit(run_app(app, "cca-tune", arguments))


def _problem(**sizes: Any) -> Problem:
    try:
        return Problem(**sizes)
    except ValueError as error:
        message = str(error)
        for name, option in OPTIONS.items():
            message = message.replace(name, option)
        raise Refused(message) from error


def _device(name: str | None) -> Device:
    from .autotune.devices import device_at_hand, device_table, find_device

    known = ", ".join(device_table())
    try:
        device = device_at_hand() if name is None else find_device(name)
    except LookupError as error:
        raise Refused(str(error.args[0]), NO_DEVICE if name is None else None) from error
    if device is None:
        raise Refused(f"there is no GPU here; name the one to tune for: --gpu {known}", NO_DEVICE)
    return device


def _default_jobs() -> int:
    return min(MOST_JOBS, len(os.sched_getaffinity(0)))


def _request(
    device: Device, problem: Problem, kernels: str, cache_dir: Path | None, jobs: int, candidates: int
) -> Request:
    if jobs < 1:
        raise Refused(f"--jobs must be at least 1, got {jobs}")
    if candidates < 0:
        raise Refused(f"--candidates must be at least 0, got {candidates}")
    from platformdirs import user_cache_path

    from .autotune.devices import device_at_hand
    from .autotune.progress import Request
    from .profiles.configs import tunables

    try:
        at_hand = device_at_hand() == device
    except LookupError:
        at_hand = False  # a GPU that the table does not have is not the one asked for
    # kernels for one architecture can be verified on it only
    known = tunables(device.arch if at_hand else None)
    names = list(known) if kernels == "all" else [name.strip() for name in kernels.split(",")]
    if unknown := [name for name in names if name not in known]:
        raise Refused(f"--kernels: there is no kernel {', '.join(unknown)}; there are {', '.join(known)}")
    return Request(
        device=device,
        problem=problem,
        tunables=tuple(known[name] for name in dict.fromkeys(names)),
        cache_folder=cache_dir or user_cache_path("cca-attention"),
        at_hand=at_hand,
        jobs=jobs,
        most_compiled=candidates,
    )


def _run(request: Request, output: Path, *, as_json: bool, quiet: bool) -> int:
    from rich.console import Console

    from .autotune.journal import Journal, JournalError
    from .autotune.progress import plan
    from .autotune.report import display_for
    from .autotune.tune import Tuner

    held = _held_profile(request, output)
    words = Console(stderr=True, quiet=quiet)
    how = "measured here" if request.at_hand else "predicted: that GPU is not in this machine"
    kernels = plan(request)
    try:
        with Journal(request.cache_folder) as journal:
            words.print(f"{request.device.name}, {request.problem}; times are {how}", highlight=False, soft_wrap=True)
            with display_for(words, kernels, quiet) as display:
                Tuner(request, journal, kernels, display).run()
    except JournalError as error:
        raise Refused(str(error)) from error
    except KeyboardInterrupt as error:
        message = "interrupted; what was finished is kept, the same command goes on from there"
        raise Refused(message, INTERRUPTED) from error
    settled = [kernel for kernel in kernels if kernel.chosen is not None]
    if settled:
        _write(request, settled, held, output)
    _show(request, kernels, output if settled else None, words, as_json=as_json)
    return OK if len(settled) == len(kernels) else WRONG


def _held_profile(request: Request, output: Path) -> Profile | None:
    """The profile that is at `output` already, to which this run adds."""
    from .autotune.result import profile_of
    from .profiles.store import ProfileError, merged, read_profile

    if not output.exists():
        return None
    try:
        held = read_profile(output)
        merged(held, profile_of(request, []))
    except ProfileError as error:
        raise Refused(f"--output {output} exists and cannot be added to: {error}") from error
    return held


def _write(request: Request, settled: Sequence[Progress], held: Profile | None, output: Path) -> None:
    from .autotune.result import profile_of
    from .profiles.store import merged, write_profile

    profile = profile_of(request, settled)
    write_profile(profile if held is None else merged(held, profile), output)


def _show(request: Request, kernels: Sequence[Progress], output: Path | None, words: Console, *, as_json: bool) -> None:
    import json

    from rich.console import Console

    from .autotune.report import choice_table
    from .autotune.result import summary_of

    if as_json:
        typer.echo(json.dumps(summary_of(request, kernels, None if output is None else str(output)), indent=2))
    results = words if as_json else Console()
    results.print(choice_table(kernels, results.width))
    for kernel in kernels:
        if kernel.trouble is not None:
            words.print(f"{kernel.name} has no config: {kernel.trouble}", style="red", markup=False, soft_wrap=True)
    if output is not None:
        use = f'cca_attention(..., profile="{output}")'
        results.print(f"wrote {output}; use it with {use}", markup=False, highlight=False, soft_wrap=True)
    else:
        words.print("no profile was written", style="red")
