"""Exports: each form is read back by the rules that its reader is documented to follow."""

from __future__ import annotations

import ast
import hashlib
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from triton import Config

from cca_attention.kernels.decode import DecodeConfig
from cca_attention.profiles.configs import source_hash
from cca_attention.profiles.export import FORMATS, export
from cca_attention.profiles.reading import parse_profile
from cca_attention.profiles.schema import Profile
from cca_attention.verify.sample_profile import PROBLEM, TEXT

LAUNCH = {"BLOCK_Q": 128, "BLOCK_K": 64, "num_warps": 4, "num_stages": 2}
SHORT = {**LAUNCH, "BLOCK_Q": 64}
NAME = (
    "op=cca_forward,B=1,Hq=32,Hkv=8,D=128,G=16,W=1024,cores=query,pooling=last_query,"
    "device_name=NVIDIA_A100-SXM4-80GB,dtype=bfloat16.json"
)


def profile(name: str = "NVIDIA A100-SXM4-80GB") -> Profile:
    """A measured entry at 131072, a modelled one at 4096 and a decode entry that nobody verified."""
    content = yaml.safe_load(TEXT)
    content["device"]["names"] = ["a100", name]
    (first,) = content["entries"]
    del first["interval"]
    short = {**first, "problem": {**first["problem"], "seq_len": 4096}, "config": {**first["config"], "block_q": 64}}
    short |= {"evidence": "modelled", "latency": None}
    decode = {**first, "kernel": "decode", "config": {**DecodeConfig().launch_args()}, "verification": None}
    decode["config"] = {key.lower(): value for key, value in decode["config"].items()}
    content["kernels"]["decode"] = {"source_hash": source_hash("decode")}
    content["entries"] = [first, short, decode]
    return parse_profile(yaml.safe_dump(content).encode(), "p.yaml")


def nearest(configs: dict[int, Any], length: int) -> Any:
    """The rule of vLLM and SGLang: the nearest key by difference."""
    return configs[min(configs, key=lambda key: abs(key - length))]


@pytest.mark.parametrize("of_kernel", [True, False])
@pytest.mark.parametrize("form", FORMATS)
def test_a_kernel_that_has_changed_since_is_left_out_and_named(form: Any, of_kernel: bool) -> None:
    content = yaml.safe_load(TEXT.replace(source_hash("forward"), "0" * 64))
    if not of_kernel:  # only the verification is of another source
        content["kernels"]["forward"]["source_hash"] = source_hash("forward")
    content["entries"][0]["config"] = {"tile": 64}  # the fields of that version
    found = export(parse_profile(yaml.safe_dump(content).encode(), "p.yaml"), form)
    assert found.left_out == ["forward: its source has changed since it was tuned"]
    assert "64" not in "".join(found.files.values())


def test_vllm_finds_the_file_by_name_and_the_config_by_the_nearest_integer_key() -> None:
    files = export(profile(), "vllm").files
    assert " " not in "".join(files) and len(files) == 2
    content = json.loads(files[NAME])
    assert content.pop("triton_version") == "3.7.1"
    configs = {int(key): value for key, value in content.items()}
    assert nearest(configs, 10_000) == SHORT and nearest(configs, 10**6) == LAUNCH


def test_sglang_has_the_version_of_triton_as_a_folder_and_only_integer_keys() -> None:
    files = export(profile(), "sglang").files
    configs = {int(key): value for key, value in json.loads(files[f"configs/triton_3_7_1/{NAME}"]).items()}
    assert nearest(configs, 131072) == LAUNCH and len(configs) == 2


def test_hugging_face_kernels_takes_the_nearest_in_log_space() -> None:
    configs = {
        int(key): value for key, value in json.loads(export(profile(), "kernels").files[f"configs/{NAME}"]).items()
    }
    assert configs[min(configs, key=lambda key: abs(math.log2(key / 20_000)))] == SHORT


def test_triton_configs_are_python_that_only_builds_them() -> None:
    hostile = 'NVIDIA """; import antigravity; """ \' A100'
    (text,) = export(profile(hostile), "triton-config").files.values()
    imports = [ast.unparse(node) for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Import | ast.ImportFrom)]
    assert imports == ["from triton import Config"]
    space: dict[str, Any] = {}
    exec(text, space)
    assert space["DEVICE"] == hostile
    found: Config = space["CONFIGS"]["forward", str(PROBLEM)]
    assert {**found.kwargs, "num_warps": found.num_warps, "num_stages": found.num_stages} == LAUNCH
    assert space["CONFIGS"]["forward", str(replace(PROBLEM, seq_len=4096))].kwargs["BLOCK_Q"] == 64


def test_t4_has_what_was_measured_and_verified_and_says_what_is_left_out() -> None:
    exported = export(profile(), "t4")
    content = json.loads(exported.files["t4-forward.json"])
    assert content["schema_version"] == "1.0.0" and list(exported.files) == ["t4-forward.json"]
    (result,) = content["results"]
    assert result["invalidity"] == "correct" and result["correctness"] == 1
    assert result["configuration"] == {**PROBLEM.as_dict(), **LAUNCH}
    measured = {m["name"]: (m["value"], m["unit"]) for m in result["measurements"]}
    assert measured["time_median"] == (51.0, "ms") and result["objectives"] == ["time_median"]
    assert result["times"]["runtimes"] == [51.0] and set(result["objectives"]) <= set(measured)
    assert [re.sub(r" on .*:", ":", what) for what in exported.left_out] == [
        "forward: not measured", "decode: not verified",
    ]  # fmt: skip


def fla_lookup(content: dict[str, Any], key: list[Any], mode: str) -> Any:
    """The documented modes: by the md5 of the key's compact JSON; numbers alike; the default."""
    if mode == "strict":
        digest = hashlib.md5(json.dumps(key, separators=(",", ":"), sort_keys=True).encode()).hexdigest()
        return content["autotune_entries"].get(digest, {}).get("config")
    if mode == "fuzzy":
        kinds = [type(part) for part in key]
        entries = content["autotune_entries"].values()
        return next((e["config"] for e in entries if [type(part) for part in e["autotune_key"]] == kinds), None)
    return content["default_config"]


def test_fla_finds_an_entry_by_its_key_and_the_default() -> None:
    files = export(profile(), "fla").files
    assert {name.split("/")[0] for name in files} == {"NVIDIA_A100_SXM4_80GB"}
    content = json.loads(files["NVIDIA_A100_SXM4_80GB/forward_kernel.json"])
    assert content["kernel_name"] == "forward_kernel" and content["triton_version"] == "3.7.1"
    key = [1, 32, 8, 4096, 128, 16, 1024, "torch.bfloat16"]
    strict = fla_lookup(content, key, "strict")
    assert strict["kwargs"] == {"BLOCK_Q": 64, "BLOCK_K": 64} and strict["num_ctas"] == 1
    assert (strict["num_warps"], strict["num_stages"]) == (4, 2)
    assert fla_lookup(content, [*key[:3], 999, *key[4:]], "strict") is None
    assert fla_lookup(content, [*key[:3], 999, *key[4:]], "fuzzy") is not None
    assert fla_lookup(content, key, "default")["kwargs"]["BLOCK_Q"] == 128
    assert {name.split("/")[1] for name in files} >= {"forward_kernel.json", "decode_kernel.json"}


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", ["../../etc x", "/tmp/ x", ".. ..", "a\\b c"])
def test_no_name_of_a_gpu_leaves_the_folder(form: Any, name: str) -> None:
    for path in export(profile(name), form).files:
        assert not Path(path).is_absolute() and ".." not in Path(path).parts and "\\" not in path


def test_another_form_is_refused() -> None:
    with pytest.raises(ValueError, match=r"form must be one of vllm, .*, got 'inductor'"):
        export(profile(), "inductor")  # type: ignore[arg-type]
