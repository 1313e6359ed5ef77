"""What an entry of a profile rests on: times, resources, checks, the search behind it. Plain values, never executed."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, PositiveFloat

MOST = 2**48
Size = Annotated[int, Field(gt=0, le=MOST)]
"""A number of things, at least one."""
Count = Annotated[int, Field(ge=0, le=MOST)]
"""A number of things, or none."""
Fields = dict[str, Annotated[int, Field(ge=-(2**31), lt=2**31)]]
"""The fields of a config."""


class Part(BaseModel):
    """A block of a profile: frozen, without infinities, and any field that it does not know is a mistake."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Latency(Part):
    """A measured time: microseconds over `samples` launches, of `sessions` processes; `mad_us`: median deviation."""

    median_us: PositiveFloat
    p20_us: PositiveFloat
    p80_us: PositiveFloat
    samples: Size
    mad_us: NonNegativeFloat | None = None
    sessions: Size = 1


class Predicted(Part):
    """A modelled time in microseconds and the terms that it was made of."""

    total_us: PositiveFloat
    parts: dict[str, float]


class KernelResources(Part):
    """What one compiled kernel takes of a block and of a thread, and does in one pass through its loops.

    `tile_` and `edge_` figures are of the loops over tiles, `outside_` of all other code: see `Resources` of the tuner.
    """

    kernel: str
    shared_bytes: Count
    registers: Count
    spill_bytes: Count
    num_warps: Size
    loop_instructions: Count = 0
    loop_spill_bytes: Count = 0
    loop_exchanges: Count = 0
    tile_instructions: Count = 0
    tile_exponentials: Count = 0
    tile_loads: Count = 0
    tile_products: Count = 0
    tile_spills: Count = 0
    edge_instructions: Count = 0
    edge_spills: Count = 0
    outside_instructions: Count = 0
    outside_spills: Count = 0
    group_products: bool = False


class Verification(Part):
    """The run of a config against the oracle that it passed, on the source of this `kernel_hash`.

    `worst_budget_use` is the largest error over what is allowed; `bitwise_repeatable` whether a second run gave the
    same bits, None if that was not looked at.
    """

    suite: str
    seed: Count
    cases: Size
    worst_budget_use: float
    mode: Literal["gpu", "interpreter"]
    kernel_hash: str
    bitwise_repeatable: bool | None = None


class Margin(Part):
    """How much faster the entry is than the built-in config: default's time over its own, and the 95 % interval."""

    speedup: PositiveFloat
    ci95: tuple[PositiveFloat, PositiveFloat] | None = None


class Baseline(Part):
    """The built-in config and its time, measured or predicted like the entry's own."""

    config: Fields
    time_us: PositiveFloat | None = None
    margin: Margin | None = None


class Determinism(Part):
    """Entries of one `reduction_class` add up in the same order; `batch_invariant`: whatever the batch size."""

    reduction_class: str
    batch_invariant: bool


class MeasurementPolicy(Part):
    """How times were taken. Times of different policies are never compared, nor merged into one profile."""

    mode: Literal["eager", "cuda_graph"]
    cold_l2: bool
    interleaved: bool


class SearchRecord(Part):
    """Where a kernel's entries come from: the configs of its space, and what became of them."""

    strategy: str
    space_size: Size
    legal: Count
    compiled: Count
    measured: Count
    failed: dict[str, Count] = {}
    seed: Count | None = None
    wall_s: NonNegativeFloat | None = None


class ParetoPoint(Part):
    """One of the semantics that none other beats in all of cache bytes, quality and latency; never applied to a model.

    `kv_ratio`: cache bytes over those of full attention. `quality` is a proxy, named with its data in `quality_proxy`.
    """

    group_size: Size
    window_size: Size
    kv_ratio: PositiveFloat
    quality: float
    quality_proxy: str
    latency_us: PositiveFloat
