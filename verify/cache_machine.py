"""Random walks over CCACache, held to `cache_model` after every step (P27 and P28 of docs/properties.md).

Tokens are appended one by one, a few at a time and in chunks, padded or not; rows are cropped, emptied, reordered and
copied (which forks a sequence); the storage grows or is static.

Hypothesis draws the walks; it comes with the extra [test], so nobody imports this module who can do without it.
"""

from __future__ import annotations

import zlib
from contextlib import ExitStack
from dataclasses import dataclass
from unittest import mock

import hypothesis
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


class CacheMachine(RuleBasedStateMachine):
    """What can be done to a cache; `machine` makes one for a backend and a device."""

    backend: Backend
    device: str
    tally: Tally

    def __init__(self) -> None:
        super().__init__()
        self.surroundings = ExitStack()

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
        self.surroundings.enter_context(poisoned_memory())
        self.surroundings.enter_context(mock.patch.object(cache, "FIRST_CORES", 1))
        self.model = CacheModel(
            spec, heads, batch=batch, rollback=rollback, static=static, backend=self.backend, device=self.device,
            tally=self.tally,
        )  # fmt: skip

    @rule(size=st.just(1) | st.integers(1, 6))
    def decode(self, size: int) -> None:
        """Append a token or some."""
        self.model.decode(size)

    @rule(size=st.integers(0, 9))
    def prefill(self, size: int) -> None:
        """Append a chunk."""
        self.model.prefill(size)

    @rule(data=st.data(), size=st.integers(1, 7))
    def prefill_padded(self, data: st.DataObject, size: int) -> None:
        """Append a chunk in which each row has its own tokens."""
        edges = st.lists(st.integers(0, size), min_size=2, max_size=2).map(lambda pair: (min(pair), max(pair)))
        self.model.prefill_padded(size, [data.draw(edges) for _ in self.model.rows])

    @precondition(lambda self: self.model.longest > 0)
    @rule(data=st.data())
    def crop(self, data: st.DataObject) -> None:
        """Roll back to some length, which is refused where it cannot be."""
        self.model.crop(data.draw(st.integers(0, self.model.longest)))

    @precondition(lambda self: self.model.longest > 0)
    @rule(tokens=st.integers(1, 4))
    def roll_back(self, tokens: int) -> None:
        """Drop the newest tokens, which is refused where it cannot be."""
        self.model.crop(-tokens)

    @precondition(lambda self: self.model.longest > 0)
    @rule()
    def reset(self) -> None:
        """Empty every row; the slots are used again."""
        self.model.crop(0)

    @precondition(lambda self: len(self.model.rows) > 1)
    @rule(data=st.data())
    def reorder(self, data: st.DataObject) -> None:
        """Exchange rows."""
        self.model.reorder(data.draw(st.permutations(range(len(self.model.rows)))))

    @precondition(lambda self: len(self.model.rows) > 1)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        """Make every row a copy of one."""
        count = len(self.model.rows)
        self.model.reorder([data.draw(st.integers(0, count - 1))] * count)

    @precondition(lambda self: self.model.longest > 0)
    @rule()
    def build_again(self) -> None:
        """Fill a fresh cache with the same tokens."""
        self.model.build_again()

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


def machine(backend: Backend, device: str, tally: Tally) -> type[CacheMachine]:
    """The machine for caches of this backend, which counts in `tally`; its ``TestCase`` is a test."""
    return type("Cache", (CacheMachine,), {"backend": backend, "device": device, "tally": tally})


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

    Args:
        backend: of the caches. seed: of the walks; None: always the same. device: of the tensors.
    """
    seed = zlib.crc32(backend.encode()) if seed is None else seed
    tally = Tally()
    # without shrinking: so short a walk can be read as it is, and a layer has no time for more
    limits = settings(
        max_examples=examples, stateful_step_count=steps, phases=[Phase.generate], database=None, **COMMON
    )
    try:
        run_state_machine_as_test(hypothesis.seed(seed)(machine(backend, device, tally)), settings=limits)
    except HypothesisException:
        raise
    except Exception as error:
        said = [line for note in getattr(error, "__notes__", []) for line in note.splitlines()]
        taken = tuple(line.removeprefix("state.") for line in said if line.startswith("state."))
        return Walks(seed, tally, f"{type(error).__name__}: {error}", taken, blob_of(error))
    return Walks(seed, tally)
