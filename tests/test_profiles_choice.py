"""Which entry a kernel gets: at what level, how far away, why; and never a config that cannot run."""

from __future__ import annotations

import warnings
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
import triton
import yaml
from hypothesis import given
from hypothesis import strategies as st

from cca_attention import Problem
from cca_attention.kernels.forward import ForwardConfig, default_config
from cca_attention.profiles import choice
from cca_attention.profiles.choice import LEVELS, MAX_DOUBLINGS, ProfileMismatch, Resolution, choose
from cca_attention.profiles.configs import source_hash
from cca_attention.profiles.live import LiveDevice
from cca_attention.profiles.reading import parse_profile
from cca_attention.profiles.schema import Profile
from cca_attention.verify.sample_profile import A100, PROBLEM, TEXT, TUNED

BUILT_IN = default_config(PROBLEM, "sm_80")
OTHER_NAME = replace(A100, name="NVIDIA PG506-232")
A100_40GB = replace(A100, name="NVIDIA A100-SXM4-40GB", hbm_bytes=42_000_000_000)
SLICE = replace(A100, sm_count=42)
SMALL = replace(A100, name="NVIDIA A30", sm_count=56, shared_bytes_per_block=90000)
H200 = replace(A100, name="NVIDIA H200", arch="sm_90")
GPU = torch.device("cuda", 0)


def profile(text: str = TEXT, **changes: Any) -> Profile:
    """The sample profile with the first entry changed."""
    content = yaml.safe_load(text)
    content["entries"][0] |= changes
    return parse_profile(yaml.safe_dump(content).encode(), "p.yaml")


def chosen(
    text: str = TEXT,
    problem: Problem = PROBLEM,
    gpu: LiveDevice | None = A100,
    mode: choice.Mode = "checked",
    **changes: Any,
) -> Resolution:
    """What the forward kernel gets."""
    return choose(profile(text, **changes), "forward", problem, gpu, mode)


PREDICTED = {"evidence": "modelled", "latency": None}


@pytest.mark.parametrize("gpu", [A100, None], ids=["at hand", "absent"])
def test_what_was_measured_here_is_exact(gpu: LiveDevice | None) -> None:
    found = chosen(gpu=gpu)
    assert (found.level, found.config, found.source, found.distance) == ("exact", TUNED, "p.yaml", 0.0)
    assert found.reasons == () and found.entry == profile().entries[0]


@pytest.mark.parametrize(
    ("level", "reason", "change"),
    [
        ("same silicon", "this GPU is of the same silicon", {"gpu": OTHER_NAME}),
        ("same arch", "this GPU is of the same arch", {"gpu": A100_40GB}),
        ("same arch", "this GPU is of the same arch", {"gpu": SLICE}),
        ("same arch", "measured on h200", {"evidence": "transferred", "measured_on": "h200"}),
        ("exact", "", {"problem": replace(PROBLEM, seq_len=65536, batch=2)}),
        ("nearest", "1.0 doublings away", {"problem": replace(PROBLEM, seq_len=32768)}),
        ("nearest", "1.0 doublings away", {"problem": replace(PROBLEM, kv_heads=16)}),
        ("modelled", "its evidence is modelled", PREDICTED),
        ("modelled", "its evidence is modelled", {"gpu": OTHER_NAME, **PREDICTED}),
        ("default", "its evidence is default", {"evidence": "default", "latency": None}),
        ("exact", "tuned with driver 580.65.06, this is 999.1", {"gpu": replace(A100, driver="999.1")}),
        ("exact", "", {"gpu": replace(A100, driver=None)}),
    ],
)  # fmt: skip
def test_the_weakest_claim_is_the_level(level: str, reason: str, change: dict[str, Any]) -> None:
    found = chosen(**change)
    assert (found.level, found.config) == (level, TUNED)
    assert reason in "; ".join(found.reasons) and bool(reason) == bool(found.reasons)


@pytest.mark.parametrize(
    ("reason", "change"),
    [
        ("tuned for sm_80, NVIDIA H200 is sm_90", {"gpu": H200}),
        ("forward_kernel takes 98304 bytes of shared memory of a block, NVIDIA A30 has 90000", {"gpu": SMALL}),
        ("its resources are not recorded, so that nothing says that it can run", {"resources": []}),
        ("its resources are not recorded", {"gpu": SMALL, "resources": []}),
        ("its resources are not recorded", {"resources": [], "evidence": "default", "latency": None}),
        ("tuned for no head_dim 64 in bfloat16", {"problem": replace(PROBLEM, head_dim=64)}),
        ("tuned for no head_dim 128 in float32", {"problem": replace(PROBLEM, dtype="float32")}),
        ("5.0 doublings away, more than 4", {"problem": replace(PROBLEM, seq_len=2048)}),
        ("block_q 96 is not a power of two", {"config": {**asdict(TUNED), "block_q": 96}}),
        ("its source has changed", {"text": TEXT.replace(source_hash("forward"), "0" * 64)}),
        ("its source has changed", {"text": TEXT.replace(source_hash("forward"), "0" * 64), "config": {"tile": 64}}),
        ("its configs are of kernel ABI 2, this is 1", {"text": TEXT.replace("abi: 1", "abi: 2")}),
        ("verified on another source", {"text": TEXT.replace(f"_hash: {source_hash('forward')},\n", "_hash: no,\n")}),
        ("modelled for Triton 3.1.0", {"text": TEXT.replace(f"n: {triton.__version__}", "n: 3.1.0"), **PREDICTED}),
    ],
)  # fmt: skip
def test_what_cannot_run_or_be_believed_is_stepped_down_to_the_built_in(reason: str, change: dict[str, Any]) -> None:
    found = chosen(**change)
    problem, gpu = change.get("problem", PROBLEM), change.get("gpu", A100)
    assert (found.level, found.source, found.entry) == ("default", "built-in", None)
    assert found.config == default_config(problem, gpu.arch) and reason in "; ".join(found.reasons)


def test_fp_fusion_of_another_setting_rejects(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton.knobs.language, "default_fp_fusion", False)
    found = chosen()
    assert found.level == "default" and "tuned with fp_fusion True, here it is False" in found.reasons
    assert chosen(text=TEXT.replace("\n  fp_fusion: true", "")).level == "exact"


@pytest.mark.parametrize(("gpu", "level"), [(A100, "same silicon"), (OTHER_NAME, "same arch"), (A100_40GB, "nearest")])
def test_another_minor_of_triton_degrades_by_one_level(gpu: LiveDevice, level: str) -> None:
    text = TEXT.replace(f"triton: {triton.__version__}", "triton: '3.10'")
    found = chosen(text=text, gpu=gpu)
    assert (found.level, found.config) == (level, TUNED)
    assert f"one level lower: tuned with Triton 3.10, this is {triton.__version__}" in found.reasons
    patch = ".".join((*triton.__version__.split(".")[:2], "99"))
    assert chosen(text=TEXT.replace(f"triton: {triton.__version__}", f"triton: {patch}")).level == "exact"


def two_entries(**second: Any) -> Profile:
    """A first entry that takes too much of an A30, and another twice as far away."""
    content = yaml.safe_load(TEXT)
    near = content["entries"][0]
    del near["interval"]
    far = {**near, "problem": {**near["problem"], "seq_len": 65536}, **second}
    content["entries"].append(far)
    return parse_profile(yaml.safe_dump(content).encode(), "p.yaml")


def test_the_next_entry_that_fits_is_stepped_down_to() -> None:
    less = [{"kernel": "forward_kernel", "shared_bytes": 4096, "registers": 255, "spill_bytes": 0, "num_warps": 4}]
    config = {"num_warps": 4, "num_stages": 1, "block_q": 64, "block_k": 64}
    both = two_entries(resources=less, config=config)
    assert choose(both, "forward", PROBLEM, A100).config == TUNED
    found = choose(both, "forward", PROBLEM, SMALL)
    assert found.config == ForwardConfig(**config) and found.level == "nearest"
    assert "98304 bytes of shared memory" in found.reasons[-1]


@pytest.mark.parametrize(
    "change", [{"group_size": 8}, {"window_size": 512}, {"core_heads": "kv"}, {"pooling": "mean"}], ids=str
)
def test_a_profile_never_changes_the_model(change: dict[str, Any]) -> None:
    with pytest.raises(ProfileMismatch, match=r"the profile of a100-80gb is for .*, the call has"):
        chosen(problem=replace(PROBLEM, **change))


@pytest.mark.parametrize(
    ("said", "change"),
    [
        ("its level is 'nearest': the nearest is", {"problem": replace(PROBLEM, seq_len=32768)}),
        ("its level is 'same arch'", {"gpu": A100_40GB}),
        ("its level is 'default': .* resources are not recorded", {"resources": []}),
        ("its level is 'default': tuned for sm_80", {"gpu": H200}),
        ("its entry has no verification", {"verification": None}),
    ],
)
def test_strict_takes_only_what_was_measured_and_verified_here(said: str, change: dict[str, Any]) -> None:
    with pytest.raises(ProfileMismatch, match=f"mode 'strict', .*: forward on B1-H32.*: {said}"):
        chosen(mode="strict", **change)
    assert chosen(mode="strict", gpu=OTHER_NAME).level == "same silicon"


def test_off_is_the_built_in_config_without_a_word() -> None:
    found = chosen(mode="off", problem=replace(PROBLEM, group_size=8))
    assert (found.level, found.config, found.reasons) == ("default", BUILT_IN, ("the mode is off",))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(profile().read_from("p.yaml", "off").schedule(PROBLEM)) == 0


GPUS = st.builds(
    LiveDevice,
    name=st.sampled_from([A100.name, "another"]), arch=st.sampled_from(["sm_80", "sm_80", "sm_90"]),
    sm_count=st.sampled_from([56, 108]), shared_bytes_per_block=st.sampled_from([48 * 1024, 98304, 166912]),
    l2_bytes=st.just(41943040), hbm_bytes=st.sampled_from([40 * 10**9, 85 * 10**9]),
    registers_per_block=st.sampled_from([None, 32768, 65536]),
)  # fmt: skip


@given(gpu=GPUS, seq_len=st.integers(1, 2**22), batch=st.integers(1, 64), head_dim=st.sampled_from([64, 128]))
def test_nothing_is_chosen_that_could_not_run(gpu: LiveDevice, seq_len: int, batch: int, head_dim: int) -> None:
    problem = replace(PROBLEM, seq_len=seq_len, batch=batch, head_dim=head_dim)
    found = chosen(problem=problem, gpu=gpu)
    assert found.config.refusal(problem) is None
    if found.entry is not None:
        assert found.entry.resources and gpu.shortage(found.entry.resources) is None and gpu.arch == "sm_80"
        assert found.distance is not None and found.distance <= MAX_DOUBLINGS
    nearer = replace(problem, seq_len=min(max(seq_len, 65536), 262144), batch=min(batch, 2))
    assert LEVELS.index(chosen(problem=nearer, gpu=gpu).level) <= LEVELS.index(found.level)
