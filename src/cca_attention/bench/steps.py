"""Decode: one token through as many layers as keep their caches out of L2, in a CUDA graph, beside dense attention."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from ..cache import CCACache
from ..configs import configs_for
from ..problem import Problem
from ..verify.gate import launches
from .lab import Figures, Lab, require
from .peers import CCA, dense
from .plan import DECODE, Case
from .record import Evidence, Row
from .samples import STEPS, evidence, pooling_errors, step_error
from .timing import steps_of
from .work import moved_bytes, step_keys

CHUNK = 8192
"""Tokens of a call that fills a cache; the queries of the whole context would not fit beside a large batch."""


def decode_rows(case: Case, lab: Lab) -> Iterator[Row]:
    """CCA, then each peer over all keys and over as many as CCA sees."""
    yield lab.row(case, DECODE, CCA, partial(_cca, case.problem, lab))
    for peer in case.peers:
        for keys in dict.fromkeys((case.problem.seq_len + 1, step_keys(case.problem))):
            yield lab.row(case, DECODE, peer, partial(_peer, case.problem, lab, peer, keys), keys=keys)


def _tensor(problem: Problem, lab: Lab, heads: int, tokens: int) -> Tensor:
    shape = (problem.batch, heads, tokens, problem.head_dim)
    return torch.randn(shape, device=lab.device, dtype=getattr(torch, problem.dtype))


class Layer:
    """A cache that holds `seq_len` random tokens, and one more token for every step."""

    def __init__(self, problem: Problem, lab: Lab, steps: int) -> None:
        p, self._spec = problem, problem.spec
        self.cache = CCACache(
            p.spec, batch=p.batch, q_heads=p.q_heads, kv_heads=p.kv_heads, head_dim=p.head_dim,
            dtype=getattr(torch, p.dtype), device=lab.device, max_tokens=p.seq_len + steps, profile=lab.profile or None,
        )  # fmt: skip
        size = min(p.seq_len, max(CHUNK, p.spec.max_local_tokens()))
        first = p.seq_len % size
        for tokens in [first] * bool(first) + [size] * (p.seq_len // size):
            q, k, v = (_tensor(p, lab, heads, tokens) for heads in (p.q_heads, p.kv_heads, p.kv_heads))
            self.cache.prefill(q, k, v)
        self.held = p.seq_len
        self.pooled = self._pooled(q, k, v)
        kept = p.spec.max_local_tokens()
        self._history = k[:, :, -kept:].clone(), v[:, :, -kept:].clone()
        self.q, self.k, self.v = (_tensor(p, lab, heads, 1) for heads in (p.q_heads, p.kv_heads, p.kv_heads))
        self.out = torch.empty(0)

    def _pooled(self, q: Tensor, k: Tensor, v: Tensor) -> Evidence:
        """The cores of the last chunk, from where its first whole group begins."""
        g, start = self._spec.group_size, self.held - q.shape[2]
        skipped = -start % g
        q, k, v = (x[:, :, skipped:] for x in (q, k, v))
        cores = self.cache.k_core, self.cache.v_core
        errors = pooling_errors(q, k, v, cores, self._spec, first=(start + skipped) // g)
        return evidence("core tokens of the cache", errors, q.dtype)

    def step(self) -> None:
        """Append the token and attend to what it sees."""
        self.out = self.cache.decode(self.q, self.k, self.v)

    def checked(self, check: str) -> Evidence:
        """Sampled rows of the newest step's result."""
        return evidence(check, self._errors(), self.q.dtype)

    def _errors(self) -> Iterator[float]:
        steps, spec = self.cache.seen - self.held, self._spec
        position = self.held + steps - 1
        cores, local = spec.visible_cores(position), len(spec.local_range(position))
        raw = [
            torch.cat((old, new.expand(-1, -1, steps, -1)), 2)[:, :, -local:]
            for old, new in zip(self._history, (self.k, self.v), strict=True)
        ]
        kept = self.cache.k_core, self.cache.v_core
        generator = torch.Generator().manual_seed(0)
        for _ in range(STEPS):
            b, h = (int(torch.randint(n, (), generator=generator)) for n in self.q.shape[:2])
            core_head, kv_head = (h * n // self.q.shape[1] for n in (kept[0].shape[1], self.k.shape[1]))
            keys, values = (
                torch.cat((core[b, core_head, :cores], x[b, kv_head])) for core, x in zip(kept, raw, strict=True)
            )
            yield step_error(self.q[b, h, 0], (keys, values), self.out[b, h, 0], spec.softmax_scale(self.q.shape[3]))


def _cca(problem: Problem, lab: Lab) -> Figures:
    count = lab.meter.layers(moved_bytes(DECODE, problem))
    repeats, steps = steps_of(count)
    layers = [Layer(problem, lab, steps + 1) for _ in range(count)]
    with launches() as launched:
        for layer in layers:
            layer.step()
    first = layers[0]
    like = first.q.expand(-1, -1, problem.seq_len + steps + 1, -1)
    configs = configs_for(lab.profile, like, first.k, problem.spec)
    found = lab.demand(launched, configs, problem, first.pooled, first.checked("first step"))
    ms = lab.meter.replay_ms([layer.step for layer in layers], repeats)
    again = require(layers[-1].checked("step after the last replay"))
    return {"ms": ms, "evidence": (*found, *again)}


def _peer(problem: Problem, lab: Lab, name: str, keys: int) -> Figures:
    count = lab.meter.layers(moved_bytes(DECODE, problem, keys=keys))
    attend = dense(name, is_causal=False)
    heads = (problem.q_heads, 1), (problem.kv_heads, keys), (problem.kv_heads, keys)
    layers = [[_tensor(problem, lab, h, n) for h, n in heads] for _ in range(count)]
    with torch.no_grad():
        calls = [partial(attend, *layer) for layer in layers]
        return {"ms": lab.meter.replay_ms(calls, steps_of(count)[0])}
