"""The worker processes of a command, and the order in which its runs use them.

Everything is compiled, then verified, then timed: what is timed has the machine to itself. With several GPUs each race
(a kernel at a context) is one GPU's alone, and as many go on at a time as there are GPUs.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any

from . import jobs
from .card import card_at_hand
from .compile import aim
from .pool import Pool
from .progress import Progress, Request
from .stations import Station, spread

if TYPE_CHECKING:
    from .tune import Tuner

MOST_CHECKERS = 4
"""Processes that verify at a time, on all GPUs of a machine: each has a context, and up to 0.7 gigabytes."""
COMPILED_BY, CHECKED_BY = 0.4, 0.6
"""Shares of the budget after which no further config is compiled, and verified, where the rest goes into timing."""


class Workshop:
    """The workers for requests that differ in their problem alone; a context manager that ends them."""

    def __init__(self, request: Request) -> None:
        self._request = request
        staff = _local if request.ray is None else _far
        self.compilers, self.checkers, self.stations = staff(request)
        self._preparing = threading.Lock()

    def __enter__(self) -> Workshop:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for pool in (self.compilers, self.checkers, *(station.pool for station in self.stations)):
            pool.close()

    def run(self, tuners: Sequence[Tuner]) -> None:
        """Take every kernel of these runs from its space to a verified choice, or to its trouble.

        Raises:
            LostError: if no worker can be had that compiles.
            ValueError: if a built-in config cannot run the problem.
        """
        begin, budget_s = time.monotonic(), sum(tuner.budget_s for tuner in tuners)
        at_hand = self._request.at_hand
        for tuner in tuners:
            tuner.compile(self.compilers, begin + budget_s * (COMPILED_BY if at_hand else 1.0))
        self.compilers.close()
        if at_hand:
            for tuner in tuners:
                tuner.check(self.checkers, begin + budget_s * CHECKED_BY)
            self.checkers.close()  # those that time have the GPUs, and memory is free again
            self._race(tuners, begin + budget_s)
            for station in self.stations:
                station.pool.close()
        for tuner in tuners:
            tuner.settle(self.checkers)

    def _race(self, tuners: Sequence[Tuner], until: float) -> None:
        """Time what is right: a kernel at a context is one piece of work, the longest context first."""
        pieces = [(tuner, kernel) for tuner in tuners for kernel in tuner.kernels]
        pieces.sort(key=lambda piece: -piece[0].problem.seq_len)
        left = len(pieces)

        def time_kernel(piece: tuple[Tuner, Progress], station: Station) -> None:
            nonlocal left
            now = time.monotonic()
            share = max(0.0, until - now) * min(1.0, len(self.stations) / left)
            tuner, kernel = piece
            tuner.race(kernel, station, self._prepare(tuner, station), now + share)
            station.done.append(f"{kernel.name} at {tuner.problem.seq_len}")
            left = max(1, left - 1)

        lost = spread(pieces, self.stations, time_kernel)
        for _, kernel in lost:
            kernel.trouble = "; ".join(f"GPU {station.name} is lost: {station.lost}" for station in self.stations)

    def _prepare(self, tuner: Tuner, station: Station) -> Callable[[Progress, tuple[Any, ...]], None]:
        """What compiles and verifies for a race that asks for more; where others race, at its own GPU alone."""
        checkers = self.checkers if len(self.stations) == 1 else station.pool

        def prepare(kernel: Progress, configs: tuple[Any, ...]) -> None:
            with self._preparing:
                tuner.prepare(kernel, configs, self.compilers, checkers)

        return prepare


Staff = tuple[Pool, Pool, list[Station]]


def _local(request: Request) -> Staff:
    """Who compiles, verifies and times on this machine; without cards there is the GPU that PyTorch uses of itself."""
    size, places = max(len(request.cards), min(request.jobs, MOST_CHECKERS)), _places(request)
    compilers = Pool(request.jobs, aim, request.device.arch)
    if not places:
        checkers, timer = (Pool(count, jobs.no_setup, renew=jobs.spent) for count in (size, 1))
        return compilers, checkers, [_station(0, timer)]
    stations = [
        _station(card.index, Pool(1, request.take, renew=jobs.spent, places=[place]))
        for card, place in zip(request.cards, places, strict=True)
    ]
    return compilers, Pool(size, request.take, renew=jobs.spent, places=places), stations


def _places(request: Request) -> list[tuple[str]]:
    return [(card.handle,) for card in request.cards]


def _station(index: int, pool: Pool) -> Station:
    nvml = card_at_hand(index)
    return Station(str(index), pool) if nvml is None else Station(str(index), pool, nvml.state)


def _far(request: Request) -> Staff:
    """The same in the Ray cluster that was joined. Those that verify share the GPUs before and after they are timed."""
    from .ray_pool import RayPool, state_of, take_alike

    compilers = RayPool(request.jobs, aim, request.device.arch)
    if not request.cards:
        return compilers, RayPool(request.jobs, jobs.no_setup, renew=jobs.spent), []
    kind, share = request.cards[0].kind, 1 / MOST_CHECKERS
    size = MOST_CHECKERS * len(request.cards)
    checkers = RayPool(size, take_alike, kind, renew=jobs.spent, cpus=0.0, gpus=share)
    pools = [RayPool(1, take_alike, kind, renew=jobs.spent, cpus=0.0, gpus=1.0) for _ in request.cards]
    stations = [
        Station(str(card.index), pool, partial(state_of, pool)) for card, pool in zip(request.cards, pools, strict=True)
    ]
    return compilers, checkers, stations
