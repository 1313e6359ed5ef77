"""What every measurement goes through: the limit of time, the demand for evidence, and errors that become rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from ..autotune.card import Card
from ..configs import Configs, architecture
from ..problem import Problem
from ..verify.gate import Launched
from .admission import Gate, kernels_of
from .peers import CCA, TITLES
from .plan import Case
from .record import Evidence, Row, matching
from .timing import Meter
from .work import flops, moved_bytes

Figures = dict[str, Any]
"""The fields of a `Row` that a measurement fills in: ms, extra_bytes, held_bytes, evidence."""


class Wrong(Exception):
    """CCA gave a result that it must not be timed with; `evidence` says which."""

    def __init__(self, evidence: list[Evidence]) -> None:
        bad = [e for e in evidence if not (e.worst <= 1 and e.count)]
        super().__init__("; ".join(f"{e.check}: {e.detail or f'{e.worst:.3g} of what is allowed'}" for e in bad))
        self.evidence = evidence


@dataclass
class Lab:
    """Where things are measured.

    `profile` is a handle of `register_profile`, `limit_ms` the longest call of a peer that is waited for, `say` is told
    what comes next, `card` is asked for its clocks, `rows` are those of the run so far.
    """

    meter: Meter
    gate: Gate
    device: torch.device
    profile: str
    limit_ms: float
    say: Callable[[str], None]
    card: Card | None = None
    rows: list[Row] = field(default_factory=list)

    def row(self, case: Case, what: str, system: str, measure: Callable[[], Figures], keys: int | None = None) -> Row:
        """What came of `measure`, or why nothing did."""
        self.say(f"{case} {what}: {TITLES[system]}{f', {keys} keys' if keys else ''}")
        dense = system in ("flash", "cudnn")
        facts: dict[str, Any] = {"suite": case.suite, "what": what, "system": system, "keys": keys}
        facts["problem"] = case.problem.as_dict()
        work = {
            "flops": flops(what, case.problem, dense=dense, keys=keys),
            "bytes": moved_bytes(what, case.problem, dense=dense, keys=keys),
        }
        if note := self._too_slow(system, what, work["flops"]):
            row = Row(**facts, status="skipped", note=note)
        else:
            row = self._measured(facts, work, measure)
        self.rows.append(row)
        return row

    def _measured(self, facts: dict[str, Any], work: dict[str, float], measure: Callable[[], Figures]) -> Row:
        try:
            figures = measure()
        except Wrong as error:
            return Row(**facts, status="wrong", note=str(error), evidence=tuple(error.evidence))
        except torch.OutOfMemoryError as error:
            return Row(**facts, status="out of memory", note=_first_line(error))
        except Exception as error:  # whatever a peer raises is what came of it; CCA's fails the run
            return Row(**facts, status="failed" if facts["system"] == CCA else "refused", note=_first_line(error))
        finally:
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        if note := figures.pop("not_offered", ""):
            return Row(**facts, status="not offered", note=note)
        rates: Figures = {} if self.card is None else {"card": asdict(self.card.state())}
        if figures.get("ms") is not None:
            rates |= {"tflops": work["flops"] / figures["ms"] / 1e9, "tbps": work["bytes"] / figures["ms"] / 1e9}
        return Row(**facts, status="measured", **{**work, **rates, **figures})

    def _too_slow(self, system: str, what: str, operations: float) -> str:
        """Why a peer is not waited for, from its newest time of the same kind; "" if it is."""
        known = [row for row in matching(self.rows, system=system, what=what) if row.ms and row.flops]
        if system == CCA or not known:
            return ""
        last = known[-1]
        expected_ms = (last.ms or 0.0) * operations / (last.flops or 1.0)
        if expected_ms <= self.limit_ms:
            return ""
        return f"{expected_ms / 1e3:.1f} s expected from T={last.ctx}, the limit is {self.limit_ms / 1e3:g} s"

    def demand(
        self, launched: Iterable[Launched], configs: Configs, problem: Problem, *samples: Evidence
    ) -> tuple[Evidence, ...]:
        """All evidence for a call that launched these kernels with these configs.

        Raises:
            Wrong: if any of it speaks against the call, or the gate knows no kernel of it.
        """
        names = kernels_of(launched, architecture(self.device))
        found = self.gate.admit({name: configs[name] for name in names}, problem)
        if not found:
            found = [Evidence(check="gate", count=0, worst=0.0, detail="no kernel of ours was seen to be launched")]
        return require(*found, *samples)


def require(*evidence: Evidence) -> tuple[Evidence, ...]:
    """`evidence`, if there is some of each kind and nothing in it is over its bound.

    Raises:
        Wrong: otherwise.
    """
    if not all(e.worst <= 1 and e.count for e in evidence):
        raise Wrong(list(evidence))
    return evidence


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]
