"""What a case must do at least, in closed form: useful operations, bytes that must move, memory that must be held."""

from __future__ import annotations

from ..kernels.primitives import visible_pairs
from ..problem import Problem
from .plan import BOTH, DECODE, FORWARD, MEMORY, POOLING, UNORDERED

PRODUCTS = {FORWARD: 2, BOTH: 7, UNORDERED: 7, MEMORY: 7}
"""Matrix products of each visible pair: scores and output; with gradients five more, however often they are redone."""


def step_keys(problem: Problem) -> int:
    """Keys that the token after `seq_len` others sees under CCA, itself included."""
    position = problem.seq_len
    return problem.spec.visible_cores(position) + len(problem.spec.local_range(position))


def flops(what: str, problem: Problem, *, dense: bool = False, keys: int | None = None) -> float:
    """Multiply-adds of what is asked for, counted twice, over visible pairs only."""
    per_pair = 2.0 * problem.batch * problem.q_heads * problem.head_dim
    if what == DECODE:
        return 2 * per_pair * (step_keys(problem) if keys is None else keys)
    if what == POOLING:  # scores, core keys, core values
        tokens = problem.spec.num_groups(problem.seq_len) * problem.group_size
        return 6.0 * problem.batch * problem.num_core_heads * tokens * problem.head_dim
    t = problem.seq_len
    return PRODUCTS[what] * per_pair * (t * (t + 1) / 2 if dense else sum(visible_pairs(problem)))


def moved_bytes(what: str, problem: Problem, *, dense: bool = False, keys: int | None = None) -> float:
    """Bytes of each input read once and each output written once; the cores written and read once if not `dense`."""
    row = problem.batch * problem.head_dim * problem.element_bytes
    q_rows, kv_rows = problem.q_heads * problem.seq_len, problem.kv_heads * problem.seq_len
    core_rows = 2 * problem.num_core_heads * problem.spec.num_groups(problem.seq_len)
    lse = 4.0 * problem.batch * q_rows
    if what == DECODE:
        return float(row * (_read_in_a_step(problem, keys) + 2 * (problem.q_heads + problem.kv_heads)))
    if what == POOLING:
        whole = problem.spec.num_groups(problem.seq_len)
        return float(row * (whole * (2 * problem.kv_heads * problem.group_size + problem.q_heads) + core_rows))
    forward = row * (2 * q_rows + 2 * kv_rows + (0 if dense else 2 * core_rows)) + lse
    if what == FORWARD:
        return forward
    # q, k, v, out and its gradient are read again, three gradients are written
    return forward + row * (4 * q_rows + 4 * kv_rows + (0 if dense else 2 * core_rows)) + lse


def _read_in_a_step(problem: Problem, keys: int | None) -> int:
    """Rows of keys and values that one decode step reads: `keys` of each key/value head, or what CCA sees."""
    if keys is not None:
        return 2 * problem.kv_heads * keys
    cores = problem.spec.visible_cores(problem.seq_len)
    return 2 * (problem.num_core_heads * cores + problem.kv_heads * (step_keys(problem) - cores))


def held_bytes(problem: Problem) -> int:
    """Bytes that a backward of CCA cannot do without: core keys and values, log-sum-exps, and delta."""
    core_rows = 2 * problem.num_core_heads * problem.spec.num_groups(problem.seq_len)
    statistics = 2 * 4 * problem.q_heads * problem.seq_len
    return problem.batch * (core_rows * problem.head_dim * problem.element_bytes + statistics)
