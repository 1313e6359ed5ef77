"""The device table: what its numbers must satisfy, and finding a GPU by any of its names."""

from __future__ import annotations

import pytest

from cca_attention.autotune.devices import Device, device_at_hand, device_table, find_device

REQUIRED = {
    "a100-40gb", "a100-80gb", "h100-sxm", "h100-pcie", "h200", "l40s", "rtx4090", "a10g", "b200", "rtx5090", "mi300x",
}  # fmt: skip


def test_the_table_has_every_gpu_that_is_promised() -> None:
    assert set(device_table()) >= REQUIRED


@pytest.mark.parametrize("device", device_table().values(), ids=lambda device: device.name)
def test_a_row_is_consistent(device: Device) -> None:
    assert device.shared_bytes_per_block <= device.shared_bytes_per_sm
    assert device.registers_per_thread * device.threads_per_warp * 4 <= device.registers_per_sm
    assert device.source and device.torch_names
    # the vendor's float32 rate is two operations a lane and clock: 64, 128 or 256 lanes in an SM
    lanes = device.fp32_tflops * 1e6 / (2 * device.sm_count * device.clock_mhz)
    assert any(lanes == pytest.approx(n, rel=0.15) for n in (64, 128, 256)), lanes
    tensor_per_clock = device.tensor_tflops * 1e6 / (device.sm_count * device.clock_mhz)
    assert any(tensor_per_clock == pytest.approx(n, rel=0.1) for n in (512, 1024, 2048, 4096, 8192)), tensor_per_clock
    assert device.hbm_bytes > 100 * device.l2_bytes


def test_no_name_means_two_gpus() -> None:
    names = [name.lower() for device in device_table().values() for name in device.names]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a100", "a100-80gb"),
        ("A100", "a100-80gb"),
        ("a100_40gb", "a100-40gb"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA A100 80GB PCIe", "a100-80gb"),
        ("NVIDIA H100 80GB HBM3", "h100-sxm"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("RTX 4090", "rtx4090"),
        (" h200 ", "h200"),
        ("AMD Instinct MI300X", "mi300x"),
    ],
)
def test_a_gpu_is_found_by_its_usual_names(name: str, expected: str) -> None:
    assert find_device(name).name == expected


@pytest.mark.parametrize(("typo", "meant"), [("a10O", "a100"), ("h1000", "h100-sxm"), ("rtx409", "rtx4090")])
def test_a_mistyped_name_suggests_the_nearest(typo: str, meant: str) -> None:
    with pytest.raises(LookupError, match=f"did you mean .*{meant}"):
        find_device(typo)


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(LookupError, match=r"unknown GPU 'quadro'; known: a100-40gb, .*mi300x"):
        find_device("quadro")


def test_the_gpu_at_hand_is_looked_up_by_what_pytorch_calls_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert device_at_hand() is None
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "NVIDIA H200")
    assert device_at_hand() is find_device("h200")
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "NVIDIA T4")
    with pytest.raises(LookupError, match="unknown GPU 'NVIDIA T4'"):
        device_at_hand()
