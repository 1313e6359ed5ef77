"""Compile a `Tunable` for a GPU that is not there.

The kernel's own launcher is called on meta tensors with the run method of its jitted functions replaced, so that no
signature is written down twice: what would have been launched is recorded, then compiled with Triton's warm-up, which
needs a driver only to be told the target. Everything here runs in a worker process, where `aim` was called.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from ..kernels.tunable import Config, Tunable
from ..problem import Problem
from ..profiles.configs import known_kernel
from .binary import Resources, read_resources
from .traits import UNKNOWN, Traits, read_traits

META = torch.device("meta")

_known_traits: dict[str, Traits] = {}


@dataclass(frozen=True, slots=True)
class Launch:
    """One kernel that a config launches: its programs and what its loops do."""

    kernel: str
    grid: tuple[int, int, int]
    traits: Traits

    @property
    def programs(self) -> int:
        """Programs of the grid."""
        return self.grid[0] * self.grid[1] * self.grid[2]


@dataclass(frozen=True, slots=True)
class Sketch:
    """What a config launches, and an identity: configs of equal `key` launch the very same thing."""

    key: str
    launches: tuple[Launch, ...]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Sketch:
        """The inverse of `dataclasses.asdict`."""
        launches = (
            Launch(launch["kernel"], tuple(launch["grid"]), Traits(**launch["traits"])) for launch in values["launches"]
        )
        return cls(values["key"], tuple(launches))


class CompileOnlyDriver:
    """The active Triton driver of a worker: it knows the target and nothing else."""

    def __init__(self, target: GPUTarget) -> None:
        self._target = target

    def get_current_target(self) -> GPUTarget:
        """The GPU compiled for."""
        return self._target

    def get_current_device(self) -> int:
        """Triton keeps its kernels by device; there is one."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """Nothing is ever put on it."""
        return 0


def target_of(arch: str) -> GPUTarget:
    """Triton's target of an architecture: "sm_80" and the like, or "gfx942"."""
    if arch.startswith("sm_"):
        return GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    return GPUTarget("hip", arch, 64)


def aim(arch: str) -> None:
    """Make this process compile for `arch` from now on; it can launch nothing."""
    driver.set_active(CompileOnlyDriver(target_of(arch)))


def find_tunable(module: str, name: str) -> Tunable:
    """The tunable that importing `module` registers as `name`."""
    importlib.import_module(module)
    _settle_keys()
    return known_kernel(name)


@functools.cache
def _settle_keys() -> None:
    """Have Triton hash all kernels in one order, whatever a process begins with.

    What its cache knows a kernel by depends on which of the functions that it calls were hashed before it: processes
    that compile and that launch would not find each other's.
    """
    for name in sorted(Tunable.REGISTRY):
        for kernel in Tunable.REGISTRY[name].kernels:
            if isinstance(kernel, JITFunction):
                kernel.cache_key  # noqa: B018


@dataclass(frozen=True, slots=True)
class _Call:
    """One launch as the launcher asked for it."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        return str(self.kernel.fn.__name__)

    @property
    def identity(self) -> tuple[str, ...]:
        """Equal for calls that compile to, and launch, the same."""
        args = [_described(arg) for arg in self.args]
        return (self.name, repr(args), repr(self.grid), repr(sorted(self.options.items())))

    @property
    def tile_identity(self) -> str:
        """Equal for calls with the same Triton IR: warps and stages count only if the kernel itself takes them."""
        free = {"num_warps", "num_stages"} - set(self.kernel.arg_names)
        options = sorted((k, v) for k, v in self.options.items() if k not in free)
        return repr((self.name, [_kind(arg) for arg in self.args], options))


def _described(arg: Any) -> Any:
    return (arg.dtype, tuple(arg.shape), arg.stride()) if isinstance(arg, Tensor) else arg


def _kind(arg: Any) -> Any:
    """What Triton's IR can depend on: of an integer at run time its width, and whether it is 1 or divides by 16."""
    if isinstance(arg, tuple):
        return tuple(map(_kind, arg))
    if isinstance(arg, int):
        return (arg == 1, arg % 16 == 0, arg < 2**31)
    return arg.dtype if isinstance(arg, Tensor) else arg


@contextmanager
def _recorded(kernels: tuple[Any, ...]) -> Iterator[list[_Call]]:
    """Record the launches of `kernels` instead of making them."""
    calls: list[_Call] = []

    def record(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        if callable(grid):
            grid = grid({**dict(zip(kernel.arg_names, args, strict=False)), **options})
        calls.append(_Call(kernel, tuple(grid), args, options))

    for kernel in kernels:
        kernel.run = functools.partial(record, kernel)
    try:
        yield calls
    finally:
        for kernel in kernels:
            del kernel.run


def _calls(tunable: Tunable, problem: Problem, config: Config) -> list[_Call]:
    with _recorded(tunable.kernels) as calls:
        tunable.launch(problem, tunable.allocate(problem, META, None), config)
    if not calls:
        raise RuntimeError(f"{tunable.name} launched none of its kernels for {problem} with {config}")
    return calls


def _triton_ir(call: _Call) -> str:
    """The kernel's IR after Triton's own first passes, nothing of the back end."""
    made: list[str] = []

    def hook(*, compile: dict[str, Any], **_: Any) -> bool:
        target = driver.active.get_current_target()
        backend = make_backend(target)
        source = ASTSource(call.kernel, compile["signature"], compile["constants"], compile["configs"][0])
        options = backend.parse_options({**call.options, **source.parse_options()})
        context = triton._C.libtriton.ir.context()
        triton._C.libtriton.ir.load_dialects(context)
        backend.load_dialects(context)
        stages: dict[str, Any] = {}
        backend.add_stages(stages, options, source.language)
        functions = backend.get_codegen_implementation(options)
        module = source.make_ir(target, options, functions, backend.get_module_map(), context)
        made.append(str(stages["ttir"](module, {})))
        return True

    with triton.knobs.runtime.scope():
        triton.knobs.runtime.jit_cache_hook = hook
        call.kernel.warmup(*call.args, grid=call.grid, **call.options)
    return made[0]


def sketch(module: str, name: str, problem: Problem, configs: tuple[Config, ...]) -> tuple[Sketch, ...]:
    """What each of `configs` launches; Triton IR is made once for those that share it."""
    tunable = find_tunable(module, name)
    sketches = []
    for config in configs:
        launches = []
        calls = _calls(tunable, problem, config)
        for call in calls:
            identity = call.tile_identity
            if identity not in _known_traits:
                # a kernel in Gluon is for one GPU, and timed there: it has no Triton IR to be modelled by
                _known_traits[identity] = UNKNOWN if call.kernel.is_gluon() else read_traits(_triton_ir(call))
            x, y, z = (*call.grid, 1, 1)[:3]
            launches.append(Launch(call.name, (x, y, z), _known_traits[identity]))
        digest = hashlib.sha256(repr([call.identity for call in calls]).encode())
        sketches.append(Sketch(digest.hexdigest(), tuple(launches)))
    return tuple(sketches)


def compile_config(module: str, name: str, problem: Problem, config: Config) -> tuple[Resources, ...]:
    """Compile what `config` launches to machine code and read what each kernel takes, in launch order."""
    tunable = find_tunable(module, name)
    found = []
    for call in _calls(tunable, problem, config):
        found.append(read_resources(call.kernel.warmup(*call.args, grid=call.grid, **call.options)))
        # a worker compiles hundreds of kernels: keep none of them
        call.kernel.device_caches.clear()
    return tuple(found)
