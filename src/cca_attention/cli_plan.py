"""Tuning in two steps: `cca-tune plan` on a machine without the GPU, `cca-tune confirm` on the one that has it."""

from __future__ import annotations

import inspect
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from . import cli
from .terminal import USAGE, Refused, check_output, new_app, number

COMMANDS = ("plan", "confirm")
ON_THE_GPU = {
    "effort", "strategy", "search_semantics", "group_sizes", "window_sizes", "max_kv_ratio", "max_error", "prefer",
    "qkv", "budget", "seed", "allow_busy",
}  # fmt: skip
"""Options of `cca-tune` that say how times are taken, or what a model should compute: a plan has no use for them."""

app = new_app()


def plan(**given: Any) -> int:
    """Compile every legal config for a GPU, at hand or not, rank them by the model, and write the profile of that.

    Nothing is timed: the profile says modelled, and has a short list of each kernel for cca-tune confirm.
    """
    without = {name: _OPTIONS[name].default for name in ON_THE_GPU} | {"effort": "exhaustive"}
    given = {**given, **without}
    problems = cli._problems(given)
    device = cli._device(given["gpu"])
    output = given["output"] or Path(f"{device.name}.yaml")
    check_output("--output", output)
    requests = [replace(request, at_hand=False) for request in cli._requests(given, problems, device)]
    portable = tuple(tunable for tunable in requests[0].tunables if not tunable.archs)
    requests = [replace(request, tunables=portable) for request in requests]
    return cli._run(requests, output, as_json=given["as_json"], quiet=given["quiet"])


_OPTIONS = inspect.signature(cli.tune, eval_str=True).parameters
_PLANNED = {name: option for name, option in _OPTIONS.items() if name not in ON_THE_GPU}
plan.__signature__ = inspect.Signature(list(_PLANNED.values()))  # type: ignore[attr-defined]
plan.__annotations__ = {name: option.annotation for name, option in _PLANNED.items()}
app.command(epilog="Example: cca-tune plan --gpu h200 --ctx 131072, then on it: cca-tune confirm h200.yaml")(plan)


@app.command(epilog="Example: cca-tune confirm h200.yaml. Exit codes: as of cca-tune; 2 where that GPU is not.")
def confirm(
    profile: Annotated[Path, typer.Argument(metavar="PROFILE", help="What cca-tune plan wrote.")],
    output: Annotated[Path | None, typer.Option("--output", help="Profile to write; default: PROFILE itself.")] = None,
    rounds: Annotated[int, number("--rounds", "How often the configs are timed.")] = 12,
    seed: Annotated[int, number("--seed", "Of the order in which configs are timed.")] = 0,
    allow_busy: Annotated[bool, typer.Option("--allow-busy", help="Time on a GPU that others use, too.")] = False,
    cache_dir: Annotated[Path | None, typer.Option("--cache-dir", help="Where finished trials are kept.")] = None,
    jobs: Annotated[int | None, number("--jobs", "Worker processes; default: one for each core.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Say nothing but errors and results.")] = False,
) -> int:
    """Time the short lists of a plan on its GPU, beside the built-in configs, and write what was measured.

    Each config is verified before it is timed, and each choice again after.
    """
    output = output or profile
    check_output("--output", output)
    for option, value, least in (("--rounds", rounds, 1), ("--seed", seed, 0)):
        if value < least:
            raise Refused(f"{option} must be at least {least}, got {value}")
    jobs = cli._default_jobs() if jobs is None else jobs
    if jobs < 1:
        raise Refused(f"--jobs must be at least 1, got {jobs}")
    requests = _confirmations(profile, {"rounds": rounds, "seed": seed, "jobs": jobs, "cache_folder": cache_dir})
    return cli._run(requests, output, as_json=as_json, quiet=quiet, given={"allow_busy": allow_busy})


def _confirmations(path: Path, options: dict[str, Any]) -> Any:
    """The runs that confirm the plan at `path`, on this machine."""
    from platformdirs import user_cache_path

    from .autotune.devices import device_at_hand
    from .autotune.plan import PlanError, requests_of
    from .profiles.configs import tunables
    from .profiles.store import ProfileError, read_profile

    try:
        plan = read_profile(path)
    except ProfileError as error:
        raise Refused(str(error)) from error
    try:
        here = device_at_hand()
    except LookupError:
        here = None  # a GPU that the table does not have is not the plan's
    if here is None or here.name != plan.device.name:
        found = "no GPU that is known" if here is None else f"an {here.name}"
        raise Refused(f"{path} is to be confirmed on {plan.device.name}, and here is {found}", USAGE)
    options["cache_folder"] = options["cache_folder"] or user_cache_path("cca-attention")
    try:
        return requests_of(plan, here, tunables(here.arch), {**options, "most_compiled": 0})
    except PlanError as error:
        raise Refused(f"{path} cannot be confirmed: {error}") from error
