"""Races spread over the GPUs: each is run at one of them from end to end, and anew at another if that one is lost."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Generic, TypeVar

from .card import CardState
from .pool import LostError, Pool

Piece = TypeVar("Piece")


class Station:
    """One GPU: the worker that times on it alone, and who is asked how it is; `lost` says why it is gone."""

    def __init__(self, name: str, pool: Pool, state: Callable[[], CardState | None] = lambda: None) -> None:
        self.name, self.pool, self.state = name, pool, state
        self.done: list[str] = []
        self.lost: str | None = None


class _Queue(Generic[Piece]):
    """Pieces of work for several threads. None is left when all are done, not when all are taken."""

    def __init__(self, pieces: Iterable[Piece]) -> None:
        self.waiting = deque(pieces)
        self._under_way = 0
        self._changed = threading.Condition()

    def take(self) -> Piece | None:
        """The next piece, as soon as there is one; None if there will be none."""
        with self._changed:
            self._changed.wait_for(lambda: self.waiting or not self._under_way)
            if not self.waiting:
                return None
            self._under_way += 1
            return self.waiting.popleft()

    def settle(self, piece: Piece, *, again: bool) -> None:
        """A piece is done, or has to be done again by another."""
        with self._changed:
            self._under_way -= 1
            if again:
                self.waiting.appendleft(piece)
            self._changed.notify_all()


def spread(pieces: Iterable[Piece], stations: Sequence[Station], do: Callable[[Piece, Station], None]) -> list[Piece]:
    """Do every piece at one station, whichever is free, and return what is left because every station was lost.

    A `LostError` loses the station, and its piece begins anew elsewhere; any other exception ends all the others and
    is raised here.
    """
    queue = _Queue(pieces)

    def serve(station: Station) -> None:
        while station.lost is None and (piece := queue.take()) is not None:
            try:
                do(piece, station)
            except LostError as error:
                station.lost = str(error)
            finally:
                queue.settle(piece, again=station.lost is not None)

    standing = [station for station in stations if station.lost is None]
    with ThreadPoolExecutor(max(1, len(standing))) as threads:
        try:
            for future in as_completed([threads.submit(serve, station) for station in standing]):
                future.result()
        except BaseException:
            queue.waiting.clear()
            for station in standing:
                station.pool.stop()
            raise
    return list(queue.waiting)
