"""The command `cca-tune`. Words go to stderr, results to stdout; options are checked before anything is begun."""

from __future__ import annotations

import inspect
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import cli_cards, cli_peers, cli_runs
from .problem import Problem
from .terminal import INTERRUPTED, NO_DEVICE, OK, WRONG, Refused, check_output, choice, joined, new_app, number, run_app

if TYPE_CHECKING:
    from rich.console import Console

    from .autotune.devices import Device
    from .autotune.options import Bucket
    from .autotune.progress import Request
    from .autotune.recommend import Found
    from .autotune.session import Session
    from .kernels.tunable import Tunable

MOST_JOBS = 12
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
EFFORTS = ("quick", "standard", "exhaustive")
PREFERENCES = ("knee", "latency", "memory", "quality")
STRATEGIES = ("racing", "exhaustive", "coordinate", "evolutionary", "optuna")
HEADS = {"q_heads": 32, "kv_heads": 8, "head_dim": 128}
"""What is tuned where neither a model nor an option says otherwise."""
OPTIONS = {
    "seq_len": "--ctx", "batch": "--batch", "q_heads": "--heads", "kv_heads": "--kv-heads", "head_dim": "--head-dim",
    "group_size": "--group-size", "window_size": "--window-size", "core_heads": "--core-heads", "pooling": "--pooling",
}  # fmt: skip
OF_THE_SEARCH = ("group_sizes", "window_sizes", "max_kv_ratio", "max_error", "prefer", "qkv")
EPILOG = """Example: cca-tune --gpu a100 --ctx 131072

It writes a100-80gb.yaml: predicted on a machine without that GPU, measured on one with it. Another:
cca-tune --model llama3.1-8b --ctx 4096..131072 --phase prefill,decode --budget 10m

In two steps: cca-tune plan --gpu h200 --ctx 131072, and on that GPU cca-tune confirm h200.yaml.
Finished runs and known GPUs: cca-tune devices, explain, diff, replay, report (each with --help). A model's
activations for --qkv: cca-tune capture.

Exit codes: 0 done; 1 a kernel has no config that passed verification; 2 wrong usage, nothing was begun;
3 no usable GPU; 130 interrupted, what was finished is kept and the same command goes on from there."""


app = new_app()


@app.command(epilog=EPILOG)
def tune(
    ctx: Annotated[str, typer.Option("--ctx", metavar="N", help="Contexts: 8192, 8192,131072 or 4096..131072.")],
    gpu: Annotated[str | None, cli_cards.GPU] = None,
    model: Annotated[str | None, cli_cards.MODEL] = None,
    phase: Annotated[str, typer.Option("--phase", help="Of prefill, train and decode, with commas.")] = "all",
    group_size: Annotated[int, number("--group-size", "Tokens of one core token.")] = 16,
    window_size: Annotated[int, number("--window-size", "Recent tokens that are seen raw.")] = 1024,
    heads: Annotated[int | None, number("--heads", "Query heads; default: 32, or the model's.")] = None,
    kv_heads: Annotated[int | None, number("--kv-heads", "Key/value heads; default: 8, or the model's.")] = None,
    head_dim: Annotated[int | None, number("--head-dim", "Head dimension, 16 to 256; default: 128.")] = None,
    batch: Annotated[int, number("--batch", "Sequences of a batch.")] = 1,
    dtype: Annotated[str, choice("--dtype", "Element type of q, k and v.", *DTYPES)] = "bf16",
    core_heads: Annotated[str, choice("--core-heads", "Which heads have cores.", "query", "kv")] = "query",
    pooling: Annotated[str, choice("--pooling", "How groups are pooled.", "last_query", "mean")] = "last_query",
    kernels: Annotated[str, typer.Option("--kernels", help="Kernels, with commas between.")] = "all",
    effort: Annotated[str, choice("--effort", "How much is tried.", *EFFORTS)] = "standard",
    strategy: Annotated[str, choice("--strategy", "How configs to time are searched.", *STRATEGIES)] = "racing",
    candidates: Annotated[int | None, number("--candidates", "Configs of a kernel at most; 0: all.")] = None,
    search_semantics: Annotated[bool, typer.Option("--search-semantics", help="Search group and window.")] = False,
    group_sizes: Annotated[str, typer.Option("--group-sizes", help="Group sizes to search.")] = "4,8,16,32,64",
    window_sizes: Annotated[str, typer.Option("--window-sizes", help="Windows to search.")] = "256,512,1024,2048,4096",
    max_kv_ratio: Annotated[float | None, typer.Option("--max-kv-ratio", help="Cache over full attention's.")] = None,
    max_error: Annotated[float | None, typer.Option("--max-error", help="Relative L2 from full attention.")] = None,
    prefer: Annotated[str, choice("--prefer", "Of the front, which.", *PREFERENCES)] = "knee",
    qkv: Annotated[Path | None, typer.Option("--qkv", help="Activations for the error: a .safetensors file.")] = None,
    budget: Annotated[str | None, typer.Option("--budget", help="Time for all of the search: 90s, 10m.")] = None,
    devices: Annotated[str | None, typer.Option("--devices", help="GPUs to time on: 0,1; default: all alike.")] = None,
    ray: Annotated[str | None, typer.Option("--ray", help="Ray cluster to run in: its address, or local.")] = None,
    seed: Annotated[int, number("--seed", "Of the order in which configs are timed.")] = 0,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Try again what earlier runs put out.")] = False,
    allow_busy: Annotated[bool, typer.Option("--allow-busy", help="Time on a GPU that others use, too.")] = False,
    no_peers: Annotated[bool, typer.Option("--no-peers", help="Do not time SDPA and FlexAttention beside.")] = False,
    output: Annotated[Path | None, typer.Option("--output", help="Profile to write; default: ./GPU.yaml.")] = None,
    cache_dir: Annotated[Path | None, typer.Option("--cache-dir", help="Where finished trials are kept.")] = None,
    jobs: Annotated[int | None, number("--jobs", f"Workers; default: one a core, up to {MOST_JOBS}.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Say nothing but errors and results.")] = False,
) -> int:
    """Find the fastest verified launch configs of the CCA attention kernels for a GPU, and write them to a profile.

    On a machine with that GPU every config is timed. Without it, configs are compiled for it, those that cannot run
    there are dropped, and the rest is ranked by a model; the profile says which it was.
    """
    return _begin(locals())


def _begin(given: dict[str, Any]) -> int:
    idle = [name for name in OF_THE_SEARCH if given[name] != inspect.signature(tune).parameters[name].default]
    if idle and not given["search_semantics"]:
        raise Refused(f"--{idle[0].replace('_', '-')} is for --search-semantics, which is not given")
    problems = _problems(given)
    device = _device(given["gpu"], given["devices"], given["ray"])
    output = given["output"] or Path(f"{device.name}.yaml")
    check_output("--output", output)
    requests = _requests(given, problems, device)
    return _run(requests, output, as_json=given["as_json"], quiet=given["quiet"], given=given)


def tune_main(arguments: Sequence[str] | None = None) -> None:
    """The command `cca-tune`; ends the process with its exit code."""
    from . import cli_plan

    given = sys.argv[1:] if arguments is None else list(arguments)
    # a shell that completes gives no arguments; without a command it is to tune
    tunes = given[:1] != [] and given[0].startswith("-")
    sys.exit(run_app(app if tunes else joined(app, cli_plan.app, cli_runs.app), "cca-tune", given))


def _problems(given: dict[str, Any]) -> list[tuple[Bucket, Problem]]:
    """What is to be tuned, from the options alone."""
    from .autotune import options

    if given["dtype"] not in DTYPES:
        raise Refused(f"--dtype must be one of {', '.join(DTYPES)}, got {given['dtype']!r}")
    try:
        shape = HEADS if given["model"] is None else options.model_shape(given["model"]).as_dict()
        explicit = {"q_heads": given["heads"], "kv_heads": given["kv_heads"], "head_dim": given["head_dim"]}
        shape = {**shape, **{name: size for name, size in explicit.items() if size is not None}}
        names = ("batch", "group_size", "window_size", "core_heads", "pooling")
        same = {**shape, **{name: given[name] for name in names}, "dtype": DTYPES[given["dtype"]]}
        return [(bucket, Problem(seq_len=bucket.ctx, **same)) for bucket in options.buckets(given["ctx"])]
    except ValueError as error:
        message = str(error)
        for name, option in OPTIONS.items():
            message = message.replace(name, option)
        raise Refused(message) from error


def _device(name: str | None, indices: str | None = None, ray: str | None = None) -> Device:
    """The GPU to tune for: the one named, else the first of `indices` (--devices) or of the cluster, else that here."""
    from .autotune.devices import device_at_hand, device_table, find_device

    known = ", ".join(device_table())
    if name is None and (indices or ray):
        name = cli_cards.first(indices, ray)
    try:
        device = device_at_hand() if name is None else find_device(name)
    except LookupError as error:
        raise Refused(str(error.args[0]), NO_DEVICE if name is None else None) from error
    if device is None:
        raise Refused(f"there is no GPU here; name the one to tune for: --gpu {known}", NO_DEVICE)
    return device


def _default_jobs() -> int:
    return min(MOST_JOBS, len(os.sched_getaffinity(0)))


def _requests(given: dict[str, Any], problems: list[tuple[Bucket, Problem]], device: Device) -> list[Request]:
    """The runs that were asked for, one for each problem; nothing of them has begun."""
    from platformdirs import user_cache_path

    from .autotune import options
    from .autotune.progress import Request

    cards, cores = cli_cards.to_use(device, given["devices"], given["ray"])
    jobs = given["jobs"] if given["jobs"] is not None else cores or _default_jobs()
    try:
        effort = options.effort(given["effort"])
        budget_s = None if given["budget"] is None else options.seconds(given["budget"]) / len(problems)
    except ValueError as error:
        raise Refused(str(error)) from error
    candidates = effort.candidates if cards else effort.unseen
    candidates = candidates if given["candidates"] is None else given["candidates"]
    for option, value, least in (("--jobs", jobs, 1), ("--candidates", candidates, 0), ("--seed", given["seed"], 0)):
        if value < least:
            raise Refused(f"{option} must be at least {least}, got {value}")
    if given["strategy"] not in STRATEGIES:
        hint = options.suggestion(given["strategy"], STRATEGIES)
        raise Refused(f"--strategy must be one of {', '.join(STRATEGIES)}, got {given['strategy']!r}{hint}")
    same: dict[str, Any] = {
        "device": device, "tunables": _chosen_tunables(given, device.arch if cards else None), "at_hand": bool(cards),
        "cards": cards, "ray": given["ray"], "retry_failed": given["retry_failed"],
        "cache_folder": given["cache_dir"] or user_cache_path("cca-attention"), "jobs": jobs,
        "most_compiled": candidates, "rounds": effort.rounds, "strategy": given["strategy"], "budget_s": budget_s,
        "seed": given["seed"],
    }  # fmt: skip
    ranged = ".." in given["ctx"]
    return [Request(problem=p, least_ctx=bucket.least if ranged else None, **same) for bucket, p in problems]


def _chosen_tunables(given: dict[str, Any], arch: str | None) -> tuple[Tunable, ...]:
    """The kernels that --kernels and --phase leave; `arch`: of the GPU at hand, whose own kernels it can verify."""
    from .autotune.options import directions, suggestion
    from .profiles.configs import tunables
    from .verify.gate_cases import DIRECTION_OF

    known, kernels, phase = tunables(arch), given["kernels"], given["phase"]
    names = list(known) if kernels == "all" else [name.strip() for name in kernels.split(",")]
    if unknown := [name for name in names if name not in known]:
        hint = suggestion(unknown[0], known)
        raise Refused(f"--kernels: there is no kernel {', '.join(unknown)}; there are {', '.join(known)}{hint}")
    try:
        wanted = set(DIRECTION_OF.values()) if phase == "all" else set(directions(phase))
    except ValueError as error:
        raise Refused(str(error)) from error
    left = [name for name in dict.fromkeys(names) if DIRECTION_OF[name] in wanted]
    if not left:
        raise Refused(f"--phase {phase} leaves none of --kernels {kernels}: no kernel is in both")
    return tuple(known[name] for name in left)


def _run(
    requests: Sequence[Request], output: Path, *, as_json: bool, quiet: bool, given: dict[str, Any] | None = None
) -> int:
    from rich.console import Console

    from .autotune.journal import JournalError
    from .autotune.session import Session, SessionError

    given, words = given or {}, Console(stderr=True, quiet=quiet)
    results = words if as_json else Console()
    here = requests[0].at_hand and requests[0].ray is None
    if here and not given.get("allow_busy"):
        cli_cards.check_idle([card.index for card in requests[0].cards])
    try:
        found = _recommended(requests, given, words, results) if given.get("search_semantics") else None
        session = Session(requests if found is None else [found.request], output, words, quiet=quiet, found=found)
        settled = session.run()
        besides = here and session.written and not given.get("no_peers")
        beside = cli_peers.timed(session.runs, output, words) if besides else []
    except (JournalError, SessionError) as error:
        raise Refused(str(error)) from error
    except KeyboardInterrupt as error:
        message = "interrupted; what was finished is kept, the same command goes on from there"
        raise Refused(message, INTERRUPTED) from error
    if as_json:
        typer.echo(json.dumps({**session.summary(), "peers": beside}, indent=2))
    session.show(results)
    cli_peers.show(beside, requests[0].at_hand, results)
    _keep(session, beside, requests[0], words)
    return OK if settled else WRONG


def _keep(session: Session, beside: list[dict[str, Any]], request: Request, words: Console) -> None:
    """Keep the run, for `cca-tune explain` and its like."""
    from .autotune.record import record_of, write_record

    try:
        path = write_record({**record_of(session), "peers": beside}, request.cache_folder)
    except OSError as error:
        words.print(f"the run cannot be kept: {error}", style="red", markup=False, soft_wrap=True)
    else:
        words.print(f"the run is kept: {path}; see cca-tune explain, cca-tune report", highlight=False, soft_wrap=True)


def _recommended(requests: Sequence[Request], given: dict[str, Any], words: Console, results: Console) -> Found:
    """The front over group and window size, and the request for the preferred pair."""
    from .autotune import options
    from .autotune.recommend import BuiltIn, Found, LatencyError, front_table, recommend
    from .autotune.semantics import EmptyError, Limits
    from .autotune.tensors_file import TensorsFileError

    if requests[0].ray is not None:
        raise Refused("--search-semantics does not run in a Ray cluster; leave --ray out")
    if len(requests) > 1:
        raise Refused(f"--search-semantics takes one --ctx, got {given['ctx']}")
    if given["prefer"] not in PREFERENCES:
        hint = options.suggestion(given["prefer"], PREFERENCES)
        raise Refused(f"--prefer must be one of {', '.join(PREFERENCES)}, got {given['prefer']!r}{hint}")
    try:
        limits = Limits(
            options.limit("--max-kv-ratio", given["max_kv_ratio"]), options.limit("--max-error", given["max_error"])
        )
        grid = (
            options.sizes("--group-sizes", given["group_sizes"]),
            options.sizes("--window-sizes", given["window_sizes"]),
        )
        with BuiltIn(requests[0]) as latency:
            outcome = recommend(requests[0], grid, limits, given["prefer"], given["qkv"], latency, words.print)
    except (EmptyError, TensorsFileError, LatencyError, ValueError) as error:
        raise Refused(str(error)) from error
    results.print(front_table(outcome))
    return Found.of(requests[0], outcome, "generated data" if given["qkv"] is None else given["qkv"].name)
