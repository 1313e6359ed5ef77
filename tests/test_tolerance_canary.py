"""A broken acceptance rule is noticed: before its first judgement, later, and by `canary`."""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from cca_attention.verify import bias, levels, peer, rounding, statistics, tolerance
from cca_attention.verify.canary import EVERY, CanaryError, canary, guarded
from cca_attention.verify.rounding import Bounded
from cca_attention.verify.rounding_backward import Gradients
from cca_attention.verify.tolerance import Comparison

RULES: dict[str, tuple[ModuleType, tuple[Any, ...]]] = {
    "compare": (tolerance, (torch.zeros(2), Bounded(torch.zeros(2), torch.ones(2)))),
    "compare_bitwise": (tolerance, (torch.zeros(2), torch.zeros(2))),
    "compare_bias": (bias, (torch.zeros(1), Bounded(torch.zeros(1), torch.ones(1)))),
    "compare_constant": (bias, (torch.zeros(1), torch.zeros(1))),
    "compare_to_peer": (peer, (torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1))),
}


OUT, GRADIENTS = rounding.ErrorModel.out.fget, levels.gradients  # type: ignore[attr-defined]


def always(ok: bool) -> Callable[..., Comparison]:
    return lambda *args, **kwargs: Comparison("x", 0.0 if ok else math.inf, (), ok)


def test_the_rules_judge() -> None:
    assert canary() == len(RULES)


@pytest.mark.parametrize("ok", [True, False])
@pytest.mark.parametrize("name", RULES)
def test_a_rule_that_was_replaced(name: str, ok: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RULES[name][0], name, always(ok))
    with pytest.raises(CanaryError, match=f"{name} (accepts what is wrong|refuses what is right)"):
        canary()


def looser(bounded: Any) -> Any:
    return bounded._replace(bound=100 * bounded.bound)


@pytest.mark.parametrize(
    ("module", "name", "change", "match"),
    [
        (rounding.ErrorModel, "out", property(lambda self: looser(OUT(self))), "rigorous bounds of out accept"),
        (rounding.ErrorModel, "out", property(lambda self: OUT(self)._replace(bound=0 * OUT(self).bound)), "refuse"),
        (statistics, "SIGMAS", 15.0, "statistical bounds of .* accept"),
        (levels, "gradients", lambda *args: Gradients(*map(looser, GRADIENTS(*args))), "rigorous bounds of dq accept"),
    ],
)
def test_bounds_that_are_wrong(
    module: Any, name: str, change: Any, match: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, name, change)
    with pytest.raises(CanaryError, match=match):
        canary()


# a line of a rule's module, and what a careless or hostile change makes of it
FAULTS = [
    ("compare", "    value, bound = expected.value", '    return Comparison(name, 0.0, (), True)\n{}'),
    ("compare", "error / bound, math.inf))\n    return judge", "error / (100 * bound), math.inf))\n    return judge"),
    ("compare", "error / bound, math.inf))\n    return judge", "error / (1.6 * bound), math.inf))\n    return judge"),
    ("compare", "torch.where(both, error, math.inf))", "torch.where(both, error, 0.0))"),
    ("compare", "    if actual.shape != value.shape:", "    if False:"),
    ("compare", "ok = bool((use <= 1.0).all())", "ok = True"),
    ("compare", "ok = bool((use <= 1.0).all())", "ok = False"),
    ("compare", "ok = bool((use <= 1.0).all())", "ok = bool((use <= 1.0).any())"),
    ("compare_bitwise", "differs, math.inf, 0.0)", "differs, 1.0, 0.0)"),
    ("compare_bitwise", "view(bits) != expected", "view(bits) == expected"),
    ("compare_bias", "uses += [abs(mean) / MAX_MEAN,", "uses += [0.0 * mean,"),
    ("compare_bias", "MAX_MEAN = 0.05", "MAX_MEAN = 0.5"),
    ("compare_bias", "MAX_Z = 5.0", "MAX_Z = 50.0"),
    ("compare_bias", "SECOND_ORDER = 4.0", "SECOND_ORDER = 40.0"),
    ("compare_bias", "min(abs(z) / MAX_Z, abs(mean) / small)]", "0.0]"),
    ("compare_bias", '("away", part * value.sign())', '("away", part)'),
    ("compare_bias", "max(math.inf if math.isnan(x) else x for x in uses)", "max([0.0, *uses])"),
    ("compare_constant", "MIN_EXACT = 0.99", "MIN_EXACT = 0.5"),
    ("compare_constant", "MAX_MEAN_RELATIVE = 2e-4", "MAX_MEAN_RELATIVE = 1.0"),
    ("compare_to_peer", "FACTOR * _of_tile((near - value).abs())", "FACTOR * (near - value).abs().amax()"),
    ("compare_to_peer", "FACTOR = 2.0", "FACTOR = 4.0"),
    ("compare_to_peer", "error = errors(found, value)", "error = errors(found, value).nan_to_num(0.0, 0.0, 0.0)"),
]  # fmt: skip


@dataclass
class Copies:
    """Copies of the rules' modules with a changed source, under names of their own."""

    names: list[str]

    def of(self, module: ModuleType, old: str, new: str) -> ModuleType:
        source = Path(str(module.__file__)).read_text()
        assert source.count(old) == 1, f"{old!r} is {source.count(old)} times in {module.__name__}"
        name = f"{module.__name__}_changed"
        changed = importlib.util.module_from_spec(importlib.util.spec_from_loader(name, None))  # type: ignore[arg-type]
        changed.__package__ = module.__package__
        self.names.append(name)
        sys.modules[name] = changed
        exec(compile(source.replace(old, new.format(old)), name, "exec"), changed.__dict__)
        return changed


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> Iterator[Copies]:
    monkeypatch.setattr("cca_attention.verify.canary._PROOFS", {})
    made = Copies([])
    yield made
    for name in made.names:
        del sys.modules[name]


@pytest.mark.parametrize(("rule", "old", "new"), FAULTS)
def test_a_rule_with_a_broken_body_never_judges(rule: str, old: str, new: str, copies: Copies) -> None:
    module, arguments = RULES[rule]
    changed = copies.of(module, old, new)
    with pytest.raises(CanaryError):
        getattr(changed, rule)("x", *arguments)


def test_a_rule_that_breaks_later_is_noticed_within_256_judgements() -> None:
    right = True

    @guarded(lambda rule: rule(0.5), lambda rule: rule(1.5))
    def rule(use: float) -> Comparison:
        return Comparison("x", use, (), use <= 1 if right else True)

    assert rule(1.0).ok and not rule(2.0).ok
    right = False
    with pytest.raises(CanaryError, match=r"rule accepts what is wrong: bad examples \[0\]"):
        for _ in range(EVERY):
            rule(2.0)


def test_a_rule_that_failed_once_is_believed_never() -> None:
    @guarded(lambda judge: judge(True), lambda judge: judge(False))
    def takes_anything(right: bool) -> Comparison:
        return Comparison("it", 0.0, (), True)

    for _ in range(3):
        with pytest.raises(CanaryError, match="accepts what is wrong"):
            takes_anything(True)
