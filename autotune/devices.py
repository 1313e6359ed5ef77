"""The GPUs that a config can be tuned for, at hand or not: `devices.yaml` as frozen values, found by any usual name."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

import yaml


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One GPU product: the limits of its architecture and its own sizes and peak rates.

    `tensor_tflops` is dense bfloat16/float16 with float32 accumulation. An AMD compute unit is called an SM here, and
    a wavefront a warp. `torch_names` are what PyTorch calls the product, `source` where its numbers come from.
    """

    name: str
    vendor: str
    arch: str
    sm_count: int
    threads_per_warp: int
    shared_bytes_per_block: int
    shared_bytes_per_sm: int
    registers_per_sm: int
    registers_per_thread: int
    warps_per_sm: int
    blocks_per_sm: int
    l2_bytes: int
    hbm_bytes: int
    hbm_gbps: float
    tensor_tflops: float
    fp32_tflops: float
    clock_mhz: int
    aliases: tuple[str, ...]
    torch_names: tuple[str, ...]
    source: str

    @property
    def names(self) -> tuple[str, ...]:
        """Every name it answers to."""
        return (self.name, *self.aliases, *self.torch_names)


def normalised(name: str) -> str:
    """`name` as names are compared: lower case, words joined by single dashes, without the vendor's."""
    words = re.split(r"[^a-z0-9]+", name.strip().lower())
    return "-".join(word for word in words if word and word not in ("nvidia", "amd"))


@cache
def device_table() -> dict[str, Device]:
    """Every known GPU by its name."""
    text = resources.files(__package__).joinpath("devices.yaml").read_text(encoding="utf-8")
    table = yaml.safe_load(text)
    return {name: _device(name, row, table["architectures"][row["arch"]]) for name, row in table["devices"].items()}


def _device(name: str, row: dict[str, Any], limits: dict[str, Any]) -> Device:
    facts = {**limits, **row, "name": name, "source": f"{row['source']}; {limits['source']}"}
    facts["l2_bytes"] = facts.pop("l2_mib") * 2**20
    facts["hbm_bytes"] = facts.pop("hbm_gb") * 10**9
    facts["aliases"], facts["torch_names"] = tuple(row["aliases"]), tuple(row["torch_names"])
    return Device(**facts)


def find_device(name: str) -> Device:
    """The GPU called `name`: a table name, an alias such as "a100", or PyTorch's name for it.

    Raises:
        LookupError: for an unknown name, with the nearest known ones.
    """
    by_name = {normalised(known): device for device in device_table().values() for known in device.names}
    found = by_name.get(normalised(name))
    if found is not None:
        return found
    near = {by_name[match].name: None for match in difflib.get_close_matches(normalised(name), by_name, n=5)}
    hint = f"did you mean {' or '.join(list(near)[:3])}? " if near else ""
    raise LookupError(f"unknown GPU {name!r}; {hint}known: {', '.join(device_table())}")


def device_at_hand() -> Device | None:
    """The GPU that PyTorch would use here, or None where there is none.

    Raises:
        LookupError: for a GPU that the table does not have.
    """
    import torch

    if not torch.cuda.is_available():
        return None
    return find_device(torch.cuda.get_device_name())
