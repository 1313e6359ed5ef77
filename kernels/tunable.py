"""What every kernel family tells the rest of the project about itself.

A kernel file defines one or more `Tunable`s: the config of its launch, the space that a search may draw from,
how to allocate the tensors of one call, how to launch it on them, and the work it does. The tuner, the verifier
and the offline compiler know kernels only through this type.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from functools import cache
from itertools import product
from types import MappingProxyType
from typing import Any, ClassVar, Protocol

import torch
import triton
from torch import Tensor

from ..problem import Problem

INTERPRETED = not isinstance(triton.language.sum, triton.JITFunction)
"""Whether Triton's interpreter runs the portable kernels (TRITON_INTERPRET=1 when triton was imported)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Launch choices common to every kernel: warps per program and software-pipeline depth.

    A subclass adds its tiles as ``block_<axis>`` fields and its limits in `refusal`.
    """

    num_warps: int = 4
    num_stages: int = 2

    def refusal(self, problem: Problem) -> str | None:
        """Why this config cannot run `problem`, or None. The only statement of the kernel's limits."""
        for field in fields(self):
            value = getattr(self, field.name)
            if value < 1:
                return f"{field.name} {value} is below 1"
            if (field.name.startswith("block_") or field.name == "num_warps") and value & (value - 1):
                return f"{field.name} {value} is not a power of two"
        return None

    def launch_args(self) -> Mapping[str, int]:
        """Keyword arguments of the launch: blocks upper-cased to their constexpr names."""
        return _launch_args(self)


@cache
def _launch_args(config: Config) -> Mapping[str, int]:
    names = [field.name for field in fields(config)]
    args = {name.upper() if name.startswith("block_") else name: getattr(config, name) for name in names}
    return MappingProxyType(args)  # every launch is given this one


def smallest_block_refusal(config: Config, problem: Problem) -> str | None:
    """The limits of every kernel built on matrix products: whole powers of two, tiles of at least 16."""
    for field in fields(config):
        value = getattr(config, field.name)
        if field.name.startswith("block_") and value < 16:
            return f"{field.name} {value} is below 16, the smallest side of a matrix product"
    return Config.refusal(config, problem)


@cache
def padded_dim(head_dim: int) -> int:
    """The power of two that a tile's last axis has: at least `head_dim` and at least 16."""
    return max(16, int(triton.next_power_of_2(head_dim)))


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """What a kernel accumulates in and keeps its statistics in: float32, or float64 for float64 (gradcheck)."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def draw(
    shapes: Mapping[str, tuple[int, ...]],
    problem: Problem,
    device: torch.device,
    generator: torch.Generator | None,
) -> dict[str, Tensor]:
    """Standard-normal tensors of the problem's dtype, in the order of `shapes`; empty ones on the meta device."""
    dtype = getattr(torch, problem.dtype)
    if device.type == "meta":
        return {name: torch.empty(shape, dtype=dtype, device=device) for name, shape in shapes.items()}
    return {
        name: torch.randn(shape, dtype=torch.float32, device=device, generator=generator).to(dtype)
        for name, shape in shapes.items()
    }


HANDLES: dict[str, Any] = {}
"""What a custom op's string argument stands for: every Schedule and Profile of this process by its `handle`.

They are entered when they are made, not when they are used: a use can be inside of what `torch.compile` traces, which
would enter them only after the op had looked.
"""


class Schedule(Mapping[str, Config]):
    """Which config each kernel is launched with; kernels that it does not name use their built-in default.

    `handle` is a string that stands for it in `HANDLES`, empty if it names none; equal schedules have equal handles.
    """

    def __init__(self, configs: Mapping[str, Config] | None = None) -> None:
        self._configs = dict(configs or {})
        self.handle = f"schedule {sorted(self._configs.items())!r}" if self._configs else ""
        if self.handle:
            HANDLES.setdefault(self.handle, self)

    def __getitem__(self, kernel: str) -> Config:
        return self._configs[kernel]

    def __iter__(self) -> Iterator[str]:
        return iter(self._configs)

    def __len__(self) -> int:
        return len(self._configs)

    def __hash__(self) -> int:
        return hash(self.handle)

    def __repr__(self) -> str:
        return f"Schedule({self._configs!r})"


@dataclass(frozen=True, slots=True)
class Work:
    """What one launch must do at least, for rooflines and useful TFLOP/s.

    `flops`: multiply-adds counted twice, visible pairs only. `bytes`: each input read once, each output written
    once. `exp2`: exponentials.
    """

    flops: float
    bytes: float
    exp2: float


class Allocate(Protocol):
    """Make the tensors of one call: inputs are drawn from `generator` (left empty on the meta device)."""

    def __call__(
        self, problem: Problem, device: torch.device, generator: torch.Generator | None
    ) -> dict[str, Tensor]: ...


@dataclass(frozen=True, slots=True)
class Tunable:
    """One kernel as the tuner, the verifier and the offline compiler see it.

    `launch(problem, tensors, config)` launches on what `allocate` made; on the meta device, under the offline
    compiler's driver, the same call only compiles. `archs`: the architectures that it is for, which the interpreter
    then does not run; none if it is portable.
    """

    name: str
    config: type[Config]
    space: Mapping[str, tuple[int, ...]]
    default: Callable[[Problem, str], Config]
    allocate: Allocate
    launch: Callable[[Problem, dict[str, Tensor], Any], None]
    work: Callable[[Problem, Config], Work]
    kernels: tuple[Any, ...]
    archs: tuple[str, ...] = ()

    REGISTRY: ClassVar[dict[str, Tunable]] = {}

    def __post_init__(self) -> None:
        self.REGISTRY[self.name] = self

    def candidates(self, problem: Problem) -> Iterator[tuple[Config, str | None]]:
        """Every config of the space with its refusal for `problem` (None if legal)."""
        for values in product(*self.space.values()):
            config = self.config(**dict(zip(self.space, values, strict=True)))
            yield config, config.refusal(problem)
