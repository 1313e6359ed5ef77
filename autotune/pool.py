"""Workers, replaced when they are lost: a job that hangs or takes its process down is an outcome, not an end."""

from __future__ import annotations

import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing import connection
from types import TracebackType
from typing import Any

from .worker import Done, Failed, Job, Process, Worker

SETUP_LIMIT_S = 180.0
"""A worker that is not ready by then (importing PyTorch on a busy machine) never will be."""


Renew = Callable[[Done | Failed], bool]


def no_renewal(outcome: Done | Failed) -> bool:
    """Workers stay for as long as they live."""
    return False


class LostError(RuntimeError):
    """No worker can be had any more; the message says why."""


class _Seat:
    """A worker's place: what it is set up for, the job it is at, and what it is still to be blamed for."""

    def __init__(self, worker: Worker, place: tuple[Any, ...], owed: tuple[Job, Done | Failed] | None = None) -> None:
        self.worker, self.place, self.owed = worker, place, owed
        self.job: Job | None = None
        self.ready = False
        self.started = time.monotonic()

    def give(self, job: Job) -> None:
        self.job, self.started = job, time.monotonic()
        self.worker.give(job)


class Pool:
    """`size` workers that each ran ``setup(*args, *place)``; a worker that was lost is replaced.

    A job that took its worker down is blamed for it only once another worker stands in its place. Where none can be
    set up, the place is `lost`, and its jobs are done at the others.

    Args:
        places: further arguments of the set-up, in turn: a GPU each, for example.
        renew: whether a worker that is still there is replaced as well, after this outcome of a job.
    """

    def __init__(
        self, size: int, setup: Callable[..., None], *args: Any, renew: Renew = no_renewal,
        places: Sequence[tuple[Any, ...]] = ((),),
    ) -> None:  # fmt: skip
        self._setup, self._args, self._size, self._renew = setup, args, size, renew
        self._places = list(places)
        self._seats: list[_Seat] = []
        self._turn = threading.Lock()
        self._stopped = False
        self.lost: dict[tuple[Any, ...], str] = {}

    def __enter__(self) -> Pool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the workers; jobs that are given later get new ones."""
        for seat in self._seats:
            seat.worker.kill()
        self._seats.clear()

    def stop(self) -> None:
        """End what is running in another thread, there with a `LostError`; nothing can be given any more."""
        self._stopped = True
        for seat in list(self._seats):
            seat.worker.strike()

    def make(self, place: tuple[Any, ...]) -> Worker:
        """A new worker."""
        return Process(self._setup, (*self._args, *place))

    def wait(self, workers: Sequence[Any], timeout_s: float) -> list[Any]:
        """Those that have an answer; none after `timeout_s`."""
        heard = connection.wait([worker.pipe for worker in workers], timeout=timeout_s)
        return [worker for worker in workers if worker.pipe in heard]

    def run(self, jobs: Iterable[Job], limit_s: float, until: float = math.inf) -> Iterator[tuple[Job, Done | Failed]]:
        """Every job with its outcome, as they end. `limit_s` seconds for each.

        Those that had not begun when the clock (`time.monotonic`) passed `until` are left out, unless they must be
        done. One thread at a time has the workers; others wait.

        Raises:
            LostError: if the workers' set-up fails, since then no job can be done.
        """
        with self._turn:
            waiting = deque(jobs)
            while waiting or any(seat.job or seat.owed for seat in self._seats):
                if time.monotonic() > until:
                    waiting = deque(job for job in waiting if job.must)
                self._occupy(waiting)
                active = {seat.worker: seat for seat in self._seats if seat.job or not seat.ready}
                if not active:
                    return
                now = time.monotonic()
                soonest = min(s.started + (limit_s if s.ready else SETUP_LIMIT_S) for s in active.values())
                for worker in self.wait(list(active), max(0.0, soonest - now)):
                    yield from self._listen(active[worker], waiting)
                self._expire(limit_s, waiting)

    def _occupy(self, waiting: deque[Job]) -> None:
        """Give what waits to who is free, and let more workers come while there is more."""
        if self._stopped:
            raise LostError("the workers were stopped")
        busy = sum(seat.job is not None or not seat.ready for seat in self._seats)
        while len(self._seats) < min(self._size, busy + len(waiting)):
            taken = Counter(seat.place for seat in self._seats)
            self._sit(min(self._places, key=lambda place: taken[place]))
            busy += 1
        for seat in self._seats:
            if seat.ready and seat.job is None and waiting:
                seat.give(waiting.popleft())

    def _sit(self, place: tuple[Any, ...], owed: tuple[Job, Done | Failed] | None = None) -> None:
        self._seats.append(_Seat(self.make(place), place, owed))

    def _listen(self, seat: _Seat, waiting: deque[Job]) -> Iterator[tuple[Job, Done | Failed]]:
        if seat not in self._seats:
            return  # it went with its place
        outcome, job = seat.worker.answer(), seat.job
        if self._stopped:
            raise LostError("the workers were stopped")
        seat.job = None
        if job is not None:
            if (isinstance(outcome, Failed) and outcome.kind == "crashed") or self._renew(outcome):
                self._replace(seat, job, outcome)
            else:
                yield job, outcome
        elif isinstance(outcome, Failed):
            self._give_up(seat, outcome.message, waiting)
        else:
            seat.ready = True
            owed, seat.owed = seat.owed, None
            if owed is not None:
                yield owed

    def _expire(self, limit_s: float, waiting: deque[Job]) -> None:
        now = time.monotonic()
        for seat in list(self._seats):
            if not seat.ready and now - seat.started > SETUP_LIMIT_S:
                self._give_up(seat, f"not ready within {SETUP_LIMIT_S:.0f} s", waiting)
            elif seat.ready and seat.job is not None and now - seat.started > limit_s:
                outcome = Failed("timeout", f"not done after {limit_s:.0f} s", now - seat.started)
                self._replace(seat, seat.job, outcome)

    def _replace(self, seat: _Seat, job: Job, outcome: Done | Failed) -> None:
        """Another worker at the same place; the outcome stands if it can be had."""
        self._leave(seat)
        self._sit(seat.place, (job, outcome))

    def _leave(self, seat: _Seat) -> None:
        self._seats.remove(seat)
        seat.worker.kill()

    def _give_up(self, seat: _Seat, message: str, waiting: deque[Job]) -> None:
        """A place where nothing can be set up: what was under way there begins anew elsewhere."""
        self.lost[seat.place] = message
        self._places = [place for place in self._places if place != seat.place]
        for other in [other for other in self._seats if other.place == seat.place]:
            waiting.extendleft(job for job in (other.job, other.owed[0] if other.owed else None) if job is not None)
            self._leave(other)
        if not self._places:
            raise LostError(f"a worker could not start: {message}")
