"""The GPUs of this machine as `cca-tune` gets them: those that --devices names, else all that are alike, and idle."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .terminal import NO_DEVICE, Refused

if TYPE_CHECKING:
    from .autotune.devices import Device
    from .autotune.host import HostCard


def named(indices: str) -> tuple[HostCard, ...]:
    """The cards that --devices names, all alike."""
    from .autotune.host import cards_here, named_cards

    try:
        return named_cards(indices, cards_here())
    except LookupError as error:
        raise Refused(str(error), NO_DEVICE) from error
    except ValueError as error:
        raise Refused(str(error)) from error


def to_use(device: Device, indices: str | None) -> tuple[HostCard, ...]:
    """The cards of this machine to time on; none if `device` is not in it."""
    from .autotune.host import cards_for, cards_here

    chosen = cards_here() if indices is None else named(indices)
    try:
        return cards_for(device, chosen, named=indices is not None)
    except ValueError as error:
        raise Refused(f"--devices {indices}: {error}") from error


def check_idle(indices: Sequence[int]) -> None:
    """Refuse GPUs that somebody else keeps busy: times there are worth nothing."""
    from .autotune.card import BUSY_PER_CENT, card_at_hand

    for index in indices or [0]:
        card = card_at_hand(index)
        busy = None if card is None else card.busy_per_cent()
        if busy is not None and busy > BUSY_PER_CENT:
            message = f"another process keeps GPU {index} {busy} % busy, and times would be worth nothing"
            hint = "wait for its end, name others with --devices, or take them all the same with --allow-busy"
            raise Refused(f"{message}; {hint}", NO_DEVICE)
