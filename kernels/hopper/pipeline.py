"""What the kernels for Hopper share: tensor descriptors, and rings of tiles between feeding and computing warps."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

DTYPES = {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16}
FEEDER_REGISTERS, COMPUTE_REGISTERS = 24, 240


def describe(x: Tensor, rows: int) -> TensorDescriptor:
    """A TMA descriptor of `x` (B, H, T, D) for tiles of `rows` rows of one head; rows past the end read as zero."""
    block = [1, 1, rows, x.shape[3]]
    layout = gl.NVMMASharedLayout.get_default_for(block, DTYPES[x.dtype])
    return TensorDescriptor(x, list(x.shape), list(x.stride()), block, layout)


@lru_cache
def multiprocessors(device: torch.device) -> int:
    """Of the GPU; 132, an H100's, for the meta device."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


@gluon.jit
def barriers(NUM: gl.constexpr, ARRIVALS: gl.constexpr):
    """NUM barriers in shared memory, each of which completes after so many arrivals."""
    found = gl.allocate_shared_memory(gl.int64, [NUM, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(NUM):
        mbarrier.init(found.index(i), count=ARRIVALS)
    return found


@gluon.jit
def slot(count, NUM: gl.constexpr):
    """(place in a ring of NUM, parity of the turn) of the tile number `count`."""
    return count % NUM, (count // NUM) & 1


@gluon.jit
def turns(items):
    """How many of the items this program takes; `item_of` says which."""
    whole = items // gl.num_programs(0)
    return whole + gl.where(item_of(whole) < items, 1, 0)


@gluon.jit
def item_of(turn):
    """The item of a turn: the programs take one each, in alternating order, so that falling sizes add up evenly."""
    place = gl.program_id(0)
    return turn * gl.num_programs(0) + gl.where(turn % 2 == 1, gl.num_programs(0) - 1 - place, place)


@gluon.jit
def pack(wide, DTYPE: gl.constexpr):
    """`wide` [M, K] float32 as pairs of DTYPE in words [M, K / 2]: pairs that a loop carries cost no instruction."""
    even, odd = gl.split(wide.reshape([wide.shape[0], wide.shape[1] // 2, 2]))
    NAME: gl.constexpr = "bf16" if gl.bfloat16 == DTYPE else "f16"
    ASM: gl.constexpr = "cvt.rn." + NAME + "x2.f32 $0, $2, $1;"
    return gl.inline_asm_elementwise(ASM, "=r,f,f", [even, odd], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def settle(packed):
    """A copy of `packed`, made when no product reads what was packed before: else the assembler waits for each."""
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [packed], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def rescaled(sums, factor):
    """`sums` [M, N] times `factor` [M, 1]; rows whose factor is 1, most of them, cost no multiplication."""
    ASM: gl.constexpr = "{ .reg .pred p; setp.neu.f32 p, $2, 0f3F800000; mov.f32 $0, $1; @p mul.f32 $0, $1, $2; }"
    return gl.inline_asm_elementwise(ASM, "=f,f,f", [sums, factor], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def unpack(packed, DTYPE: gl.constexpr, SUMS: gl.constexpr):
    """What `pack` packed as the first operand of a product whose sums have the layout SUMS."""
    low = packed.to(gl.int16).to(DTYPE, bitcast=True)
    high = (packed >> 16).to(gl.int16).to(DTYPE, bitcast=True)
    whole = gl.join(low, high).reshape([packed.shape[0], packed.shape[1] * 2])
    return gl.convert_layout(whole, gl.DotOperandLayout(0, SUMS, 2))
