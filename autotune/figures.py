"""What the pictures of a run show, as numbers: the page draws them as SVG, `report --png` as files."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..problem import Problem
from ..profiles.configs import as_config, known_kernel
from .devices import find_device

Kernel = Mapping[str, Any]
NO_TERM = ("exposed_us", "further_launches_us")


@dataclass(frozen=True, slots=True)
class Tiles:
    """The least time, in microseconds, for each pair of values of the two tile fields that vary most."""

    down: str
    across: str
    rows: list[int]
    columns: list[int]
    best_us: dict[tuple[int, int], float]


@dataclass(frozen=True, slots=True)
class Roofline:
    """Useful TFLOP/s at so many operations for each byte that must move, of named configs, and what the GPU can do."""

    points: dict[str, tuple[float, float]]
    peak_tflops: float
    peak_tbps: float

    def roof(self, intensity: float) -> float:
        """The most TFLOP/s at an intensity."""
        return min(self.peak_tflops, self.peak_tbps * intensity)


def history(kernel: Kernel) -> list[float]:
    """The least time so far after each round; without rounds, each compiled config's prediction, best first."""
    times: list[float] = []
    for found in kernel["rounds"]:
        known = [time_us for time_us in found.values() if time_us is not None]
        if known:
            times.append(min([*known, *times[-1:]]))
    return times or sorted(t["predicted_us"] for t in kernel["trials"] if t["predicted_us"] is not None)


def tiles(kernel: Kernel) -> Tiles | None:
    """None where no two tile fields were tried."""
    key = "time_us" if kernel["rounds"] else "predicted_us"
    trials = [trial for trial in kernel["trials"] if trial["refusal"] is None and trial[key] is not None]
    names = [name for name in (trials[0]["config"] if trials else ()) if not name.startswith("num_")]
    varied = sorted(names, key=lambda name: -len({trial["config"][name] for trial in trials}))[:2]
    if len(varied) < 2:
        return None
    rows, columns = (sorted({trial["config"][name] for trial in trials}) for name in varied)
    best: dict[tuple[int, int], float] = {}
    for trial in trials:
        cell = (trial["config"][varied[0]], trial["config"][varied[1]])
        best[cell] = min(trial[key], best.get(cell, math.inf))
    return Tiles(varied[0], varied[1], rows, columns, best)


def bounds(kernel: Kernel) -> dict[str, float]:
    """Microseconds of each term of the model of the chosen config, the largest first; nothing without a choice."""
    chosen = next((trial for trial in kernel["trials"] if trial["config"] == kernel["chosen"]), None)
    parts = {} if chosen is None else chosen["parts"]
    terms = {name.removesuffix("_us"): us for name, us in parts.items() if name.endswith("_us") and name not in NO_TERM}
    return dict(sorted(terms.items(), key=lambda term: -term[1])) if any(terms.values()) else {}


def roofline(name: str, kernel: Kernel, problem: Mapping[str, Any], device: str) -> Roofline | None:
    """The choice and the built-in config under the roof of the GPU's stated rates; None for a kernel of no work."""
    times = {
        "chosen": (kernel["chosen"], kernel["time_us"]),
        "built-in": (kernel["default"], kernel["default_time_us"]),
    }
    gpu, asked, points = find_device(device), Problem(**problem), {}
    for title, (config, time_us) in times.items():
        if config is not None and time_us:
            work = known_kernel(name).work(asked, as_config(name, config))
            if work.flops and work.bytes:
                points[title] = (work.flops / work.bytes, work.flops / time_us / 1e6)
    peak = gpu.fp32_tflops if asked.dtype == "float32" else gpu.tensor_tflops
    return Roofline(points, peak, gpu.hbm_gbps / 1e3) if points else None


def failures(kernel: Kernel) -> Counter[str]:
    """How many configs were lost, by kind."""
    lost = Counter({**kernel["failed"], **kernel["dropped"], **kernel["ruled_out"]})
    return lost + Counter(entry["outcome"] for entry in kernel["quarantined"])
