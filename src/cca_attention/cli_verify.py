"""The command `cca-verify`. Words go to stderr, results to stdout; options are checked before anything is begun."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .terminal import OK, Refused, check_output, fail, file, new_app, run_app

if TYPE_CHECKING:
    from .verify.record import Record
    from .verify.units import Unit

NAME = "cca-verify"
BROKEN, USAGE = 4, 5
STDOUT = Path("-")
MOST_FINDINGS = 10
LAYERS = ("L0", "L1", "L2", "L3", "L4", "L5", "L6")
EPILOG = """Examples: cca-verify --json R.json && cca-verify report R.json --output R.html;
cca-verify --profile a100-80gb.yaml; cca-verify --layer L0 --layer L2 --list

Exit codes: 0 every check that ran passed; 1 a numerical or property failure; 2 a planted mistake survived; 3 a
time-out or crash; 4 the baseline or the environment is broken; 5 configuration: wrong usage, a check missing or skipped
without leave, a mutant that no longer applies, or nothing ran; 130 interrupted, the record is incomplete."""


app = new_app()


@app.callback(invoke_without_command=True, epilog=EPILOG)
def verify(
    context: typer.Context,
    layer: Annotated[list[str] | None, typer.Option("--layer", metavar="L0..L6", help="Only this; repeatable.")] = None,
    profile: Annotated[Path | None, file("--profile", "Check each config of a profile; alone, nothing else.")] = None,
    gpu: Annotated[str, typer.Option("--gpu", metavar="auto|none", help="Whether to use the GPU at hand.")] = "auto",
    json_path: Annotated[Path | None, file("--json", "Where to write the record; -: stdout.")] = None,
    junit: Annotated[Path | None, file("--junit", "Where to write JUnit XML.")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Statistical suspicions fail.")] = False,
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Of the random examples.")] = 0,
    examples: Annotated[int | None, typer.Option("--examples", metavar="N", help="Random examples a property.")] = None,
    budget_scale: Annotated[float, typer.Option("--budget-scale", metavar="X", help="Times the time budgets.")] = 1.0,
    jobs: Annotated[int | None, typer.Option("--jobs", metavar="N", help="Worker processes at a time.")] = None,
    listed: Annotated[bool, typer.Option("--list", help="Print the ids of the checks, and run none.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Say nothing but errors and the verdict.")] = False,
    ci: Annotated[str, typer.Option(envvar="CI", hidden=True)] = "",
) -> int:
    """Decide whether kernels, configs and an upgrade of Triton may ship: run the layers of checks and give a verdict.

    Without a GPU the kernels run in Triton's interpreter, and what needs a GPU is reported as not run.
    """
    if context.invoked_subcommand is not None:
        return OK
    _check_numbers(jobs=jobs, examples=examples, budget_scale=budget_scale, gpu=gpu)
    check_output("--json", None if json_path == STDOUT else json_path)
    check_output("--junit", junit)
    layers = _layers(layer, profile)
    units = _units(layers, profile, strict=strict, seed=seed, examples=examples)
    if listed:
        typer.echo("\n".join(unit.id for unit in units))
        return OK
    record = _run(
        units, layers, use_gpu=gpu == "auto", jobs=jobs, quiet=quiet,
        settings={"seed": seed, "examples": examples, "budget_scale": budget_scale, "strict": strict, "ci": bool(ci)},
    )  # fmt: skip
    return _conclude(record, json_path, junit)


@app.command("mutants")
def plant(
    names: Annotated[list[str] | None, typer.Argument(metavar="[NAME]...", help="Names or ids; default: all.")] = None,
    json_path: Annotated[Path | None, file("--json", "Where to write the record.")] = None,
    jobs: Annotated[int | None, typer.Option("--jobs", metavar="N", help="Worker processes at a time.")] = None,
    listed: Annotated[bool, typer.Option("--list", help="Print the planted mistakes, and judge none.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Say nothing but errors and the verdict.")] = False,
) -> int:
    """Plant mistakes in copies of the package, one at a time: each must be killed by the check that it names."""
    from .verify.layers import Extent, plan
    from .verify.mutants import MUTANTS, selected

    _check_numbers(jobs=jobs)
    check_output("--json", None if json_path == STDOUT else json_path)
    try:
        wanted = set(selected(names or None))
    except ValueError as error:
        raise Refused(str(error)) from error
    if listed:
        typer.echo("\n".join(f"{MUTANTS[name].id:4} {name}: {MUTANTS[name].says}" for name in sorted(wanted)))
        return OK
    units = [unit for unit in plan(("L5",), Extent()) if unit.arguments["mutant"] in wanted]
    settings = {"seed": 0, "examples": None, "budget_scale": 1.0, "strict": False, "ci": False}
    record = _run(units, () if names else ("L5",), use_gpu=False, jobs=jobs, quiet=quiet, settings=settings)
    return _conclude(record, json_path, None)


@app.command("report")
def report(
    record: Annotated[Path, typer.Argument(metavar="R.json", help="A record of cca-verify.")],
    output: Annotated[Path, file("--output", "The page to write.")],
) -> int:
    """Render a record as one HTML page that needs nothing else."""
    from .verify.record import RecordError, read, write
    from .verify.report import as_html

    check_output("--output", output)
    try:
        page = as_html(read(record))
    except RecordError as error:
        raise Refused(str(error)) from error
    write(output, page)
    typer.echo(f"wrote {output}")
    return OK


@app.command("verdict")
def verdict_of(record: Annotated[Path, typer.Argument(metavar="R.json", help="A record of cca-verify.")]) -> int:
    """Derive the verdict of a record anew from its JSON; the exit code is that of the run."""
    from .ci.verdict import judge_file

    code, lines = judge_file(record)
    typer.echo("\n".join(lines), err=code != OK)
    return code


@app.command("sanitize-target")
def sanitize() -> int:
    """Run every kernel on tiny shapes, as a target for compute-sanitizer; it prints the command lines to use."""
    import shlex

    import torch

    from .verify.gpu import DONE, TOOLS, sanitize_target, sanitizer_command

    for tool in TOOLS:
        typer.echo(shlex.join(sanitizer_command(tool)), err=True)
    if not torch.cuda.is_available():
        raise Refused("sanitize-target needs an NVIDIA GPU, and there is none here", BROKEN)
    typer.echo(f"{sanitize_target()} groups of launches\n{DONE}")
    return OK


def main(arguments: Sequence[str] | None = None) -> None:
    """The command `cca-verify`; ends the process with its exit code."""
    sys.exit(run_app(app, NAME, arguments, USAGE))


def _check_numbers(
    *, jobs: int | None, examples: int | None = None, budget_scale: float = 1.0, gpu: str = "auto"
) -> None:
    if gpu not in ("auto", "none"):
        raise Refused(f"--gpu must be one of auto, none, got {gpu!r}")
    for option, number in (("--jobs", jobs), ("--examples", examples)):
        if number is not None and number < 1:
            raise Refused(f"{option} must be at least 1, got {number}")
    if not 0 < budget_scale < float("inf"):
        raise Refused(f"--budget-scale must be a number above 0, got {budget_scale}")


def _layers(chosen: list[str] | None, profile: Path | None) -> tuple[str, ...]:
    if unknown := [name for name in chosen or () if name not in LAYERS]:
        raise Refused(f"--layer must be one of {', '.join(LAYERS)}, got {unknown[0]!r}")
    if chosen:
        return tuple(name for name in LAYERS if name in chosen)
    return LAYERS if profile is None else ()


def _units(layers: tuple[str, ...], profile: Path | None, **options: Any) -> list[Unit]:
    from .profiles.store import ProfileError, load_profile
    from .verify.layers import Extent, plan, profile_units

    units = []
    if profile is not None:
        try:
            units += profile_units(load_profile(profile))
        except ProfileError as error:
            raise Refused(f"--profile: {error}") from error
    return [*units, *plan(layers, Extent(**options))]


def _run(
    units: list[Unit],
    layers: tuple[str, ...],
    *,
    use_gpu: bool,
    jobs: int | None,
    quiet: bool,
    settings: dict[str, Any],
) -> Record:
    """Run the units and make the record; Ctrl-C ends it early, and the record says so."""
    from rich.console import Console

    from .ci.verdict import read_allowed, read_expected
    from .verify.session import Session

    session = Session(
        units, layers, use_gpu=use_gpu, jobs=jobs, settings=settings, expected=read_expected(),
        allowed_skips=read_allowed(),
    )  # fmt: skip
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # a CI system's time-out is an interrupt too
    try:
        return session.run(Console(stderr=True, quiet=quiet))
    finally:
        signal.signal(signal.SIGTERM, before)


def _conclude(record: Record, json_path: Path | None, junit: Path | None) -> int:
    import json

    from .ci.verdict import complaints, exit_code
    from .verify.junit import as_junit
    from .verify.record import as_json, write

    text = as_json(record)
    to_stdout = json_path == STDOUT
    if to_stdout:
        typer.echo(text, nl=False)
    elif json_path is not None:
        write(json_path, text)
    if junit is not None:
        write(junit, as_junit(record))
    typer.echo(summary(record), err=to_stdout)
    code = record.footer.exit_code
    rederived = exit_code(complaints(json.loads(text), record.header.expected))
    if record.complete and rederived != code:
        doubt = f"the verdict {code} is {rederived} when derived from the record: one of the two is wrong"
        return fail(NAME, doubt, BROKEN)
    return code


def summary(record: Record) -> str:
    """The last lines of a run: what is wrong, counts, and the verdict."""
    wrong = [r for r in record.results if r.status in ("fail", "error")]
    findings = [f"{r.status} {r.id}: {r.message}" for r in wrong[:MOST_FINDINGS]]
    more = [f"and {len(wrong) - MOST_FINDINGS} more"] if len(wrong) > MOST_FINDINGS else []
    numbers = ", ".join(f"{n} {status}" for status, n in record.footer.counts.items() if n)
    end = f"{numbers} in {record.footer.duration_s:.0f} s"
    return "\n".join([*findings, *more, end, f"verdict {record.footer.exit_code}: {record.footer.verdict}"])


if __name__ == "__main__":
    main()
