"""The layers L0 to L6: which units each has. Nothing is run here, so that a plan can be shown and counted."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from ..kernels.tunable import Config, Tunable
from ..problem import Problem
from ..profiles.configs import tunables
from ..profiles.schema import Entry, Profile
from . import gate, gpu
from .foundations import FOUNDATIONS
from .gate_cases import DIRECTION_OF
from .mutants import MUTANTS
from .record import Mode
from .registry import Check, checks
from .shapes import FEW, fixed_names
from .units import Place, Unit

INTERPRETED = ("float32", "float64", "float16")
COMPILED = ("bfloat16", "float16", "float32")
TITLES = {
    "L0": "integers, and two oracles that agree",
    "L1": "oracle and eager path",
    "L2": "kernels in the interpreter",
    "L3": "kernels under the shadow checker; every config",
    "L4": "the cache's state machine",
    "L5": "planted mistakes",
    "L6": "on the GPU",
}
BUDGETS_S = {"L0": 30.0, "L1": 180.0, "L2": 1200.0, "L3": 900.0, "L4": 300.0, "L5": 1500.0, "L6": 1200.0}
"""Seconds that a layer may take on two cores; L6 on a GPU machine."""
REPEATS = 250
EXAMPLES = {"L2": 12, "L4": 20, "L6": 3}
"""Random examples of each property."""
WALKS: dict[str, tuple[Place, Mode, int, int]] = {
    "eager": ("host", "eager", 80, 20),
    "triton": ("interpreter", "interpreter", 40, 14),
}
"""How often the cache's state machine walks on each backend, and the most steps of a walk."""
KERNELS_ONLY = ("schedule_is_used", "layout_changes_no_bit", "head_permutation", "shared_keys_are_repeated_keys")
"""Checks of bits that the kernels promise and the eager path does not: PyTorch's matrix products depend on the layout
and on the size of the whole batch."""
PLAIN = ("forward_equals_oracle", "backward_equals_oracle", "decode_equals_prefill")


@dataclass(frozen=True, slots=True, kw_only=True)
class Extent:
    """How much to run: `examples` random ones of each property, and configs of each choice of tiles on a GPU (None for
    the layers' own numbers, and for all configs), drawn by `seed`; `strict` as in `Unit`."""

    examples: int | None = None
    seed: int = 0
    strict: bool = False


def plan(layers: tuple[str, ...], extent: Extent) -> list[Unit]:
    """The units of these layers, in order."""
    return [replace(unit, strict=extent.strict) for layer in layers for unit in LAYERS[layer](extent)]


def _l0(extent: Extent) -> Iterator[Unit]:
    yield Unit(id="L0/canaries", layer="L0", check="canaries", runner="canaries", place="host", mode="host")
    for name in FOUNDATIONS:
        if name != "oracle_gradcheck":
            yield Unit(id=f"L0/{name}", layer="L0", check=name, runner="foundation", place="host", mode="host")


def _l1(extent: Extent) -> Iterator[Unit]:
    yield Unit(
        id="L1/oracle_gradcheck", layer="L1", check="oracle_gradcheck", runner="foundation", place="host", mode="eager"
    )
    yield from (_levels_unit("L1", dtype, "host", "eager", backend="eager") for dtype in ("float64", "bfloat16"))
    for check in checks().values():
        if check.name not in KERNELS_ONLY:
            for dtype in ("float64", "bfloat16"):
                yield _check_unit(
                    "L1", check, dtype, "host", "eager", _cases_of(check, dtype, "float64"), backend="eager"
                )


def _l2(extent: Extent) -> Iterator[Unit]:
    yield Unit(
        id="L2/ratchet", layer="L2", check="every_level", runner="ratcheted", place="interpreter", mode="interpreter",
        estimate_s=40.0,
    )  # fmt: skip
    yield from (_levels_unit("L2", dtype, "interpreter", "interpreter") for dtype in INTERPRETED)
    for name in (*PLAIN[:2], "sequences_equal_alone"):
        check = checks()[name]
        for dtype in INTERPRETED:
            yield _check_unit("L2", check, dtype, "interpreter", "interpreter", _cases_of(check, dtype, "float32"))
    yield from (_drawn_unit("L2", check, extent, EXAMPLES["L2"], covers=True) for check in checks().values())


def _l3(extent: Extent) -> Iterator[Unit]:
    for name in (*PLAIN, "crop_equals_fresh", "reorder_equals_fresh"):
        cases = (*FEW, "packed", "padded") if name in PLAIN[:2] else ("two_tiles", "mean_kv_cores")
        unit = _check_unit("L3", checks()[name], "float32", "interpreter", "interpreter", cases, runner="shadowed")
        yield replace(unit, estimate_s=40.0)
    yield from _configs("L3", "float32", "interpreter", extent)


def _l4(extent: Extent) -> Iterator[Unit]:
    for backend, (place, mode, walks, steps) in WALKS.items():
        examples = extent.examples or walks
        yield Unit(
            id=f"L4/walks/{backend}", layer="L4", check="cache_machine", runner="walks", place=place, mode=mode,
            properties=("P27", "P28"), direction="decode", dtype="float32", estimate_s=0.6 * examples,
            arguments={
                "backend": backend, "examples": examples, "steps": steps, "seed": extent.seed or None,
                "covers": examples >= walks,
            },
        )  # fmt: skip
    for check in checks().values():
        if check.direction == "decode":
            yield _drawn_unit("L4", check, extent, EXAMPLES["L4"])


def _l5(extent: Extent) -> Iterator[Unit]:
    for name, planted in MUTANTS.items():
        yield Unit(
            id=f"L5/{planted.id}/{name}", layer="L5", check=planted.check, runner="mutant", place="host",
            mode="interpreter", dtype=planted.case.problem.dtype, arguments={"mutant": name}, estimate_s=8.0,
        )  # fmt: skip


def _l6(extent: Extent) -> Iterator[Unit]:
    # the longest first, so that no worker is left with one of them at the end
    for tool in gpu.TOOLS:
        yield _gpu_unit(f"sanitizer/{tool}", "sanitizer", "", {"tool": tool}, limit_s=400.0)
    for dtype in COMPILED:
        yield _gpu_unit(f"repeats/{dtype}", "repeats", dtype, {"times": REPEATS}, properties=("P33",))
    yield from (_levels_unit("L6", dtype, "gpu", "gpu", device="cuda") for dtype in COMPILED)
    for check in checks().values():
        for dtype in COMPILED:
            yield _check_unit("L6", check, dtype, "gpu", "gpu", _cases_of(check, dtype, "bfloat16"), device="cuda")
    yield from (_drawn_unit("L6", check, extent, EXAMPLES["L6"]) for check in checks().values())
    yield from _configs("L6", "bfloat16", "gpu", extent)
    for direction, first in (("forward", 0), ("backward", 0), ("forward", 1), ("backward", 1), ("decode", 0)):
        name = f"large/{direction}{'/unaligned' if first else ''}"
        yield _gpu_unit(name, "large", "bfloat16", {"first": first}, direction=direction, alone=True)


def _gpu_unit(name: str, runner: str, dtype: str, arguments: dict[str, Any], **fields: Any) -> Unit:
    return Unit(
        id=f"L6/{name}", layer="L6", check=runner, runner=runner, place="gpu", mode="gpu", dtype=dtype,
        arguments=arguments, estimate_s=30.0, **fields,
    )  # fmt: skip


LAYERS: dict[str, Callable[[Extent], Iterator[Unit]]] = {
    "L0": _l0, "L1": _l1, "L2": _l2, "L3": _l3, "L4": _l4, "L5": _l5, "L6": _l6,
}  # fmt: skip


def _cases_of(check: Check, dtype: str, widest: str) -> tuple[str, ...]:
    """The fixed cases of a check: all for the comparison with the oracle, in one dtype; few elsewhere."""
    if check.name == "sequences_equal_alone":
        return ("packed", "padded")
    if check.name in PLAIN[:2]:
        return tuple(fixed_names()) if dtype == widest else (*FEW, "packed", "padded")
    return ("base", "window_below_a_group", "kv_cores") if dtype == widest else ("base",)


def _drawn_unit(layer: str, check: Check, extent: Extent, examples: int, *, covers: bool = False) -> Unit:
    on_gpu = layer == "L6"
    count = extent.examples or examples
    return Unit(
        id=f"{layer}/drawn/{check.name}", layer=layer, check=check.name, runner="drawn",
        place="gpu" if on_gpu else "interpreter", mode="gpu" if on_gpu else "interpreter", properties=check.properties,
        direction=check.direction, limit_s=300.0 + 20.0 * count, estimate_s=1.5 * count,
        arguments={
            "examples": count, "seed": extent.seed or None, "device": "cuda" if on_gpu else "cpu", "covers": covers,
        },
    )  # fmt: skip


def _levels_unit(layer: str, dtype: str, place: Place, mode: Mode, **options: Any) -> Unit:
    return Unit(
        id=f"{layer}/every_level/{dtype}", layer=layer, check="every_level", runner="levels", place=place, mode=mode,
        direction="backward", dtype=dtype, estimate_s=2.0 if mode == "eager" else 20.0,
        arguments={"cases": FEW, **options},
    )  # fmt: skip


def _check_unit(
    layer: str, check: Check, dtype: str, place: Place, mode: Mode, cases: tuple[str, ...], *, runner: str = "check",
    **options: Any,
) -> Unit:  # fmt: skip
    prefix = "shadow/" if runner == "shadowed" else ""
    return Unit(
        id=f"{layer}/{prefix}{check.name}/{dtype}", layer=layer, check=check.name, runner=runner, place=place,
        mode=mode, properties=check.properties, direction=check.direction, dtype=dtype,
        arguments={"cases": cases, **options}, limit_s=600.0, estimate_s=len(cases) * (0.2 if mode == "eager" else 2.0),
    )  # fmt: skip


def _configs(layer: str, dtype: str, place: Place, extent: Extent) -> Iterator[Unit]:
    """A unit for each choice of tiles of each kernel: the interpreter knows no warps or stages, a GPU gets them all."""
    problem = Problem(**{**gate.STANDARD, "dtype": dtype})
    arch = gpu.arch_at_hand() if place == "gpu" and torch.cuda.is_available() else None
    for kernel, tunable in tunables(arch).items():
        groups: dict[str, list[Config]] = {}
        for config, refusal in tunable.candidates(problem):
            if refusal is None:
                groups.setdefault(_tiles(config), []).append(config)
        for tiles, configs in groups.items():
            most = 1 if place == "interpreter" else extent.examples or len(configs)
            kept = random.Random(extent.seed).sample(configs, min(most, len(configs)))
            yield Unit(
                id=f"{layer}/config/{kernel}/{tiles}", layer=layer, check="config", runner="config", place=place,
                mode="gpu" if place == "gpu" else "interpreter", direction=DIRECTION_OF[kernel], kernel=kernel,
                dtype=dtype, estimate_s=3.0 * len(kept), arguments={"configs": [asdict(config) for config in kept]},
            )  # fmt: skip


def _tiles(config: Config) -> str:
    fields = {name: value for name, value in asdict(config).items() if name not in ("num_warps", "num_stages")}
    return "-".join(f"{name}{value}" for name, value in fields.items())


def profile_units(profile: Profile) -> list[Unit]:
    """A unit for each entry of a profile: the gate, as the tuner runs it."""
    return [_profile_unit(entry) for entry in profile.entries]


def _profile_unit(entry: Entry) -> Unit:
    on_gpu = bool(Tunable.REGISTRY[entry.kernel].archs)  # there is no interpreter for it
    return Unit(
        id=f"profile/{entry.kernel}/{entry.problem}", layer="profile", check="check_config", runner="profile_entry",
        place="gpu" if on_gpu else "host", mode="gpu" if on_gpu else "interpreter", kernel=entry.kernel,
        dtype=entry.problem.dtype,
        limit_s=gate.TIMEOUT_S + 60.0, estimate_s=30.0,
        arguments={"config": dict(entry.config), "problem": entry.problem.as_dict()},
    )  # fmt: skip
