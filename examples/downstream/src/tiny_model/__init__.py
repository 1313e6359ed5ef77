"""One attention layer on cca-attention: what a model that depends on it looks like."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cca_attention import CCASpec, cca_attention


class Attention(nn.Module):
    """Self-attention over [B, T, width] with the core tokens of the far past; `profile` as of `cca_attention`."""

    def __init__(self, width: int, heads: int, spec: CCASpec, profile: str | None = None) -> None:
        super().__init__()
        self.heads, self.spec, self.profile = heads, spec, profile
        self.project_in = nn.Linear(width, 3 * width, bias=False)
        self.project_out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, T, width]; the same shape comes out."""
        batch, tokens, width = x.shape
        q, k, v = self.project_in(x).view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        out = cca_attention(
            q, k, v, group_size=self.spec.group_size, window_size=self.spec.window_size, profile=self.profile
        )
        return self.project_out(out.transpose(1, 2).reshape(batch, tokens, width))


def tiny_attention(profile: str | None = None) -> Attention:
    """The layer that the tests use."""
    torch.manual_seed(0)
    return Attention(width=64, heads=2, spec=CCASpec(group_size=4, window_size=8), profile=profile)
