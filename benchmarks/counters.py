"""What the profiler's counters say of each kernel on the GPU at hand (docs/performance.md, "What limits a kernel").

    python benchmarks/counters.py --json docs/data/counters-h200.json     # needs Nsight Compute's `ncu`, and its rights
    python benchmarks/counters.py --show docs/data/counters-h200.json     # the table of docs/performance.md

The shapes are those of the goals: 131072 tokens in bfloat16, 32/32 heads of 128; 32/8 and cores of key/value heads for
the decode step. `ncu` launches a kernel anew for every group of counters, with pauses in which the card cools down: its
times are those of a card at rest. Beside them stand those of a busy one: of forward and backward, over and over. The
clocks are left alone, and what they were is in the table.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from cca_attention import Problem, cca_attention
from cca_attention.configs import architecture
from cca_attention.profiles.configs import tunables
from cca_attention.verify.provenance import commit, gpu_name, versions

COUNTERS = {
    "gpu__time_duration.sum": ("time, ms", 1e-6, 3),
    "gpc__cycles_elapsed.avg.per_second": ("clock, MHz", 1e-6, 0),
    "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_elapsed": ("matrix units busy, %", 1, 1),
    "sm__inst_executed_pipe_xu.avg.pct_of_peak_sustained_elapsed": ("exp2 units busy, %", 1, 1),
    "sm__issue_active.avg.pct_of_peak_sustained_elapsed": ("cycles with an instruction, %", 1, 1),
    "lts__t_sector_hit_rate.pct": ("found in L2, %", 1, 1),
    "dram__bytes.sum.per_second": ("memory, TB/s", 1e-12, 2),
}
"""Of `ncu`: the column's name, its factor and its digits."""
BUSY = "busy_ms"
STEPS = 12
KERNELS = (
    "pooling", "forward_hopper", "backward_dcore_hopper", "pooling_backward", "backward_dkv_hopper",
    "backward_dq_hopper", "decode",
)  # fmt: skip


def launch(tokens: int) -> None:
    """Launch each kernel twice, the second time for the profiler: `ncu` runs this."""
    device = torch.device("cuda")
    arch = architecture(device)
    for name in KERNELS:
        heads = {"kv_heads": 8, "core_heads": "kv"} if name == "decode" else {"kv_heads": 32}
        problem = Problem(q_heads=32, seq_len=tokens, head_dim=128, **heads)
        kernel = tunables(arch)[name]
        tensors = kernel.allocate(problem, device, torch.Generator(device).manual_seed(0))
        for watched in (False, True):
            if watched:
                torch.cuda.profiler.start()
            kernel.launch(problem, tensors, kernel.default(problem, arch))
            torch.cuda.synchronize()
        torch.cuda.profiler.stop()


def busy_times(tokens: int) -> dict[str, float]:
    """Milliseconds of each kernel of forward and backward, while the card does nothing else for a second and more."""
    q, k, v, dout = (torch.randn(1, 32, tokens, 128, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    leaves = [x.requires_grad_() for x in (q, k, v)]

    def step() -> None:
        torch.autograd.grad(cca_attention(*leaves, group_size=16, window_size=1024), leaves, dout)

    for _ in range(STEPS):
        step()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
        for _ in range(STEPS):
            step()
        torch.cuda.synchronize()
    times = {event.key: event.self_device_time_total / 1e3 / STEPS for event in found.key_averages()}
    return {name.removesuffix("_kernel"): ms for name, ms in times.items() if name.endswith("_kernel")}


def profile(tokens: int) -> list[dict[str, Any]]:
    """What `ncu` counted, a kernel launched a row."""
    if shutil.which("ncu") is None:
        raise SystemExit("ncu is not on the PATH: it comes with CUDA's Nsight Compute")
    command = ["ncu", "--clock-control", "none", "--profile-from-start", "off", "--csv", "--page", "raw"]
    command += ["--print-units", "base", "--metrics", ",".join(COUNTERS)]
    child = [sys.executable, str(Path(__file__).resolve()), "--launch", "--tokens", str(tokens)]
    found = subprocess.run([*command, *child], capture_output=True, text=True)
    if found.returncode:
        raise SystemExit(f"ncu ended with exit code {found.returncode}:\n{found.stdout[-2000:]}{found.stderr[-2000:]}")
    return rows(found.stdout)


def rows(output: str) -> list[dict[str, Any]]:
    """The kernels of what `ncu` printed: its name, its grid and every counter."""
    lines = [line for line in csv.reader(output.splitlines()) if len(line) > len(COUNTERS)]
    head, values = lines[0], lines[2:]  # the second line holds the units

    def row(line: list[str]) -> dict[str, Any]:
        cells = dict(zip(head, line, strict=True))
        counted = {name: float(cells[name].replace(",", "")) for name in COUNTERS}
        return {"kernel": cells["Kernel Name"].removesuffix("_kernel"), "grid": cells["Grid Size"], **counted}

    return [row(line) for line in values]


def table(record: dict[str, Any]) -> Iterator[str]:
    """The record in Markdown."""
    yield "| kernel | busy, ms | " + " | ".join(title for title, _, _ in COUNTERS.values()) + " |"
    yield "|---|---:|" + "---:|" * len(COUNTERS)
    for row in record["kernels"]:
        cells = [f"{row[name] * factor:,.{digits}f}" for name, (_, factor, digits) in COUNTERS.items()]
        busy = f"{row[BUSY]:.2f}" if BUSY in row else ""
        yield f"| `{row['kernel']}` | " + " | ".join([busy, *cells]) + " |"


def main() -> int:
    """Count and print the table, or print that of a record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=Path("counters.json"), help="where to (default: %(default)s)")
    parser.add_argument("--show", type=Path, help="print the table of this record, count nothing")
    parser.add_argument("--tokens", type=int, default=131072, help="context length (default: %(default)s)")
    parser.add_argument("--launch", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not options.show and not torch.cuda.is_available():
        raise SystemExit("this script counts on an NVIDIA GPU and found none; --show FILE prints a record")
    if options.launch:
        launch(options.tokens)
        return 0
    if not options.show:
        about = {"gpu": gpu_name(), "versions": versions(), "commit": commit(), "tokens": options.tokens}
        busy = busy_times(options.tokens)
        found = {
            **about,
            "kernels": [
                {**row, BUSY: busy[row["kernel"]]} if row["kernel"] in busy else row for row in profile(options.tokens)
            ],
        }
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    record = json.loads((options.show or options.json).read_text(encoding="utf-8"))
    sys.stdout.write("\n".join(table(record)) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
