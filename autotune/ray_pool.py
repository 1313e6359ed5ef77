"""The workers of `pool` in a Ray cluster: the same jobs, outcomes and time limits on any machine of it.

Imported only where the extra `ray` is asked for. Every machine has this package installed in the same version.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError

from .card import CardState, card_at_hand
from .host import HostCard, cards_here, touch
from .pool import Pool, Renew, no_renewal
from .worker import Done, Failed, Job, attempt

FIND_LIMIT_S = 120.0
GIVEN_BACK_S = 5.0
"""How long a GPU may take to be free whose process has ended."""


def connect(address: str) -> None:
    """Join the cluster at `address`, or start one on this machine ("local").

    Raises:
        ConnectionError: if there is none.
    """
    own = {"include_dashboard": False} if address == "local" else {}
    try:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR", ignore_reinit_error=True, **own)
    except (ConnectionError, RayError, RuntimeError, TimeoutError, ValueError) as error:
        raise ConnectionError(f"there is no Ray cluster at {address}: {' '.join(str(error).split())[:200]}") from error


def leave() -> None:
    """End what was joined or started."""
    ray.shutdown()
    cluster_cards.cache_clear()


def cores() -> int:
    """CPUs of the cluster."""
    return int(ray.cluster_resources().get("CPU", 1))


class _Caller:
    """What lives in the cluster."""

    def __init__(self, path: list[str]) -> None:
        sys.path.extend(folder for folder in path if folder not in sys.path)

    def call(self, function: Callable[..., Any], args: tuple[Any, ...]) -> Done | Failed:
        """A call as an outcome."""
        return attempt(function, args)


class RayWorker:
    """A worker somewhere in the cluster, which runs its set-up as soon as there is room for it."""

    def __init__(self, setup: Callable[..., Any], args: tuple[Any, ...], cpus: float, gpus: float) -> None:
        # workers compile: if this process interprets its kernels, they must not
        options = {"num_cpus": cpus, "num_gpus": gpus, "runtime_env": {"env_vars": {"TRITON_INTERPRET": "0"}}}
        self._actor = ray.remote(_Caller).options(**options).remote(sys.path)
        self.ref = self._actor.call.remote(setup, args)

    def give(self, job: Job) -> None:
        """Begin a job."""
        self.ref = self._actor.call.remote(job.function, job.args)

    def answer(self) -> Done | Failed:
        """What came of it, or that the process or its machine is gone."""
        try:
            outcome: Done | Failed = ray.get(self.ref)
        except RayActorError as error:
            return Failed("crashed", f"the worker was lost: {' '.join(str(error).split())[:200]}", 0.0)
        except RayError as error:
            return Failed("error", " ".join(str(error).split())[-200:], 0.0)
        return outcome

    def kill(self) -> None:
        """End the process."""
        ray.kill(self._actor)

    strike = kill


class RayPool(Pool):
    """`Pool` with its workers in the cluster that this process has joined; each takes `cpus` and `gpus` there."""

    def __init__(
        self, size: int, setup: Callable[..., None], *args: Any, renew: Renew = no_renewal, cpus: float = 1.0,
        gpus: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__(size, setup, *args, renew=renew)
        self._cpus, self._gpus = cpus, gpus

    def make(self, place: tuple[Any, ...]) -> RayWorker:
        """A new worker."""
        return RayWorker(self._setup, (*self._args, *place), self._cpus, self._gpus)

    def wait(self, workers: Sequence[RayWorker], timeout_s: float) -> list[RayWorker]:
        """Those that have an answer; none after `timeout_s`."""
        ready, _ = ray.wait([worker.ref for worker in workers], timeout=timeout_s)
        return [worker for worker in workers if worker.ref in ready]


def take_alike(kind: str) -> None:
    """See that the GPU which Ray gave this process works, and is of the kind that is being timed.

    Raises:
        RuntimeError: if not; what unlike cards measure is never mixed.
    """
    touch()
    (card,) = cards_here()
    if card.kind != kind:
        raise RuntimeError(f"Ray gave a {card.kind}, not a {kind}")


def describe() -> HostCard:
    """The GPU that Ray gave this process.

    Raises:
        LookupError: if PyTorch sees none.
    """
    if not (cards := cards_here()):
        raise LookupError("PyTorch sees no GPU in the process that Ray gave one")
    return cards[0]


def state_of(pool: RayPool) -> CardState | None:
    """How the GPU of a pool's one worker is now; None if that is not told."""
    ((_, outcome),) = pool.run([Job("state", _state, ())], FIND_LIMIT_S)
    return outcome.value if isinstance(outcome, Done) else None


def _state() -> CardState | None:
    card = card_at_hand()
    return None if card is None else card.state()


def _free_gpus() -> int:
    """GPUs of the cluster that nobody has; those that somebody has just given back are waited for."""
    total, until = int(ray.cluster_resources().get("GPU", 0)), time.monotonic() + GIVEN_BACK_S
    while (free := int(ray.available_resources().get("GPU", 0))) < total and time.monotonic() < until:
        time.sleep(0.1)
    return free


@cache
def cluster_cards() -> tuple[HostCard, ...]:
    """Every GPU of the cluster that is free as this is first called; their handles are their kinds, for `take_alike`.

    Raises:
        ConnectionError: if there are some and none can be used.
    """
    if not (count := _free_gpus()):
        return ()
    workers = [RayWorker(describe, (), 0.0, 1.0) for _ in range(count)]
    ready, _ = ray.wait([worker.ref for worker in workers], num_returns=count, timeout=FIND_LIMIT_S)
    found = [worker.answer() for worker in workers if worker.ref in ready]
    for worker in workers:
        worker.kill()
    cards = [outcome.value for outcome in found if isinstance(outcome, Done)]
    if not cards:
        why = {outcome.message for outcome in found if isinstance(outcome, Failed)} or {"none answers"}
        raise ConnectionError(f"none of the {count} GPUs of the Ray cluster can be used: {'; '.join(sorted(why))}")
    return tuple(HostCard(index, card.name, card.kind, card.kind) for index, card in enumerate(cards))
