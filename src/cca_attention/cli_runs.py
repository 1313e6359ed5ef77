"""The commands of `cca-tune` beside tuning: devices, explain, diff, replay, report, and capture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from .terminal import OK, WRONG, Refused, check_output, choice, file, new_app, number

COMMANDS = ("devices", "explain", "diff", "replay", "report", "capture")
Run = Annotated[Path | None, typer.Argument(metavar="RUN", help="A run's file; default: the last one that was kept.")]
CacheDir = Annotated[Path | None, typer.Option("--cache-dir", help="Where finished runs are kept.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]

app = new_app()


def _record(run: Path | None, cache_dir: Path | None, *, known: bool = True) -> dict[str, Any]:
    from platformdirs import user_cache_path

    from .autotune.record import RecordError, latest, read_record

    try:
        return read_record(run or latest(cache_dir or user_cache_path("cca-attention")), known=known)
    except RecordError as error:
        raise Refused(str(error)) from error


@app.command(epilog="Example: cca-tune devices")
def devices(as_json: AsJson = False) -> int:
    """List the GPUs that can be tuned for, and mark the one at hand."""
    from dataclasses import asdict

    from rich.console import Console
    from rich.table import Table

    from .autotune.devices import device_at_hand, device_table

    try:
        here = device_at_hand()
    except LookupError:
        here = None  # a GPU that the table does not have
    if as_json:
        typer.echo(json.dumps([{**asdict(d), "at_hand": d == here} for d in device_table().values()], indent=2))
        return OK
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("GPU", "arch", "SMs", "memory", "GB/s", "TFLOP/s", "also called"):
        table.add_column(title, justify="left" if title in ("GPU", "arch", "also called") else "right")
    for device in device_table().values():
        name = f"{device.name} (here)" if device == here else device.name
        table.add_row(
            name, device.arch, str(device.sm_count), f"{device.hbm_bytes / 1e9:.0f} GB", f"{device.hbm_gbps:.0f}",
            f"{device.tensor_tflops:.0f}", ", ".join(device.aliases),
        )  # fmt: skip
    Console().print(table)
    return OK


@app.command(epilog="Example: cca-tune explain --kernels forward")
def explain(
    run: Run = None,
    kernels: Annotated[str, typer.Option("--kernels", help="Kernels, with commas between.")] = "all",
    cache_dir: CacheDir = None,
) -> int:
    """Say why a run chose each config: what was legal, what bounds it, what came next, what is in quarantine."""
    from .autotune.explain import explanation

    record = _record(run, cache_dir)
    known = [name for done in record["runs"] for name in done["kernels"]]
    names = () if kernels == "all" else tuple(name.strip() for name in kernels.split(","))
    if unknown := [name for name in names if name not in known]:
        raise Refused(
            f"--kernels: the run has no kernel {', '.join(unknown)}; it has {', '.join(dict.fromkeys(known))}"
        )
    for line in explanation(record, names):
        typer.echo(line)
    return OK


@app.command(epilog="Example: cca-tune diff old.json new.json. Exit codes: 0 the same, 1 they differ, 2 wrong usage.")
def diff(
    old: Annotated[Path, typer.Argument(metavar="OLD", help="A run's file.")],
    new: Annotated[Path, typer.Argument(metavar="NEW", help="Another's.")],
) -> int:
    """Say what one run chose otherwise than another, and which times moved by more than the margin."""
    from .autotune.explain import differences

    lines = list(differences(_record(old, None, known=False), _record(new, None, known=False)))
    for line in lines:
        typer.echo(line)
    return WRONG if lines else OK


@app.command(epilog="Example: cca-tune replay run.json --strategy coordinate")
def replay(
    run: Run = None,
    strategy: Annotated[str, typer.Option("--strategy", help="The search to try.")] = "racing",
    cache_dir: CacheDir = None,
) -> int:
    """Search a measured run's recorded times again, by any strategy, without a GPU."""
    from .autotune import explain
    from .autotune.options import suggestion
    from .autotune.record import RecordError
    from .autotune.report import config_text
    from .autotune.strategies import STRATEGIES

    if strategy not in STRATEGIES:
        hint = suggestion(strategy, STRATEGIES)
        raise Refused(f"--strategy must be one of {', '.join(STRATEGIES)}, got {strategy!r}{hint}")
    for done in _record(run, cache_dir)["runs"]:
        for name, kernel in done["kernels"].items():
            try:
                order, looked = explain.replay(name, kernel, strategy)
            except RecordError as error:
                raise Refused(str(error)) from error
            best = config_text(order[0]) if order else "nothing"
            typer.echo(f"{name}, {done['problem']['seq_len']} tokens: {best}, after {looked} configs")
    return OK


@app.command(epilog="Example: cca-tune report --output run.html --png pictures")
def report(
    run: Run = None,
    output: Annotated[Path, file("--output", "The page to write.")] = Path("cca-tune.html"),
    png: Annotated[Path | None, typer.Option("--png", metavar="DIR", help="Where to draw the pictures, too.")] = None,
    cache_dir: CacheDir = None,
) -> int:
    """Write a run as one HTML page that needs nothing else, and its pictures as PNG files."""
    from .autotune.page import as_html
    from .autotune.pictures import draw

    check_output("--output", output)
    _check_folder(png)
    record = _record(run, cache_dir)
    try:
        output.write_text(as_html(record), encoding="utf-8")
        for path in (output, *(draw(record, png) if png is not None else ())):
            typer.echo(f"wrote {path}", err=True)
    except OSError as error:
        raise Refused(f"{error.filename or output} cannot be written: {error.strerror or error}") from error
    return OK


def _check_folder(png: Path | None) -> None:
    import importlib.util

    if png is None:
        return
    if png.exists() and not png.is_dir():
        raise Refused(f"--png {png} is a file, not a directory")
    check_output("--png", png / "front.png" if png.is_dir() else png)
    if importlib.util.find_spec("matplotlib") is None:
        raise Refused("--png needs matplotlib: pip install 'cca-attention[report]'")


@app.command(epilog="Example: cca-tune capture ./llama-3.1-8b book.txt --output dump.safetensors")
def capture(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A local folder that transformers loads, or a GGUF.")],
    text: Annotated[Path, typer.Argument(metavar="TEXT", help="A file in UTF-8.")],
    output: Annotated[Path, file("--output", "The safetensors file to write, for --qkv.")],
    layers: Annotated[str | None, typer.Option("--layers", help="From 0, with commas; default: 4 of them.")] = None,
    heads: Annotated[str | None, typer.Option("--heads", help="Key heads, with commas; default: all.")] = None,
    tokens: Annotated[int | None, number("--tokens", "How many to take; default: up to 8192.")] = None,
    dtype: Annotated[str | None, choice("--dtype", "Default: the checkpoint's.", "bf16", "fp16", "fp32")] = None,
) -> int:
    """Keep the queries, keys and values of a model on a text, for --search-semantics --qkv."""
    from .autotune.capture import DTYPES, CaptureError, Wanted
    from .autotune.capture import capture as captured

    check_output("--output", output)
    if dtype not in (None, *DTYPES):
        raise Refused(f"--dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    wanted = Wanted(layers=_numbers("--layers", layers), heads=_numbers("--heads", heads), tokens=tokens, dtype=dtype)
    try:
        captured(model, text, output, wanted, lambda line: typer.echo(line, err=True))
    except CaptureError as error:
        raise Refused(str(error)) from error
    except OSError as error:
        raise Refused(f"--output {output} cannot be written: {error.strerror or error}") from error
    typer.echo(f"wrote {output} ({output.stat().st_size / 1e6:.1f} MB)", err=True)
    return OK


def _numbers(option: str, text: str | None) -> list[int] | None:
    parts = [] if text is None else [part.strip() for part in text.split(",")]
    if wrong := [part for part in parts if not part.isdecimal()]:
        raise Refused(f"{option} must be whole numbers with commas between, got {wrong[0]!r}")
    return [int(part) for part in parts] or None
