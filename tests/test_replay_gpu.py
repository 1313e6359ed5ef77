"""Calls that are done again, by `replay`, have the bits of calls that are done anew."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from cca_attention import CCACache, CCASpec, cca_attention, replay

CALLS: dict[str, dict[str, Any]] = {
    "no core": {"tokens": 96},
    "cores": {"tokens": 700},
    "grouped, cores of kv heads": {"tokens": 700, "kv_heads": 2, "core_heads": "kv"},
    "mean": {"tokens": 700, "pooling": "mean"},
    "with lse": {"tokens": 700, "return_lse": True},
    "strided": {"tokens": 700, "strided": True},
    "float32": {"tokens": 300, "dtype": torch.float32},
    "packed": {"tokens": 700, "cu_seqlens": [0, 130, 131, 700]},
    "padded": {"tokens": 350, "batch": 2, "seq_bounds": [[3, 350], [120, 340]]},
    "on Hopper's kernels": {"tokens": 4096, "heads": 16, "batch": 2},
}


@pytest.mark.gpu
@pytest.mark.parametrize("name", CALLS)
def test_attention_done_again_has_the_bits_of_attention_done_anew(name: str) -> None:
    options = {"batch": 1, "heads": 4, "dtype": torch.bfloat16, "group_size": 16, "window_size": 128} | CALLS[name]
    batch, heads, tokens, dtype = (options.pop(key) for key in ("batch", "heads", "tokens", "dtype"))
    kv_heads, strided = options.pop("kv_heads", heads), options.pop("strided", False)
    for key in {"cu_seqlens", "seq_bounds"} & set(options):
        options[key] = torch.tensor(options[key], dtype=torch.int32, device="cuda")

    def inputs(seed: int) -> list[Tensor]:
        generator = torch.Generator("cuda").manual_seed(seed)
        made = []
        for count in (heads, kv_heads, kv_heads, heads):
            shape = (batch, tokens, count, 128) if strided else (batch, count, tokens, 128)
            x = torch.randn(shape, device="cuda", generator=generator).to(dtype)
            made.append(x.transpose(1, 2) if strided else x)
        return made

    def results(seed: int) -> list[Tensor]:
        *qkv, dout = inputs(seed)
        qkv = [x.requires_grad_() for x in qkv]
        out = cca_attention(*qkv, **options)
        outs = out if isinstance(out, tuple) else (out,)
        grads = torch.autograd.grad(outs, qkv, [dout, *(torch.ones_like(x) for x in outs[1:])])
        return [x.detach() for x in (*outs, *grads)]

    replay.forget()
    anew = []
    for seed in range(5):
        anew.append(results(seed))
        replay.forget()
    again = [results(seed) for seed in range(5)]
    assert [type(known) for known in replay.KNOWN.values()] == [replay.Replay] * 2
    for seed in range(5):
        for first, second in zip(anew[seed], again[seed], strict=True):
            assert torch.equal(first, second) and not first.isnan().any()


STATES: dict[str, dict[str, Any]] = {
    "growing": {},
    "of a fixed size": {"max_tokens": 700},
    "cores of kv heads, rows": {"core_heads": "kv", "batch": 3},
    "float32": {"dtype": torch.float32},
}


@pytest.mark.gpu
@pytest.mark.parametrize("name", STATES)
def test_decode_steps_done_again_have_the_bits_of_steps_done_anew(name: str) -> None:
    options = {"batch": 1, "dtype": torch.bfloat16, "core_heads": "query"} | STATES[name]
    spec = CCASpec(16, 128, core_heads=options.pop("core_heads"))

    def results(anew: bool) -> list[Tensor]:
        generator = torch.Generator("cuda").manual_seed(0)
        cache = CCACache(spec, q_heads=4, kv_heads=2, head_dim=128, device="cuda", **options)
        outs = []
        for tokens in (300, *[1] * 200):
            if anew:
                replay.forget()
            shapes = [(options["batch"], tokens, heads, 128) for heads in (4, 2, 2)]
            new = [torch.randn(shape, device="cuda", generator=generator) for shape in shapes]
            q, k, v = (x.to(options["dtype"]).transpose(1, 2) for x in new)
            outs.append(cache.decode(q, k, v) if tokens == 1 else cache.prefill(q, k, v))
        return [*outs, cache.k_core.clone(), cache.v_core.clone(), cache.lengths]

    anew, again = results(True), results(False)
    known = replay.KNOWN.values()
    assert replay.NEVER not in known and any(isinstance(x, replay.Replay) for x in known)
    for first, second in zip(anew, again, strict=True):
        assert torch.equal(first, second) and not first.isnan().any()
