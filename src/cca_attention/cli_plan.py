"""Tuning in two steps: `cca-tune plan` on a machine without the GPU, `cca-tune confirm` on the one that has it.

Both take options of `cca-tune` itself, and are runs of it: one as if there were no GPU, one of nothing but short lists.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from . import cli
from .terminal import USAGE, Refused, check_output, new_app

COMMANDS = ("plan", "confirm")
WHAT = (
    "ctx", "gpu", "model", "phase", "group_size", "window_size", "heads", "kv_heads", "head_dim", "batch", "dtype",
    "core_heads", "pooling", "kernels", "candidates",
)  # fmt: skip
"""Options that say what to plan for."""
HOW = ("effort", "budget", "devices", "seed", "retry_failed", "allow_busy", "no_peers")
"""Options that say how times are taken."""
WHERE = ("cache_dir", "jobs", "as_json", "quiet")

OPTIONS = inspect.signature(cli.tune, eval_str=True).parameters
PROFILE = inspect.Parameter(
    "profile",
    inspect.Parameter.POSITIONAL_OR_KEYWORD,
    annotation=Annotated[Path, typer.Argument(metavar="PROFILE", help="What cca-tune plan wrote.")],
)
OUTPUT = inspect.Parameter(
    "output",
    inspect.Parameter.POSITIONAL_OR_KEYWORD,
    default=None,
    annotation=Annotated[Path | None, typer.Option("--output", help="Profile to write; default: PROFILE itself.")],
)
app = new_app()


def _taking(*parameters: inspect.Parameter) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Give a function of keyword arguments these parameters, for typer to see."""

    def decorate(function: Callable[..., int]) -> Callable[..., int]:
        function.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        function.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return function

    return decorate


def _complete(given: dict[str, Any]) -> dict[str, Any]:
    """`given` with every other option of `cca-tune` as it is by default."""
    return {name: given.get(name, option.default) for name, option in OPTIONS.items()}


@app.command(epilog="Example: cca-tune plan --gpu h200 --ctx 131072, then on it: cca-tune confirm h200.yaml")
@_taking(*(OPTIONS[name] for name in (*WHAT, "output", *WHERE)))
def plan(**given: Any) -> int:
    """Compile every legal config for a GPU, here or not, rank them by the model, and write the profile of that.

    Nothing is timed: the profile says modelled, and has a short list of each kernel for cca-tune confirm.
    """
    given = _complete(given) | {"effort": "exhaustive"}
    problems = cli._problems(given)
    device = cli._device(given["gpu"])
    output = given["output"] or Path(f"{device.name}.yaml")
    check_output("--output", output)
    requests = cli._requests(given, problems, device)
    portable = tuple(tunable for tunable in requests[0].tunables if not tunable.archs)
    requests = [replace(request, at_hand=False, tunables=portable) for request in requests]
    return cli._run(requests, output, as_json=given["as_json"], quiet=given["quiet"])


@app.command(epilog="Example: cca-tune confirm h200.yaml. Exit codes: those of cca-tune; 2 where that GPU is not.")
@_taking(PROFILE, OUTPUT, *(OPTIONS[name] for name in (*HOW, *WHERE) if name in OPTIONS))
def confirm(profile: Path, **given: Any) -> int:
    """Time the short lists of a plan on its GPU, beside the built-in configs, and write what was measured.

    Each config is verified before it is timed, and each choice again after.
    """
    from .autotune.options import Bucket
    from .autotune.plan import PlanError, confirmation, planned
    from .profiles.store import ProfileError, read_profile

    given = _complete(given) | {"ctx": ""}
    output = given["output"] or profile
    check_output("--output", output)
    try:
        found = read_profile(profile)
        lists = planned(found)
    except ProfileError as error:
        raise Refused(str(error)) from error
    except PlanError as error:
        raise Refused(f"{profile} cannot be confirmed: {error}") from error
    problems = [(Bucket(problem.seq_len, problem.seq_len), problem) for problem in lists]
    requests = cli._requests(given, problems, cli._device(found.device.name))
    if not requests[0].at_hand:
        raise Refused(f"{profile} is a plan for {found.device.name}, which is not in this machine", USAGE)
    requests = [confirmation(request, lists[request.problem]) for request in requests]
    return cli._run(requests, output, as_json=given["as_json"], quiet=given["quiet"], given=given)
