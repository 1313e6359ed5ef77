"""`CCACache`: the decode state of one layer (spec section 6)."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .arguments import DTYPES, check_sequences, check_tensors
from .attention import Backend, choose_backend
from .cache_state import CacheState
from .configs import register_profile
from .kernels.tunable import Schedule
from .problem import check_heads
from .spec import CCASpec, check_positive_int

if TYPE_CHECKING:
    from .profiles.schema import Profile

FIRST_CORES = 64
"""Core tokens that growing storage starts with; it doubles from there."""


class CCACache:
    """Core tokens, the newest raw tokens and the number of tokens seen, for a batch of sequences of one layer.

    Rows may hold different numbers of tokens. Core tokens are appended as their groups complete; the newest
    ``w + g - 1 + rollback`` raw tokens lie in a ring.

    With `max_tokens` all storage is allocated here and stays where it is, and `prefill` (without `seq_bounds`) and
    `decode` with the Triton kernels read nothing back from the device: they can be captured in a CUDA graph, after
    one such call that compiles them, and every replay continues from the device's own counter. A token past
    `max_tokens` is refused where the host can know of it; where it cannot, because graphs were replayed, the token is
    not stored and its output is NaN. Without `max_tokens` the cores' storage grows, and capture is refused.

    Under Triton's interpreter bfloat16 is emulated: the state is float32, and outputs are rounded once.

    Args:
        spec: what is computed.
        batch, q_heads, kv_heads, head_dim, dtype, device: of the tensors that will come.
        max_tokens: the most tokens of a row; None: any number.
        rollback: `crop` can always drop the ``rollback + 1`` newest tokens, and the decode kernels append as many in
            one step; more go through the kernels of prefill.
        backend, profile: as in `cca_attention`.

    Raises:
        TypeError, ValueError: naming the argument, its value and what is allowed.
    """

    def __init__(
        self,
        spec: CCASpec,
        *,
        batch: int,
        q_heads: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str,
        max_tokens: int | None = None,
        rollback: int = 0,
        backend: Backend = "auto",
        profile: str | Profile | Schedule | None = None,
    ) -> None:
        self._sizes = {"batch": batch, "q_heads": q_heads, "kv_heads": kv_heads, "head_dim": head_dim}
        _check_sizes(spec, self._sizes, max_tokens, rollback)
        if dtype not in DTYPES:
            raise TypeError(f"dtype must be float16, bfloat16, float32 or float64, got {dtype}")
        probe = torch.empty(0, device=device)
        self.backend = choose_backend(backend, probe)
        if self.backend == "triton" and probe.is_cuda and dtype == torch.float64:
            raise TypeError("dtype must be float16, bfloat16 or float32 on CUDA, got torch.float64")
        self.spec, self.dtype, self.device = spec, dtype, probe.device
        self.max_tokens, self.rollback = max_tokens, rollback
        shape = (batch, q_heads, kv_heads, head_dim)
        ring = spec.max_local_tokens() + rollback
        self._state = CacheState(
            spec, shape, dtype, self.device,
            ring=ring, max_tokens=max_tokens, backend=self.backend, profile=register_profile(profile),
        )  # fmt: skip
        # what the host knows of each row: the tokens it holds (once a graph was captured, at least), and the position
        # before which slots of the ring were overwritten by tokens since dropped
        self._known, self._oldest = [0] * batch, [0] * batch

    @property
    def lengths(self) -> Tensor:
        """(B,) int32 on the device: tokens that each row holds."""
        return self._state.seen.clone()

    @property
    def seen(self) -> int:
        """Tokens that the longest row holds. Reads the device if a graph was captured."""
        return max(self._lengths())

    @property
    def nbytes(self) -> int:
        """Bytes of what is held: `CCASpec.cache_bytes` of each row's length, so without room for more or rollback."""
        sizes = {**self._sizes, "batch": 1, "element_bytes": self.dtype.itemsize}
        return sum(self.spec.cache_bytes(length, **sizes) for length in self._lengths())

    @property
    def allocated_nbytes(self) -> int:
        """Bytes of the storage."""
        return self._state.nbytes

    @property
    def k_core(self) -> Tensor:
        """View [B, Hc, C, D] of the core keys, C as of the longest row; row b has ``lengths[b] // g`` of them."""
        return self._state.core[0, :, :, : self.spec.num_groups(self.seen)]

    @property
    def v_core(self) -> Tensor:
        """View [B, Hc, C, D] of the core values; see `k_core`."""
        return self._state.core[1, :, :, : self.spec.num_groups(self.seen)]

    def prefill(self, q: Tensor, k: Tensor, v: Tensor, seq_bounds: Tensor | None = None) -> Tensor:
        """Append a chunk of T tokens, any number any number of times, and return what its queries see.

        Args:
            q: (B, Hq, T, D). k, v: (B, Hkv, T, D). q and k rotated, last dimensions contiguous.
            seq_bounds: (B, 2) int32: first and one past the last real token of each row of a padded chunk. Padding
                does not enter the state. Read by the host.

        Returns:
            (B, Hq, T, D) in q's dtype, zero in padding rows.

        Raises:
            TypeError, ValueError: naming the argument, its value and what is allowed; nothing was appended.
            RuntimeError: if a CUDA graph is being captured and this call cannot be.
        """
        self._check(q, k, v)
        check_sequences(q, None, seq_bounds)
        tokens = q.shape[2]
        new = [tokens] * len(self._known) if seq_bounds is None else self._real_tokens(tokens, seq_bounds)
        self._reserve(new)
        if tokens == 0:
            return torch.empty_like(q)
        empty = seq_bounds is None and not self._state.may_overflow and not any(self._known)
        with self._on_device():
            stored = self._stored(q, k, v)
            out = self._state.begin(*stored) if empty else self._state.extend(*stored, seq_bounds)
        self._count(new)
        return out.to(self.dtype)

    def decode(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Append n >= 1 tokens to every row and return what their queries see, (B, Hq, n, D) in q's dtype.

        Arguments and errors are those of `prefill`. Two launches for up to ``rollback + 1`` tokens.
        """
        self._check(q, k, v)
        if q.shape[2] == 0:
            raise ValueError("q, k and v must bring at least one token to decode, got 0; prefill takes none as well")
        new = [q.shape[2]] * len(self._known)
        self._reserve(new)
        append = self._state.step if self._state.takes_in_one_step(q, k) else self._state.extend
        with self._on_device():
            out = append(*self._stored(q, k, v))
        self._count(new)
        return out.to(self.dtype)

    def crop(self, n: int) -> None:
        """Keep the first `n` tokens of each row (shorter rows stay as they are), or drop the ``-n`` newest of each.

        What follows is what would have followed a fresh run over the kept tokens. Not during capture.

        Raises:
            TypeError, ValueError: naming the argument, its value and what is allowed: a row cannot be taken back to
                where the next query would need raw tokens that are gone. No row was changed then.
        """
        if isinstance(n, bool) or not isinstance(n, int):
            raise TypeError(f"n must be an int, got {n!r}")
        self._refuse_capture("crop")
        ring, held = self._state.ring, self._lengths()
        oldest = [max(first, length - ring) for first, length in zip(self._oldest, held, strict=True)]
        kept = [min(n, length) if n >= 0 else length + n for length in held]
        for row, (keep, first) in enumerate(zip(kept, oldest, strict=True)):
            if keep < 0:
                raise ValueError(f"n must drop no more tokens than a row holds, got {n}: row {row} holds {held[row]}")
            needed = self.spec.local_range(keep).start
            if needed < first and needed < keep:
                raise ValueError(
                    f"n must keep at least {self._least_kept(first)} of the {held[row]} tokens of row {row}, or "
                    f"{'none' if self.spec.window_size > 1 else 'whole groups'}, got {n}: the raw tokens before "
                    f"position {first} are gone (rollback={self.rollback})"
                )
        self._state.seen.copy_(torch.tensor(kept, dtype=torch.int32))
        self._known = kept
        self._oldest = [first if keep else 0 for first, keep in zip(oldest, kept, strict=True)]

    def reorder(self, index: Tensor) -> None:
        """Row b becomes a copy of row ``index[b]`` (beam search). Not during capture.

        Args:
            index: (B,) int32 or int64, each in 0 .. B - 1. Read by the host.
        """
        if not isinstance(index, Tensor) or index.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"index must be an int32 or int64 tensor, got {getattr(index, 'dtype', index)}")
        self._refuse_capture("reorder")
        rows, batch = index.tolist(), len(self._known)
        if index.shape != (batch,) or not all(0 <= row < batch for row in rows):
            raise ValueError(f"index must be of shape ({batch},) with values in 0..{batch - 1}, got {rows}")
        self._state.reorder(index.to(self.device))
        self._known, self._oldest = [self._known[row] for row in rows], [self._oldest[row] for row in rows]

    def _lengths(self) -> list[int]:
        """Tokens that each row holds."""
        if self._state.may_overflow:
            self._refuse_capture("reading the lengths")
            self._known = self._state.seen.tolist()
        return self._known

    def _least_kept(self, oldest: int) -> int:
        """The fewest tokens, above 0, after which a query sees no raw token before position `oldest` > 0."""
        groups = -(-oldest // self.spec.group_size)
        return groups * self.spec.group_size + self.spec.window_size - 1

    def _on_device(self) -> AbstractContextManager[object]:
        """Triton launches on the current device, which need not be this cache's."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    def _capturing(self) -> bool:
        return self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()

    def _refuse_capture(self, what: str) -> None:
        if self._capturing():
            raise RuntimeError(f"{what} reads the device, so that a CUDA graph cannot capture it")

    def _check(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Raise unless q, k and v fit together and this cache."""
        check_tensors(q, k, v)
        if q.dtype != self.dtype:
            raise TypeError(f"q, k and v must be {self.dtype} as this cache is, got {q.dtype}")
        if q.device != self.device:
            raise ValueError(f"q, k and v must be on {self.device} as this cache is, got {q.device}")
        batch, q_heads, kv_heads, head_dim = self._sizes.values()
        for name, x, heads in (("q", q, q_heads), ("k", k, kv_heads)):
            if (x.shape[0], x.shape[1], x.shape[3]) != (batch, heads, head_dim):
                expected = f"({batch}, {heads}, tokens, {head_dim})"
                raise ValueError(f"{name} must have shape {expected} in this cache, got {tuple(x.shape)}")
        if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
            raise ValueError("q, k and v must not require grad: a cache is not differentiable, use torch.no_grad()")

    def _stored(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        dtype = self._state.dtype
        return (q, k, v) if dtype == q.dtype else (q.to(dtype), k.to(dtype), v.to(dtype))

    def _real_tokens(self, tokens: int, seq_bounds: Tensor) -> list[int]:
        """Real tokens of each row of a padded chunk."""
        self._refuse_capture("prefill with seq_bounds")
        bounds = seq_bounds.tolist()
        if not all(0 <= first <= end <= tokens for first, end in bounds):
            raise ValueError(f"seq_bounds must hold 0 <= first <= end <= {tokens} in each row, got {bounds}")
        return [end - first for first, end in bounds]

    def _reserve(self, new: list[int]) -> None:
        """Make sure that each row has room for `new` more tokens, as far as the host knows."""
        total = [known + more for known, more in zip(self._known, new, strict=True)]
        if self._capturing():
            if self.max_tokens is None or self.backend == "eager":
                have = f"max_tokens={self.max_tokens} and backend={self.backend!r}"
                raise RuntimeError(f"a CUDA graph can capture a cache with max_tokens and 'triton', this has {have}")
            self._state.may_overflow = True
        if self.max_tokens is None:
            cores = self.spec.num_groups(max(total))
            self._state.grow(max(cores, FIRST_CORES) if cores else 0)
            return
        for known, more in zip(self._known, new, strict=True):
            if known + more > self.max_tokens:
                raise ValueError(
                    f"max_tokens must be at least {known + more} for {more} tokens after {known}, got {self.max_tokens}"
                )

    def _count(self, new: list[int]) -> None:
        """Count the tokens that were appended; a captured call has appended nothing yet."""
        if not self._capturing():
            self._known = [known + more for known, more in zip(self._known, new, strict=True)]


def _check_sizes(spec: CCASpec, sizes: dict[str, int], max_tokens: int | None, rollback: int) -> None:
    if not isinstance(spec, CCASpec):
        raise TypeError(f"spec must be a CCASpec, got {type(spec).__name__}")
    for name, size in sizes.items():
        check_positive_int(name, size)
    check_heads(sizes["q_heads"], sizes["kv_heads"], sizes["head_dim"])
    if max_tokens is not None:
        check_positive_int("max_tokens", max_tokens)
    if isinstance(rollback, bool) or not isinstance(rollback, int) or rollback < 0:
        raise ValueError(f"rollback must be an int of at least 0, got {rollback!r}")
