"""Activations in a file of the safetensors format: tensors and nothing else, so that reading it runs no code.

One sequence of one layer is `q` [Hq, T, D], `k` and `v` [Hkv, T, D]; of several layers `layers.0.q` and so on.
"""

from __future__ import annotations

import json
import math
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .proxies import Activations

MOST_HEADER_BYTES = 2**24
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
NAMES = ("q", "k", "v")
NAME = re.compile(r"(?:layers\.(\d+)\.)?([qkv])")


class Heads(NamedTuple):
    """q [Hq, T, D], k and v [Hkv, T, D] of one layer."""

    q: Tensor
    k: Tensor
    v: Tensor


class TensorsFileError(ValueError):
    """A file that does not hold what it should; the message says what is wrong."""


def read_activations(path: Path) -> dict[str, Activations]:
    """What a file holds, rotated as the model attends; by names that say the layer. Other tensors are ignored.

    Raises:
        TensorsFileError: naming the file, and the tensor.
    """
    try:
        tensors = _tensors(path.read_bytes())
    except OSError as error:
        raise TensorsFileError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise TensorsFileError(f"{path} is no safetensors file: {error}") from error
    prefixes = sorted({name[:-1] for name in tensors}, key=lambda prefix: (len(prefix), prefix)) or [""]
    return {_called(path, prefix): _activations(path, prefix, tensors) for prefix in prefixes}


def _called(path: Path, prefix: str) -> str:
    return f"{path.name}, layer {prefix.split('.')[1]}" if prefix else path.name


def _activations(path: Path, prefix: str, tensors: Mapping[str, Tensor]) -> Activations:
    names = [f"{prefix}{name}" for name in NAMES]
    if missing := [name for name in names if name not in tensors]:
        raise TensorsFileError(f"{path} has no tensor {', '.join(missing)}; it needs q [Hq, T, D] and k, v [Hkv, T, D]")
    q, k, v = (tensors[name].float() for name in names)
    if q.dim() != 3 or k.dim() != 3 or k.shape != v.shape or q.shape[1:] != k.shape[1:] or not q.numel():
        shapes = ", ".join(f"{name} {list(tensors[name].shape)}" for name in names)
        raise TensorsFileError(f"{path} must have q [Hq, T, D] and k, v [Hkv, T, D], got {shapes}")
    if q.shape[0] % k.shape[0]:
        raise TensorsFileError(f"{path}: the {q.shape[0]} heads of q are no multiple of the {k.shape[0]} of k and v")
    if wrong := [name for name, x in zip(names, (q, k, v), strict=True) if not bool(x.isfinite().all())]:
        raise TensorsFileError(f"{path}: {', '.join(wrong)} must be finite everywhere")
    return Activations(q, k, v)


def _tensors(content: bytes) -> dict[str, Tensor]:
    """The tensors of the supported dtypes: 8 bytes of the header's length, the header in JSON, then the data."""
    size = int.from_bytes(content[:8], "little")
    if not 2 <= size <= min(MOST_HEADER_BYTES, len(content) - 8):
        raise ValueError(f"its header would have {size} bytes")
    header = json.loads(content[8 : 8 + size])
    if not isinstance(header, dict):
        raise ValueError("its header is no mapping")
    data = memoryview(content)[8 + size :]
    return {name: _tensor(name, entry, data) for name, entry in header.items() if NAME.fullmatch(name)}


def _tensor(name: str, entry: dict[str, Any], data: memoryview) -> Tensor:
    dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    if dtype not in DTYPES:
        raise ValueError(f"{name} is {dtype}, not one of {', '.join(DTYPES)}")
    if not all(isinstance(n, int) and n >= 0 for n in (*shape, begin, end)) or end > len(data):
        raise ValueError(f"{name} lies outside of the file")
    if end - begin != math.prod(shape) * DTYPES[dtype].itemsize:
        raise ValueError(f"{name} has {end - begin} bytes, which is not {shape} of {dtype}")
    if begin == end:
        return torch.empty(shape, dtype=DTYPES[dtype])
    return torch.frombuffer(bytearray(data[begin:end]), dtype=DTYPES[dtype]).reshape(shape)


def write_layers(path: Path, layers: Mapping[int, Heads], about: Mapping[str, str]) -> None:
    """Write the file that `read_activations` reads, whole or not at all; `about` becomes its metadata.

    Raises:
        OSError: if it cannot be written.
    """
    header: dict[str, Any] = {"__metadata__": dict(about)}
    codes = {dtype: code for code, dtype in DTYPES.items()}
    tensors = {f"layers.{layer}.{n}": x for layer, heads in layers.items() for n, x in heads._asdict().items()}
    end = 0
    for name, x in tensors.items():
        begin, end = end, end + x.numel() * x.element_size()
        header[name] = {"dtype": codes[x.dtype], "shape": list(x.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for x in tensors.values():
                file.write(x.contiguous().view(torch.uint8).numpy().data)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
