"""What the tests of profiles start from: a profile that has every block there can be, and the GPU that it is for."""

from __future__ import annotations

import triton

from ..kernels.forward import ForwardConfig
from ..problem import Problem
from ..profiles.configs import source_hash
from ..profiles.live import LiveDevice

PROBLEM = Problem(q_heads=32, kv_heads=8, seq_len=131072, head_dim=128)
"""That of its only entry."""
TUNED = ForwardConfig(block_q=128, block_k=64)
"""The config of that entry."""
A100 = LiveDevice(
    name="NVIDIA A100-SXM4-80GB", arch="sm_80", sm_count=108, shared_bytes_per_block=166912, l2_bytes=41943040,
    hbm_bytes=85_000_000_000, driver="580.65.06",
)  # fmt: skip
"""The GPU that it is for."""

_TEXT = """\
schema: cca-profile/1.0
created: '2026-11-22T10:00:00+00:00'
device:
  name: a100-80gb
  vendor: nvidia
  arch: sm_80
  names: [a100-80gb, a100, NVIDIA A100-SXM4-80GB]
  sm_count: 108
  shared_bytes_per_block: 166912
  l2_bytes: 41943040
  hbm_bytes: 80000000000
  hbm_gbps: 2039.0
software: {cca_attention: 0.1.0, triton: TRITON, torch: 2.13.0, python: 3.11.7, cuda: '13.0', ptxas: 13.0.48,
  driver: 580.65.06,
  fp_fusion: true}
semantic:
  group_size: 16
  window_size: 1024
  core_heads: query
  pooling: last_query
  dtypes: [bfloat16]
  layouts:
  - {q_heads: 32, kv_heads: 8, head_dim: 128}
kernels:
  forward: {source_hash: HASH, abi: 1}
policy:
  forward: {mode: eager, cold_l2: true, interleaved: true}
search:
  forward: {strategy: exhaustive, space_size: 72, legal: 60, compiled: 24, measured: 20,
    failed: {shared memory: 3, timeout: 1}, seed: 7, wall_s: 412.5}
pareto:
- {group_size: 16, window_size: 1024, kv_ratio: 0.0704, quality: 0.93, quality_proxy: mass recall on needles,
  latency_us: 41.2}
entries:
- kernel: forward
  problem: {batch: 1, q_heads: 32, kv_heads: 8, seq_len: 131072, head_dim: 128, group_size: 16, window_size: 1024,
    core_heads: query, pooling: last_query, dtype: bfloat16}
  interval: {seq_len: [65536, 262144], batch: [1, 2]}
  config: {num_warps: 4, num_stages: 2, block_q: 128, block_k: 64}
  evidence: measured
  latency: {median_us: 51000.0, p20_us: 50800.0, p80_us: 51500.0, samples: 90, mad_us: 120.0, sessions: 3}
  predicted:
    total_us: 49000.0
    parts: {tensor_us: 35000.0}
  resources:
  - {kernel: forward_kernel, shared_bytes: 98304, registers: 255, spill_bytes: 8, num_warps: 4}
  baseline:
    config: {num_warps: 4, num_stages: 2, block_q: 128, block_k: 32}
    time_us: 52000.0
    margin:
      speedup: 1.02
      ci95: [1.01, 1.03]
  verification: {suite: config/2, seed: 20261122, cases: 12, worst_budget_use: 0.25, mode: gpu,
    kernel_hash: HASH,
    bitwise_repeatable: true}
  determinism: {reduction_class: bk64, batch_invariant: true}
"""
TEXT = _TEXT.replace("HASH", source_hash("forward")).replace("TRITON", triton.__version__)
"""The file, of the kernels and the Triton at hand."""
