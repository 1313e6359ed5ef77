"""Which kernels a call launches, and whether the gate lets their configs be timed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from typing import Any

from ..kernels.tunable import Config
from ..problem import Problem
from ..profiles.configs import tunables
from ..verify.child import Child, ChildFailedError
from ..verify.gate import TIMEOUT_S, Launched, run_request
from ..verify.gate_cases import SEED
from .record import Evidence

WORKERS = 12
"""Processes of the gate at most: most of its time goes into compiling."""

Key = tuple[str, Config, Problem]
"""A kernel, its config, and the kind of problem that it is judged for."""


def kernels_of(launched: Iterable[Launched], arch: str) -> list[str]:
    """The tunables whose functions were launched; what is not tuned is judged with the kernels that it serves."""
    names = {launch.function for launch in launched}
    return [
        name for name, tunable in tunables(arch).items() if names & {function.__name__ for function in tunable.kernels}
    ]


class Gate:
    """The verdicts of `verify.gate` on configs, each asked for once and given in processes of their own.

    `check` is what is called in them, with a request of `verify.gate.check_config`.
    """

    def __init__(self, check: Callable[[dict[str, Any]], dict[str, Any]] = run_request) -> None:
        self._check = check
        self._verdicts: dict[Key, dict[str, Any]] = {}
        self._children: list[Child] = []

    def admit(self, configs: dict[str, Config], problem: Problem) -> list[Evidence]:
        """Evidence for these kernels with these configs, on problems of this kind; over 1 where one is wrong."""
        keys = [(name, config, kind_of(problem)) for name, config in configs.items()]
        self.ask(keys)
        return [_evidence(key[0], self._verdicts[key]) for key in keys]

    def ask(self, keys: Iterable[Key]) -> None:
        """Have these judged, all at a time, but for those that were."""
        wanted = [key for key in dict.fromkeys(keys) if key not in self._verdicts]
        if not wanted:
            return
        self._children += [Child(interpret=False) for _ in range(min(WORKERS, len(wanted)) - len(self._children))]
        idle = list(self._children)
        with ThreadPoolExecutor(len(idle)) as pool:
            try:
                answers = list(pool.map(lambda key: self._ask(idle, *key), wanted))
            except BaseException:
                self.close()  # else the threads, and who leaves the pool, would wait for their answers
                raise
        self._verdicts.update(zip(wanted, answers, strict=True))

    def _ask(self, idle: list[Child], kernel: str, config: Config, problem: Problem) -> dict[str, Any]:
        if refusal := config.refusal(problem):
            return {"ok": False, "cases": 0, "message": f"refused: {refusal}"}
        request = {
            "kernel": kernel, "config": asdict(config), "problem": problem.as_dict(), "seed": SEED, "only_first": False
        }  # fmt: skip
        child = idle.pop()  # there are as many as threads
        try:
            verdict: dict[str, Any] = child.call(self._check, request, timeout_s=TIMEOUT_S)
        except ChildFailedError as error:
            child.close()
            verdict = {"ok": False, "cases": 0, "message": str(error)}
        idle.append(child)
        return verdict

    def close(self) -> None:
        """End the processes, whatever they are at."""
        for child in self._children:
            child.kill()
        self._children.clear()


def kind_of(problem: Problem) -> Problem:
    """`problem` without the sizes that the gate replaces by small ones anyway."""
    ratio = problem.q_heads // problem.kv_heads
    return replace(problem, batch=1, kv_heads=1, q_heads=ratio, seq_len=1)


def _evidence(kernel: str, verdict: dict[str, Any]) -> Evidence:
    worst = min(float(verdict.get("worst_budget_use", 1e30)), 1e30)
    return Evidence(
        check=f"gate of {kernel}", count=verdict["cases"],
        worst=worst if verdict["ok"] else max(worst, 1e30), detail=verdict["message"],
    )  # fmt: skip
