"""Random walks over CCACache, held to `cache_model` after every step (P27 and P28 of docs/properties.md).

Tokens are appended one by one, a few at a time and in chunks, padded or not; rows are cropped, emptied, reordered and
copied (which forks a sequence); the storage grows or is static.

Hypothesis draws the walks; it comes with the extra [test], so nobody imports this module who can do without it.
"""

from __future__ import annotations

import faulthandler
import os
import pickle
import signal
import tempfile
import traceback
import zlib
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import IO, Any, BinaryIO, NoReturn
from unittest import mock

import hypothesis
import torch
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.errors import HypothesisException
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from .. import cache
from ..attention import Backend
from ..spec import CCASpec
from .cache_model import CacheModel, Tally
from .inputs import poisoned_memory
from .property_run import COMMON, blob_of

BEGINS = "create("
"""How the line of a walk's first step begins."""


class CacheMachine(RuleBasedStateMachine):
    """What can be done to a cache; `machine` makes one for a backend and a device."""

    backend: Backend
    device: str
    tally: Tally
    trail: BinaryIO | None = None

    def __init__(self) -> None:
        super().__init__()
        self.surroundings = ExitStack()

    def tell(self, step: str) -> None:
        """Write a step down before it is taken: a process that crashes cannot say it afterwards."""
        if self.trail is not None:
            self.trail.write(f"{step}\n".encode())

    def take(self, step: str, *given: Any) -> None:
        """Have the model take a step."""
        self.tell(f"{step}({', '.join(map(repr, given))})")
        getattr(self.model, step)(*given)

    @initialize(
        spec=st.builds(
            CCASpec,
            group_size=st.integers(1, 4),
            window_size=st.integers(1, 5),
            core_heads=st.sampled_from(["query", "kv"]),
            pooling=st.sampled_from(["last_query", "mean"]),
        ),
        heads=st.sampled_from([(1, 1), (2, 1), (2, 2)]),
        batch=st.sampled_from([1, 2, 2]),
        rollback=st.integers(0, 3),
        static=st.booleans(),
    )
    def create(self, spec: CCASpec, heads: tuple[int, int], batch: int, rollback: int, static: bool) -> None:
        """Begin with an empty cache, in poisoned memory; what grows has room for one core token at first."""
        self.tally.walks += 1
        self.tell(f"{BEGINS}{spec}, {heads=}, {batch=}, {rollback=}, {static=})")
        self.surroundings.enter_context(poisoned_memory())
        self.surroundings.enter_context(mock.patch.object(cache, "FIRST_CORES", 1))
        self.model = CacheModel(
            spec, heads, batch=batch, rollback=rollback, static=static, backend=self.backend, device=self.device,
            tally=self.tally,
        )  # fmt: skip

    @rule(size=st.just(1) | st.integers(1, 6))
    def decode(self, size: int) -> None:
        """Append a token or some."""
        self.take("decode", size)

    @rule(size=st.integers(0, 9))
    def prefill(self, size: int) -> None:
        """Append a chunk."""
        self.take("prefill", size)

    @rule(data=st.data(), size=st.integers(1, 7))
    def prefill_padded(self, data: st.DataObject, size: int) -> None:
        """Append a chunk in which each row has its own tokens."""
        edges = st.lists(st.integers(0, size), min_size=2, max_size=2).map(lambda pair: (min(pair), max(pair)))
        self.take("prefill_padded", size, [data.draw(edges) for _ in self.model.rows])

    @precondition(lambda self: self.model.longest > 0)
    @rule(data=st.data())
    def crop(self, data: st.DataObject) -> None:
        """Roll back to some length, which is refused where it cannot be."""
        self.take("crop", data.draw(st.integers(0, self.model.longest)))

    @precondition(lambda self: self.model.longest > 0)
    @rule(tokens=st.integers(1, 4))
    def roll_back(self, tokens: int) -> None:
        """Drop the newest tokens, which is refused where it cannot be."""
        self.take("crop", -tokens)

    @precondition(lambda self: self.model.longest > 0)
    @rule()
    def reset(self) -> None:
        """Empty every row; the slots are used again."""
        self.take("crop", 0)

    @precondition(lambda self: len(self.model.rows) > 1)
    @rule(data=st.data())
    def reorder(self, data: st.DataObject) -> None:
        """Exchange rows."""
        self.take("reorder", data.draw(st.permutations(range(len(self.model.rows)))))

    @precondition(lambda self: len(self.model.rows) > 1)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        """Make every row a copy of one."""
        count = len(self.model.rows)
        self.take("reorder", [data.draw(st.integers(0, count - 1))] * count)

    @precondition(lambda self: self.model.longest > 0)
    @rule()
    def build_again(self) -> None:
        """Fill a fresh cache with the same tokens."""
        self.take("build_again")

    @invariant()
    def sizes_and_cores_are_right(self) -> None:
        """After every step."""
        self.model.check_sizes_and_cores()

    @invariant()
    def unused_slots_are_untouched(self) -> None:
        """After every step."""
        self.model.check_unused_slots()

    def teardown(self) -> None:
        """After the last step."""
        self.surroundings.close()


def machine(backend: Backend, device: str, tally: Tally, trail: BinaryIO | None = None) -> type[CacheMachine]:
    """The machine for caches of this backend; its ``TestCase`` is a test.

    It counts in `tally`, and each step is written to `trail`, which has no buffer.
    """
    return type("Cache", (CacheMachine,), {"backend": backend, "device": device, "tally": tally, "trail": trail})


@dataclass(frozen=True, slots=True)
class Walks:
    """What came of a run: its `seed`, its `tally`; and if a walk failed what was `wrong`, the walk's `steps` and
    hypothesis' `blob` for it."""

    seed: int
    tally: Tally
    wrong: str = ""
    steps: tuple[str, ...] = ()
    blob: str = ""


def walk(backend: Backend, *, examples: int, steps: int, seed: int | None = None, device: str = "cpu") -> Walks:
    """Walk `examples` times up to `steps` steps, up to the first walk that fails.

    On the CPU that is in a fork of this process: there a kernel that reaches out of its memory takes the process down,
    and what is said then is by which signal and after which steps.

    Args:
        backend: of the caches. seed: of the walks; None: always the same. device: of the tensors.
    """
    seed = zlib.crc32(backend.encode()) if seed is None else seed
    # without shrinking: so short a walk can be read as it is, and a layer has no time for more
    limits = settings(
        max_examples=examples, stateful_step_count=steps, phases=[Phase.generate], database=None, **COMMON
    )
    if device != "cpu":
        return _walk(machine(backend, device, Tally()), limits, seed)
    with tempfile.TemporaryFile(buffering=0) as trail, tempfile.TemporaryFile() as answer:
        process = os.fork()
        if process == 0:
            _answer(answer, lambda: _walk(machine(backend, device, Tally(), trail), limits, seed))
        code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        answer.seek(0)
        if code == 0:
            found: Walks = pickle.load(answer)
            return found
        trail.seek(0)
        taken = trail.read().decode().splitlines()
    if code > 0:
        raise RuntimeError("the walks ended with an exception that is no cache's; it is said above")
    last = max((number for number, step in enumerate(taken) if step.startswith(BEGINS)), default=0)
    return Walks(seed, Tally(), f"killed by {signal.Signals(-code).name} in {taken[-1]}", tuple(taken[last:]))


def _answer(answer: IO[bytes], call: Callable[[], Walks]) -> NoReturn:
    """Write down what `call` gives and end this process: with 1 if it raises."""
    code = 1
    try:
        faulthandler.disable()  # the parent tells it in fewer words
        torch.set_num_threads(1)  # the threads of a pool are not in a fork
        pickle.dump(call(), answer)
        answer.flush()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _walk(cache_machine: type[CacheMachine], limits: settings, seed: int) -> Walks:
    tally = cache_machine.tally
    try:
        run_state_machine_as_test(hypothesis.seed(seed)(cache_machine), settings=limits)
    except HypothesisException:
        raise
    except Exception as error:
        said = [line for note in getattr(error, "__notes__", []) for line in note.splitlines()]
        taken = tuple(line.removeprefix("state.") for line in said if line.startswith("state."))
        return Walks(seed, tally, f"{type(error).__name__}: {error}", taken, blob_of(error))
    return Walks(seed, tally)
