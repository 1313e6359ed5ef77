"""The tensors behind `CCACache` and what is done to them on the device; nothing here is read back to the host."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import fused
from .configs import configs_for
from .kernels import eager
from .kernels.decode import MAX_ROWS, UNBOUNDED, DecodeConfig, launch_decode
from .kernels.layout import Sequences
from .kernels.pooling import launch_pooling
from .kernels.tunable import accumulator_dtype
from .replay import replayed
from .spec import CCASpec


class CacheState:
    """Core tokens, a ring of raw tokens and the counters of a batch.

    Position p of row b lies at ``raw[:, b, :, p % W]``, core c at ``core[:, b, :, c]``, keys before values;
    ``seen[b]`` tokens were appended.

    Args:
        spec: what is computed.
        shape: (batch, q_heads, kv_heads, head_dim).
        dtype: of the inputs; bfloat16 under Triton's interpreter is kept as float32.
        ring: W, the slots of the ring. cores: slots for core tokens.
        max_tokens: tokens that no row may exceed; None: `grow` is called in time.
        backend: "triton" or "eager". profile: a handle of `register_profile`.
    """

    def __init__(
        self,
        spec: CCASpec,
        shape: tuple[int, int, int, int],
        dtype: torch.dtype,
        device: torch.device | str,
        *,
        ring: int,
        max_tokens: int | None,
        backend: str,
        profile: str,
    ) -> None:
        batch, q_heads, kv_heads, head_dim = shape
        emulated = backend == "triton" and fused.emulated(torch.empty(0, dtype=dtype))
        self.dtype = torch.float32 if emulated else dtype
        self.spec, self.max_tokens, self.backend, self.profile = spec, max_tokens, backend, profile
        self.seen = torch.zeros(batch, dtype=torch.int32, device=device)
        self.raw = torch.zeros(2, batch, kv_heads, ring, head_dim, dtype=self.dtype, device=device)
        cores = 0 if max_tokens is None else spec.num_groups(max_tokens)
        core_heads = spec.num_core_heads(q_heads, kv_heads)
        self.core = torch.zeros(2, batch, core_heads, cores, head_dim, dtype=self.dtype, device=device)
        # whether tokens past max_tokens can come unnoticed by the host
        self.may_overflow = False
        self._decode_config: DecodeConfig | None = None

    @property
    def ring(self) -> int:
        """Slots of the ring."""
        return self.raw.shape[3]

    @property
    def nbytes(self) -> int:
        """Bytes of the storage."""
        return sum(x.numel() * x.element_size() for x in (self.core, self.raw, self.seen))

    def grow(self, cores: int) -> None:
        """Make room for `cores` core tokens; where that takes more storage, for a quarter of them on top."""
        if cores > (held := self.core.shape[3]):
            old, shape = self.core, list(self.core.shape)
            shape[3] = cores + cores // 4
            self.core = old.new_zeros(shape)
            self.core[:, :, :, :held] = old
            self._decode_config = None

    def reorder(self, index: Tensor) -> None:
        """Row b becomes a copy of row ``index[b]``; the storage stays where it is."""
        for storage, axis in ((self.core, 1), (self.raw, 1), (self.seen, 0)):
            storage.copy_(storage.index_select(axis, index))

    def takes_in_one_step(self, q: Tensor, k: Tensor) -> bool:
        """Whether `step` can append the tokens of q (B, Hq, n, D)."""
        new = q.shape[2]
        fits = new <= self.ring - self.spec.max_local_tokens() + 1 and new * (q.shape[1] // k.shape[1]) <= MAX_ROWS
        return fits and self.backend == "triton"

    def step(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Append a few tokens with the decode kernels; a token past `max_tokens` is lost, its output is NaN."""
        if self._decode_config is None:
            # chosen for the most tokens that this storage holds
            most = self.max_tokens or max(1, self.core.shape[3] * self.spec.group_size)
            like = q[:, :, :1].expand(-1, -1, most, -1)
            self._decode_config = configs_for(self.profile, like, k, self.spec)["decode"]
        how: dict[str, Any] = {"spec": self.spec, "config": self._decode_config}
        how["max_tokens"] = self.max_tokens or UNBOUNDED
        (out,) = replayed((_step, *how.values()), partial(_step, how), (q, k, v, self.core, self.raw, self.seen))
        return out

    def begin(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Append the first tokens of every row, at most `max_tokens`, with the kernels for whole sequences."""
        tokens, kept = q.shape[2], min(q.shape[2], self.ring)
        if self.backend == "eager":
            return self.extend(q, k, v)
        core = self.core[:, :, :, : self.spec.num_groups(tokens)]
        out = self._attend(q, k, v, core, Sequences.dense(q.shape[0]))
        slots = torch.arange(tokens - kept, tokens, device=q.device) % self.ring
        self.raw.index_copy_(3, slots, torch.stack((k[:, :, tokens - kept :], v[:, :, tokens - kept :])))
        self.seen.fill_(tokens)
        return out

    def extend(self, q: Tensor, k: Tensor, v: Tensor, bounds: Tensor | None = None) -> Tensor:
        """Append a chunk of any length, or of each row its tokens ``bounds[b, 0] .. bounds[b, 1] - 1``.

        The ring is unrolled before the chunk, so that pooling and attention see one run of raw tokens, and its end
        is rolled up again. A token past `max_tokens` is lost, its output is NaN.
        """
        seen, tokens = self.seen, q.shape[2]
        first, asked = (torch.zeros_like(seen), torch.full_like(seen, tokens)) if bounds is None else bounds.unbind(1)
        end = asked if self.max_tokens is None else torch.minimum(asked, first + (self.max_tokens - seen))
        raw = self._unrolled(k, v, first)
        if self.backend == "triton":
            sequences = Sequences.chunk(torch.stack((first, end), dim=1), seen, self.ring)
            out = self._attend(q, raw[0], raw[1], self.core, sequences)
        else:
            out = self._attend_eagerly(q, raw, first, end)
        if self.may_overflow:
            row = torch.arange(tokens, device=q.device)
            lost = (row >= end[:, None]) & (row < asked[:, None])
            out.masked_fill_(lost[:, None, :, None], float("nan"))
        total = seen + end - first
        slot = torch.arange(self.ring, device=q.device)
        held = total[:, None] - 1 - (total[:, None] - 1 - slot) % self.ring  # the position that each slot gets
        self.raw.copy_(raw.gather(3, self._rows(held - (seen - first)[:, None] + self.ring)))
        seen.copy_(total)
        return out

    def _rows(self, index: Tensor) -> Tensor:
        """index [B, N] of raw rows as gather and scatter take it: [2, B, Hkv, N, D]."""
        return index.long()[None, :, None, :, None].expand(2, -1, self.raw.shape[2], -1, self.raw.shape[4])

    def _unrolled(self, k: Tensor, v: Tensor, first: Tensor) -> Tensor:
        """[2, B, Hkv, W + T, D]: the ring in the order of positions, just before token ``first[b]`` of the chunk.

        Row x of sequence b is position ``x - W + seen[b] - first[b]``; rows before ``first[b]`` are not set.
        """
        order = torch.arange(self.ring, device=k.device)
        slots = (self.seen[:, None] + order) % self.ring
        raw = self.raw.new_empty(2, *k.shape[:2], self.ring + k.shape[2], k.shape[3])
        raw[0, :, :, self.ring :] = k
        raw[1, :, :, self.ring :] = v
        return raw.scatter_(3, self._rows(first[:, None] + order), self.raw.gather(3, self._rows(slots)))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, core: Tensor, sequences: Sequences) -> Tensor:
        """Pool into `core` and attend to it and the raw tokens with the Triton kernels."""
        configs = configs_for(self.profile, q, k, self.spec)
        pool_lse = core.new_empty(core.shape[1:4], dtype=accumulator_dtype(q.dtype))
        launch_pooling(
            q, k, v, core[0], core[1], pool_lse, spec=self.spec, sequences=sequences, config=configs["pooling"]
        )  # fmt: skip
        return fused.attend(q, k, v, core[0], core[1], self.spec, sequences, configs)[0]

    def _attend_eagerly(self, q: Tensor, raw: Tensor, first: Tensor, end: Tensor) -> Tensor:
        """The same in plain PyTorch: all rows at once if they are alike, else one by one."""
        out, g = torch.zeros_like(q), self.spec.group_size
        table = torch.stack((self.seen, first, end), dim=1).tolist()
        alike = all(row == table[0] for row in table)
        for row, (seen, start, stop) in enumerate(table[:1] if alike else table):
            rows = slice(None) if alike else slice(row, row + 1)
            base = self.ring + start - seen  # where position 0 lies or would lie
            old, all_groups = seen // g, (seen + stop - start) // g
            core = self.core[:, rows, :, :all_groups]
            if all_groups > old:
                q_last = q[rows, :, start - seen + (old + 1) * g - 1 : stop : g]
                members = raw[:, rows, :, base + old * g : base + all_groups * g]
                pooled = eager.pool_groups(q_last, members[0], members[1], self.spec)
                core[0, :, :, old:], core[1, :, :, old:] = pooled
            oldest = max(0, seen - self.ring)
            keys = raw[:, rows, :, base + oldest : self.ring + stop]
            out[rows, :, start:stop] = eager.attend(
                q[rows, :, start:stop], core[0], core[1], keys[0], keys[1], self.spec, q_first=seen, k_first=oldest
            )[0]
        return out


def _step(
    how: dict[str, Any], q: Tensor, k: Tensor, v: Tensor, core: Tensor, raw: Tensor, seen: Tensor
) -> tuple[Tensor]:
    """What the queries of a few new tokens see, which are appended; `how` is for `launch_decode`."""
    out = torch.empty_like(q)
    launch_decode(q, k, v, out, core[0], core[1], raw[0], raw[1], seen, seen, **how)
    return (out,)
