"""The GPUs of this machine as `cca-tune` gets them: those that --devices names, else all that are alike, and idle.

And the options whose values are names of a table, for a shell to complete.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .terminal import NO_DEVICE, Refused, one_of

if TYPE_CHECKING:
    from .autotune.devices import Device
    from .autotune.host import HostCard


def _gpus() -> list[str]:
    from .autotune.devices import device_table

    return [name for device in device_table().values() for name in (device.name, *device.aliases)]


def _models() -> list[str]:
    from .autotune.options import model_table

    return list(model_table())


GPU = one_of("--gpu", "GPU to tune for; default: the one at hand.", _gpus)
MODEL = one_of("--model", "Model whose heads to take, or a config.json.", _models)


def named(indices: str) -> tuple[HostCard, ...]:
    """The cards that --devices names, all alike."""
    from .autotune.host import cards_here, named_cards

    try:
        return named_cards(indices, cards_here())
    except LookupError as error:
        raise Refused(str(error), NO_DEVICE) from error
    except ValueError as error:
        raise Refused(str(error)) from error


def cluster(address: str) -> tuple[tuple[HostCard, ...], int]:
    """The GPUs and the number of CPUs of the Ray cluster that --ray names, joined by this."""
    try:
        from .autotune import ray_pool
    except ModuleNotFoundError as error:
        raise Refused('--ray needs Ray; install it with: pip install "cca-attention[ray]"') from error
    try:
        ray_pool.connect(address)
        return ray_pool.cluster_cards(), ray_pool.cores()
    except ConnectionError as error:
        raise Refused(f"--ray: {error}") from error


def first(indices: str | None, ray: str | None) -> str:
    """The name of the first GPU of those that --devices names, or of the cluster that --ray names."""
    if indices is not None:
        return named(indices)[0].name
    cards = cluster(ray or "")[0]
    if not cards:
        raise Refused(f"there is no GPU in the cluster at --ray {ray}; name the one to tune for with --gpu", NO_DEVICE)
    return cards[0].name


def to_use(device: Device, indices: str | None, ray: str | None) -> tuple[tuple[HostCard, ...], int | None]:
    """The cards to time on, none if there is no `device` here or in the cluster; and the cluster's CPUs."""
    from .autotune.host import cards_for, cards_here

    if ray is not None:
        if indices is not None:
            raise Refused(f"--devices {indices} are GPUs of this machine, and --ray {ray} uses those of a cluster")
        cards, cores = cluster(ray)
        return cards_for(device, cards, named=False), cores
    chosen = cards_here() if indices is None else named(indices)
    try:
        return cards_for(device, chosen, named=indices is not None), None
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
