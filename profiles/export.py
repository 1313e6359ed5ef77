"""Profiles in the forms that other projects' loaders read: file names below a folder, and what is in them.

`docs/profiles.md` says which loader reads which. A launch config is written as Triton takes it: tiles in upper case,
with num_warps and num_stages.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from ..kernels.tunable import Tunable
from .configs import as_config, known_kernel, source_hash
from .schema import Entry, Profile

Format = Literal["vllm", "sglang", "kernels", "triton-config", "t4", "fla"]
FORMATS: tuple[Format, ...] = get_args(Format)


@dataclass(frozen=True, slots=True)
class Exported:
    """Text by file name, and for words which entries are in none of the files, each with the reason."""

    files: dict[str, str] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)


def export(profile: Profile, form: Format) -> Exported:
    """`profile` in the form of another project, without kernels whose source has changed since.

    Raises ValueError for a form that there is not.
    """
    if form not in FORMATS:
        raise ValueError(f"form must be one of {', '.join(FORMATS)}, got {form!r}")
    current = tuple(entry for entry in profile.entries if _is_current(profile, entry))
    outdated = dict.fromkeys(entry.kernel for entry in profile.entries if not _is_current(profile, entry))
    written = _WRITERS[form](profile.model_copy(update={"entries": current}))
    changed = [f"{kernel}: its source has changed since it was tuned" for kernel in outdated]
    return Exported(written.files, [*changed, *written.left_out])


def _is_current(profile: Profile, entry: Entry) -> bool:
    verified = () if entry.verification is None else (entry.verification.kernel_hash,)
    return {profile.kernels[entry.kernel].source_hash, *verified} == {source_hash(entry.kernel)}


def launch_args(entry: Entry) -> dict[str, int]:
    """The keyword arguments of the launch, in a mapping of the caller's own."""
    return dict(as_config(entry.kernel, entry.config).launch_args())


def torch_name(profile: Profile) -> str:
    """What PyTorch calls the GPU: the first of its names with a space, else its name."""
    return next((name for name in profile.device.names if " " in name), profile.device.name)


def _json(content: Any) -> str:
    return json.dumps(content, indent=4) + "\n"


def _file_name(profile: Profile, entry: Entry) -> str:
    """Shape and device, as the loaders of vLLM, SGLang and Hugging Face kernels name their files: no spaces."""
    p = entry.problem
    device = re.sub(r"[^0-9A-Za-z_.-]+", "_", torch_name(profile))
    sizes = f"B={p.batch},Hq={p.q_heads},Hkv={p.kv_heads},D={p.head_dim},G={p.group_size},W={p.window_size}"
    semantics = f"cores={p.core_heads},pooling={p.pooling}"
    return f"op=cca_{entry.kernel},{sizes},{semantics},device_name={device},dtype={p.dtype}.json"


def _by_length(profile: Profile) -> dict[str, dict[str, dict[str, int]]]:
    """Of each file the launch arguments by sequence length, which is the key that these loaders take the nearest of."""
    files: dict[str, dict[str, dict[str, int]]] = {}
    for entry in sorted(profile.entries, key=lambda entry: entry.problem.seq_len):
        files.setdefault(_file_name(profile, entry), {})[str(entry.problem.seq_len)] = launch_args(entry)
    return files


def _vllm(profile: Profile) -> Exported:
    version = {"triton_version": profile.software.triton}  # the loader drops it
    return Exported({name: _json({**version, **configs}) for name, configs in _by_length(profile).items()})


def _sglang(profile: Profile) -> Exported:
    folder = "triton_" + re.sub(r"[^0-9A-Za-z]+", "_", profile.software.triton)
    return Exported({f"configs/{folder}/{name}": _json(configs) for name, configs in _by_length(profile).items()})


def _kernels(profile: Profile) -> Exported:
    return Exported({f"configs/{name}": _json(configs) for name, configs in _by_length(profile).items()})


def _triton_config(profile: Profile) -> Exported:
    lines = ["from triton import Config", "", f"DEVICE = {torch_name(profile)!r}", "CONFIGS = {"]
    for entry in profile.entries:
        arguments = launch_args(entry)
        options = ", ".join(f"{name}={arguments.pop(name)}" for name in ("num_warps", "num_stages"))
        lines.append(f"    ({entry.kernel!r}, {str(entry.problem)!r}): Config({arguments!r}, {options}),")
    return Exported({"cca_configs.py": "\n".join([*lines, "}", ""])})


def _t4(profile: Profile) -> Exported:
    """One file for each kernel, with what was measured and verified: the form has no word for a prediction."""
    results: dict[str, list[dict[str, Any]]] = {}
    left_out: list[str] = []
    for entry in profile.entries:
        if entry.latency is None or entry.verification is None:
            left_out.append(f"{entry.kernel} on {entry.problem}: {'not verified' if entry.latency else 'not measured'}")
            continue
        times = {"median": entry.latency.median_us, "p20": entry.latency.p20_us, "p80": entry.latency.p80_us}
        measurements = [{"name": f"time_{name}", "value": us / 1e3, "unit": "ms"} for name, us in times.items()]
        results.setdefault(f"t4-{entry.kernel}.json", []).append({
            "timestamp": profile.created,
            "configuration": {**entry.problem.as_dict(), **launch_args(entry)},
            "times": {"runtimes": [entry.latency.median_us / 1e3]},
            "invalidity": "correct",
            "correctness": 1,
            "measurements": measurements,
            "objectives": ["time_median"],
        })  # fmt: skip
    files = {name: _json({"schema_version": "1.0.0", "results": found}) for name, found in results.items()}
    return Exported(files, left_out)


def _fla(profile: Profile) -> Exported:
    """One file for each Triton function; the default config is the one of the longest problem."""
    folder = re.sub(r"[^0-9A-Za-z]+", "_", torch_name(profile)).strip("_") or "unknown_gpu"
    contents: dict[str, dict[str, Any]] = {}
    for entry in sorted(profile.entries, key=lambda entry: entry.problem.seq_len):
        arguments = launch_args(entry)
        options = {name: arguments.pop(name) for name in ("num_warps", "num_stages")}
        config = {"kwargs": arguments, **options, "num_ctas": 1, "maxnreg": None, "ir_override": None}
        key = [*(value for value in entry.problem.as_dict().values() if isinstance(value, int)), _dtype_of(entry)]
        digest = hashlib.md5(json.dumps(key, separators=(",", ":")).encode(), usedforsecurity=False).hexdigest()
        for function in _functions(known_kernel(entry.kernel)):
            content = contents.setdefault(
                function, {"kernel_name": function, "triton_version": profile.software.triton}
            )
            content.setdefault("autotune_entries", {})[digest] = {"autotune_key": key, "config": config}
            content["default_config"] = config
    return Exported({f"{folder}/{name}.json": _json(content) for name, content in contents.items()})


def _dtype_of(entry: Entry) -> str:
    return f"torch.{entry.problem.dtype}"


def _functions(tunable: Tunable) -> Iterator[str]:
    for kernel in tunable.kernels:
        yield str(getattr(kernel, "fn", kernel).__name__)


_WRITERS: dict[Format, Callable[[Profile], Exported]] = {
    "vllm": _vllm, "sglang": _sglang, "kernels": _kernels, "triton-config": _triton_config, "t4": _t4, "fla": _fla,
}  # fmt: skip
