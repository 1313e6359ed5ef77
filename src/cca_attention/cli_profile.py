"""The command `cca-profile`. Words go to stderr, results to stdout; options are checked before anything is begun."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial, reduce
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from .problem import Problem
from .terminal import OK, WRONG, Refused, check_output, choice, file, new_app, number, run_app, version

if TYPE_CHECKING:
    from .profiles.schema import Profile

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
CONTEXTS = tuple(4096 * 4**step for step in range(5))  # 4K to 1M
MODELS = ("llama2-7b", "llama3.1-8b", "llama3.1-70b", "qwen2.5-7b", "qwen3-8b", "mistral-7b")
EPILOG = """Examples: cca-profile list; cca-profile explain forward --profile h200 --ctx 100000;
cca-profile validate a100-80gb.yaml; cca-profile export h200 --format vllm --output tuned

Exit codes: 0 done; 1 what was asked for is not so: a damaged file, a difference, a hole, a stale entry, a config that
the mode does not accept; 2 wrong usage, nothing was begun; 130 interrupted."""

app = new_app()
Source = Annotated[str, typer.Argument(metavar="PROFILE", help="A file ending in .yaml, or the name of a GPU.")]
Files = Annotated[list[Path], typer.Argument(metavar="FILE...", help="Profile files.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
T = TypeVar("T")


@app.callback(epilog=EPILOG)
def profile() -> None:
    """Look at, check, compare, merge and export profiles of launch configs. Needs no GPU."""


@app.command("list")
def list_profiles(as_json: AsJson = False) -> int:
    """List the profiles in every place that is looked at, in the order in which it is."""
    from .profiles.places import current_folder, places
    from .profiles.tables import file_rows

    looked = _or_refuse(lambda: [current_folder(), *places()])
    rows, errors = file_rows(looked)
    for error in errors:
        typer.echo(error, err=True)
    if not rows:
        typer.echo(f"no profiles in {', '.join(str(place.folder) for place in looked)}", err=True)
    return _print(rows, as_json, WRONG if errors else OK)


@app.command()
def show(source: Source, as_json: AsJson = False) -> int:
    """Show what a profile holds: an entry a line, or all of it with --json."""
    from .profiles.tables import entry_rows, semantics_in_words

    found = _load(source)
    if as_json:
        typer.echo(found.model_dump_json(by_alias=True, exclude_none=True, indent=2))
        return OK
    software = f"Triton {found.software.triton}, PyTorch {found.software.torch}"
    typer.echo(
        f"{found.source}: {found.device.name} ({found.device.arch}), {semantics_in_words(found)}, {software}", err=True
    )
    return _print(entry_rows(found), as_json=False)


@app.command()
def explain(
    kernel: Annotated[str, typer.Argument(help="The kernel: forward, decode, ...")],
    ctx: Annotated[int, number("--ctx", "Context length in tokens.")],
    profile: Annotated[str, typer.Option("--profile", help="A file, a GPU's name, or auto: this GPU.")] = "auto",
    mode: Annotated[str, choice("--mode", "What is accepted.", "checked", "strict", "off")] = "checked",
    batch: Annotated[int, number("--batch", "Sequences of a batch.")] = 1,
    heads: Annotated[int, number("--heads", "Query heads.")] = 32,
    kv_heads: Annotated[int, number("--kv-heads", "Key/value heads.")] = 8,
    head_dim: Annotated[int, number("--head-dim", "Head dimension, 16 to 256.")] = 128,
    group_size: Annotated[int, number("--group-size", "Tokens of one core token.")] = 16,
    window_size: Annotated[int, number("--window-size", "Recent tokens that are seen raw.")] = 1024,
    core_heads: Annotated[str, choice("--core-heads", "Which heads have cores.", "query", "kv")] = "query",
    pooling: Annotated[str, choice("--pooling", "How groups are pooled.", "last_query", "mean")] = "last_query",
    dtype: Annotated[str, choice("--dtype", "Element type of q, k and v.", *DTYPES)] = "bf16",
    as_json: AsJson = False,
) -> int:
    """Say which config a kernel gets for a problem, from which file, at what level and why."""
    if dtype not in DTYPES:
        raise Refused(f"--dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if mode not in ("checked", "strict", "off"):
        raise Refused(f"--mode must be one of checked, strict, off, got {mode!r}")
    problem = _or_refuse(
        lambda: Problem(
            batch=batch, q_heads=heads, kv_heads=kv_heads, seq_len=ctx, head_dim=head_dim, group_size=group_size,
            window_size=window_size, core_heads=core_heads, pooling=pooling, dtype=DTYPES[dtype],  # type: ignore[arg-type]
        )
    )  # fmt: skip
    return _explain(kernel, problem, profile, mode, as_json)


def _explain(kernel: str, problem: Problem, source: str, mode: Any, as_json: bool) -> int:
    import torch

    from .profiles.choice import ProfileMismatch
    from .profiles.configs import known_kernel
    from .profiles.resolve import resolve
    from .profiles.tables import config_in_words

    _or_refuse(partial(known_kernel, kernel))
    given = source if source == "auto" else _load(source)
    at_hand = torch.device("cuda") if source == "auto" and torch.cuda.is_available() else None
    try:
        found = resolve(kernel, problem, given, at_hand, mode)
    except ProfileMismatch as error:
        raise Refused(str(error), WRONG) from error
    distance = "" if found.distance is None else f"{found.distance:g} doublings"
    row = {"kernel": kernel, "problem": str(problem), "config": config_in_words(asdict(found.config))}
    row |= {"level": found.level, "from": found.source, "distance": distance, "because": "; ".join(found.reasons)}
    if as_json:
        typer.echo(json.dumps({**row, "config": asdict(found.config), "reasons": list(found.reasons)}, indent=2))
        return OK
    return _print([{"": name, " ": value} for name, value in row.items()], as_json=False)


@app.command()
def validate(files: Files, as_json: AsJson = False) -> int:
    """Check files against the schema; every mistake is listed with its line."""
    from .profiles.reading import ProfileError, parse_profile, read_data
    from .profiles.tables import evidence_in_words

    rows = []
    for path, data in [(path, _or_refuse(partial(read_data, path))) for path in files]:
        try:
            found = parse_profile(data, str(path))
        except ProfileError as error:
            rows.append({"file": str(path), "valid": "no", "entries": "", "mistakes": str(error)})
        else:
            rows.append({"file": str(path), "valid": "yes", "entries": evidence_in_words(found), "mistakes": ""})
    code = WRONG if any(row["mistakes"] for row in rows) else OK
    if as_json:
        return _print(rows, as_json, code)
    for row in rows:
        typer.echo(row["mistakes"] or f"{row['file']}: valid, {row['entries']}", err=bool(row["mistakes"]))
    return code


@app.command()
def coverage(
    files: Annotated[list[Path] | None, typer.Argument(metavar="[FILE...]", help="Default: the bundled ones.")] = None,
    models: Annotated[str, typer.Option("--models", help="Models whose heads to ask for.")] = ",".join(MODELS),
    as_json: AsJson = False,
) -> int:
    """Show at what level every GPU's profiles serve the kernels, by model and context; holes are what none serves."""
    from .autotune.options import model_shape
    from .profiles.compare import coverage as cells_of
    from .profiles.places import Place, bundled_folder
    from .profiles.store import profile_files
    from .profiles.tables import level_rows

    paths = files or [path for _, path in profile_files([Place("bundled", bundled_folder())])]
    by_gpu: dict[str, list[Profile]] = {}
    for found in map(_read, paths):
        by_gpu.setdefault(found.device.name, []).append(found)
    rows = []
    for gpu, profiles in by_gpu.items():
        for model in models.split(","):
            shape = _or_refuse(partial(model_shape, model.strip()))
            sizes: dict[str, Any] = {"q_heads": shape.q_heads, "kv_heads": shape.kv_heads, "head_dim": shape.head_dim}
            sizes |= profiles[0].semantic.meaning.model_dump()
            problems = [Problem(**sizes, seq_len=ctx) for ctx in CONTEXTS]
            rows += [{"gpu": gpu, "model": model, **row} for row in level_rows(cells_of(profiles, problems))]
    return _print(rows, as_json, WRONG if any("hole" in row.values() for row in rows) else OK)


@app.command()
def diff(old: Source, new: Source, as_json: AsJson = False) -> int:
    """Show what two profiles say differently."""
    from .profiles.compare import differences

    found = list(differences(_load(old), _load(new)))
    rows = [{"what": d.what, "old": d.old or "", "new": d.new or ""} for d in found]
    return _print(rows, as_json, WRONG if rows else OK)


@app.command()
def merge(
    files: Files,
    output: Annotated[Path, file("--output", "Where to write; what is there is merged too.")],
) -> int:
    """Merge profiles of one GPU and model: every problem, and of two entries for one the better evidence."""
    from .profiles.store import merged, update_profile
    from .profiles.tables import evidence_in_words

    check_output("--output", output)
    new = _or_refuse(lambda: reduce(merged, map(_read, files)))
    both = _or_refuse(lambda: update_profile(output, lambda held: new if held is None else merged(held, new)))
    typer.echo(f"wrote {output}: {evidence_in_words(both)}", err=True)
    return OK


@app.command("export")
def export_profile(
    source: Source,
    form: Annotated[str, choice("--format", "For whom.", "vllm", "sglang", "kernels", "triton-config", "t4", "fla")],
    output: Annotated[Path, typer.Option("--output", metavar="DIR", help="Folder to write into; made if not there.")],
) -> int:
    """Write a profile as other projects' loaders read it; the folder gets the layout that they look for."""
    from .profiles.export import FORMATS, export

    if form not in FORMATS:
        raise Refused(f"--format must be one of {', '.join(FORMATS)}, got {form!r}")
    if output.exists() and not output.is_dir():
        raise Refused(f"--output {output} is not a folder")
    exported = export(_load(source), form)
    for name, text in exported.files.items():
        typer.echo(str(_or_refuse(partial(_write, output / name, text))))
    for what in exported.left_out:
        typer.echo(f"left out: {what}", err=True)
    return OK if exported.files else WRONG


@app.command()
def stale(
    files: Files,
    triton: Annotated[str | None, version("--triton", "Version of Triton; default: the installed.")] = None,
    driver: Annotated[str | None, version("--driver", "Version of the driver; default: the loaded.")] = None,
    fp_fusion: Annotated[bool | None, typer.Option("--fp-fusion/--no-fp-fusion", help="Default: as set here.")] = None,
    as_json: AsJson = False,
) -> int:
    """Say which entries the kernels of this installation, or a change of Triton or driver, would reject or degrade."""
    from importlib import metadata

    from .profiles import live
    from .profiles.compare import stale as stale_entries
    from .profiles.tables import stale_rows

    asked = triton or metadata.version("triton"), live.fp_fusion() if fp_fusion is None else fp_fusion
    rows = []
    for path in files:
        affected = stale_entries(_read(path), *asked, driver or live.driver_version())
        rows += [{"file": str(path), **row} for row in stale_rows(affected)]
    return _print(rows, as_json, WRONG if any(row["effect"] != "noted" for row in rows) else OK)


@app.command()
def schema() -> int:
    """Print the JSON Schema of profiles."""
    from .profiles.json_schema import json_schema

    typer.echo(json_schema(), nl=False)
    return OK


def main(arguments: Sequence[str] | None = None) -> None:
    """The command `cca-profile`; ends the process with its exit code."""
    sys.exit(run_app(app, "cca-profile", arguments))


def _print(rows: list[dict[str, str]], as_json: bool, code: int = OK) -> int:
    from .profiles.tables import print_rows

    print_rows(rows, as_json)
    return code


def _or_refuse(call: Callable[[], T]) -> T:
    """What `call` gives; what it raises because of what the user gave is one message for the user."""
    from .profiles.store import ProfileError, ProfileNotFound

    try:
        return call()
    except OSError as error:
        raise Refused(f"{error.filename or 'the file'}: {error.strerror or error}") from error
    except (ValueError, LookupError) as error:
        is_damaged = isinstance(error, ProfileError) and not isinstance(error, ProfileNotFound)
        message = str(error.args[0]).replace("seq_len must", "--ctx must").replace("q_heads must", "--heads must")
        raise Refused(message, WRONG if is_damaged else None) from error


def _write(path: Path, text: str) -> Path:
    from .profiles.store import write_text

    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text)
    return path


def _read(path: Path) -> Profile:
    from .profiles.reading import read_profile

    return _or_refuse(partial(read_profile, path))


def _load(source: str) -> Profile:
    from .profiles.store import load_profile

    return _or_refuse(partial(load_profile, source))
