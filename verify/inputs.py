"""What the checks feed in: inputs that provoke faults (verification.md section 6).

Values are drawn on the CPU from a seeded generator, so that a case means the same numbers on every machine, and
rounded to the problem's dtype before anybody, the oracle included, sees them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from ..spec import check_choice
from .cases import Case

Family = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


class Inputs(NamedTuple):
    """Of one call: q, dout [B, Hq, T, D], k, v [B, Hkv, T, D], dlse [B, Hq, T]."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    dlse: Tensor

    def part(self, rows: slice, tokens: slice) -> Inputs:
        """Those of one sequence."""
        return Inputs(*(x[rows, :, tokens] for x in self))


def make_inputs(case: Case) -> Inputs:
    """Values and memory of `case`. Everything outside the sequences of a padded batch is NaN.

    `dout` spans six decades from row to row, so that an upstream gradient is never uniform.

    Raises:
        ValueError: for a family or layout that there is not.
    """
    check_choice("family", case.family, tuple(FAMILIES))
    check_choice("layout", case.layout, tuple(LAYOUTS))
    p = case.problem
    generator = torch.Generator().manual_seed(case.seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    q = normal(p.batch, p.q_heads, p.seq_len, p.head_dim)
    k, v = (normal(p.batch, p.kv_heads, p.seq_len, p.head_dim) for _ in range(2))
    direction = torch.nn.functional.normalize(normal(p.head_dim), dim=0)
    q, k, v = FAMILIES[case.family](q, k, v, direction)
    decades = torch.rand(q.shape[:3], generator=generator, dtype=torch.float64) * 6 - 5
    dout, dlse = normal(*q.shape) * 10 ** decades[..., None], normal(*q.shape[:3])
    arrange = LAYOUTS[case.layout]
    placed = {}
    for name, x in {"q": q, "k": k, "v": v, "dout": dout}.items():
        x = _outside_is_nan(case, x).to(case.dtype)
        placed[name] = arrange(name, x.to(case.device))
    wide = torch.float64 if case.dtype == torch.float64 else torch.float32
    return Inputs(**placed, dlse=_outside_is_nan(case, dlse).to(case.device, wide))


def _outside_is_nan(case: Case, x: Tensor) -> Tensor:
    if case.bounds is None:
        return x
    filled = torch.full_like(x, float("nan"))
    for rows, tokens in case.sequences():
        filled[rows, :, tokens] = x[rows, :, tokens]
    return filled


# --- families: q, k, v standard normal and a unit direction, all float64 ----------------------------------------------


def _ramp(q: Tensor, k: Tensor, direction: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
    """Queries along `direction`, keys whose logits are `slope` [T] of it, both with a little noise."""
    root = q.shape[-1] ** 0.25
    return 0.1 * q + 4 * root * direction, 0.1 * k + root / 4 * slope[:, None] * direction


def _age(x: Tensor) -> Tensor:
    return torch.linspace(0, 1, x.shape[2], dtype=x.dtype)


def _rising(q: Tensor, k: Tensor, v: Tensor, direction: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The row's maximum moves on with every tile."""
    return *_ramp(q, k, direction, 20 * _age(q)), v


def _falling(q: Tensor, k: Tensor, v: Tensor, direction: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The row's maximum is in the first tile, and the old dominate."""
    return *_ramp(q, k, direction, -20 * _age(q)), v


def _old_keys(q: Tensor, k: Tensor, v: Tensor, direction: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The first eighth of the tokens outweighs the rest, core tokens therefore the window."""
    return *_ramp(q, k, direction, 8.0 * (_age(q) < 0.125)), v


def _needle(q: Tensor, k: Tensor, v: Tensor, direction: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All keys are orthogonal to all queries but one, an old one in the first group."""
    needle = torch.zeros(q.shape[2], dtype=q.dtype)
    needle[:2] = 1.0
    needle[:1] = 0.0 if q.shape[2] > 1 else 1.0
    k = k - (k @ direction)[..., None] * direction
    root = q.shape[-1] ** 0.25
    return (4 * root * direction).expand_as(q), k + 4 * root * needle[:, None] * direction, v


def _sparse(q: Tensor, k: Tensor, v: Tensor, direction: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return q, k, 100 * v * (v.abs() > 2)


FAMILIES: dict[str, Family] = {
    "randn": lambda q, k, v, direction: (q, k, v),
    "sharp": lambda q, k, v, direction: (6 * q, k, v),
    "offset_values": lambda q, k, v, direction: (q, k, v + 30),
    "sparse_values": _sparse,
    "small_values": lambda q, k, v, direction: (q, k, 1e-3 * v),
    "old_keys": _old_keys,
    "rising": _rising,
    "falling": _falling,
    "equal": lambda q, k, v, direction: (q, k[:, :, :1].expand_as(k), v),
    "needle": _needle,
}


# --- layouts: the same values elsewhere in memory ---------------------------------------------------------------------


def _contiguous(name: str, x: Tensor) -> Tensor:
    return x.contiguous()


def _transposed(name: str, x: Tensor) -> Tensor:
    """A (B, T, H, D) tensor seen as (B, H, T, D)."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _slab(name: str, x: Tensor) -> Tensor:
    """Inside a larger tensor of NaN, at an odd offset; a read outside is seen."""
    batch, heads, tokens, dim = x.shape
    slab = torch.full((batch, heads, tokens + 5, dim + 6), float("nan"), dtype=x.dtype, device=x.device)
    view = slab[:, :, 2 : 2 + tokens, 3 : 3 + dim]
    view.copy_(x)
    return view


def _different(name: str, x: Tensor) -> Tensor:
    """Each tensor with strides of its own, k and v above all."""
    return {"q": _slab, "k": _transposed, "v": _contiguous, "dout": _transposed}[name](name, x)


def _expanded(name: str, x: Tensor) -> Tensor:
    """Stride 0: one q and dout for the whole batch, one k and v for all heads (this changes the values)."""
    return x[:, :1].expand_as(x) if name in ("k", "v") else x[:1].expand_as(x)


LAYOUTS: dict[str, Callable[[str, Tensor], Tensor]] = {
    "contiguous": _contiguous,
    "transposed": _transposed,
    "slab": _slab,
    "different": _different,
    "expanded": _expanded,
}


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fresh tensors are full of NaN (integers of their maximum), so that what nobody wrote cannot look right."""
    mode = torch.get_deterministic_debug_mode()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        if not torch.empty(1).isnan().all():
            raise RuntimeError("torch.utils.deterministic.fill_uninitialized_memory must be on, got off")
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)
