"""The GPU and the software at hand, as far as a profile depends on them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import torch
import triton

from .evidence import KernelResources
from .identity import DeviceIdentity, plain

THREADS_PER_BLOCK = 1024
SAME_CLASS = 1.25
"""Sizes of cache and memory within this factor are one class: makers count in decimal and binary, drivers keep some."""

Likeness = Literal["exact", "same silicon", "same arch"]
_DRIVER_VERSIONS = (Path("/proc/driver/nvidia/version"), Path("/sys/module/amdgpu/version"))


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveDevice:
    """The GPU that a config is to run on."""

    name: str
    arch: str
    sm_count: int
    shared_bytes_per_block: int
    l2_bytes: int
    hbm_bytes: int
    threads_per_warp: int = 32
    registers_per_block: int | None = 65536  # None: the compiler keeps to what there is
    driver: str | None = None

    def likeness(self, identity: DeviceIdentity) -> Likeness | None:
        """How like it is to the GPU of a profile: the product, the same silicon under another name, the same
        architecture, or None. A product cut down to a part of its SMs (MIG) is no longer that product.
        """
        if self.arch != identity.arch:
            return None
        limits = ("sm_count", "shared_bytes_per_block")
        if any(getattr(self, limit) != getattr(identity, limit) for limit in limits):
            return "same arch"
        if plain(self.name) in map(plain, identity.names):
            return "exact"
        sizes = ((getattr(self, size), getattr(identity, size)) for size in ("l2_bytes", "hbm_bytes"))
        alike = all(max(pair) <= SAME_CLASS * min(pair) for pair in sizes)
        return "same silicon" if alike else "same arch"

    def shortage(self, resources: Iterable[KernelResources]) -> str | None:
        """What a config that takes `resources` would lack here, with both figures; None if it runs."""
        for kernel in resources:
            threads = kernel.num_warps * self.threads_per_warp
            for what, wanted, held in (
                ("bytes of shared memory", kernel.shared_bytes, self.shared_bytes_per_block),
                ("threads", threads, THREADS_PER_BLOCK),
                ("registers", threads * kernel.registers, self.registers_per_block),
            ):
                if held is not None and wanted > held:
                    return f"{kernel.kernel} takes {wanted} {what} of a block, {self.name} has {held}"
        return None


def live_device(device: torch.device | None) -> LiveDevice | None:
    """The GPU of `device`; None where it is no GPU."""
    if device is None or device.type != "cuda":
        return None
    return _gpu(torch.cuda.current_device() if device.index is None else device.index)


@cache
def _gpu(index: int) -> LiveDevice:
    from triton.runtime import driver

    facts = torch.cuda.get_device_properties(index)
    limits = driver.active.utils.get_device_properties(index)  # what Triton itself refuses a launch by
    arch = str(facts.gcnArchName).split(":")[0] if torch.version.hip else f"sm_{facts.major}{facts.minor}"
    return LiveDevice(
        name=facts.name,
        arch=arch,
        sm_count=facts.multi_processor_count,
        shared_bytes_per_block=limits["max_shared_mem"],
        l2_bytes=facts.L2_cache_size,
        hbm_bytes=facts.total_memory,
        threads_per_warp=facts.warp_size,
        registers_per_block=None if torch.version.hip else limits["max_num_regs"],
        driver=driver_version(),
    )


@cache
def driver_version() -> str | None:
    """The version of the GPU driver that the kernel has loaded, or None."""
    for path in _DRIVER_VERSIONS:
        if path.is_file() and (found := re.search(r"\b\d+\.\d+(\.\d+)*\b", path.read_text())):
            return found.group()
    return None


def minor_version(version: str) -> str:
    """ "3.7" of "3.7.1"."""
    return ".".join(version.split(".")[:2])


def fp_fusion() -> bool:
    """Whether Triton fuses multiplications and additions unless a kernel says otherwise."""
    return bool(triton.knobs.language.default_fp_fusion)
