"""Tables of what was chosen, and how configs, times and counts are written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict

from rich.table import Table

from ..kernels.tunable import Config
from .progress import Progress
from .race import BAND, MARGIN, speedup

WIDE = 110


def choice_table(kernels: Sequence[Progress], width: int) -> Table:
    """What was chosen for each kernel, how fast it is against the built-in config, and how it was verified.

    What the kernels take of an SM is left out where `width` columns have no room for it.
    """
    settled = [kernel for kernel in kernels if kernel.chosen is not None]
    measured = any(kernel.chosen and kernel.chosen.timing for kernel in settled)
    columns: dict[str, Callable[[Progress], str]] = {
        "measured" if measured else "predicted": lambda kernel: time_text(
            kernel.chosen.time_us if kernel.chosen else None
        ),
        "built-in": _builtin_text,
        "registers": lambda kernel: str(_most(kernel, "registers")),
        "shared": lambda kernel: f"{_most(kernel, 'shared_bytes') / 1024:.0f} KiB",
        "spilled": lambda kernel: f"{_most(kernel, 'spill_bytes')} B",
        "verified": lambda kernel: "{cases} cases, {mode}".format(**kernel.evidence or {}),
    }
    if width < WIDE:
        for title in ("registers", "shared", "spilled"):
            del columns[title]
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("kernel", no_wrap=True)
    table.add_column("config")
    for title in columns:
        table.add_column(title, justify="left" if title == "verified" else "right", no_wrap=title != "verified")
    for kernel in settled:
        config = config_text(kernel.chosen.config) if kernel.chosen else ""
        table.add_row(kernel.name, config, *(text(kernel) for text in columns.values()))
    return table


def _builtin_text(kernel: Progress) -> str:
    if kernel.chosen is None or kernel.chosen.config == kernel.default:
        return "the same"
    own, builtin = kernel.chosen.time_us, baseline_us(kernel)
    return f"{time_text(builtin)}, {builtin / own:.2f}x" if own and builtin else "unknown"


def _most(kernel: Progress, resource: str) -> int:
    return max((getattr(used, resource) for used in kernel.chosen.resources), default=0) if kernel.chosen else 0


def reasons(kernels: Sequence[Progress]) -> Iterator[str]:
    """Why each kernel's choice was made, in a line."""
    for kernel in kernels:
        if kernel.chosen is not None:
            yield f"{kernel.name}: {_reason(kernel)}"


def _reason(kernel: Progress) -> str:
    if not kernel.rounds:
        return _by_the_model(kernel)
    if kernel.chosen is None or kernel.chosen.config == kernel.default:
        return f"the built-in config: none of {kernel.timed} timed is faster by more than {MARGIN:.0%} and the noise"
    found = speedup(kernel.rounds, kernel.default, kernel.chosen.config)
    gain = "" if found is None else ", {:.2f} times as fast as the built-in (95 %: {:.2f} to {:.2f})".format(*found)
    timed = [trial for trial in kernel.trials.values() if trial.refusal is None and trial.timing is not None]
    least = min(timed, key=lambda trial: trial.score or 0.0).config
    tie = "" if least == kernel.chosen.config else f"; equal to the fastest within {BAND:.0%}, preferred by rule"
    return f"of {kernel.timed} timed{gain}{tie}"


def _by_the_model(kernel: Progress) -> str:
    fit = sum(trial.time_us is not None for trial in kernel.trials.values())
    parts = {} if kernel.chosen is None or kernel.chosen.prediction is None else kernel.chosen.prediction.parts
    terms = {name: us for name, us in parts.items() if name.endswith("_us") and name != "exposed_us"}
    bound = f"; bounded by {max(terms, key=terms.__getitem__).removesuffix('_us')}" if terms else ""
    builtin = kernel.chosen is not None and kernel.chosen.config == kernel.default
    what = f"the built-in config, at most {MARGIN:.0%} behind" if builtin else "the best"
    return f"{what} by the model, of {fit} that fit{bound}"


def baseline_us(kernel: Progress) -> float | None:
    """The built-in config's time: measured in turns with the chosen one, else predicted."""
    if kernel.chosen is not None and kernel.chosen.baseline is not None:
        return kernel.chosen.baseline.median_us
    default = kernel.trials.get(kernel.default)
    return None if default is None or default.prediction is None else default.prediction.total_us


def config_text(config: Config) -> str:
    """A config in one line, tiles first."""
    fields = asdict(config)
    tiles = [f"{name.removeprefix('block_')}={n}" for name, n in fields.items() if not name.startswith("num_")]
    return f"{' '.join(tiles)} warps={config.num_warps} stages={config.num_stages}"


def time_text(time_us: float | None) -> str:
    """A time with a unit that suits it."""
    if time_us is None:
        return "unknown"
    return f"{time_us / 1e3:.2f} ms" if time_us >= 1e3 else f"{time_us:.1f} us"


def counted(counter: Counter[str]) -> str:
    """Kinds and how many of each, most first."""
    return ", ".join(f"{count} {kind}" for kind, count in counter.most_common() if count)


def trouble_kinds(kernel: Progress) -> Counter[str]:
    """What was wrong with configs that were compiled, and how many of each kind there are."""
    # copies, since a live display asks while a run goes on
    outcomes = Counter(reason.outcome for reason in list(kernel.quarantined.values()))
    return Counter(kernel.dropped) + Counter(kernel.failed) + outcomes
