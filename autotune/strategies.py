"""Which configs to time next: searches behind one protocol.

A strategy is given a `Space` and makes a `Search`: a generator that yields some configs of the space, is sent the time
of each (and of the built-in config, which takes part in every round; None for what failed), and ends when it has seen
enough. It knows nothing of GPUs, clocks, files and printing; whoever runs it may stop it at any time. The same seed and
the same answers give the same questions, so that an interrupted search goes on where it was. What failed is not asked
for again.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Generator
from dataclasses import asdict, dataclass
from itertools import islice

from ..kernels.tunable import Config
from .race import Round, Search, race

FINALISTS = 8
STEP = 0.001
"""The share by which a neighbour must be faster for coordinate descent to move there."""
POPULATION, TOURNAMENT, LITTER = 12, 3, 4


@dataclass(frozen=True, slots=True)
class Space:
    """What may be timed: `configs`, the built-in one first and then the best by the model.

    `most`: how many to look at (0: all); `rounds`: how often to time the few best; `seed` of whatever is drawn.
    """

    configs: tuple[Config, ...]
    most: int = 24
    rounds: int = 12
    seed: int = 0

    @property
    def default(self) -> Config:
        """The built-in config."""
        return self.configs[0]

    @property
    def limit(self) -> int:
        """How many configs are looked at, at most."""
        return self.most or len(self.configs)


Strategy = Callable[[Space], Search]
Known = dict[Config, float]
"""The time of each config that was looked at over the built-in one's in the same round; infinite if it failed."""


def exhaustive(space: Space) -> Search:
    """Time the first `most` configs in every round, leaving out none that works."""
    left = space.configs[: space.limit]
    for _ in range(space.rounds):
        result = yield left
        left = tuple(config for config in left if result[config] is not None)
        if not left:
            return


def racing(space: Space) -> Search:
    """Time the first `most` configs, and go on with those that may still be the best."""
    yield from race(space.configs[: space.limit], space.rounds)


def coordinate(space: Space) -> Search:
    """Descend from the built-in config: look at all values of one field at a time, go to the best, until none helps."""
    known: Known = {}
    yield from _look((space.default,), space, known)
    here, moved = space.default, True
    while moved:
        moved = False
        for field in asdict(here):
            near = tuple(config for config in space.configs if _differ_in(config, here) == [field])
            yield from _look(near, space, known)
            best = min((here, *(config for config in near if config in known)), key=known.__getitem__)
            if known[best] < known[here] * (1 - STEP):
                here, moved = best, True
    yield from _final(space, known)


def evolutionary(space: Space) -> Search:
    """Aging evolution: the fittest of a few breeds, a child differs in one field, the oldest dies."""
    generator, known = random.Random(space.seed), Known()
    rest = space.configs[POPULATION // 2 :]
    first = space.configs[: POPULATION // 2] + tuple(generator.sample(rest, min(len(rest), POPULATION // 2)))
    yield from _look(first, space, known)
    population = list(known)
    while len(known) < min(space.limit, len(space.configs)):
        children: list[Config] = []
        while len(children) < LITTER and len(known) + len(children) < min(space.limit, len(space.configs)):
            few = generator.sample(population, min(TOURNAMENT, len(population)))
            parent = min(few, key=known.__getitem__)
            unseen = [config for config in space.configs if config not in known and config not in children]
            near = [config for config in unseen if len(_differ_in(config, parent)) == 1]
            children.append(generator.choice(near or unseen))
        yield from _look(tuple(children), space, known)
        population = (population + children)[-POPULATION:]
    yield from _final(space, known)


def optuna_tpe(space: Space) -> Search:
    """Optuna's tree-structured Parzen estimator, for whoever has it: the extra `optuna`."""
    from .optuna_search import suggestions

    known: Known = {}
    for config in islice(suggestions(space, known), space.limit):
        yield from _look((config,), space, known)
    yield from _final(space, known)


STRATEGIES: dict[str, Strategy] = {
    "racing": racing,
    "exhaustive": exhaustive,
    "coordinate": coordinate,
    "evolutionary": evolutionary,
    "optuna": optuna_tpe,
}
"""Every strategy by its name."""
IN_ORDER = ("racing", "exhaustive")
"""Those that ask for the first configs of the space and for no others: all of these can be compiled at once."""


def _look(configs: tuple[Config, ...], space: Space, known: Known) -> Generator[tuple[Config, ...], Round, None]:
    """Time what is not known yet of `configs`, as far as there is room, and enter it in `known`."""
    new = tuple(config for config in configs if config not in known)[: max(0, space.limit - len(known))]
    if not new:
        return
    result = yield new
    builtin = result.get(space.default)
    for config in new:
        time_us = result[config]
        known[config] = float("inf") if time_us is None else time_us / (builtin or 1.0)


def _final(space: Space, known: Known) -> Search:
    """A race of the best that were looked at."""
    works = sorted((config for config in known if known[config] < float("inf")), key=known.__getitem__)
    yield from race(works[:FINALISTS], space.rounds)


def _differ_in(config: Config, other: Config) -> list[str]:
    """The fields in which two configs differ."""
    values = asdict(other)
    return [name for name, value in asdict(config).items() if value != values[name]]
