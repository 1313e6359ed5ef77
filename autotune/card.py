"""The state of the GPU while it is timed: clocks, temperature, power, throttling, other work on it, by NVML.

What a card or a container does not tell is None, never an error; without NVML nothing is told.
"""

from __future__ import annotations

import ctypes
import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

LIBRARY = "libnvidia-ml.so.1"
SM_CLOCK, MEMORY_CLOCK, CORE_TEMPERATURE = 1, 2, 0
REASONS = {
    0x004: "power cap", 0x008: "hardware slowdown", 0x020: "thermal slowdown", 0x040: "hardware thermal slowdown",
    0x080: "power brake",
}  # fmt: skip
UNFIT = {"hardware slowdown", "thermal slowdown", "hardware thermal slowdown", "power brake"}
"""Reasons that make a timing worthless; a power cap is how a card under load runs, and only recorded."""
BUSY_PER_CENT = 10
LOOKS, PAUSE_S = 4, 0.25
UUID_BYTES = 96


@dataclass(frozen=True, slots=True)
class CardState:
    """One look: MHz, degrees Celsius, watts, and why the clocks were held back."""

    sm_mhz: int | None
    memory_mhz: int | None
    temperature_c: int | None
    power_w: float | None
    throttled: tuple[str, ...]

    @property
    def unfit(self) -> bool:
        """Whether what was timed just now is worth nothing."""
        return bool(UNFIT & set(self.throttled))


@dataclass(frozen=True, slots=True)
class CardSetting:
    """What does not change in a run: driver, limits and modes, and the processes that had the card when it began."""

    driver: str | None
    power_limit_w: float | None
    persistence: bool | None
    ecc: bool | None
    mig: bool | None
    processes: int | None


class Card:
    """One NVIDIA GPU, asked through NVML's C library."""

    def __init__(self, library: Any, uuid: str) -> None:
        self._nvml = library
        self._handle = ctypes.c_void_p()
        for call in (library.nvmlInit_v2, partial(self._find, uuid)):
            if status := call():
                raise LookupError(f"NVML does not know the GPU {uuid} (status {status})")

    def _find(self, uuid: str) -> int:
        return int(self._nvml.nvmlDeviceGetHandleByUUID(uuid.encode(), ctypes.byref(self._handle)))

    def state(self) -> CardState:
        """How it is now."""
        mask = self._number("nvmlDeviceGetCurrentClocksThrottleReasons", kind=ctypes.c_ulonglong) or 0
        return CardState(
            sm_mhz=self._number("nvmlDeviceGetClockInfo", SM_CLOCK),
            memory_mhz=self._number("nvmlDeviceGetClockInfo", MEMORY_CLOCK),
            temperature_c=self._number("nvmlDeviceGetTemperature", CORE_TEMPERATURE),
            power_w=_watts(self._number("nvmlDeviceGetPowerUsage")),
            throttled=tuple(name for bit, name in REASONS.items() if mask & bit),
        )

    def setting(self) -> CardSetting:
        """What does not change."""
        persistence = self._number("nvmlDeviceGetPersistenceMode")
        return CardSetting(
            driver=self._driver(),
            power_limit_w=_watts(self._number("nvmlDeviceGetEnforcedPowerLimit")),
            persistence=None if persistence is None else bool(persistence),
            ecc=self._mode("nvmlDeviceGetEccMode"),
            mig=self._mode("nvmlDeviceGetMigMode"),
            processes=self._processes(),
        )

    def busy_per_cent(self) -> int | None:
        """The least share of time that kernels ran, in some looks within a second; ours should not be among them."""
        shares = []
        for _ in range(LOOKS):
            rates = (ctypes.c_uint * 2)()
            if self._nvml.nvmlDeviceGetUtilizationRates(self._handle, ctypes.byref(rates)):
                return None
            shares.append(int(rates[0]))
            time.sleep(PAUSE_S)
        return min(shares)

    def _number(self, function: str, *args: int, kind: Any = ctypes.c_uint) -> int | None:
        value = kind()
        status = getattr(self._nvml, function)(self._handle, *args, ctypes.byref(value))
        return None if status else int(value.value)

    def _mode(self, function: str) -> bool | None:
        current, pending = ctypes.c_uint(), ctypes.c_uint()
        status = getattr(self._nvml, function)(self._handle, ctypes.byref(current), ctypes.byref(pending))
        return None if status else bool(current.value)

    def _driver(self) -> str | None:
        text = ctypes.create_string_buffer(UUID_BYTES)
        return None if self._nvml.nvmlSystemGetDriverVersion(text, UUID_BYTES) else text.value.decode()

    def _processes(self) -> int | None:
        """How many processes compute there; with no room for the list, NVML only says how long it is."""
        count = ctypes.c_uint(0)
        status = self._nvml.nvmlDeviceGetComputeRunningProcesses_v3(self._handle, ctypes.byref(count), None)
        return int(count.value) if status in (0, 7) else None


def card_at_hand(index: int = 0) -> Card | None:
    """The GPU that PyTorch has under `index` here; None without one, or where nobody can be asked about it."""
    if not torch.cuda.is_available() or torch.version.hip:
        return None
    uuid = str(torch.cuda.get_device_properties(index).uuid)
    try:
        return Card(ctypes.CDLL(LIBRARY), uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}")
    except (OSError, LookupError):
        return None


def _watts(milliwatts: int | None) -> float | None:
    return None if milliwatts is None else milliwatts / 1000
