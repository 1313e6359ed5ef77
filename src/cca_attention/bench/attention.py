"""Whole sequences: pooling, forward, backward and their memory, of CCA and of its peers on the same tensors."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import fused
from ..attention import cca_attention
from ..configs import Configs, configs_for
from ..kernels import eager
from ..kernels.layout import Sequences
from ..verify.gate import launches
from .lab import Figures, Lab
from .peers import CCA, EAGER, FLEX, Attention, dense, flex
from .plan import FORWARD, MEMORY, POOLING, UNORDERED, Case
from .record import Evidence, Row
from .samples import Pass, backward_errors, evidence, forward_errors, pooling_errors
from .work import held_bytes

SEED = 20241219


class Tensors(NamedTuple):
    """q and dout (B, Hq, T, D), k and v (B, Hkv, T, D), standard-normal."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor


def attention_rows(case: Case, lab: Lab) -> Iterator[Row]:
    """The rows of a case, one after the other."""
    subject = Subject(case, lab)
    for what in case.whats:
        if what == POOLING:
            yield lab.row(case, what, CCA, subject.pooling)
            if case.peers:
                yield lab.row(case, what, EAGER, subject.eager_pooling)
            continue
        yield lab.row(case, what, CCA, partial(subject.cca, what))
        for peer in case.peers if what != UNORDERED else ():  # a peer has one backward
            yield lab.row(case, what, peer, partial(subject.peer, what, peer))


class Subject:
    """The tensors of a case, made when they are first needed, and what is done with them."""

    def __init__(self, case: Case, lab: Lab) -> None:
        self._problem, self._spec, self._lab = case.problem, case.problem.spec, lab

    @cached_property
    def _tensors(self) -> Tensors:
        p, device = self._problem, self._lab.device
        generator = torch.Generator(device).manual_seed(SEED)
        heads = (p.q_heads, p.kv_heads, p.kv_heads, p.q_heads)
        shapes = [(p.batch, h, p.seq_len, p.head_dim) for h in heads]
        dtype = getattr(torch, p.dtype)
        return Tensors(*(torch.randn(shape, device=device, dtype=dtype, generator=generator) for shape in shapes))

    @cached_property
    def _configs(self) -> Configs:
        return configs_for(self._lab.profile, self._tensors.q, self._tensors.k, self._spec)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
        p = self._problem
        return cca_attention(
            q, k, v, group_size=p.group_size, window_size=p.window_size, core_heads=p.core_heads, pooling=p.pooling,
            profile=self._lab.profile or None, **options,
        )  # fmt: skip

    # --- CCA ------------------------------------------------------------------------------------------------------

    def cca(self, what: str) -> Figures:
        """Evidence first, then figures."""
        if what == FORWARD:
            found = self._evidence(grads=False)
            with torch.no_grad():
                return {"ms": self._lab.meter.time_ms(lambda: self._attend(*self._tensors[:3])), "evidence": found}
        ordered = what != UNORDERED
        if not ordered and self._launched(deterministic=True) == self._launched(deterministic=False):
            return {"not_offered": "deterministic=False launches the same kernels"}
        found = self._evidence(grads=True, deterministic=ordered)
        attend: Attention = partial(self._attend, deterministic=ordered)
        return {**self._with_backward(what, attend), "held_bytes": held_bytes(self._problem), "evidence": found}

    def _launched(self, **options: Any) -> set[Any]:
        leaves = [x.detach().requires_grad_() for x in self._tensors[:3]]
        with launches() as launched:
            torch.autograd.grad(self._attend(*leaves, **options), leaves, self._tensors.dout)
        return launched

    def _evidence(self, *, grads: bool, **options: Any) -> tuple[Evidence, ...]:
        q, k, v, dout = self._tensors
        leaves = [x.detach().requires_grad_(grads) for x in (q, k, v)]
        with launches() as launched:
            out = self._attend(*leaves, **options)  # as it is timed: without lse, other kernels may give it
            found = torch.autograd.grad(out, leaves, dout) if grads else None
            with torch.no_grad():
                _, lse = self._attend(q, k, v, return_lse=True, **options)
        run = Pass(q, k, v, out.detach(), lse, dout, found)
        samples = [evidence("rows of out", forward_errors(run, self._spec), q.dtype)]
        if grads:
            samples.append(evidence("rows and groups of dq, dk, dv", backward_errors(run, self._spec), q.dtype))
        return self._lab.demand(launched, self._configs, self._problem, *samples)

    def pooling(self) -> Figures:
        """The cores alone."""
        q, k, v, _ = self._tensors
        pool = partial(fused.pool, q, k, v, self._spec, Sequences.dense(q.shape[0]), self._configs)
        with launches() as launched:
            cores = pool()[:2]
        sample = evidence("core tokens", pooling_errors(q, k, v, cores, self._spec), q.dtype)
        found = self._lab.demand(launched, self._configs, self._problem, sample)
        return {"ms": self._lab.meter.time_ms(pool), "evidence": found}

    # --- peers ----------------------------------------------------------------------------------------------------

    def eager_pooling(self) -> Figures:
        """The cores as written in plain PyTorch."""
        q, k, v, _ = self._tensors
        g = self._spec.group_size
        last = q[:, :, g - 1 : self._spec.num_groups(q.shape[2]) * g : g]
        return {"ms": self._lab.meter.time_ms(lambda: eager.pool_groups(last, k, v, self._spec))}

    @cached_property
    def _flex(self) -> Attention:
        q, k, v, _ = self._tensors
        k_core, v_core, _ = fused.pool(q, k, v, self._spec, Sequences.dense(q.shape[0]), self._configs)
        return flex(self._problem, k_core, v_core)

    def peer(self, what: str, name: str) -> Figures:
        """A peer's figures."""
        attend = self._flex if name == FLEX else dense(name)
        if what == FORWARD:
            with torch.no_grad():
                return {"ms": self._lab.meter.time_ms(lambda: attend(*self._tensors[:3]))}
        return self._with_backward(what, attend)

    # --- either ---------------------------------------------------------------------------------------------------

    def _with_backward(self, what: str, attend: Attention) -> Figures:
        """Time (but of the memory suite) and peak memory of forward and backward."""
        q, k, v, dout = self._tensors
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]

        def call() -> tuple[Tensor, ...]:
            return torch.autograd.grad(attend(*leaves), leaves, dout)

        call()  # what is compiled or kept from the first call on is not of every call
        results = sum(x.numel() * x.element_size() for x in (q, q, k, v))
        extra = self._lab.meter.peak_bytes(call) - results
        ms = None if what == MEMORY else self._lab.meter.time_ms(call)
        return {"ms": ms, "extra_bytes": max(0, extra)}
