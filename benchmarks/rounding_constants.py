"""Measure the rounding of the GPU at hand that the bounds of T1 assume (docs/verification.md, "Constants of a GPU").

    python benchmarks/rounding_constants.py --json docs/data/rounding-h200.json

Two constants come from hardware: how exact the base-2 exponential is (`EXP_ULPS` units of roundoff), and how exactly a
matrix product adds up (`Precision.dot`, in units of roundoff for each term of the sum of magnitudes). The script exits
with 1 if the GPU needs more than the bounds grant.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
import triton
import triton.language as tl
from rich.console import Console
from torch import Tensor

from cca_attention.verify.provenance import gpu_name, versions
from cca_attention.verify.rounding import EXP_ULPS, ROUNDOFF, Precision

UNIT = ROUNDOFF[torch.float32]
TERMS = (16, 64, 256, 1024, 4096)


@triton.jit
def exp2_kernel(x_ptr, out_ptr, size, BLOCK: tl.constexpr):
    """Write 2^x."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < size, other=0.0)
    tl.store(out_ptr + offs, tl.exp2(x), mask=offs < size)


@triton.jit
def dot_kernel(a_ptr, b_ptr, out_ptr, terms, TILE: tl.constexpr, BLOCK_K: tl.constexpr):
    """Write a [TILE, terms] @ b [terms, TILE], added up in tiles of BLOCK_K terms as the attention kernels do."""
    rows, columns = tl.arange(0, TILE)[:, None], tl.arange(0, TILE)[None, :]
    acc = tl.zeros([TILE, TILE], tl.float32)
    for start in range(0, terms, BLOCK_K):
        a = tl.load(a_ptr + rows * terms + start + tl.arange(0, BLOCK_K)[None, :])
        b = tl.load(b_ptr + (start + tl.arange(0, BLOCK_K)[:, None]) * TILE + columns)
        acc = tl.dot(a, b, acc, input_precision="ieee")
    tl.store(out_ptr + rows * TILE + columns, acc)


def exponential_error(device: str, samples: int) -> float:
    """Largest relative error of `tl.exp2`, in units of roundoff, over arguments whose result is a normal number."""
    generator = torch.Generator(device).manual_seed(0)
    worst = 0.0
    for exponent in range(-24, 7):
        x = -(1 + torch.rand(samples, generator=generator, device=device)) * 2.0**exponent
        x = x[x >= -126]
        out = torch.empty_like(x)
        exp2_kernel[(triton.cdiv(x.numel(), 1024),)](x, out, x.numel(), BLOCK=1024)
        exact = torch.exp2(x.double())
        worst = max(worst, float(((out.double() - exact).abs() / exact).max()) / UNIT)
    return worst


def _factors(terms: int, dtype: torch.dtype, device: str, positive: bool) -> tuple[Tensor, Tensor]:
    generator = torch.Generator(device).manual_seed(terms)
    shapes = (64, terms), (terms, 64)
    a, b = (torch.randn(shape, generator=generator, device=device) for shape in shapes)
    return (a.abs().to(dtype), b.abs().to(dtype)) if positive else (a.to(dtype), b.to(dtype))


def product_error(dtype: torch.dtype, device: str) -> float:
    """Largest share of `Precision.dot` that a product of normal numbers, or of their magnitudes, uses."""
    worst = 0.0
    for terms in TERMS:
        for positive in (False, True):
            a, b = _factors(terms, dtype, device, positive)
            out = torch.empty(64, 64, device=device)
            dot_kernel[(1,)](a, b, out, terms, TILE=64, BLOCK_K=16 if terms == 16 else 64)
            exact, magnitude = a.double() @ b.double(), a.double().abs() @ b.double().abs()
            error = (out.double() - exact).abs() / magnitude
            worst = max(worst, float(error.max()) / Precision.of(dtype).dot(terms))
    return worst


def main() -> int:
    """Measure, print, save; 0 if the bounds hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=None, help="also save the figures here")
    parser.add_argument("--samples", type=int, default=1 << 22, help="arguments of each power of two")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("this script measures; it needs an NVIDIA GPU and found none")
    ulps = exponential_error("cuda", args.samples)
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    shares = {str(dtype).removeprefix("torch."): product_error(dtype, "cuda") for dtype in dtypes}
    console = Console(highlight=False)
    console.print(f"exp2: {ulps:.2f} units of roundoff, {EXP_ULPS:g} allowed")
    for name, share in shares.items():
        console.print(f"matrix product, {name}: {share:.3f} of what is allowed")
    if args.json:
        found = {"gpu": gpu_name(), "versions": versions(), "exp2_ulps": ulps, "product_shares": shares}
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    return int(ulps > EXP_ULPS or max(shares.values()) > 1)


if __name__ == "__main__":
    sys.exit(main())
