"""What a person sees of a run: the live table, plain lines, the time that is left, the table of the choice."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cca_attention.autotune.binary import Resources
from cca_attention.autotune.devices import find_device
from cca_attention.autotune.journal import Journal
from cca_attention.autotune.live import display_for, left_text, space_lines, state_table
from cca_attention.autotune.measure import Timing
from cca_attention.autotune.outcome import Quarantined
from cca_attention.autotune.predict import Prediction
from cca_attention.autotune.progress import Progress, Request, plan
from cca_attention.autotune.remaining import USUAL_S, Remaining, standing
from cca_attention.autotune.report import choice_table, reasons
from cca_attention.autotune.search import Trial
from cca_attention.autotune.tune import Tuner
from cca_attention.kernels.tunable import Tunable
from cca_attention.problem import Problem

DATA = Path(__file__).parent / "data"
PROBLEM = Problem(q_heads=1, kv_heads=1, seq_len=4096, head_dim=64)
WIDTHS = (60, 80, 120)


def shown(width: int, *what: Any) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(*what, sep="\n")
    return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]


def timing(toy: Any, stage: str = "timing", seq_len: int = 4096) -> Progress:
    """A kernel in the middle of its race: one config is 1.25 times as fast as the built-in one, another was wrong."""
    default = toy.default(PROBLEM, "sm_80")
    fast, wrong, *_ = (config for config, _ in toy.HARMFUL.candidates(PROBLEM) if config != default)
    kernel = Progress(toy.HARMFUL, default, seq_len, True, stage=stage, legal=12, refused=6, to_compile=3, same=4)
    kernel.ruled_out.update({"registers": 2})
    used = (Resources("harmful", 4096, 64, 0, 4, 100, 0),)
    kernel.trials = {c: Trial(c, used, Prediction(5.0, {"hbm_us": 4.0})) for c in (default, fast, wrong)}
    kernel.quarantined[wrong] = Quarantined("wrong", "3 of 4 cases", "verify")
    kernel.checked = {default: {}, fast: {}}
    kernel.rounds = [{default: 100.0 + drift, fast: 0.8 * (100.0 + drift)} for drift in (0, 1, 2, 3, 4, 5)]
    kernel.samples, kernel.timed = {default: {}, fast: {}}, 2
    return kernel


def chosen(toy: Any) -> Progress:
    """The same kernel at its end."""
    kernel = timing(toy, "done")
    default, fast, *_ = kernel.trials
    kernel.trials[fast] = replace(kernel.trials[fast], timing=Timing(80, 80, 80, 6), baseline=Timing(100, 100, 100, 6))
    kernel.trials[default] = replace(kernel.trials[default], timing=Timing(100, 100, 100, 6))
    kernel.chosen, kernel.evidence = kernel.trials[fast], {"cases": 4, "mode": "gpu"}
    return kernel


@pytest.mark.parametrize("width", WIDTHS)
def test_the_table_has_room_for_every_number(toy: Any, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = timing(toy)
    monkeypatch.setattr(Tunable, "REGISTRY", {**Tunable.REGISTRY})  # a tunable enters itself: not over the real one
    kernel.tunable = replace(toy.HARMFUL, name="backward_dcore_hopper")
    kernel.rounds = [{config: 1e3 * us for config, us in found.items() if us} for found in kernel.rounds]
    text = shown(width, state_table([kernel], width))
    assert "…" not in text and len(text.splitlines()) == 2
    assert max(map(len, text.splitlines())) <= width
    assert all(word in text for word in ("backward_dcore_hopper", "timing", "82.00 ms", "compiled", "timed", "out"))
    assert (" 1.25x" in text) == ("verified" in text) == (width >= 80) and ("12/18" in text) == (width == 120)


def test_counts_say_why(toy: Any) -> None:
    assert space_lines([timing(toy), timing(toy)]) == [
        "24 of 36 configs are legal: 4 cannot fit (4 registers), 8 launch what another does", "out: 2 wrong",
    ]  # fmt: skip
    assert space_lines([]) == []


def test_contexts_are_named_where_there_are_several(toy: Any) -> None:
    one, other = timing(toy), timing(toy, seq_len=8192)
    assert "4096" not in shown(120, state_table([one], 120))
    assert "harmful 8192" in shown(120, state_table([one, other], 120))


def test_the_best_so_far_is_found_in_pairs(toy: Any) -> None:
    kernel = timing(toy)
    own, builtin = standing(kernel)
    assert own == pytest.approx(82.0) and builtin == 102.5
    kernel.rounds = []
    assert standing(kernel) == (5.0, 5.0)
    assert standing(Progress(toy.TOY, toy.default(PROBLEM, "sm_80"))) == (None, None)


def test_the_time_left_follows_the_rate(toy: Any) -> None:
    now = 0.0
    kernel = Progress(toy.TOY, toy.default(PROBLEM, "sm_80"), to_compile=10)
    left = Remaining([kernel], lambda: now)
    assert left() is None
    kernel.stage = "compiling"
    assert left() == 10 * USUAL_S["compiling"] + USUAL_S["verifying"]
    kernel.trials = {number: Trial(kernel.default) for number in range(4)}  # type: ignore[misc]
    now = 12.0
    assert left() == 6 * 3.0 + USUAL_S["verifying"]
    kernel.stage, now = "verifying", 30.0
    assert left() == USUAL_S["verifying"]
    now = 300.0
    assert left() == 0.0
    kernel.stage = "done"
    assert left() is None
    assert [left_text(s) for s in (None, 0.0, 3.0, 42.0, 130.0)] == [
        "", "", "about 5 s left", "about 40 s left", "about 2 min left",
    ]  # fmt: skip


def test_the_time_left_knows_of_races(toy: Any) -> None:
    now = 0.0
    kernels = [timing(toy), timing(toy, "checking")]
    kernels[1].rounds = []
    left = Remaining(kernels, lambda: now)
    assert left() == pytest.approx(1.5 * USUAL_S["timing"] + 2 * USUAL_S["verifying"])
    kernels[0].stage, now = "verifying", 60.0
    assert 0 < (left() or 0) < 1000


@pytest.mark.parametrize("width", WIDTHS)
def test_the_choice_says_why(toy: Any, width: int) -> None:
    kernel = chosen(toy)
    text = shown(width, choice_table([kernel], width), *reasons([kernel]))
    assert "100.0 us, 1.25x" in " ".join(text.split()) and "4 cases" in text and "…" not in text
    assert "harmful: of 2 timed, 1.25 times as fast as the built-in (95 %:" in " ".join(text.split())
    assert max(map(len, text.splitlines())) <= width
    default, *_ = kernel.trials
    kernel.chosen = kernel.trials[default]
    assert "the built-in config: none of 2 timed is faster by more than 2%" in "".join(reasons([kernel]))
    kernel.rounds = []
    assert "at most 2% behind by the model, of 3 that fit; bounded by hbm" in "".join(reasons([kernel]))


def test_the_displays_show_a_run(toy: Any, tmp_path: Path) -> None:
    request = Request(
        device=find_device("a100"), problem=PROBLEM, tunables=(toy.TOY,), cache_folder=tmp_path, at_hand=False, jobs=1,
        most_compiled=0, verify=toy.accept,
    )  # fmt: skip
    for terminal in (True, False):
        console = Console(file=io.StringIO(), width=60, force_terminal=terminal)
        kernels = plan(request)
        with Journal(tmp_path) as journal, display_for(console, kernels, quiet=False) as display:
            Tuner(request, journal, kernels, display).run()
        text = " ".join(console.file.getvalue().split())  # type: ignore[attr-defined]
        assert all(word in text for word in ("toy", "12", "2 registers", "compil", "done"))
    silent = Console(file=io.StringIO())
    with display_for(silent, kernels, quiet=True) as display:
        display(kernels[0])
    assert silent.file.getvalue() == ""  # type: ignore[attr-defined]
