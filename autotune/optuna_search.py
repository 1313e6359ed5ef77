"""Optuna behind the protocol of `strategies`; imported only where the extra `optuna` is asked for."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict

import optuna

from ..kernels.tunable import Config
from .strategies import Known, Space

PATIENCE = 50
"""Suggestions in a row that are illegal or known before the next unknown config is taken in the space's order."""


def suggestions(space: Space, known: Known) -> Iterator[Config]:
    """Configs that were not suggested before; `known` must have each when the next is asked for.

    Each field is a categorical parameter. What is not in the space is told as a value worse than all others and never
    reaches the caller, since a failed trial would be ignored by the sampler and proposed again; a config that is
    suggested twice is told its known value.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    by_fields = {tuple(asdict(config).values()): config for config in space.configs}
    choices = {name: sorted({asdict(config)[name] for config in space.configs}) for name in asdict(space.default)}
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=space.seed))
    study.enqueue_trial(asdict(space.default))
    while len(known) < len(space.configs):
        for _ in range(PATIENCE):
            trial = study.ask()
            fields = tuple(trial.suggest_categorical(name, values) for name, values in choices.items())
            config = by_fields.get(fields)
            if config is not None and config not in known:
                yield config
                study.tell(trial, _score(known[config]))
                break
            study.tell(trial, _score(math.inf if config is None else known[config]))
        else:
            yield next(config for config in space.configs if config not in known)


def _score(ratio: float) -> float:
    """What a study is told: the ratio to the built-in config, and a poor one for what is out."""
    return ratio if math.isfinite(ratio) else 10.0
