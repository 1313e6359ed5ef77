"""The GPUs of this host: which there are, which of them a run is given, and how a worker process takes one."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from .card import card_at_hand
from .devices import Device, find_device
from .keys import card_here


@dataclass(frozen=True, slots=True)
class HostCard:
    """One GPU: the index that PyTorch has for it here, its product's name, and its kind: `card_here` of it.

    `handle` is how a worker's process asks for it alone; empty if there is no other.
    """

    index: int
    name: str
    kind: str
    handle: str = ""


def cards_here() -> tuple[HostCard, ...]:
    """Every GPU that PyTorch sees in this process."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return tuple(_card(index, alone=count == 1) for index in range(count))


def _card(index: int, *, alone: bool) -> HostCard:
    card = card_at_hand(index)
    kind = card_here(None if card is None else card.setting().driver, index)
    handle = str(index) if torch.version.hip else f"GPU-{torch.cuda.get_device_properties(index).uuid}"
    return HostCard(index, torch.cuda.get_device_name(index), kind or "", "" if alone else handle)


def named_cards(text: str, cards: tuple[HostCard, ...]) -> tuple[HostCard, ...]:
    """Those of `cards` that `text` names by their indices, with commas between.

    Raises:
        LookupError: if there are no cards.
        ValueError: for text that names none, one that there is not, or unlike ones.
    """
    try:
        wanted = sorted({int(part) for part in text.split(",")})
    except ValueError:
        raise ValueError(f"--devices must be indices of GPUs with commas between (0,1), got {text!r}") from None
    if not cards:
        raise LookupError(f"--devices {text}: there is no GPU in this machine")
    by_index = {card.index: card for card in cards}
    if missing := [index for index in wanted if index not in by_index]:
        there = ", ".join(map(str, by_index))
        raise ValueError(f"--devices {text}: there is no GPU {missing[0]} in this machine; there are {there}")
    chosen = tuple(by_index[index] for index in wanted)
    for other in chosen[1:]:
        if other.kind != chosen[0].kind:
            unlike = f"GPU {chosen[0].index} is a {chosen[0].kind}, GPU {other.index} a {other.kind}"
            raise ValueError(f"--devices {text}: {unlike}; what unlike cards measure is never mixed")
    return chosen


def cards_for(device: Device, cards: tuple[HostCard, ...], *, named: bool) -> tuple[HostCard, ...]:
    """Those of `cards` to time `device` on: all that are like its first; empty if there is none.

    Raises:
        ValueError: if they were `named`, which makes them right or wrong together, and are no `device`.
    """
    right = [card for card in cards if _product(card) == device]
    if named and not right:
        raise ValueError(f"GPU {cards[0].index} is a {cards[0].name}, no {device.name}")
    return tuple(card for card in right if card.kind == right[0].kind)


def _product(card: HostCard) -> Device | None:
    try:
        return find_device(card.name)
    except LookupError:
        return None


def take_card(handle: str) -> None:
    """Make this process, and all that it starts, use one GPU alone, and see that it works; before CUDA is begun here.

    Raises:
        RuntimeError: if it cannot be used.
    """
    if handle:
        os.environ["CUDA_VISIBLE_DEVICES"] = handle
    touch()
    if handle.startswith("GPU-") and f"GPU-{torch.cuda.get_device_properties(0).uuid}" != handle:
        raise RuntimeError(f"this process was given the GPU {handle} and has another")


def touch() -> None:
    """Write to the GPU and read it back; raises what PyTorch does if that fails."""
    if torch.ones(1, device="cuda").item() != 1.0:
        raise RuntimeError("the GPU does not give back what was written to it")


def kind_here(cards: tuple[HostCard, ...]) -> str | None:
    """What keeps trials on unlike GPUs apart: the kind of these, else of the one at hand; None without a GPU."""
    if cards:
        return cards[0].kind
    card = card_at_hand()
    return card_here(None if card is None else card.setting().driver)
