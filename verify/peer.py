"""CCA attention as one would write it in PyTorch in low precision, and the rule that compares with its error (T4).

The peer is dense and unblocked, casts probabilities and stored core tokens to the inputs' dtype as a fused kernel does,
and shares no code with the oracles or the kernels. A kernel that is more than twice as wrong as the peer, tile by
tile, loses more than its dtype explains.

Axes: B batch, Hq query heads, Hkv key/value heads, Hc core heads, T tokens, C core tokens, g group size, D head
dimension.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..spec import CCASpec
from .canary import guarded
from .rounding import ROUNDOFF
from .tolerance import Comparison, errors, judge, refused

TILE = 64
"""Rows of a tile: what a fault in one tile of a kernel cannot hide behind."""

FACTOR = 2.0
"""How many times the peer's error is accepted."""


class Peer:
    """One dense batch in half precision: `out` [B, Hq, T, D], and its `gradients`.

    Args:
        q: [B, Hq, T, D]. k, v: [B, Hkv, T, D]. float16 or bfloat16.
        spec: what is computed.

    Raises:
        ValueError: for another dtype, in which there is no loss of precision to compare with.
    """

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, spec: CCASpec) -> None:
        if q.dtype not in (torch.float16, torch.bfloat16):
            raise ValueError(f"the dtype of q must be float16 or bfloat16, got {q.dtype}")
        self.dtype, self.scale = q.dtype, spec.softmax_scale(q.shape[-1])
        self.inputs = q, k, v = [x.detach().float().requires_grad_() for x in (q, k, v)]
        cores = (x + (self._cast(x) - x).detach() for x in _pool(q, k, v, spec, self.scale))
        self.keys, self.values = (
            torch.cat([_per_query_head(core, q), _per_query_head(raw, q)], dim=2)
            for core, raw in zip(cores, (k, v), strict=True)
        )
        with torch.no_grad():
            scores = (self.scale * q @ self.keys.mT).masked_fill(~_sees(q.shape[2], spec).to(q.device), -math.inf)
            self.probs = scores.softmax(-1)
            self.out = (self._cast(self.probs) @ self.values).to(self.dtype)

    def _cast(self, x: Tensor) -> Tensor:
        return x.to(self.dtype).float()

    def gradients(self, dout: Tensor, dlse: Tensor) -> dict[str, Tensor]:
        """dq, dk and dv for `dout` [B, Hq, T, D] and `dlse` [B, Hq, T], with delta from the rounded output."""
        dout, q = dout.detach().float(), self.inputs[0]
        with torch.no_grad():
            delta = (dout * self.out.float()).sum(-1, True) - dlse[..., None].float()
            ds = self._cast(self.probs * (dout @ self.values.mT - delta))
            dq, dkeys = self.scale * ds @ self.keys, self.scale * ds.mT @ q
            arriving = [dkeys, self._cast(self.probs).mT @ dout]
        found = torch.autograd.grad(
            [self.keys, self.values],
            self.inputs,
            arriving,
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
        return {name: x.to(self.dtype) for name, x in zip(("dq", "dk", "dv"), (dq + found[0], *found[1:]), strict=True)}


def _per_query_head(x: Tensor, q: Tensor) -> Tensor:
    return x[:, torch.arange(q.shape[1]) // (q.shape[1] // x.shape[1])]


def _pool(q: Tensor, k: Tensor, v: Tensor, spec: CCASpec, scale: float) -> tuple[Tensor, Tensor]:
    """Core tokens [B, Hc, C, D]."""
    batch, _, tokens, dim = q.shape
    groups, g = tokens // spec.group_size, spec.group_size
    if spec.core_heads == "query":
        k, v = _per_query_head(k, q), _per_query_head(v, q)
    k, v = (x[:, :, : groups * g].reshape(batch, x.shape[1], groups, g, dim) for x in (k, v))
    if spec.pooling == "mean":
        return k.mean(3), v.mean(3)
    last = q[:, :, g - 1 :: g].reshape(batch, k.shape[1], q.shape[1] // k.shape[1], groups, dim).mean(2)
    weights = (scale * last[..., None, :] @ k.mT).softmax(-1)  # [B, Hc, C, 1, g]
    return (weights @ k)[..., 0, :], (weights @ v)[..., 0, :]


def _sees(tokens: int, spec: CCASpec) -> Tensor:
    """[T, C + T]: a core whose group ended a window ago, and every past token that is in no such group."""
    token, group = torch.arange(tokens), torch.arange(-(-tokens // spec.group_size))
    core = (group + 1) * spec.group_size + spec.window_size <= token[:, None] + 1
    raw = (token <= token[:, None]) & ~core[:, token // spec.group_size]
    return torch.cat([core[:, : tokens // spec.group_size], raw], dim=1)


def _example(error: float) -> tuple[str, Tensor, Tensor, Tensor]:
    """Two tiles of ones; the peer is 2^-8 off in the first and far off in the second, `error` is in the first."""
    value = torch.ones(1, 1, TILE + 1, 1, dtype=torch.float64)
    peer, actual = value.bfloat16(), value.float()
    peer[0, 0, 7], peer[0, 0, TILE], actual[0, 0, 3] = 1 - 2**-8, 9.0, 1 + error
    return "canary", actual.half(), value, peer.half()


_ALLOWED = 2 * 2**-8 + 2 * 2**-10  # in numbers, so that FACTOR is tried as well


@guarded(
    lambda rule: rule(*_example(_ALLOWED - 2**-10)),
    lambda rule: rule(*_example(1.5 * _ALLOWED)),
    lambda rule: rule(*_example(math.nan)),
    lambda rule: rule("canary", *(torch.ones(1, 1, rows, 1) for rows in (1, 2, 2))),
)
def compare_to_peer(name: str, actual: Tensor, expected: Tensor, peer: Tensor) -> Comparison:
    """In every tile of 64 rows of every head: largest error at most twice the peer's largest, and 2 ulp.

    Args:
        name: of the tensor.
        actual, expected, peer: [B, H, T, D]; what is judged, the float64 oracle's, and the peer's in the dtype of
            `actual`. An ulp is that of the tile's largest expected value.

    Raises:
        ValueError: if the expected values or the peer's are not all finite, so that anything would pass.
    """
    value, near = expected.detach().double().cpu(), peer.detach().double().cpu()
    if not bool(value.isfinite().all() and near.isfinite().all()):
        raise ValueError(f"{name}: the expected values and the peer's must be finite everywhere")
    if actual.shape != value.shape or peer.shape != value.shape or actual.dtype != peer.dtype:
        detail = f"{actual.dtype} {tuple(actual.shape)}, not {peer.dtype} {tuple(value.shape)}"
        return refused(name, "peer", detail)
    if actual.numel() == 0:
        return Comparison(name, 0.0, (), True, empty=True, level="peer")
    found, unit = actual.detach().double().cpu(), ROUNDOFF[actual.dtype]
    error = errors(found, value)
    # frexp's exponent is one more than that of the leading bit, an ulp is two units of roundoff of that
    ulp = unit * torch.exp2(torch.frexp(_of_tile(value.abs()))[1].double())
    bound = FACTOR * _of_tile((near - value).abs()) + 2 * ulp
    bound = bound.repeat_interleave(TILE, dim=2)[:, :, : value.shape[2]].expand_as(value)
    use = torch.where(error == 0, 0.0, torch.where(bound > 0, error / bound, math.inf))
    return judge(name, found, value, error, use, "peer", bound)


def _of_tile(x: Tensor) -> Tensor:
    """The largest of x [B, H, T, D] in every tile of rows: [B, H, tiles, 1]."""
    padded = torch.nn.functional.pad(x, (0, 0, 0, -x.shape[2] % TILE))
    largest: Tensor = padded.unflatten(2, (-1, TILE)).amax((3, 4))
    return largest[..., None]
