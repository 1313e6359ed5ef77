"""Time one attention layer against its dense and sparse peers on the GPU at hand, and print one table.

    python benchmarks/attention_table.py --ctx 32768 131072 --json docs/data/attention.json

CCA's time includes its pooling. FlexAttention gets the same visibility over cores made beforehand, so its pooling is
not counted. Before CCA is timed, sampled rows of its output are held against float64. Medians of
`triton.testing.do_bench`, all systems on the same tensors in one run.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from cca_attention import CCASpec, Problem, cca_attention
from cca_attention.kernels import reference
from cca_attention.kernels.primitives import visible_pairs

Call = Callable[[Tensor, Tensor, Tensor], Tensor]
SAMPLED_ROWS = 32


def row_errors(q: Tensor, k: Tensor, v: Tensor, out: Tensor, spec: CCASpec) -> float:
    """Largest error of sampled rows of `out` against float64, relative to the largest entry of the row."""
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    for _ in range(SAMPLED_ROWS):
        batch, head, row = (int(torch.randint(n, (), generator=generator)) for n in q.shape[:3])
        kv_head = head * k.shape[1] // q.shape[1]
        pooled = spec.visible_cores(row)
        one = (slice(batch, batch + 1), slice(head, head + 1))
        kv = (slice(batch, batch + 1), slice(kv_head, kv_head + 1))
        past = slice(0, max(pooled * spec.group_size, 1))
        k_core, v_core = reference.pool(
            q[one][:, :, past], k[kv][:, :, past], v[kv][:, :, past], group_size=spec.group_size
        )
        local = slice(pooled * spec.group_size, row + 1)
        keys = torch.cat((k_core[0, 0, :pooled], k[kv][0, 0, local].double()))
        values = torch.cat((v_core[0, 0, :pooled], v[kv][0, 0, local].double()))
        scores = keys @ q[batch, head, row].double() * spec.softmax_scale(q.shape[3])
        expected = torch.softmax(scores, 0) @ values
        worst = max(worst, float((out[batch, head, row].double() - expected).abs().max() / expected.abs().max()))
    return worst


def dense(backend: SDPBackend) -> Call:
    """Full causal attention by one SDPA backend."""

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])

    return call


def flex(spec: CCASpec, tokens: int, cores: tuple[Tensor, Tensor]) -> Call:
    """FlexAttention over [cores; keys] with CCA's visibility."""
    groups, g, w = spec.num_groups(tokens), spec.group_size, spec.window_size

    def visible(b: Tensor, h: Tensor, row: Tensor, key: Tensor) -> Tensor:
        pooled = (row + 1 - w).clamp(min=0) // g
        token = key - groups
        return torch.where(key < groups, key < pooled, (token >= pooled * g) & (token <= row))

    mask = create_block_mask(visible, None, None, tokens, groups + tokens, device="cuda", _compile=True)
    compiled = torch.compile(flex_attention, dynamic=False)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = torch.cat((cores[0], k), 2), torch.cat((cores[1], v), 2)
        return compiled(q, keys, values, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])

    return call


def median_ms(call: Callable[[], Any]) -> float:
    """Median milliseconds of `call`, L2 cleared before each run."""
    return float(triton.testing.do_bench(call, warmup=50, rep=300, return_mode="median"))


def measure(name: str, call: Call, tensors: tuple[Tensor, ...], dout: Tensor) -> dict[str, Any]:
    """Forward, and forward and backward, in milliseconds; a system that cannot run says why."""
    q, k, v = tensors
    result: dict[str, Any] = {"system": name}
    try:
        with torch.no_grad():
            result["forward_ms"] = median_ms(lambda: call(q, k, v))
        leaves = [x.detach().requires_grad_() for x in tensors]
        result["forward_backward_ms"] = median_ms(lambda: torch.autograd.grad(call(*leaves), leaves, dout))
    except RuntimeError as error:  # not supported here, or out of memory: part of the result
        result["refused"] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    torch.cuda.empty_cache()
    return result


def rows_for(tokens: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """All systems at one context length."""
    spec = CCASpec(args.group_size, args.window_size)
    dtype = getattr(torch, args.dtype)
    torch.manual_seed(0)
    q, dout = (torch.randn(1, args.heads, tokens, args.head_dim, device="cuda", dtype=dtype) for _ in range(2))
    k, v = (torch.randn(1, args.kv_heads, tokens, args.head_dim, device="cuda", dtype=dtype) for _ in range(2))

    def cca(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return cca_attention(q, k, v, group_size=args.group_size, window_size=args.window_size, profile=args.profile)

    error = row_errors(q, k, v, cca(q, k, v), spec)
    budget = 4 * torch.finfo(dtype).eps
    if not error <= budget:
        raise SystemExit(
            f"CCA is wrong at {tokens} tokens: error {error:.2e} of the row's largest entry, {budget:.2e} allowed"
        )
    results = [measure("cca-attention", cca, (q, k, v), dout) | {"row_error": error}]
    systems = {"SDPA flash": SDPBackend.FLASH_ATTENTION, "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION}
    results += [measure(name, dense(backend), (q, k, v), dout) for name, backend in systems.items()]
    if args.heads == args.kv_heads:
        groups = torch.randn(2, 1, args.heads, spec.num_groups(tokens), args.head_dim, device="cuda", dtype=dtype)
        results.append(measure("FlexAttention, same mask", flex(spec, tokens, (groups[0], groups[1])), (q, k, v), dout))
    problem = Problem(
        q_heads=args.heads, kv_heads=args.kv_heads, seq_len=tokens, head_dim=args.head_dim, dtype=args.dtype,
        group_size=args.group_size, window_size=args.window_size,
    )  # fmt: skip
    flops = 4.0 * args.heads * args.head_dim * sum(visible_pairs(problem))
    for result in results:
        result |= {"ctx": tokens, "cca_flops_forward": flops}
    return results


def versions() -> dict[str, str]:
    """What the figures depend on."""
    return {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": str(torch.version.cuda),
        "cudnn": str(torch.backends.cudnn.version()),
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python", *sys.argv]),
    }


def show(results: list[dict[str, Any]], header: dict[str, str]) -> None:
    """Print the table; ratios are to cca-attention at the same length."""
    table = Table(title=", ".join(header[key] for key in ("device", "torch", "triton", "date")))
    for column in ("context", "system", "forward ms", "x CCA", "forward + backward ms", "x CCA"):
        table.add_column(column, justify="left" if column == "system" else "right")
    base: dict[str, Any] = {}
    for result in results:
        base = result if result["system"] == "cca-attention" else base
        cells = [str(result["ctx"]), result["system"]]
        for key in ("forward_ms", "forward_backward_ms"):
            known = key in result and key in base
            cells += [f"{result[key]:.2f}" if key in result else "refused"]
            cells += [f"{result[key] / base[key]:.2f}" if known else ""]
        table.add_row(*cells)
    Console(width=110).print(table)


def main() -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ctx", type=int, nargs="+", default=[32768, 131072])
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=32)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--group-size", type=int, default=16)
    parser.add_argument("--window-size", type=int, default=1024)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16"])
    parser.add_argument("--profile", default=None, help="profile whose configs cca-attention is launched with")
    parser.add_argument("--json", type=Path, default=None, help="also save the figures here")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("this script measures; it needs an NVIDIA GPU and found none")
    header = versions()
    results = [result for tokens in args.ctx for result in rows_for(tokens, args)]
    show(results, header)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"header": header, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
