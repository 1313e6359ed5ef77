"""A random walk over CCACache against plain lists of tokens and the oracle (P27 and P28 of docs/properties.md).

Tokens are appended one by one, a few at a time and in chunks, padded or not; rows are cropped, emptied, reordered and
copied (which forks a sequence); the storage grows or is static. After every step the cache holds what the lists say.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor

from cca_attention.cache import CCACache
from cca_attention.kernels.decode import DecodeConfig
from cca_attention.kernels.forward import ForwardConfig
from cca_attention.kernels.pooling import PoolingConfig
from cca_attention.kernels.tunable import Schedule
from cca_attention.spec import CCASpec
from cca_attention.verify.calls import agree
from cca_attention.verify.rounding import ErrorModel
from cca_attention.verify.tolerance import compare, compare_bitwise

SMALL = Schedule(
    {
        "decode": DecodeConfig(block_k=16, splits_core=1, splits_raw=1),
        "forward": ForwardConfig(block_q=16, block_k=16),
        "pooling": PoolingConfig(block_c=2, block_t=16),
    }
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HEAD_DIM = 16
MAX_TOKENS = 24


class Cache(RuleBasedStateMachine):
    """The model: for each row the list of its tokens' numbers, and which number each ring slot holds."""

    backend: str

    @initialize(
        group_size=st.integers(1, 4),
        window_size=st.integers(1, 5),
        core_heads=st.sampled_from(["query", "kv"]),
        pooling=st.sampled_from(["last_query", "mean"]),
        heads=st.sampled_from([(1, 1), (2, 1), (2, 2)]),
        batch=st.integers(1, 2),
        rollback=st.integers(0, 3),
        static=st.booleans(),
    )
    def create(
        self, group_size: int, window_size: int, core_heads: Any, pooling: Any, heads: tuple[int, int], batch: int,
        rollback: int, static: bool,
    ) -> None:  # fmt: skip
        self.spec, self.heads = CCASpec(group_size, window_size, core_heads, pooling), heads
        self.ring_size = window_size + group_size - 1 + rollback
        self.max_tokens = MAX_TOKENS if static else None
        self.rows: list[list[int]] = [[] for _ in range(batch)]
        self.rings: list[dict[int, int]] = [{} for _ in range(batch)]
        self.cores = [
            torch.zeros(2, 1, heads[0] if core_heads == "query" else heads[1], 0, HEAD_DIM, device=DEVICE)
        ] * batch
        self.written = [0] * batch
        self.tokens = 0
        self.cache = self.empty_cache(batch, rollback)
        if static:
            for storage in (self.cache._state.core, self.cache._state.raw):
                storage.fill_(float("nan"))

    def empty_cache(self, batch: int, rollback: int) -> CCACache:
        return CCACache(
            self.spec, batch=batch, q_heads=self.heads[0], kv_heads=self.heads[1], head_dim=HEAD_DIM,
            dtype=torch.float32, device=DEVICE, backend=self.backend, rollback=rollback, max_tokens=self.max_tokens,
            profile=SMALL,
        )  # fmt: skip

    def tensors(self, rows: list[list[int]]) -> list[Tensor]:
        """q, k and v [B, H, T, D] of rows of token numbers; a negative number is padding, NaN."""
        shape = len(rows), len(rows[0]), HEAD_DIM
        found = [
            torch.full((shape[0], heads, *shape[1:]), float("nan"), device=DEVICE)
            for heads in (*self.heads, self.heads[1])
        ]
        for b, row in enumerate(rows):
            for t, number in enumerate(row):
                if number >= 0:
                    generator = torch.Generator().manual_seed(number)
                    for whole in found:
                        whole[b, :, t] = torch.randn(whole.shape[1], HEAD_DIM, generator=generator)
        return found

    def append(self, bounds: list[tuple[int, int]], size: int, call: Any) -> None:
        """Append new tokens to the rows between their bounds with `call`, and check all that comes out."""
        chunk = [[-1] * size for _ in self.rows]
        for row, (first, end) in zip(chunk, bounds, strict=True):
            row[first:end] = range(self.tokens, self.tokens + end - first)
            self.tokens += end - first
        longest = max(len(row) + end - first for row, (first, end) in zip(self.rows, bounds, strict=True))
        if self.max_tokens is not None and longest > self.max_tokens:
            with pytest.raises(ValueError, match="max_tokens must be at least"):
                call(*self.tensors(chunk))
            return
        out = call(*self.tensors(chunk))
        for b, (first, end) in enumerate(bounds):
            for number in chunk[b][first:end]:
                self.rings[b][len(self.rows[b]) % self.ring_size] = number
                self.rows[b].append(number)
            self.written[b] = max(self.written[b], len(self.rows[b]) // self.spec.group_size)
            assert not out[b, :, :first].any()
            assert not out[b, :, end:].any()
            if end > first:
                self.check_row(b, out[b : b + 1, :, first:end])

    def check_row(self, b: int, out: Tensor) -> None:
        """Hold the newest outputs and all cores of a row to the oracle, and remember the cores."""
        model = ErrorModel(*(x.cpu() for x in self.tensors([self.rows[b]])), self.spec, torch.float32)
        newest = type(model.out)(*(x[:, :, -out.shape[2] :] for x in model.out))
        self.cores[b] = self.held_cores(b)
        pairs = (
            ("out", out, newest),
            ("k_core", self.cores[b][0], model.k_core),
            ("v_core", self.cores[b][1], model.v_core),
        )
        for name, actual, expected in pairs:
            verdict = compare(name, actual, expected)
            assert verdict.ok, verdict

    def held_cores(self, b: int) -> Tensor:
        """[2, 1, Hc, C, D]: a copy of the core keys and values of a row."""
        groups = len(self.rows[b]) // self.spec.group_size
        return torch.stack([x[b : b + 1, :, :groups] for x in (self.cache.k_core, self.cache.v_core)])

    @rule()
    def append_one(self) -> None:
        self.append([(0, 1)] * len(self.rows), 1, self.cache.decode)

    @rule(size=st.integers(2, 6))
    def append_some(self, size: int) -> None:
        self.append([(0, size)] * len(self.rows), size, self.cache.decode)

    @rule(size=st.integers(0, 9))
    def prefill(self, size: int) -> None:
        self.append([(0, size)] * len(self.rows), size, self.cache.prefill)

    @rule(data=st.data(), size=st.integers(1, 7))
    def prefill_padded(self, data: st.DataObject, size: int) -> None:
        edges = st.tuples(st.integers(0, size), st.integers(0, size)).map(sorted).map(tuple)
        bounds = [data.draw(edges) for _ in self.rows]
        table = torch.tensor(bounds, dtype=torch.int32, device=DEVICE)
        self.append(bounds, size, lambda q, k, v: self.cache.prefill(q, k, v, seq_bounds=table))

    def can_keep(self, row: int, keep: int) -> bool:
        """Whether the raw tokens that the query at position `keep` sees before itself are all in the ring."""
        needed = self.spec.local_range(keep)[:-1]
        return keep == 0 or all(self.rings[row].get(p % self.ring_size) == self.rows[row][p] for p in needed)

    @precondition(lambda self: any(self.rows))
    @rule(data=st.data(), from_the_end=st.booleans())
    def crop(self, data: st.DataObject, from_the_end: bool) -> None:
        n = data.draw(st.integers(0, max(map(len, self.rows))))
        n = -min(n, 4) if from_the_end else n
        kept = [len(row) + n if n < 0 else min(n, len(row)) for row in self.rows]
        if all(keep >= 0 and self.can_keep(row, keep) for row, keep in enumerate(kept)):
            self.cache.crop(n)
            self.rows = [row[:keep] for row, keep in zip(self.rows, kept, strict=True)]
            groups = [keep // self.spec.group_size for keep in kept]
            self.cores = [cores[:, :, :, :count] for cores, count in zip(self.cores, groups, strict=True)]
        else:
            with pytest.raises(ValueError, match="n must"):
                self.cache.crop(n)

    @precondition(lambda self: any(self.rows))
    @rule()
    def reset(self) -> None:
        """Empty every row; the slots are used again."""
        self.cache.crop(0)
        self.rows = [[] for _ in self.rows]
        self.cores = [cores[:, :, :, :0] for cores in self.cores]

    @precondition(lambda self: any(self.rows))
    @rule()
    def build_again(self) -> None:
        """A fresh cache that gets each row's tokens at once holds the same cores.

        Compiled, prefill and decode need not pool in the same order: there the bounds of both hold.
        """
        for b, row in enumerate(self.rows):
            fresh, tensors = self.empty_cache(1, 0), self.tensors([row])
            fresh.prefill(*tensors)
            assert fresh.lengths.tolist() == [len(row)]
            for name, held in zip(("k_core", "v_core"), self.cores[b], strict=True):
                again = getattr(fresh, name)
                if DEVICE == "cpu" or not again.numel():
                    verdict = compare_bitwise(name, held, again)
                else:
                    bound = getattr(ErrorModel(*(x.cpu() for x in tensors), self.spec, torch.float32), name).bound
                    verdict = agree(name, held.cpu(), again.cpu(), bound, bound)
                assert verdict.ok, verdict

    @rule(data=st.data())
    def reorder(self, data: st.DataObject) -> None:
        index = [data.draw(st.integers(0, len(self.rows) - 1)) for _ in self.rows]
        self.cache.reorder(torch.tensor(index))
        self.rows = [list(self.rows[row]) for row in index]
        self.rings = [dict(self.rings[row]) for row in index]
        self.cores = [self.cores[row] for row in index]
        self.written = [self.written[row] for row in index]

    @invariant()
    def cores_and_sizes_are_those_of_the_tokens(self) -> None:
        lengths = [len(row) for row in self.rows]
        assert self.cache.lengths.tolist() == lengths
        assert self.cache.seen == max(lengths)
        core_heads = self.heads[0] if self.spec.core_heads == "query" else self.heads[1]
        raw = self.heads[1] * (self.spec.window_size + self.spec.group_size - 1)
        groups = [length // self.spec.group_size for length in lengths]
        assert self.cache.nbytes == sum(2 * 4 * HEAD_DIM * (core_heads * count + raw) for count in groups)
        for b, cores in enumerate(self.cores):
            assert (verdict := compare_bitwise("cores", self.held_cores(b), cores)).ok, verdict

    @invariant()
    def slots_without_a_token_are_untouched(self) -> None:
        """Static storage was full of NaN at first."""
        if self.max_tokens is None:
            return
        state = self.cache._state
        for b, (ring, written) in enumerate(zip(self.rings, self.written, strict=True)):
            unused = [slot for slot in range(self.ring_size) if slot not in ring]
            assert state.raw[:, b, :, unused].isnan().all()
            assert state.core[:, b, :, written:].isnan().all()
            assert not state.core[:, b, :, :written].isnan().any()


class Eager(Cache):
    """On plain PyTorch."""

    backend = "eager"


class Triton(Cache):
    """On the kernels."""

    backend = "triton"


TestEager = Eager.TestCase
TestEager.settings = settings(max_examples=3 * settings.default.max_examples, stateful_step_count=16)
TestTriton = Triton.TestCase
TestTriton.settings = settings(stateful_step_count=10)
