"""CCACache refuses what it cannot do before anything is written, and says what is allowed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from cca_attention.cache import CCACache
from cca_attention.spec import CCASpec

GOOD: dict[str, Any] = {
    "spec": CCASpec(3, 4),
    "batch": 2,
    "q_heads": 4,
    "kv_heads": 2,
    "head_dim": 16,
    "dtype": torch.float32,
    "device": "cpu",
    "backend": "eager",
}


def bad(message: str, kind: type[Exception], **changes: Any) -> Any:
    return pytest.param(changes, kind, message, id=message[:50])


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        bad("spec must be a CCASpec, got int", TypeError, spec=16),
        bad("batch must be at least 1, got 0", ValueError, batch=0),
        bad("kv_heads must be an int of at least 1, got nan", TypeError, kv_heads=float("nan")),
        bad("q_heads must be a multiple of kv_heads, got q_heads=3 and kv_heads=2", ValueError, q_heads=3),
        bad("head_dim must be in 16..256, got 8", ValueError, head_dim=8),
        bad("dtype must be float16, bfloat16, float32 or float64, got torch.int8", TypeError, dtype=torch.int8),
        bad("max_tokens must be at least 1, got 0", ValueError, max_tokens=0),
        bad("rollback must be an int of at least 0, got -1", ValueError, rollback=-1),
        bad("rollback must be an int of at least 0, got True", ValueError, rollback=True),
        bad("backend must be one of 'auto', 'triton', 'eager', got 'cuda'", ValueError, backend="cuda"),
    ],
)
def test_bad_caches_are_refused(changes: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        CCACache(**{**GOOD, **changes})


def zeros(*shape: int, **options: Any) -> Tensor:
    return torch.zeros(shape, **options)


Q, K = zeros(2, 4, 3, 16), zeros(2, 2, 3, 16)
BOUNDS_OF = torch.tensor([[0, 3], [0, 3]], dtype=torch.int32)


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda c: c.prefill(0, K, K), TypeError, "q must be a torch.Tensor, got int"),
        (lambda c: c.decode(Q[0], K, K), ValueError, r"q must have 4 dimensions .* got \(4, 3, 16\)"),
        (lambda c: c.decode(Q, K, K[:, :, :2]), ValueError, r"v must have shape \(2, 2, 3, 16\)"),
        (lambda c: c.decode(Q, K.half(), K), TypeError, "k must have the dtype of q"),
        (lambda c: c.decode(Q.half(), K.half(), K.half()), TypeError, "must be torch.float32 as this cache is"),
        (
            lambda c: c.decode(*(x.to("meta") for x in (Q, K, K))),
            ValueError,
            "must be on cpu as this cache is, got meta",
        ),
        (lambda c: c.decode(Q.mT.contiguous().mT, K, K), ValueError, "q must be contiguous in its last dimension"),
        (lambda c: c.prefill(Q[:1], K[:1], K[:1]), ValueError, r"q must have shape \(2, 4, tokens, 16\) in this cache"),
        (lambda c: c.decode(Q, K[:, :1], K[:, :1]), ValueError, r"k must have shape \(2, 2, tokens, 16\)"),
        (lambda c: c.decode(Q[:, :, :0], K[:, :, :0], K[:, :, :0]), ValueError, "at least one token to decode, got 0"),
        (lambda c: c.decode(Q.clone().requires_grad_(), K, K), ValueError, "q, k and v must not require grad"),
        (lambda c: c.prefill(Q, K, K, BOUNDS_OF.long()), TypeError, "seq_bounds must be int32 on cpu, got torch.int64"),
        (lambda c: c.prefill(Q, K, K, BOUNDS_OF[:1]), ValueError, r"seq_bounds must have shape \(2, 2\), got \(1, 2\)"),
        (lambda c: c.prefill(Q, K, K, BOUNDS_OF + 1), ValueError, "0 <= first <= end <= 3 in each row"),
        (lambda c: c.crop(True), TypeError, "n must be an int, got True"),
        (lambda c: c.reorder([0, 1]), TypeError, r"index must be an int32 or int64 tensor, got \[0, 1\]"),
        (lambda c: c.reorder(zeros(2)), TypeError, "index must be an int32 or int64 tensor, got torch.float32"),
        (lambda c: c.reorder(torch.tensor([0])), ValueError, r"shape \(2,\) with values in 0..1, got \[0\]"),
        (lambda c: c.reorder(torch.tensor([0, 2])), ValueError, r"shape \(2,\) with values in 0..1, got \[0, 2\]"),
        (lambda c: c.reorder(torch.tensor([-1, 0])), ValueError, r"values in 0..1, got \[-1, 0\]"),
    ],
)
def test_bad_calls_are_refused(call: Callable[[CCACache], Any], kind: type[Exception], message: str) -> None:
    cache = CCACache(**GOOD)
    cache.prefill(Q, K, K)
    with pytest.raises(kind, match=message):
        call(cache)
    assert cache.lengths.tolist() == [3, 3]
