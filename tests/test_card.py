"""What NVML says of a GPU, with a library in its place that answers as the C functions do."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cca_attention.autotune import card
from cca_attention.autotune.card import Card, card_at_hand


class Library:
    """NVML's functions: they write where they are told, and return a status that is 0 if all went well."""

    def __init__(self, throttle: int = 0, unsupported: tuple[str, ...] = (), busy: tuple[int, ...] = (0,)) -> None:
        self.throttle, self.unsupported, self.busy = throttle, unsupported, list(busy)

    def __getattr__(self, name: str) -> Any:
        answers = {
            "nvmlDeviceGetCurrentClocksThrottleReasons": (self.throttle,),
            "nvmlDeviceGetTemperature": (41,),
            "nvmlDeviceGetPowerUsage": (123_500,),
            "nvmlDeviceGetEnforcedPowerLimit": (700_000,),
            "nvmlDeviceGetPersistenceMode": (1,),
            "nvmlDeviceGetEccMode": (1, 0),
            "nvmlDeviceGetMigMode": (0, 0),
        }

        def call(*args: Any) -> int:
            if name in self.unsupported:
                return 3
            references = [arg._obj for arg in args if hasattr(arg, "_obj")]
            if name == "nvmlDeviceGetClockInfo":
                references[0].value = {1: 1980, 2: 3201}[args[1]]
            if name == "nvmlDeviceGetUtilizationRates":
                references[0][0] = self.busy.pop(0) if len(self.busy) > 1 else self.busy[0]
            if name == "nvmlSystemGetDriverVersion":
                args[0].value = b"570.86.10"
            if name == "nvmlDeviceGetComputeRunningProcesses_v3":
                references[0].value = 2
                return 7
            for reference, value in zip(references, answers.get(name, ()), strict=False):
                reference.value = value
            return 0

        return call


def test_all_that_a_card_tells() -> None:
    found = Card(Library(throttle=0x004 | 0x001), "GPU-1")
    state, setting = found.state(), found.setting()
    assert (state.sm_mhz, state.memory_mhz, state.temperature_c, state.power_w) == (1980, 3201, 41, 123.5)
    assert (state.throttled, state.unfit) == (("power cap",), False)
    assert (setting.driver, setting.power_limit_w, setting.processes) == ("570.86.10", 700.0, 2)
    assert (setting.persistence, setting.ecc, setting.mig) == (True, True, False)


@pytest.mark.parametrize("bit", [0x008, 0x020, 0x040, 0x080])
def test_a_card_that_is_too_hot_or_held_back_is_unfit(bit: int) -> None:
    assert Card(Library(throttle=bit), "GPU-1").state().unfit


def test_what_it_does_not_tell_is_none() -> None:
    names = (
        "nvmlDeviceGetCurrentClocksThrottleReasons", "nvmlDeviceGetClockInfo", "nvmlDeviceGetTemperature",
        "nvmlDeviceGetPowerUsage", "nvmlDeviceGetEnforcedPowerLimit", "nvmlDeviceGetPersistenceMode",
        "nvmlDeviceGetEccMode", "nvmlDeviceGetMigMode", "nvmlSystemGetDriverVersion",
        "nvmlDeviceGetComputeRunningProcesses_v3", "nvmlDeviceGetUtilizationRates",
    )  # fmt: skip
    found = Card(Library(unsupported=names), "GPU-1")
    state, setting = found.state(), found.setting()
    assert state == card.CardState(None, None, None, None, ())
    assert setting == card.CardSetting(None, None, None, None, None, None)
    assert found.busy_per_cent() is None


def test_a_busy_card_is_one_that_never_rests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(card, "PAUSE_S", 0.0)
    assert Card(Library(busy=(90, 80, 99, 85)), "GPU-1").busy_per_cent() == 80
    assert Card(Library(busy=(90, 0, 99, 85)), "GPU-1").busy_per_cent() == 0, "our own last kernel, or a moment's work"


@pytest.mark.parametrize("function", ["nvmlInit_v2", "nvmlDeviceGetHandleByUUID"])
def test_a_card_that_nvml_does_not_know(function: str) -> None:
    with pytest.raises(LookupError, match="NVML does not know the GPU GPU-1"):
        Card(Library(unsupported=(function,)), "GPU-1")


def test_without_a_gpu_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert card_at_hand() is None


@pytest.mark.gpu
def test_the_card_at_hand_tells_its_clock() -> None:
    found = card_at_hand()
    if found is not None:  # a container may have no NVML
        assert (found.state().sm_mhz or 0) > 0
