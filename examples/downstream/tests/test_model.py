"""The model's own tests; ``pytest --cca-profile FILE`` adds one for each config of the profile that it ships with."""

from __future__ import annotations

import torch
from tiny_model import tiny_attention


def test_a_token_does_not_see_the_future() -> None:
    layer, x = tiny_attention(), torch.randn(2, 40, 64)
    changed = x.clone()
    changed[:, 25:] += 1.0
    assert torch.equal(layer(x)[:, :25], layer(changed)[:, :25])


def test_every_token_reaches_the_last_row() -> None:
    layer, x = tiny_attention(), torch.randn(1, 40, 64, requires_grad=True)
    layer(x)[0, -1].sum().backward()
    assert x.grad is not None and bool((x.grad[0].abs().sum(-1) > 0).all())
