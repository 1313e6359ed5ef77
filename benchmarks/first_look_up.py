"""Time the look-ups of `profile="auto"`, the first of a process above all. Needs no GPU: it says which is at hand.

Example: python benchmarks/first_look_up.py --gpus h200,b200,a100-80gb --processes 15

Each row is of so many fresh processes, one after another: the median, least and most milliseconds of the first look-up
after the import of the profiles, of one for another problem after it, and the microseconds of one for a known problem;
then the processor's milliseconds in the first, which others on the machine disturb less. With --here the GPU is that of
this machine, and the driver is asked about it before the clock starts.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from typing import Annotated

import typer

CHILD = """
import json, sys, time, warnings
warnings.simplefilter("ignore")
import torch
from cca_attention import Problem
from cca_attention.autotune.devices import find_device
from cca_attention.profiles import resolve
from cca_attention.profiles.live import LiveDevice, live_device

gpu, here = sys.argv[1], torch.device("cuda", 0)
if gpu == "here":
    live_device(here)
else:
    d = find_device(gpu)
    live = LiveDevice(
        name=d.torch_names[0], arch=d.arch, sm_count=d.sm_count, shared_bytes_per_block=d.shared_bytes_per_block,
        l2_bytes=d.l2_bytes, hbm_bytes=d.hbm_bytes, threads_per_warp=d.threads_per_warp,
    )
    resolve.live_device = lambda device: live
first, other = (Problem(q_heads=32, kv_heads=8, seq_len=length, head_dim=128) for length in (131072, 50_000))

def milliseconds(look_up, clock):
    begin = clock()
    look_up()
    return (clock() - begin) * 1e3

auto = resolve.AutoProfile()
cpu = time.thread_time()
wall = milliseconds(lambda: auto.schedule(first, here), time.perf_counter)
cpu = (time.thread_time() - cpu) * 1e3
another = milliseconds(lambda: auto.schedule(other, here), time.perf_counter)
known = milliseconds(lambda: [auto.schedule(first, here) for _ in range(1000)], time.perf_counter)
print(json.dumps([wall, another, known, cpu]))
"""


def once(gpu: str) -> list[float]:
    """The four times of one process."""
    child = subprocess.run([sys.executable, "-c", CHILD, gpu], capture_output=True, text=True, check=True)
    return [float(value) for value in json.loads(child.stdout.splitlines()[-1])]


def main(
    gpus: Annotated[str, typer.Option(help="Names of GPUs, with commas between.")] = "h200,b200,a100-80gb",
    processes: Annotated[int, typer.Option(min=1, help="How many for each GPU.")] = 15,
    here: Annotated[bool, typer.Option("--here", help="Only the GPU of this machine.")] = False,
) -> None:
    """Print a row for each GPU."""
    typer.echo("gpu\tfirst ms\tanother ms\tknown us\tfirst, cpu ms")
    for gpu in ["here"] if here else gpus.split(","):
        columns = zip(*(once(gpu) for _ in range(processes)), strict=True)
        cells = [f"{statistics.median(column):.2f} ({min(column):.2f} to {max(column):.2f})" for column in columns]
        typer.echo("\t".join([gpu, *cells]))


if __name__ == "__main__":
    typer.run(main)
