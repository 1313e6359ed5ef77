"""The mask function: which tokens of a batch are real, and where one packed document ends and the next begins."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function

from .settings import Settings


class Mask(NamedTuple):
    """What the layers of one type get in place of a mask.

    `sequences` int32: None: every row is one sequence; with `packed` the cu_seqlens of all rows laid end to end; else
    (B, 2), the first and one past the last real token of each row. `kept` is the mask of the layers that are not CCA.
    Given as attention_mask with nothing but a shape: there is neither padding nor packed documents.
    """

    sequences: Tensor | None = None
    packed: bool = False
    kept: Any = None
    shape: tuple[int, ...] = (0,)
    ndim: int = 4  # as of a finished mask: transformers does not look into it

    def contiguous(self) -> Mask:
        """Itself: `generate` asks for this before compiled decoding."""
        return self


_NOT_CAUSAL = "attention_mask: tokens of this model see later ones (an encoder, image tokens), or not all of the past: "
_NOT_CAUSAL += "CCA attention cannot follow that, call disable(model)"


def mask_function(
    *, batch_size: int, mask_function: Callable[..., Tensor] = causal_mask_function, use_vmap: bool = False,
    attention_mask: Tensor | Mask | None = None, config: Any = None, device: torch.device | str = "cpu", **rest: Any,
) -> Mask | None:  # fmt: skip
    """The mask that transformers' models ask for under the name "cca".

    Args:
        mask_function: which tokens each token sees: the past, or that of its packed document.
        attention_mask: (B, N) bool, true for real tokens; the last columns are those of the queries.

    A ValueError says that the mask is not causal, or that there is padding between real tokens.
    """
    if isinstance(attention_mask, Mask) and (attention_mask.sequences is not None or attention_mask.kept is not None):
        return attention_mask  # finished before
    if use_vmap:  # a model's own and_mask_function or or_mask_function
        raise ValueError(_NOT_CAUSAL)
    padding, given = None if isinstance(attention_mask, Mask) else attention_mask, {"config": config, **rest}
    settings, kept, sequences = Settings.of(config), None, None
    if settings.layers != "all" and settings.replaces in ALL_MASK_ATTENTION_FUNCTIONS.valid_keys():
        kept = ALL_MASK_ATTENTION_FUNCTIONS[settings.replaces](
            batch_size=batch_size, mask_function=mask_function, attention_mask=padding, device=device, **given
        )  # fmt: skip
    position = rest.get("cache_position")  # of transformers before 5.8
    tokens, offset = (rest["q_length"], rest["q_offset"]) if position is None else (position.shape[0], position[0])
    packed = mask_function is not causal_mask_function and attention_mask is None
    if packed:
        sequences = _documents(mask_function, batch_size, torch.arange(tokens, device=device) + offset)
    elif padding is not None and not (tokens == 1 and position is None and isinstance(offset, Tensor)):
        sequences = _real_tokens(padding[:, -tokens:])
    return None if sequences is None and kept is None else Mask(sequences, packed, kept)


def _real_tokens(real: Tensor) -> Tensor | None:
    """(B, 2) int32: first and one past the last of the true values of real (B, T), in one run each; None if all are."""
    first, count = real.int().argmax(1), real.sum(1)
    if not torch.compiler.is_compiling():
        token = torch.arange(real.shape[1], device=real.device)
        in_one_run = (real == (token >= first[:, None]) & (token < (first + count)[:, None])).all()
        whole, good = torch.stack((real.all(), in_one_run)).tolist()
        if not good:
            raise ValueError("attention_mask has padding between real tokens, which CCA cannot skip: pad left")
        if whole:
            return None
    return torch.stack((first, first + count), dim=1).int()


def _documents(sees: Callable[..., Tensor], batch: int, token: Tensor) -> Tensor | None:
    """cu_seqlens int32 of all rows laid end to end: a document begins where a token does not see the one before.

    None if every row is one document. Under ``torch.compile`` empty documents fill it up to one for each token.
    """
    row, head = torch.arange(batch, device=token.device)[:, None], token.new_zeros(())
    begins = torch.ones(batch, token.shape[0], dtype=torch.bool, device=token.device)
    begins[:, 1:] = ~sees(row, head, token[1:], token[:-1])
    begins, total = begins.flatten(), begins.numel()
    if torch.compiler.is_compiling():
        index = torch.arange(total, device=token.device).masked_fill(~begins, total).sort()[0]
    else:
        if sees(row, head, token[:-1], token[1:]).any():
            raise ValueError(_NOT_CAUSAL)
        index = begins.nonzero()[:, 0]
        if index.shape[0] == batch:
            return None
    return torch.cat((index, index.new_full((1,), total))).int()
