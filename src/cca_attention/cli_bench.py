"""The command `cca-bench`. Words go to stderr, results to stdout; options are checked before anything is begun."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .bench.plan import PEERS, SUITES
from .terminal import INTERRUPTED, NO_DEVICE, OK, WRONG, Refused, check_output, choice, file, new_app, number, run_app

if TYPE_CHECKING:
    from rich.console import Console

    from .bench.plan import Case
    from .bench.record import Record

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
LISTS = ("--ctx", "--batch")
NONE = "none"
EPILOG = """Examples: cca-bench all --json R.json --plots plots; cca-bench prefill --ctx 32768,131072 --peers cudnn;
cca-bench show R.json --markdown; cca-bench plot R.json --output plots

Exit codes: 0 done; 1 CCA failed or gave a wrong result, which has no figure; 2 wrong usage, nothing was begun; 3 no
usable GPU; 130 interrupted, what was measured is kept."""

app = new_app()
RecordFile = Annotated[Path, typer.Argument(metavar="R.json", help="A record of cca-bench.")]


@app.callback(epilog=EPILOG)
def bench() -> None:
    """Measure CCA attention on the GPU at hand, beside dense and sparse attention on the same tensors."""


def _list(option: str, description: str) -> Any:
    return typer.Option(
        option, metavar="N,N", help=f"{description}, with commas or spaces between; default: the suite's."
    )


def _measures(suites: Sequence[str]) -> Callable[..., int]:
    """The command that runs these suites."""

    def command(
        ctx: Annotated[str | None, _list("--ctx", "Context lengths")] = None,
        batch: Annotated[str | None, _list("--batch", "Batch sizes")] = None,
        heads: Annotated[int, number("--heads", "Query heads.")] = 32,
        kv_heads: Annotated[int | None, number("--kv-heads", "Key/value heads; default: 32, decode 8.")] = None,
        head_dim: Annotated[int, number("--head-dim", "Head dimension, 16 to 256.")] = 128,
        group_size: Annotated[int, number("--group-size", "Tokens of one core token.")] = 16,
        window_size: Annotated[int, number("--window-size", "Recent tokens that are seen raw.")] = 1024,
        core_heads: Annotated[
            str | None, choice("--core-heads", "Which heads have cores; default: query, decode both.", "query", "kv")
        ] = None,
        pooling: Annotated[str, choice("--pooling", "How groups are pooled.", "last_query", "mean")] = "last_query",
        dtype: Annotated[str, choice("--dtype", "Element type of q, k and v.", *DTYPES)] = "bf16",
        peers: Annotated[
            str | None,
            typer.Option("--peers", metavar=",".join((*PEERS, NONE)), help="Beside whom; default: the suite's."),
        ] = None,
        profile: Annotated[str | None, typer.Option("--profile", help="Profile with the launch configs.")] = None,
        limit: Annotated[float, typer.Option("--limit", metavar="S", help="Longest call of a peer, expected.")] = 5.0,
        json_path: Annotated[Path | None, file("--json", "Where to keep the figures; written as they come.")] = None,
        plots: Annotated[Path | None, typer.Option("--plots", metavar="DIR", help="Where to draw them.")] = None,
        quiet: Annotated[bool, typer.Option("--quiet", help="Say nothing but errors and results.")] = False,
    ) -> int:
        sizes = {"q_heads": heads, "head_dim": head_dim, "group_size": group_size, "window_size": window_size}
        cases = _cases(
            suites, ctx=ctx, batch=batch, kv_heads=kv_heads, core_heads=core_heads, peers=peers,
            problem={**sizes, "pooling": pooling, "dtype": _dtype(dtype)},
        )  # fmt: skip
        if not 0 < limit < float("inf"):
            raise Refused(f"--limit must be a number of seconds above 0, got {limit}")
        _check_outputs(json_path, plots)
        return _run(cases, profile, limit, json_path, plots, quiet=quiet)

    return command


for _name, _suite in SUITES.items():
    app.command(_name, help=_suite.says)(_measures((_name,)))
app.command("all", help="Every suite, one after the other.")(_measures(tuple(SUITES)))


@app.command("show")
def show_record(
    record: RecordFile,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="As Markdown, goals first.")] = False,
) -> int:
    """Print the tables of a record again."""
    from rich.console import Console

    from .bench.goals import goal_table
    from .bench.table import markdown, show

    found = _read(record)
    if as_markdown:
        typer.echo("\n".join((*goal_table(found), "", *markdown(found))))
    else:
        show(found, Console())
    return OK


@app.command("plot")
def plot_record(
    record: RecordFile,
    output: Annotated[Path, typer.Option("--output", metavar="DIR", help="Where to draw; made if it is not there.")],
) -> int:
    """Draw the plots of a record; needs no GPU."""
    _check_outputs(None, output, "--output")
    _draw(_read(record), output)
    return OK


def main(arguments: Sequence[str] | None = None) -> None:
    """The command `cca-bench`; ends the process with its exit code."""
    sys.exit(run_app(app, "cca-bench", _joined(sys.argv[1:] if arguments is None else arguments)))


def _joined(arguments: Sequence[str]) -> list[str]:
    """`--ctx 1024 2048` as `--ctx 1024,2048`: both are natural, and typer takes one value of an option."""
    found: list[str] = []
    for argument in arguments:
        if len(found) > 1 and found[-2] in LISTS and argument[:1].isdigit():
            found[-1] = f"{found[-1].rstrip(',')},{argument.lstrip(',')}"
        else:
            found.append(argument)
    return found


def _numbers(option: str, text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        found = tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise Refused(f"{option} must be whole numbers with commas or spaces between, got {text!r}") from error
    if min(found) < 1:
        raise Refused(f"{option} must be at least 1, got {min(found)}")
    return found


def _peers(text: str | None) -> tuple[str, ...] | None:
    if text is None:
        return None
    names = [name.strip() for name in text.split(",")]
    if unknown := [name for name in names if name not in (*PEERS, NONE)]:
        raise Refused(f"--peers must be of {', '.join((*PEERS, NONE))}, got {unknown[0]!r}")
    return tuple(name for name in dict.fromkeys(names) if name != NONE)


def _dtype(name: str) -> str:
    if name not in DTYPES:
        raise Refused(f"--dtype must be one of {', '.join(DTYPES)}, got {name!r}")
    return DTYPES[name]


def _cases(suites: Sequence[str], *, ctx: str | None, batch: str | None, peers: str | None, **given: Any) -> list[Case]:
    from .bench.plan import Options, cases

    options = Options(contexts=_numbers("--ctx", ctx), batches=_numbers("--batch", batch), peers=_peers(peers), **given)
    try:
        return cases(suites, options)
    except ValueError as error:
        message = str(error)
        for name in ("kv_heads", "head_dim", "group_size", "window_size", "core_heads", "pooling", "q_heads"):
            option = "--heads" if name == "q_heads" else f"--{name.replace('_', '-')}"
            message = message.replace(name, option)
        raise Refused(message) from error


def _check_outputs(json_path: Path | None, plots: Path | None, option: str = "--plots") -> None:
    import importlib.util

    check_output("--json", json_path)
    if plots is None:
        return
    if plots.exists() and not plots.is_dir():
        raise Refused(f"{option} {plots} is a file, not a directory")
    if not plots.is_dir():
        check_output(option, plots)
    if importlib.util.find_spec("matplotlib") is None:
        raise Refused(f"{option} needs matplotlib: pip install 'cca-attention[report]'")


def _read(path: Path) -> Record:
    from .bench.record import RecordError, read

    try:
        return read(path)
    except RecordError as error:
        raise Refused(str(error)) from error


def _draw(record: Record, folder: Path) -> None:
    from .bench.plots import draw

    for path in draw(record, folder):
        typer.echo(f"wrote {path}", err=True)


def _run(
    cases: Sequence[Case],
    profile: str | None,
    limit_s: float,
    json_path: Path | None,
    plots: Path | None,
    *,
    quiet: bool,
) -> int:
    """Measure, print, keep; Ctrl-C ends it early, and the record says so."""
    from rich.console import Console

    from .bench.table import show

    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # a time-out is an interrupt too
    try:
        record = _measured(cases, profile, limit_s, json_path, Console(stderr=True, quiet=quiet))
    finally:
        signal.signal(signal.SIGTERM, before)
    show(record, Console())
    if plots is not None:
        _draw(record, plots)
    if not record.complete:
        return INTERRUPTED
    return WRONG if any(row.status in ("wrong", "failed") for row in record.rows) else OK


def _measured(
    cases: Sequence[Case], profile: str | None, limit_s: float, json_path: Path | None, words: Console
) -> Record:
    import shlex

    import torch

    from .autotune.card import card_at_hand
    from .bench.admission import Gate
    from .bench.lab import Lab
    from .bench.record import write
    from .bench.session import Session, header
    from .bench.timing import GpuMeter
    from .configs import register_profile
    from .profiles.store import ProfileError

    try:
        handle = register_profile(profile)
    except ProfileError as error:
        raise Refused(f"--profile: {error}") from error
    if not torch.cuda.is_available():
        raise Refused("measuring needs an NVIDIA GPU, and there is none here", NO_DEVICE)
    words.print("measuring the ceilings of this GPU", highlight=False)
    card, dtype = card_at_hand(), getattr(torch, cases[0].problem.dtype)
    where = header(shlex.join(["cca-bench", *sys.argv[1:]]), dtype, card)
    with words.status("") as status:

        def say(line: str) -> None:
            status.update(line)
            if not words.is_terminal:
                words.print(line, highlight=False, markup=False, soft_wrap=True)

        lab = Lab(GpuMeter(), Gate(), torch.device("cuda"), handle, 1e3 * limit_s, say, card)
        keep = (lambda record: None) if json_path is None else partial(write, json_path)
        return Session(where, cases, lab, keep).run()


if __name__ == "__main__":
    main()
