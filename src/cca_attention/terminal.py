"""What the commands share: options, exit codes, refusals in one line, the check of a file to be written.

A command is a typer app whose functions return their exit code and raise `Refused` for what cannot be carried out.
Words go to stderr, results to stdout, and options are checked before anything is loaded or begun:

    app = new_app()

    @app.command(epilog="Example: ... Exit codes: ...")
    def bench(output: Annotated[Path, file("--output", "Where to write the numbers.")]) -> int:
        check_output("--output", output)
        if output.suffix != ".json":
            raise Refused(f"--output must end in .json, got {output}")
        return OK

    def main(arguments: Sequence[str] | None = None) -> None:
        sys.exit(run_app(app, "cca-bench", arguments))

Nothing heavy is imported here, nor should it be at the top of a command's module: `--help` answers at once.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Sequence
from copy import copy
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperGroup

OK, WRONG, USAGE, NO_DEVICE, INTERRUPTED = 0, 1, 2, 3, 130
"""Exit codes; a command whose codes are others says its own for wrong usage to `run_app`."""


class Refused(Exception):
    """A request that cannot be carried out: one line for the user, and the exit code, None for that of wrong usage."""

    def __init__(self, message: str, code: int | None = None) -> None:
        super().__init__(message)
        self.code = code


def new_app(**options: Any) -> typer.Typer:
    """An app with shell completion and without decorated tracebacks."""
    return typer.Typer(pretty_exceptions_enable=False, rich_markup_mode=None, **options)


class _FirstByDefault(TyperGroup):
    """A group that is its first command wherever none is named."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        first = next(iter(self.commands))
        is_named = args[:1] and args[0] in self.commands
        if args and not is_named and not ctx.resilient_parsing and not args[0].startswith("-"):
            near = difflib.get_close_matches(args[0], self.commands, n=1)
            hint = f"; did you mean {near[0]}?" if near else f"; there are {', '.join(list(self.commands)[1:])}"
            raise Refused(f"there is no command {args[0]!r}{hint}")
        return super().parse_args(ctx, args if is_named or (ctx.resilient_parsing and not args) else [first, *args])

    def shell_complete(self, ctx: Any, incomplete: str) -> list[Any]:
        name, first = next(iter(self.commands.items()))
        with first.make_context(name, [], parent=ctx, resilient_parsing=True) as inner:
            found = [*super().shell_complete(ctx, incomplete), *first.shell_complete(inner, incomplete)]
        return list({item.value: item for item in found}.values())


def joined(first: typer.Typer, *others: typer.Typer) -> typer.Typer:
    """An app of all their commands that is the one of `first` where none is named: what a shell asks for its words."""
    app = new_app(cls=_FirstByDefault)
    for each in (first, *others):
        for command in each.registered_commands:
            app.registered_commands.append(copy(command))
            app.registered_commands[-1].hidden |= each is first
    return app


def number(option: str, description: str) -> Any:
    """An option that takes a whole number."""
    return typer.Option(option, parser=_whole, metavar="N", help=description)


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} is not a whole number") from error


def version(option: str, description: str) -> Any:
    """An option that takes the version of a program."""
    return typer.Option(option, parser=_version, metavar="X.Y.Z", help=description)


def _version(text: str) -> str:
    if not re.match(r"\d+\.\d+", text, re.ASCII):
        raise typer.BadParameter(f"{text!r} is not a version, like 3.7.1")
    return text


def choice(option: str, description: str, *choices: str) -> Any:
    """An option whose help names the choices; the command checks the choice."""
    return typer.Option(option, metavar="|".join(choices), help=description, autocompletion=_beginning(lambda: choices))


def one_of(option: str, description: str, names: Callable[[], Sequence[str]]) -> Any:
    """An option that takes one of the names, which a shell can complete; the command checks it."""
    return typer.Option(option, help=description, autocompletion=_beginning(names))


def _beginning(names: Callable[[], Sequence[str]]) -> Callable[[str], list[str]]:
    def completed(incomplete: str) -> list[str]:
        return [name for name in names() if name.startswith(incomplete)]

    return completed


def file(option: str, description: str) -> Any:
    """An option that takes the path of a file."""
    return typer.Option(option, metavar="FILE", help=description)


def check_output(option: str, path: Path | None) -> None:
    """Raise `Refused`, which names the option, if a file cannot be written at `path`; None: none will be."""
    if path is None:
        return
    if path.is_dir():
        raise Refused(f"{option} {path} is a directory")
    if not path.parent.is_dir():
        raise Refused(f"{option} {path}: there is no directory {path.parent}")
    if not os.access(path.parent, os.W_OK):
        raise Refused(f"{option} {path}: the directory {path.parent} cannot be written")


def run_app(app: typer.Typer, name: str, arguments: Sequence[str] | None, usage: int = USAGE) -> int:
    """Run the app as the command `name`, with `arguments` or those of the process, and return its exit code.

    Wrong usage, refusals and an interrupt become one line on stderr each.
    """
    # typer keeps click's exceptions in different places from version to version
    usage_error: type[Exception] = typer.BadParameter.__bases__[0]
    try:
        code = int(app(arguments, prog_name=name, standalone_mode=False) or OK)
        if code == INTERRUPTED:  # typer's own answer to an interrupt; ours are refusals
            return fail(name, "interrupted before anything was begun", INTERRUPTED)
        return code
    except usage_error as error:
        return fail(name, error.format_message(), usage)  # type: ignore[attr-defined]
    except Refused as error:
        return fail(name, str(error), usage if error.code is None else error.code)
    except (KeyboardInterrupt, typer.Abort):
        return fail(name, "interrupted before anything was begun", INTERRUPTED)


def fail(name: str, message: str, code: int) -> int:
    """Say on stderr what is wrong, and return the exit code."""
    typer.echo(f"{name}: {message}", err=True)
    return code
