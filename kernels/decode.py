"""Decode: a few new tokens against the cached core tokens and the ring of recent raw tokens (spec section 6).

A step is two launches. The programs of `decode_kernel` share out the visible keys, store the new keys and values in the
ring, and pool the groups that they complete; `decode_merge_kernel` joins the shares in a fixed order and advances the
counter. What is visible follows from the device's counter `seen` alone, so that a step can be captured in a CUDA
graph. Position p lies in the ring at ``p % RING_SIZE``. Tokens from position `max_tokens` on are not stored, and their
output is NaN.

No program waits for another: new tokens are read where the caller put them, and a step is of at most `window_size`
tokens, so that none of them sees a group that the step completes. With EARLY each launch may begin before the one
ahead of it has ended, and waits for that before it reads or writes anything (programmatic dependent launch): 1 lets
the merge begin once every share has gone through its keys, 2 as soon as all shares run.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.runtime import driver

from ..problem import Problem
from ..spec import CCASpec
from .enqueue import enqueue
from .primitives import attend, first_local, load_rows, mean_query, offset, scale_log2, store_rows, visible_cores
from .tunable import INTERPRETED, Config, Tunable, Work, accumulator_dtype, draw, padded_dim, smallest_block_refusal

MAX_ROWS = 64
"""The most rows of one tile: query heads of a key/value head times new tokens."""
UNBOUNDED = 2**31 - 1
"""`max_tokens` of storage that its owner grows before it is full."""
FEW_PROGRAMS = 512
"""Up to so many shares the merge's programs find room beside them; more would wait for each other (EARLY)."""
POOL_TILE = tl.constexpr(16)
"""The most tokens of a group that are pooled at once."""
MERGE_TILE = tl.constexpr(8192)
"""Elements of the shares' results that are joined at once."""


@triton.jit
def load_tokens(pointers, tokens, mask, seen, RING_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows [N, BLOCK_D] of one head at positions `tokens` [N]: before `seen` from the ring, else from the new ones.

    `pointers`: the head's ring, its stride, the head's new tokens, their stride.
    """
    ring, ring_stride, new, new_stride = pointers
    offs_d = tl.arange(0, BLOCK_D)[None, :]
    slots = (tokens % RING_SIZE).to(tl.int64)[:, None] * ring_stride
    rows = (tokens - seen).to(tl.int64)[:, None] * new_stride
    old = load_rows(ring + slots + offs_d, mask & (tokens < seen), HEAD_DIM, BLOCK_D, True)
    fresh = load_rows(new + rows + offs_d, mask & (tokens >= seen), HEAD_DIM, BLOCK_D, True)
    return tl.where((tokens < seen)[:, None], old, fresh)


# fmt: off
@triton.jit
def append(
    q_ptr, k_core_ptr, v_core_ptr, q_strides, core_strides, k_tokens, v_tokens,
    part, core_head, batch, seen, end,
    NUM_NEW: tl.constexpr, RING_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    GROUP_SIZE: tl.constexpr, MEAN: tl.constexpr, SCALE_LOG2: tl.constexpr,
    Q_PER_CORE: tl.constexpr, CORES_PER_KV: tl.constexpr,
):
    # fmt: on
    """Pool group number `part` of those that this step may complete; one program of each key/value head fills the ring.

    The ring slots that are written held tokens older than all that are pooled or visible: programs do not meet.
    """
    offs_d = tl.arange(0, BLOCK_D)[None, :]
    if (part == 0) & (core_head % CORES_PER_KV == 0):
        index = tl.arange(0, triton.next_power_of_2(NUM_NEW))
        kept = (index < NUM_NEW) & (seen + index < end)
        k = load_tokens(k_tokens, seen + index, kept, seen, RING_SIZE, HEAD_DIM, BLOCK_D)
        v = load_tokens(v_tokens, seen + index, kept, seen, RING_SIZE, HEAD_DIM, BLOCK_D)
        slots = ((seen + index) % RING_SIZE).to(tl.int64)[:, None]
        store_rows(k_tokens[0] + slots * k_tokens[1] + offs_d, k, kept, HEAD_DIM, BLOCK_D)
        store_rows(v_tokens[0] + slots * v_tokens[1] + offs_d, v, kept, HEAD_DIM, BLOCK_D)

    core = seen // GROUP_SIZE + part
    if (core + 1) * GROUP_SIZE <= end:
        one = tl.zeros([1], tl.int32)
        last = one + ((core + 1) * GROUP_SIZE - 1 - seen)
        q = mean_query(q_ptr, q_strides, batch, core_head * Q_PER_CORE, Q_PER_CORE, last, one == 0, HEAD_DIM, BLOCK_D)
        k_core, v_core = tl.zeros_like(q), tl.zeros_like(q)
        row_max, row_sum = tl.full([1], -float("inf"), q.dtype), tl.zeros([1], q.dtype)
        BLOCK_T: tl.constexpr = min(POOL_TILE, triton.next_power_of_2(GROUP_SIZE))
        for start in range(0, GROUP_SIZE, BLOCK_T):
            offs_t = start + tl.arange(0, BLOCK_T)
            inside = offs_t < GROUP_SIZE
            tokens = core * GROUP_SIZE + offs_t
            k = load_tokens(k_tokens, tokens, inside, seen, RING_SIZE, HEAD_DIM, BLOCK_D).to(q.dtype)
            v = load_tokens(v_tokens, tokens, inside, seen, RING_SIZE, HEAD_DIM, BLOCK_D).to(q.dtype)
            scores = tl.zeros([BLOCK_T], q.dtype) if MEAN else tl.sum(k * q, axis=1) * SCALE_LOG2
            new_max = tl.maximum(row_max, tl.max(tl.where(inside, scores, -float("inf")), axis=0))
            weights = tl.where(inside, tl.exp2(scores - new_max), 0.0)
            rescale = tl.exp2(row_max - new_max)
            row_sum = row_sum * rescale + tl.sum(weights, axis=0)
            k_core = k_core * rescale[:, None] + tl.sum(weights[:, None] * k, axis=0)[None, :]
            v_core = v_core * rescale[:, None] + tl.sum(weights[:, None] * v, axis=0)[None, :]
            row_max = new_max
        core_offs = offset((batch, core_head, core), core_strides) + offs_d
        store_rows(k_core_ptr + core_offs, k_core / row_sum[:, None], one == 0, HEAD_DIM, BLOCK_D)
        store_rows(v_core_ptr + core_offs, v_core / row_sum[:, None], one == 0, HEAD_DIM, BLOCK_D)


# fmt: off
@triton.jit
def attend_share(
    q_ptr, k_core_ptr, v_core_ptr, acc_ptr, stats_ptr, q_strides, core_at, core_stride, k_tokens, v_tokens,
    split, core_head, batch, seen, sizes,
    Q_PER_CORE: tl.constexpr, Q_PER_KV: tl.constexpr, NUM_NEW: tl.constexpr, RING_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, GROUP_SIZE: tl.constexpr, WINDOW_SIZE: tl.constexpr,
    SCALE_LOG2: tl.constexpr, SPLITS_CORE: tl.constexpr, SPLITS_RAW: tl.constexpr, BLOCK_K: tl.constexpr,
    EARLY: tl.constexpr,
):
    # fmt: on
    """One share of the cores of a core head, or of the raw tokens of a key/value head: its first core head's program.

    Shares are of tiles, dealt out in turn; the last program has the new tokens too, which are not in the ring yet. A
    row of the tile of queries is one new token of one query head that reads these keys. A row that sees none of them
    has the sum 0, that of a token past `max_tokens` the sum NaN.
    """
    q_heads, max_tokens = sizes
    is_core = split < SPLITS_CORE
    BLOCK_Q: tl.constexpr = max(16, triton.next_power_of_2(Q_PER_KV * NUM_NEW))
    rows, offs_d = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_D)[None, :]
    head, index = core_head * Q_PER_CORE + rows // NUM_NEW, rows % NUM_NEW
    mask_q = rows < tl.where(is_core, Q_PER_CORE, Q_PER_KV) * NUM_NEW
    q = load_rows(q_ptr + offset((batch, head, index), q_strides)[:, None] + offs_d, mask_q, HEAD_DIM, BLOCK_D, True)
    position = seen + index
    first_key = tl.where(is_core, 0, first_local(position, GROUP_SIZE, WINDOW_SIZE))
    end_key = tl.where(is_core, visible_cores(position, GROUP_SIZE, WINDOW_SIZE), position + 1)
    end_of_new = tl.minimum(seen + NUM_NEW, max_tokens)
    oldest = tl.where(is_core, 0, first_local(seen, GROUP_SIZE, WINDOW_SIZE))
    newest = tl.where(is_core, visible_cores(end_of_new - 1, GROUP_SIZE, WINDOW_SIZE), seen)
    first = oldest + tl.where(is_core, split, split - SPLITS_CORE) * BLOCK_K
    step = tl.where(is_core, SPLITS_CORE, SPLITS_RAW) * BLOCK_K
    k_head = tl.where(is_core, k_core_ptr + core_at, k_tokens[0])
    v_head = tl.where(is_core, v_core_ptr + core_at, v_tokens[0])
    key_stride = tl.where(is_core, tl.zeros((), tl.int64) + core_stride, tl.zeros((), tl.int64) + k_tokens[1])

    wide = acc_ptr.dtype.element_ty
    acc = tl.zeros([BLOCK_Q, BLOCK_D], wide)
    row_max, row_sum = tl.full([BLOCK_Q], -float("inf"), wide), tl.zeros([BLOCK_Q], wide)
    if split == SPLITS_CORE + SPLITS_RAW - 1:
        keys = seen + tl.arange(0, max(16, triton.next_power_of_2(NUM_NEW)))
        k = load_tokens(k_tokens, keys, keys < end_of_new, seen, RING_SIZE, HEAD_DIM, BLOCK_D)
        v = load_tokens(v_tokens, keys, keys < end_of_new, seen, RING_SIZE, HEAD_DIM, BLOCK_D)
        last_key = tl.minimum(end_key, end_of_new)
        visible = (keys[None, :] >= first_key[:, None]) & (keys[None, :] < last_key[:, None])
        acc, row_max, row_sum = attend(q, k, v, visible, acc, row_max, row_sum, SCALE_LOG2, True)
    for start in range(first, newest, step):
        keys = start + tl.arange(0, BLOCK_K)
        slots = tl.where(is_core, keys, keys % RING_SIZE)
        key_offs = slots.to(tl.int64)[:, None] * key_stride + offs_d
        k = load_rows(k_head + key_offs, keys < newest, HEAD_DIM, BLOCK_D, True)
        v = load_rows(v_head + key_offs, keys < newest, HEAD_DIM, BLOCK_D, True)
        visible = (keys[None, :] >= first_key[:, None]) & (keys[None, :] < tl.minimum(end_key, newest)[:, None])
        acc, row_max, row_sum = attend(q, k, v, visible, acc, row_max, row_sum, SCALE_LOG2, True)
    if EARLY == 1:
        gdc_launch_dependents()
    row_sum = tl.where(position < max_tokens, row_sum, float("nan"))
    part = ((batch.to(tl.int64) * q_heads + head) * NUM_NEW + index) * (SPLITS_CORE + SPLITS_RAW) + split
    store_rows(acc_ptr + part[:, None] * HEAD_DIM + offs_d, acc, mask_q, HEAD_DIM, BLOCK_D)
    tl.store(stats_ptr + 2 * part, row_max, mask=mask_q)
    tl.store(stats_ptr + 2 * part + 1, row_sum, mask=mask_q)


# fmt: off
@triton.jit
def decode_kernel(
    q_ptr, k_ptr, v_ptr, k_core_ptr, v_core_ptr, k_raw_ptr, v_raw_ptr, seen_ptr, acc_ptr, stats_ptr,
    q_strides, k_strides, v_strides, core_strides, raw_strides,
    sizes,
    Q_PER_CORE: tl.constexpr, CORES_PER_KV: tl.constexpr, NUM_NEW: tl.constexpr, RING_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, GROUP_SIZE: tl.constexpr, WINDOW_SIZE: tl.constexpr,
    MEAN: tl.constexpr, SCALE_LOG2: tl.constexpr, SPLITS_CORE: tl.constexpr, SPLITS_RAW: tl.constexpr,
    BLOCK_K: tl.constexpr, EARLY: tl.constexpr,
):
    # fmt: on
    """The programs 0 .. SPLITS - 1 of a core head attend to a share of the keys each, the others append.

    The raw tokens are for the first core head of each key/value head. Heads come first in the grid, so that those that
    append start last: where there are more programs than processors, it is these that share one.
    """
    if EARLY:
        gdc_wait()
        if EARLY == 2:
            gdc_launch_dependents()
    core_head, part, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    SPLITS: tl.constexpr = SPLITS_CORE + SPLITS_RAW
    if (part >= SPLITS_CORE) & (part < SPLITS) & (core_head % CORES_PER_KV != 0):
        return
    kv_head = core_head // CORES_PER_KV
    core_at, raw_at = offset((batch, core_head), core_strides), offset((batch, kv_head), raw_strides)
    k_new, v_new = k_ptr + offset((batch, kv_head), k_strides), v_ptr + offset((batch, kv_head), v_strides)
    k_tokens = (k_raw_ptr + raw_at, raw_strides[2], k_new, k_strides[2])
    v_tokens = (v_raw_ptr + raw_at, raw_strides[2], v_new, v_strides[2])
    seen = tl.load(seen_ptr + batch)
    if part >= SPLITS:
        append(
            q_ptr, k_core_ptr, v_core_ptr, q_strides, core_strides, k_tokens, v_tokens, part - SPLITS, core_head,
            batch, seen, tl.minimum(seen + NUM_NEW, sizes[1]), NUM_NEW, RING_SIZE, HEAD_DIM, BLOCK_D, GROUP_SIZE, MEAN,
            SCALE_LOG2, Q_PER_CORE, CORES_PER_KV,
        )  # fmt: skip
    else:
        attend_share(
            q_ptr, k_core_ptr, v_core_ptr, acc_ptr, stats_ptr, q_strides, core_at, core_strides[2], k_tokens, v_tokens,
            part, core_head, batch, seen, sizes, Q_PER_CORE, Q_PER_CORE * CORES_PER_KV, NUM_NEW, RING_SIZE,
            HEAD_DIM, BLOCK_D, GROUP_SIZE, WINDOW_SIZE, SCALE_LOG2, SPLITS_CORE, SPLITS_RAW, BLOCK_K, EARLY,
        )  # fmt: skip


# fmt: off
@triton.jit
def decode_merge_kernel(
    acc_ptr, stats_ptr, out_ptr, seen_ptr, next_seen_ptr, out_strides, max_tokens,
    NUM_NEW: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, SPLITS: tl.constexpr, EARLY: tl.constexpr,
):
    # fmt: on
    """Join the shares of one query head and new token; the first program of a row counts the new tokens.

    Every row saw at least its own key, so its overall maximum is finite unless the inputs were not.
    """
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()  # not before: the next step's programs would crowd onto the processors that were free
    row, batch = tl.program_id(0), tl.program_id(1)
    first = (batch.to(tl.int64) * tl.num_programs(0) + row) * SPLITS
    BLOCK_S: tl.constexpr = min(triton.next_power_of_2(SPLITS), MERGE_TILE // BLOCK_D)
    offs_d = tl.arange(0, BLOCK_D)[None, :]
    one = tl.zeros([1], tl.int32) == 0
    wide = acc_ptr.dtype.element_ty
    acc = tl.zeros([1, BLOCK_D], wide)
    row_max, row_sum = tl.full([1], -float("inf"), wide), tl.zeros([1], wide)
    for start in range(0, SPLITS, BLOCK_S):
        offs = start + tl.arange(0, BLOCK_S)
        part, inside = first + offs, offs < SPLITS
        tops = tl.load(stats_ptr + 2 * part, mask=inside, other=-float("inf"))
        sums = tl.load(stats_ptr + 2 * part + 1, mask=inside, other=0.0)
        partial = load_rows(acc_ptr + part[:, None] * HEAD_DIM + offs_d, inside, HEAD_DIM, BLOCK_D, True)
        new_max = tl.maximum(row_max, tl.max(tops, axis=0))
        # no share so far had a key of this row: -inf - -inf is NaN
        pivot = tl.where(new_max == -float("inf"), 0.0, new_max)
        weights = tl.exp2(tops - pivot)
        rescale = tl.exp2(row_max - pivot)
        row_sum = row_sum * rescale + tl.sum(weights * sums, axis=0)
        acc = acc * rescale[:, None] + tl.sum(weights[:, None] * partial, axis=0)[None, :]
        row_max = new_max
    out_at = offset((batch, row // NUM_NEW, row % NUM_NEW), out_strides) + offs_d
    store_rows(out_ptr + out_at, acc / row_sum[:, None], one, HEAD_DIM, BLOCK_D)
    if row == 0:
        tl.store(next_seen_ptr + batch, tl.minimum(tl.load(seen_ptr + batch) + NUM_NEW, max_tokens))


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeConfig(Config):
    """Launch choices of `decode_kernel`: keys of a tile, and programs that share the keys of each segment."""

    block_k: int = 64
    splits_core: int = 8
    splits_raw: int = 4

    def refusal(self, problem: Problem) -> str | None:
        """Why this config cannot run `problem`, or None."""
        return smallest_block_refusal(self, problem)

    def launch_args(self) -> dict[str, int]:
        """Keyword arguments of the launch: all but Triton's own upper-cased to their constexpr names."""
        names = [field.name for field in fields(self)]
        return {name if name.startswith("num_") else name.upper(): getattr(self, name) for name in names}


SPACE = {
    "block_k": (32, 64, 128),
    "splits_core": (4, 8, 14, 20, 32, 64),
    "splits_raw": (1, 2, 4, 8),
    "num_warps": (2, 4, 8),
    "num_stages": (1, 2, 3, 4),
}


def default_config(problem: Problem, arch: str) -> DecodeConfig:
    """A config that runs `problem` on every supported GPU.

    It does not depend on the batch, so that a row's bits do not either: the cores of a row alone are worth about 160
    programs, and a program of raw tokens has about as many keys as one of cores, at `seq_len` tokens. A tile of keys
    takes at most 16 KiB. Two warps do for 16-bit tiles of few queries; with all query heads' cores four are as fast.
    The interpreter runs one program at a time.
    """
    if arch == "cpu":
        return DecodeConfig(block_k=32, splits_core=2, splits_raw=1)
    nvidia, few_queries = arch.startswith("sm_"), problem.q_heads <= 16 * problem.kv_heads
    splits_core = min(64, max(8, 160 // problem.num_core_heads))
    share = max(1, problem.spec.visible_cores(problem.seq_len) // splits_core)
    return DecodeConfig(
        block_k=max(16, min(64, 2**14 // (padded_dim(problem.head_dim) * problem.element_bytes))),
        splits_core=splits_core,
        splits_raw=min(8, max(2, round(problem.spec.max_local_tokens() / share))),
        num_warps=2 if nvidia and few_queries and problem.core_heads == "kv" and problem.element_bytes == 2 else 4,
        num_stages=3 if nvidia else 2,
    )


def launch_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    k_core: Tensor,
    v_core: Tensor,
    k_raw: Tensor,
    v_raw: Tensor,
    seen: Tensor,
    next_seen: Tensor,
    *,
    spec: CCASpec,
    config: DecodeConfig,
    max_tokens: int,
) -> None:
    """Append n new tokens to a row's state and fill `out` with what they see, in steps of at most w tokens.

    Args:
        q, out: (B, Hq, n, D); k, v: (B, Hkv, n, D); any strides, last one 1.
        k_core, v_core: (B, Hc, C, D) with the same strides, room for the groups that the step completes.
        k_raw, v_raw: (B, Hkv, W, D) with the same strides, W >= w + g - 2 + n; position p lies at ``p % W``.
        seen: (B,) int32, tokens that each row held before. next_seen: (B,) int32, filled with what it holds then;
            may be `seen` itself.
        max_tokens: tokens that the cores have room for; further ones are not stored and their output is NaN.
    """
    _check_launch(q, k, k_core, v_core, k_raw, v_raw, spec)
    for first in range(0, q.shape[2], spec.window_size):
        new = tuple(x[:, :, first : first + spec.window_size] for x in (q, k, v, out))
        state = (k_core, v_core, k_raw, v_raw, next_seen if first else seen, next_seen)
        _launch_step(new + state, spec, config, max_tokens)


def _launch_step(tensors: tuple[Tensor, ...], spec: CCASpec, config: DecodeConfig, max_tokens: int) -> None:
    """One step, of at most w tokens; `tensors` are those that `launch_decode` takes."""
    q, k, v, out, k_core, v_core, k_raw, v_raw, seen, next_seen = tensors
    batch, q_heads, new, head_dim = q.shape
    kv_heads, core_heads, splits = k.shape[1], k_core.shape[1], config.splits_core + config.splits_raw
    acc = q.new_empty(batch, q_heads, new, splits, head_dim, dtype=accumulator_dtype(q.dtype))
    stats = acc.new_empty(batch, q_heads, new, splits, 2)
    early = 0
    if _can_start_early():
        early = 2 if batch * core_heads * splits <= FEW_PROGRAMS else 1
    sizes = {"NUM_NEW": new, "HEAD_DIM": head_dim, "BLOCK_D": padded_dim(head_dim), "EARLY": early}
    if early:
        sizes["launch_pdl"] = True
    enqueue(
        decode_kernel, (core_heads, triton.cdiv(new, spec.group_size) + splits, batch),
        q, k, v, k_core, v_core, k_raw, v_raw, seen, acc, stats,
        q.stride(), k.stride(), v.stride(), k_core.stride(), k_raw.stride(),
        (q_heads, max_tokens),
        Q_PER_CORE=q_heads // core_heads, CORES_PER_KV=core_heads // kv_heads, RING_SIZE=k_raw.shape[2],
        GROUP_SIZE=spec.group_size, WINDOW_SIZE=spec.window_size, MEAN=spec.pooling == "mean",
        SCALE_LOG2=scale_log2(spec, head_dim), **sizes, **config.launch_args(),
    )  # fmt: skip
    enqueue(
        decode_merge_kernel, (q_heads * new, batch, 1),
        acc, stats, out, seen, next_seen, out.stride(), max_tokens, SPLITS=splits, **sizes,
    )  # fmt: skip


def _can_start_early() -> bool:
    """Whether the GPU launched on, or compiled for, has programmatic dependent launch (compute capability 9.0)."""
    if INTERPRETED:
        return False
    target = driver.active.get_current_target()
    return bool(target.backend == "cuda" and target.arch >= 90)


def _check_launch(
    q: Tensor, k: Tensor, k_core: Tensor, v_core: Tensor, k_raw: Tensor, v_raw: Tensor, spec: CCASpec
) -> None:
    """Raise unless the kernels can rely on what they rely on."""
    new, ring = q.shape[2], k_raw.shape[2]
    if k_core.stride() != v_core.stride() or k_raw.stride() != v_raw.stride():
        raise ValueError("k_core and v_core, and k_raw and v_raw, must share their strides")
    if ring < spec.max_local_tokens() - 1 + new or q.shape[1] // k.shape[1] * new > MAX_ROWS:
        raise ValueError(f"{new} new tokens are too many for a ring of {ring} or for {MAX_ROWS} rows a tile")


def work(problem: Problem, config: Config) -> Work:
    """Each visible key and value read once; the new tokens, the split results and the output are small beside them."""
    b, t, d = problem.batch, problem.seq_len, problem.head_dim
    cores, raw = problem.spec.visible_cores(t), len(problem.spec.local_range(t))
    rows = 2 * (problem.num_core_heads * cores + problem.kv_heads * raw) + 2 * (problem.q_heads + problem.kv_heads)
    pairs = float(b * problem.q_heads * (cores + raw))
    return Work(flops=4.0 * pairs * d, bytes=float(b * rows * d * problem.element_bytes), exp2=pairs)


def allocate(problem: Problem, device: torch.device, generator: torch.Generator | None) -> dict[str, Tensor]:
    """A state of `seq_len` tokens and one new token, all at random; out and next_seen empty."""
    b, t, d = problem.batch, problem.seq_len, problem.head_dim
    cores = (b, problem.num_core_heads, problem.spec.num_groups(t + 1), d)
    ring = (b, problem.kv_heads, problem.spec.max_local_tokens(), d)
    new = {"q": (b, problem.q_heads, 1, d), "k": (b, problem.kv_heads, 1, d), "v": (b, problem.kv_heads, 1, d)}
    state = {"k_core": cores, "v_core": cores, "k_raw": ring, "v_raw": ring}
    tensors = draw(new | state, problem, device, generator)
    seen = torch.full((b,), t, dtype=torch.int32, device=device)
    return tensors | {"out": torch.empty_like(tensors["q"]), "seen": seen, "next_seen": torch.empty_like(seen)}


def launch(problem: Problem, tensors: dict[str, Tensor], config: DecodeConfig) -> None:
    """One step on what `allocate` made; `seen` stays as it was, so that every launch does the same."""
    launch_decode(**tensors, spec=problem.spec, config=config, max_tokens=UNBOUNDED)


DECODE = Tunable(
    name="decode",
    config=DecodeConfig,
    space=SPACE,
    default=default_config,
    allocate=allocate,
    launch=launch,
    work=work,
    kernels=(decode_kernel, decode_merge_kernel),
)
