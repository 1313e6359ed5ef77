"""The order of the launches: what one forward and one backward of CCA attention do with the Triton kernels."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from .configs import Configs
from .kernels import hopper
from .kernels.backward_dkv import launch_backward_dcore, launch_backward_dkv
from .kernels.backward_dq import launch_backward_dq, launch_delta
from .kernels.forward import launch_forward
from .kernels.layout import Sequences, core_gradients_in
from .kernels.pooling import launch_pooling, launch_pooling_backward
from .kernels.tunable import INTERPRETED as INTERPRETED
from .kernels.tunable import accumulator_dtype
from .replay import replayed
from .spec import CCASpec


def emulated(tensor: Tensor) -> bool:
    """Whether `tensor` is bfloat16 under the interpreter, which computes on its raw bits: then it runs as float32."""
    return INTERPRETED and tensor.dtype == torch.bfloat16


Launches = TypeVar("Launches", bound=Callable[..., Any])


def on_its_gpu(function: Launches) -> Launches:
    """`function` with the GPU of its first tensor as the current one, on which Triton launches."""

    @wraps(function)
    def run(first: Tensor, *others: Any) -> Any:
        with torch.cuda.device_of(first):
            return function(first, *others)

    return cast("Launches", run)


@on_its_gpu
def forward(
    q: Tensor, k: Tensor, v: Tensor, spec: CCASpec, sequences: Sequences, configs: Configs
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(out, lse, k_core, v_core, pool_lse); tokens outside every sequence get out = 0 and lse = -inf.

    Under the interpreter bfloat16 is emulated: float32 kernels, and one rounding of cores and of out.
    """
    if emulated(q):
        return _forward_emulated(q, k, v, spec, sequences, configs)
    return cast("tuple[Tensor, Tensor, Tensor, Tensor, Tensor]", _again(_forward, (q, k, v), spec, sequences, configs))


Pass = Callable[[tuple[Any, ...], CCASpec, Sequences, Configs], tuple[Tensor, ...]]


def _again(
    function: Pass, tensors: tuple[Tensor | None, ...], spec: CCASpec, sequences: Sequences, configs: Configs
) -> tuple[Tensor, ...]:
    """``function(tensors, spec, sequences, configs)``, which makes tensors and launches kernels, and nothing else."""

    def run(*_: Tensor | None) -> tuple[Tensor, ...]:
        return function(tensors, spec, sequences, configs)

    what = (function, spec, sequences.layout, sequences.count, configs.choice)
    return replayed(what, run, (*tensors, sequences.table))


def _forward(
    tensors: tuple[Any, ...], spec: CCASpec, sequences: Sequences, configs: Configs
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    q, k, v = tensors
    k_core, v_core, pool_lse = pool(q, k, v, spec, sequences, configs)
    out, lse = attend(q, k, v, k_core, v_core, spec, sequences, configs)
    return out, lse, k_core, v_core, pool_lse


def groups_to_pool(spec: CCASpec, seq_len: int) -> int:
    """All complete groups of sequences of at most `seq_len` tokens, or none if even the last query sees no core."""
    return spec.num_groups(seq_len) if spec.visible_cores(seq_len - 1) else 0


def pool(
    q: Tensor, k: Tensor, v: Tensor, spec: CCASpec, sequences: Sequences, configs: Configs
) -> tuple[Tensor, Tensor, Tensor]:
    """(k_core, v_core (B, Hc, C, D), pool_lse (B, Hc, C)) of the C = `groups_to_pool` groups."""
    core_heads = spec.num_core_heads(q.shape[1], k.shape[1])
    shape = (q.shape[0], core_heads, groups_to_pool(spec, q.shape[2]), q.shape[3])
    # packed and padded sequences leave some slots without a core
    empty = torch.empty if sequences.table is None else torch.zeros
    k_core, v_core = (empty(shape, dtype=x.dtype, device=x.device) for x in (k, v))
    pool_lse = empty(shape[:3], dtype=accumulator_dtype(q.dtype), device=q.device)
    launch_pooling(q, k, v, k_core, v_core, pool_lse, spec=spec, sequences=sequences, config=configs["pooling"])
    return k_core, v_core, pool_lse


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_core: Tensor,
    v_core: Tensor,
    spec: CCASpec,
    sequences: Sequences,
    configs: Configs,
) -> tuple[Tensor, Tensor]:
    """(out, lse) of the queries over cores and raw tokens; no query may see a core if there is none."""
    lse_dtype = accumulator_dtype(q.dtype)
    if sequences.table is None:
        out, lse = torch.empty_like(q), q.new_empty(q.shape[:3], dtype=lse_dtype)
    else:
        out, lse = torch.zeros_like(q), q.new_full(q.shape[:3], -torch.inf, dtype=lse_dtype)
    tensors = (q, k, v, *some_cores(k, k_core, v_core), out)
    flops = math.inf if configs.forces("forward_hopper") else 4.0 * q.numel() * keys_seen(q, spec)
    if hopper.usable(sequences, flops, *tensors):
        hopper.forward.launch_forward_hopper(*tensors, lse, spec=spec, config=configs["forward_hopper"])
    else:
        launch_forward(*tensors, lse, spec=spec, sequences=sequences, config=configs["forward"])
    return out, lse


def some_cores(k: Tensor, k_core: Tensor, v_core: Tensor) -> tuple[Tensor, Tensor]:
    """The cores, or, where there is none, tensors that kernels can address and do not read."""
    return (k_core, v_core) if k_core.shape[2] else (k, k)


def keys_seen(q: Tensor, spec: CCASpec) -> float:
    """About how many keys, cores and raw tokens, each of the queries (B, Hq, T, D) sees, on average."""
    return min(q.shape[2] / 2, spec.window_size + q.shape[2] / (2 * spec.group_size))


def _forward_emulated(
    q: Tensor, k: Tensor, v: Tensor, spec: CCASpec, sequences: Sequences, configs: Configs
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    narrow = q.dtype
    q, k, v = q.float(), k.float(), v.float()
    k_core, v_core, pool_lse = pool(q, k, v, spec, sequences, configs)
    k_core, v_core = k_core.to(narrow), v_core.to(narrow)
    out, lse = attend(q, k, v, k_core.float(), v_core.float(), spec, sequences, configs)
    return out.to(narrow), lse, k_core, v_core, pool_lse


@on_its_gpu
def backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    k_core: Tensor,
    v_core: Tensor,
    pool_lse: Tensor,
    spec: CCASpec,
    sequences: Sequences,
    configs: Configs,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) from what `forward` returned; the same bits from run to run."""
    if emulated(q):
        dout, wide_q, k, v, out, k_core, v_core = (x.float() for x in (dout, q, k, v, out, k_core, v_core))
        grads = backward(dout, dlse, wide_q, k, v, out, lse, k_core, v_core, pool_lse, spec, sequences, configs)
        return grads[0].to(q.dtype), grads[1].to(q.dtype), grads[2].to(q.dtype)
    tensors = (dout, dlse, q, k, v, out, lse, k_core, v_core, pool_lse)
    return cast("tuple[Tensor, Tensor, Tensor]", _again(_backward, tensors, spec, sequences, configs))


def _backward(
    tensors: tuple[Any, ...], spec: CCASpec, sequences: Sequences, configs: Configs
) -> tuple[Tensor, Tensor, Tensor]:
    dout, dlse, q, k, v, out, lse, k_core, v_core, pool_lse = tensors
    if not k_core.shape[2]:
        spec = replace(spec, pooling="mean")  # nothing is pooled, so nothing reaches a query through its weights
    empty = torch.empty_like if sequences.table is None else torch.zeros_like
    delta = torch.empty_like(lse)
    launch_delta(out, dout, dlse, delta)
    dq, dk, dv = empty(q), empty(k), empty(v)
    room = spec.group_size if sequences.table is None else 0  # packed and padded groups begin anywhere in dq
    dk_core, dv_core = core_gradients_in(dq, k_core, room, lse.dtype)
    if k_core.shape[2]:
        core_gradients((q, k_core, v_core, dout, lse, delta, dk_core, dv_core), spec, sequences, configs)
    call: dict[str, Any] = {"spec": spec, "sequences": sequences}
    pool_delta = torch.empty_like(pool_lse)
    if spec.pooling != "mean":
        launch_pooling_backward(
            q, k, v, k_core, v_core, dk_core, dv_core, pool_lse, pool_delta, dq,
            config=configs["pooling_backward"], **call,
        )  # fmt: skip
    raw = (q, k, v, dout, lse, delta, dk_core, dv_core, pool_lse, pool_delta, dk, dv)
    token_gradients(raw, spec, sequences, configs)
    query_gradients((q, k, v, *some_cores(k, k_core, v_core), dout, lse, delta, dq), spec, sequences, configs)
    return dq, dk, dv


def core_gradients(tensors: tuple[Tensor, ...], spec: CCASpec, sequences: Sequences, configs: Configs) -> None:
    """Fill dk_core and dv_core, what arrives at the cores; `tensors` are those that `launch_backward_dcore` takes."""
    q, k_core, v_core, dout = tensors[:4]
    flops = math.inf if configs.forces("backward_dcore_hopper") else 4.0 * q.numel() * k_core.shape[2]
    if hopper.usable(sequences, flops, q, k_core, v_core, dout):
        config = configs["backward_dcore_hopper"]
        hopper.backward_dcore.launch_backward_dcore_hopper(*tensors, spec=spec, config=config)
    else:
        launch_backward_dcore(*tensors, spec=spec, sequences=sequences, config=configs["backward_dcore"])


def token_gradients(tensors: tuple[Tensor, ...], spec: CCASpec, sequences: Sequences, configs: Configs) -> None:
    """Fill dk and dv; `tensors` are those that `launch_backward_dkv` takes."""
    q, k, v, dout = tensors[:4]
    seen = min(q.shape[2] / 2, spec.window_size)  # raw tokens of a query, on average
    flops = math.inf if configs.forces("backward_dkv_hopper") else 8.0 * q.numel() * seen
    if hopper.usable(sequences, flops, q, k, v, dout):
        config = configs["backward_dkv_hopper"]
        hopper.backward_dkv.launch_backward_dkv_hopper(*tensors, spec=spec, config=config)
    else:
        launch_backward_dkv(*tensors, spec=spec, sequences=sequences, config=configs["backward_dkv"])


def query_gradients(tensors: tuple[Tensor, ...], spec: CCASpec, sequences: Sequences, configs: Configs) -> None:
    """Complete dq, the last of `tensors`; they are those that `launch_backward_dq` takes."""
    q, k, v, k_core, v_core, dout, _, _, dq = tensors
    flops = math.inf if configs.forces("backward_dq_hopper") else 6.0 * q.numel() * keys_seen(q, spec)
    if hopper.usable(sequences, flops, q, k, v, k_core, v_core, dout, dq):
        hopper.backward_dq.launch_backward_dq_hopper(*tensors, spec=spec, config=configs["backward_dq_hopper"])
    else:
        launch_backward_dq(*tensors, spec=spec, sequences=sequences, config=configs["backward_dq"])
