"""The profiles that come with the package: each entry is one that the loader can reach, and legal for its GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import triton

from cca_attention.autotune.devices import Device, device_table, find_device
from cca_attention.autotune.options import model_shape
from cca_attention.autotune.predict import blocks_per_sm
from cca_attention.problem import Problem
from cca_attention.profiles import choice
from cca_attention.profiles.choice import choose
from cca_attention.profiles.configs import as_config, source_hash, tunables
from cca_attention.profiles.identity import DeviceIdentity
from cca_attention.profiles.live import LiveDevice
from cca_attention.profiles.places import Place, bundled_folder
from cca_attention.profiles.resolve import AutoProfile
from cca_attention.profiles.store import load_profile, profile_files, read_profile

REFRESH = "run: python benchmarks/bundled_profiles.py --output profiles/data/modelled"
MODELLED = ("a100-80gb", "a100-40gb", "h100-sxm", "h200", "l40s", "rtx4090", "b200", "rtx5090", "mi300x")
MODELS = ("llama2-7b", "llama3.1-8b", "llama3.1-70b", "qwen2.5-7b", "qwen3-8b", "mistral-7b")
FILES = [path for _, path in profile_files([Place("bundled", bundled_folder())])]


def live(device: Device) -> LiveDevice:
    """The GPU as it would be at hand."""
    return LiveDevice(
        name=device.torch_names[0], arch=device.arch, sm_count=device.sm_count, l2_bytes=device.l2_bytes,
        shared_bytes_per_block=device.shared_bytes_per_block, hbm_bytes=device.hbm_bytes,
        threads_per_warp=device.threads_per_warp,
        registers_per_block=None if device.vendor == "amd" else device.registers_per_sm,
    )  # fmt: skip


def test_every_gpu_has_a_file_of_its_own() -> None:
    found = {path.relative_to(bundled_folder()).as_posix() for path in FILES}
    assert found == {"h200.yaml", *(f"modelled/{name}.yaml" for name in MODELLED)}
    assert {entry.evidence for entry in read_profile(bundled_folder() / "h200.yaml").entries} == {"measured"}
    for name in MODELLED:
        profile = read_profile(bundled_folder() / "modelled" / f"{name}.yaml")
        for entry in profile.entries:
            assert entry.evidence == ("default" if entry.kernel.endswith("_hopper") else "modelled")
        assert {record.strategy for record in profile.search.values()} == {"built-in"}
        assert load_profile(find_device(name).torch_names[0]).device.name == name


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(bundled_folder()).as_posix())
def test_every_entry_is_reachable_and_legal(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the software that the file was written with: what has changed since is for `cca-profile stale` to say."""
    profile = read_profile(path)
    monkeypatch.setattr(choice, "source_hash", lambda kernel: profile.kernels[kernel].source_hash)
    monkeypatch.setattr(triton, "__version__", profile.software.triton)
    device = device_table()[profile.device.name]
    assert profile.device == DeviceIdentity(**{name: getattr(device, name) for name in DeviceIdentity.model_fields})
    for entry in profile.entries:
        found = choose(profile, entry.kernel, entry.problem, live(device))
        assert found.entry == entry, found.reasons
        assert found.level == {"measured": "exact"}.get(entry.evidence, entry.evidence)
        assert as_config(entry.kernel, entry.config).refusal(entry.problem) is None
        assert entry.resources and all(blocks_per_sm(device, kernel) >= 1 for kernel in entry.resources)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", MODELLED)
def test_auto_serves_every_model_at_every_length_where_the_source_is_current(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = find_device(name)
    monkeypatch.setattr("cca_attention.profiles.resolve.live_device", lambda _: live(device))
    auto = AutoProfile()
    held = read_profile(bundled_folder() / "modelled" / f"{name}.yaml")
    monkeypatch.setattr(triton, "__version__", held.software.triton)  # of another, its predictions are not used
    stale = sorted(kernel for kernel, source in held.kernels.items() if source.source_hash != source_hash(kernel))
    assert not stale, f"{', '.join(stale)}: {REFRESH}"
    for model in MODELS:
        shape = model_shape(model)
        for seq_len in (4096, 10_000, 131072, 1_048_576):
            problem = Problem(q_heads=shape.q_heads, kv_heads=shape.kv_heads, head_dim=shape.head_dim, seq_len=seq_len)
            found = auto.resolutions(problem, None)
            unserved = {kernel for kernel in tunables(device.arch) if found[kernel].entry is None}
            assert not unserved, [(kernel, found[kernel].reasons) for kernel in unserved]
