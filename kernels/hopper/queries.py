"""Tiles of queries and the keys that they see, for Hopper: what `forward` and `backward_dq` share."""

from __future__ import annotations

from dataclasses import dataclass

import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ...spec import CCASpec
from ..primitives import key_of_tile, key_tiles, visibility
from .limits import HopperConfig
from .pipeline import COMPUTE_REGISTERS, FEEDER_REGISTERS, barriers, describe, item_of, multiprocessors, slot, turns

BLOCK_Q = gl.constexpr(128)
"""Queries of a tile: 64, the rows of one matrix instruction, for each of the two computing groups of warps."""

BUFFERS = gl.constexpr(2)
"""Tiles of queries in shared memory: the next one arrives, and the one before leaves, while one is computed."""

SPACE = {"block_k": (64, 128), "num_warps": (4,), "num_stages": (2, 3, 4)}


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyTilesConfig(HopperConfig):
    """Launch choices of a kernel that sweeps over keys: those of a tile; `num_stages` such tiles in flight."""

    block_k: int = 128


def set_up(
    q: Tensor, keys: tuple[Tensor, Tensor, Tensor, Tensor], spec: CCASpec, config: KeyTilesConfig
) -> tuple[tuple[int, int, int], list[TensorDescriptor], tuple[int, ...], dict[str, int]]:
    """(grid, descriptors of k, v, k_core and v_core, sizes, constants) of a launch over the queries `q`."""
    batch, q_heads, tokens, head_dim = q.shape
    items = triton.cdiv(tokens, BLOCK_Q.value) * q_heads * batch
    sizes = (tokens, q_heads, items, q_heads // keys[0].shape[1], q_heads // keys[2].shape[1])
    constants = {
        "GROUP_SIZE": spec.group_size,
        "WINDOW_SIZE": spec.window_size,
        "HEAD_DIM": head_dim,
        "BLOCK_K": config.block_k,
        "NUM_STAGES": config.num_stages,
        "FEEDER": FEEDER_REGISTERS,
        "COMPUTE": COMPUTE_REGISTERS,
        "num_warps": config.num_warps,
    }
    descriptors = [describe(x, config.block_k) for x in keys]
    return (min(multiprocessors(q.device), items), 1, 1), descriptors, sizes, constants


@gluon.jit
def locate(item, sizes):
    """(batch, head, first query) of a tile: neighbours share a head, and its longest rows come first."""
    seq_len, heads, _, _, _ = sizes
    tiles = gl.cdiv(seq_len, BLOCK_Q)
    column = item // tiles
    return column // heads, column % heads, (tiles - 1 - item % tiles) * BLOCK_Q


@gluon.jit
def tiles_of(first_q, sizes, GROUP_SIZE: gl.constexpr, WINDOW_SIZE: gl.constexpr, BLOCK_K: gl.constexpr):
    """`key_tiles` of a tile of queries, and how many there are: at the edges of what is seen, and in all."""
    tiles = key_tiles(first_q, gl.minimum(first_q + BLOCK_Q, sizes[0]), GROUP_SIZE, WINDOW_SIZE, BLOCK_K)
    core_full, core_edge, _, left, raw_full, right = tiles
    edges = core_edge + left + right
    return tiles, edges, edges + core_full + raw_full


@gluon.jit
def key_at(number, tiles, BLOCK_K: gl.constexpr):
    """(whether of cores, first key) of tile `number`: those at the edges first, then those every query sees whole."""
    core_full, core_edge, _, left, _, right = tiles
    edges = core_edge + left + right
    edge_is_core, edge_key = key_of_tile(number, core_edge, tiles, BLOCK_K, True)
    full_is_core, full_key = key_of_tile(number - edges, core_full, tiles, BLOCK_K, False)
    is_edge = number < edges
    return (is_edge & edge_is_core) | ((number >= edges) & full_is_core), gl.where(is_edge, edge_key, full_key)


@gluon.jit
def allocate_rows(desc, HEAD_DIM: gl.constexpr):
    """Shared memory for BUFFERS tiles' rows of one tensor, in halves."""
    return gl.allocate_shared_memory(desc.dtype, [2 * BUFFERS, 1, 1, BLOCK_Q // 2, HEAD_DIM], desc.layout)


@gluon.jit
def allocate_keys(k_desc, BLOCK_K: gl.constexpr, HEAD_DIM: gl.constexpr, NUM_STAGES: gl.constexpr):
    """Shared memory (k, v), and the barriers for when (rows, k, v) are ready and are free."""
    k = gl.allocate_shared_memory(k_desc.dtype, [NUM_STAGES, 1, 1, BLOCK_K, HEAD_DIM], k_desc.layout)
    v = gl.allocate_shared_memory(k_desc.dtype, [NUM_STAGES, 1, 1, BLOCK_K, HEAD_DIM], k_desc.layout)
    k_ready, k_free = barriers(NUM_STAGES, 1), barriers(NUM_STAGES, 2)
    v_ready, v_free = barriers(NUM_STAGES, 1), barriers(NUM_STAGES, 2)
    return (k, v), (barriers(2 * BUFFERS, 1), barriers(2 * BUFFERS, 1), k_ready, k_free, v_ready, v_free)


@gluon.jit
def feed(
    row_descs, key_descs, rows_smem, keys_smem, bars, sizes,
    GROUP_SIZE: gl.constexpr, WINDOW_SIZE: gl.constexpr, BLOCK_K: gl.constexpr, HEAD_DIM: gl.constexpr,
    NUM_STAGES: gl.constexpr,
):  # fmt: skip
    """The feeding warp: the rows of each tile of queries, then its keys and values in the order of `key_at`."""
    k_desc, v_desc, k_core_desc, v_core_desc = key_descs
    k_smem, v_smem = keys_smem
    rows_ready, rows_free, k_ready, k_free, v_ready, v_free = bars
    _, _, items, q_per_kv, q_per_core = sizes
    HALF: gl.constexpr = BLOCK_Q // 2
    count = 0
    for turn in range(turns(items)):
        batch, head, first_q = locate(item_of(turn), sizes)
        tiles, _, total = tiles_of(first_q, sizes, GROUP_SIZE, WINDOW_SIZE, BLOCK_K)
        buffer, parity = slot(turn, BUFFERS)
        for half in gl.static_range(2):
            place = 2 * buffer + half
            ready = rows_ready.index(place)
            row = [batch, head, first_q + half * HALF, 0]
            mbarrier.wait(rows_free.index(place), parity ^ 1)
            mbarrier.expect(ready, len(row_descs) * HALF * HEAD_DIM * 2)
            for i in gl.static_range(len(row_descs)):
                tma.async_copy_global_to_shared(row_descs[i], row, ready, rows_smem[i].index(place))
        for number in range(total):
            stage, parity = slot(count, NUM_STAGES)
            is_core, key = key_at(number, tiles, BLOCK_K)
            core_row = [batch, head // q_per_core, key, 0]
            row = [batch, head // q_per_kv, key, 0]
            ready = k_ready.index(stage)
            mbarrier.wait(k_free.index(stage), parity ^ 1)
            mbarrier.expect(ready, BLOCK_K * HEAD_DIM * 2)
            tma.async_copy_global_to_shared(k_core_desc, core_row, ready, k_smem.index(stage), pred=is_core)
            tma.async_copy_global_to_shared(k_desc, row, ready, k_smem.index(stage), pred=is_core == 0)
            ready = v_ready.index(stage)
            mbarrier.wait(v_free.index(stage), parity ^ 1)
            mbarrier.expect(ready, BLOCK_K * HEAD_DIM * 2)
            tma.async_copy_global_to_shared(v_core_desc, core_row, ready, v_smem.index(stage), pred=is_core)
            tma.async_copy_global_to_shared(v_desc, row, ready, v_smem.index(stage), pred=is_core == 0)
            count += 1


@gluon.jit
def visible(
    offs_q, is_core, key, GROUP_SIZE: gl.constexpr, WINDOW_SIZE: gl.constexpr, BLOCK_K: gl.constexpr,
    SCORES: gl.constexpr,
):  # fmt: skip
    """Which of the queries `offs_q` [Q] sees which of the BLOCK_K keys from `key` on [Q, K]."""
    offs = key + gl.arange(0, BLOCK_K, layout=gl.SliceLayout(0, SCORES))
    return visibility(offs_q, offs, 0, is_core, GROUP_SIZE, WINDOW_SIZE)[1]
