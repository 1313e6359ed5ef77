"""What a CCACache has to be after any calls: a model of plain lists of tokens, held to the cache and to the oracle.

`cache_machine` walks over it at random.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..attention import Backend
from ..cache import CCACache
from ..kernels.decode import DecodeConfig
from ..kernels.forward import ForwardConfig
from ..kernels.pooling import PoolingConfig
from ..kernels.tunable import Schedule
from ..spec import CCASpec
from .calls import agree
from .rounding import ErrorModel
from .tolerance import Comparison, compare, compare_bitwise

SMALL = Schedule(
    {
        "decode": DecodeConfig(block_k=16, splits_core=1, splits_raw=1),
        "forward": ForwardConfig(block_q=16, block_k=16),
        "pooling": PoolingConfig(block_c=2, block_t=16),
    }
)
HEAD_DIM = 16
MAX_TOKENS = 12
"""Of static storage."""
REQUIRED = (
    "crossed a group edge", "crossed several group edges", "completed a group again", "went round the ring",
    "rolled back within a group", "rolled back across a completed group", "rollback refused", "reordered", "forked",
    "reused", "padded", "rows of different lengths", "storage full", "storage grew", "built again",
)  # fmt: skip
"""What the walks of a run must have done, all together."""


class ModelError(AssertionError):
    """The cache is not what its tokens say."""


def require(holds: bool, otherwise: str) -> None:
    """Raise `ModelError` unless it holds."""
    if not holds:
        raise ModelError(otherwise)


@dataclass
class Tally:
    """What walks leave behind: how many there were, the comparisons and the worst of them, how often each class of
    events happened."""

    walks: int = 0
    comparisons: int = 0
    worst: Comparison | None = None
    classes: Counter[str] = field(default_factory=Counter)

    def hold(self, comparison: Comparison) -> None:
        """Count a comparison and raise `ModelError` if it failed."""
        self.comparisons += 1
        if self.worst is None or comparison.budget_use > self.worst.budget_use:
            self.worst = comparison
        require(comparison.ok, str(comparison))

    def met(self, name: str, happened: bool = True) -> None:
        """Count that something happened, if it did."""
        self.classes[name] += happened


class CacheModel:
    """A cache, for each of its rows the list of its tokens' numbers, and which number each ring slot holds.

    Every method does something to the cache and to the lists, and raises `ModelError` if the two part. With `static`
    the storage is allocated at first and filled with NaN.
    """

    def __init__(
        self, spec: CCASpec, heads: tuple[int, int], *, batch: int, rollback: int, static: bool, backend: Backend,
        device: str, tally: Tally,
    ) -> None:  # fmt: skip
        self.spec, self.heads, self.backend, self.device, self.tally = spec, heads, backend, device, tally
        self.ring_size = spec.window_size + spec.group_size - 1 + rollback
        self.max_tokens = MAX_TOKENS if static else None
        self.core_heads = heads[0] if spec.core_heads == "query" else heads[1]
        self.rows: list[list[int]] = [[] for _ in range(batch)]
        self.rings: list[dict[int, int]] = [{} for _ in range(batch)]
        self.cores = [torch.zeros(2, 1, self.core_heads, 0, HEAD_DIM, device=device)] * batch
        self.written = [0] * batch
        self.tokens = 0
        self.cache = self._empty_cache(batch, rollback)
        if static:
            for storage in (self.cache._state.core, self.cache._state.raw):
                storage.fill_(float("nan"))

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return max(map(len, self.rows))

    def decode(self, size: int) -> None:
        """Append `size` tokens to each row in one step."""
        self._append([(0, size)] * len(self.rows), size, self.cache.decode)

    def prefill(self, size: int) -> None:
        """Append a chunk of `size` tokens to each row."""
        self._append([(0, size)] * len(self.rows), size, self.cache.prefill)

    def prefill_padded(self, size: int, bounds: list[tuple[int, int]]) -> None:
        """Append a chunk of `size` tokens, of which each row has those between its bounds; the others are NaN."""
        table = torch.tensor(bounds, dtype=torch.int32, device=self.device)
        self._append(bounds, size, lambda q, k, v: self.cache.prefill(q, k, v, seq_bounds=table))
        self.tally.met("rows of different lengths", len({len(row) for row in self.rows}) > 1)

    def crop(self, n: int) -> None:
        """Roll back to `n` tokens, or by ``-n``; where that cannot be, it has to be refused."""
        kept = [len(row) + n if n < 0 else min(n, len(row)) for row in self.rows]
        if not all(keep >= 0 and self._can_keep(row, keep) for row, keep in enumerate(kept)):
            self.tally.met("rollback refused")
            _refused("n must", lambda: self.cache.crop(n))
            return
        self.cache.crop(n)
        for b, keep in enumerate(kept):
            groups, held = keep // self.spec.group_size, len(self.rows[b])
            fewer = groups < held // self.spec.group_size
            self.tally.met("rolled back across a completed group", fewer and keep > 0)
            self.tally.met("rolled back within a group", not fewer and keep < held)
            self.rows[b], self.cores[b] = self.rows[b][:keep], self.cores[b][:, :, :, :groups]

    def reorder(self, index: list[int]) -> None:
        """Make each row a copy of the row `index` names for it."""
        self.tally.met("reordered", [self.rows[row] for row in index] != self.rows)
        self.tally.met("forked", any(self.rows[row] and index.count(row) > 1 for row in index))
        self.cache.reorder(torch.tensor(index))
        self.rows = [list(self.rows[row]) for row in index]
        self.rings = [dict(self.rings[row]) for row in index]
        self.cores = [self.cores[row] for row in index]
        self.written = [self.written[row] for row in index]

    def build_again(self) -> None:
        """A fresh cache that gets each row's tokens at once holds the same cores.

        Compiled, prefill and decode need not pool in the same order: there the bounds of both hold.
        """
        self.tally.met("built again", any(cores.numel() for cores in self.cores))
        for b, row in enumerate(self.rows):
            fresh = self._empty_cache(1, 0)
            fresh.prefill(*self._tensors([row]))
            require(fresh.lengths.tolist() == [len(row)], f"{fresh.lengths.tolist()} tokens, not {len(row)}")
            for name, held in zip(("k_core", "v_core"), self.cores[b], strict=True):
                again = getattr(fresh, name)
                if self.device == "cpu" or not again.numel():
                    self.tally.hold(compare_bitwise(name, held, again))
                else:
                    bound = getattr(self._oracle(row), name).bound
                    self.tally.hold(agree(name, held.cpu(), again.cpu(), bound, bound))

    def check_sizes_and_cores(self) -> None:
        """What the cache says of itself, and the bits of the cores, which no step but their own may change."""
        lengths = [len(row) for row in self.rows]
        require(self.cache.lengths.tolist() == lengths, f"lengths is {self.cache.lengths.tolist()}, not {lengths}")
        require(self.cache.seen == max(lengths), f"seen is {self.cache.seen}, not {max(lengths)}")
        raw = self.heads[1] * (self.spec.window_size + self.spec.group_size - 1)
        groups = [length // self.spec.group_size for length in lengths]
        expected = sum(2 * 4 * HEAD_DIM * (self.core_heads * count + raw) for count in groups)
        require(self.cache.nbytes == expected, f"nbytes is {self.cache.nbytes}, not {expected}")
        for b, cores in enumerate(self.cores):
            self.tally.hold(compare_bitwise("cores", self._held_cores(b), cores))

    def check_unused_slots(self) -> None:
        """Static storage holds NaN where no token and no core is."""
        if self.max_tokens is None:
            return
        state = self.cache._state
        for b, (ring, written) in enumerate(zip(self.rings, self.written, strict=True)):
            unused = [slot for slot in range(self.ring_size) if slot not in ring]
            require(bool(state.raw[:, b, :, unused].isnan().all()), f"row {b}: a ring slot without a token was written")
            require(bool(state.core[:, b, :, written:].isnan().all()), f"row {b}: a core slot was written too early")
            require(not state.core[:, b, :, :written].isnan().any(), f"row {b}: a core is NaN")

    def _empty_cache(self, batch: int, rollback: int) -> CCACache:
        return CCACache(
            self.spec, batch=batch, q_heads=self.heads[0], kv_heads=self.heads[1], head_dim=HEAD_DIM,
            dtype=torch.float32, device=self.device, backend=self.backend, rollback=rollback,
            max_tokens=self.max_tokens, profile=SMALL,
        )  # fmt: skip

    def _tensors(self, rows: list[list[int]]) -> list[Tensor]:
        """q, k and v [B, H, T, D] of rows of token numbers; a negative number is padding, NaN."""
        shape = len(rows), len(rows[0]), HEAD_DIM
        found = [
            torch.full((shape[0], heads, *shape[1:]), float("nan"), device=self.device)
            for heads in (*self.heads, self.heads[1])
        ]
        for b, row in enumerate(rows):
            for t, number in enumerate(row):
                if number >= 0:
                    generator = torch.Generator().manual_seed(number)
                    for whole in found:
                        whole[b, :, t] = torch.randn(whole.shape[1], HEAD_DIM, generator=generator)
        return found

    def _oracle(self, row: list[int]) -> ErrorModel:
        """What the tokens of a row give, and how far off that may be."""
        q, k, v = (x.cpu() for x in self._tensors([row]))
        return ErrorModel(q, k, v, self.spec, torch.float32)

    def _append(self, bounds: list[tuple[int, int]], size: int, call: Callable[..., Tensor]) -> None:
        """Append new tokens to the rows between their bounds with `call`, and check all that comes out."""
        chunk = [[-1] * size for _ in self.rows]
        for row, (first, end) in zip(chunk, bounds, strict=True):
            row[first:end] = range(self.tokens, self.tokens + end - first)
            self.tokens += end - first
        longest = max(len(row) + end - first for row, (first, end) in zip(self.rows, bounds, strict=True))
        if self.max_tokens is not None and longest > self.max_tokens:
            self.tally.met("storage full")
            _refused("max_tokens must be at least", lambda: call(*self._tensors(chunk)))
            return
        room = self.cache._state.core.shape[3]
        out = call(*self._tensors(chunk))
        self.tally.met("storage grew", 0 < room < self.cache._state.core.shape[3])
        for b, (first, end) in enumerate(bounds):
            self._remember(b, chunk[b][first:end])
            padding = torch.cat([out[b, :, :first], out[b, :, end:]], dim=1)
            self.tally.met("padded", padding.numel() > 0)
            self.tally.hold(compare_bitwise("padding", padding, torch.zeros_like(padding)))
            if end > first:
                self._check_row(b, out[b : b + 1, :, first:end])

    def _remember(self, b: int, numbers: list[int]) -> None:
        """Let the lists of row `b` have these tokens too."""
        before = len(self.rows[b]) // self.spec.group_size
        self.tally.met("reused", bool(numbers and not self.rows[b] and self.rings[b]))
        for number in numbers:
            self.rings[b][len(self.rows[b]) % self.ring_size] = number
            self.rows[b].append(number)
        now = len(self.rows[b]) // self.spec.group_size
        self.tally.met("crossed a group edge", now == before + 1)
        self.tally.met("crossed several group edges", now > before + 1)
        self.tally.met("completed a group again", before < min(now, self.written[b]))
        self.tally.met("went round the ring", bool(numbers) and len(self.rows[b]) > self.ring_size)
        self.written[b] = max(self.written[b], now)

    def _check_row(self, b: int, out: Tensor) -> None:
        """Hold the newest outputs and all cores of a row to the oracle, and remember the cores."""
        model = self._oracle(self.rows[b])
        newest = type(model.out)(*(x[:, :, -out.shape[2] :] for x in model.out))
        self.cores[b] = self._held_cores(b)
        self.tally.hold(compare("out", out, newest))
        self.tally.hold(compare("k_core", self.cores[b][0], model.k_core))
        self.tally.hold(compare("v_core", self.cores[b][1], model.v_core))

    def _held_cores(self, b: int) -> Tensor:
        """[2, 1, Hc, C, D]: a copy of the core keys and values of a row."""
        groups = len(self.rows[b]) // self.spec.group_size
        return torch.stack([x[b : b + 1, :, :groups] for x in (self.cache.k_core, self.cache.v_core)])

    def _can_keep(self, row: int, keep: int) -> bool:
        """Whether the raw tokens that the query at position `keep` sees before itself are all in the ring."""
        needed = self.spec.local_range(keep)[:-1]
        return keep == 0 or all(self.rings[row].get(p % self.ring_size) == self.rows[row][p] for p in needed)


def _refused(words: str, call: Callable[[], Any]) -> None:
    """Require that `call` raises ValueError with these words."""
    try:
        call()
    except ValueError as error:
        require(words in str(error), f"a refusal should say {words!r}, it says {error}")
    else:
        raise ModelError(f"what should be refused with {words!r} was done")
