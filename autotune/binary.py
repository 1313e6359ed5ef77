"""What a compiled kernel takes and does, read from its machine code by the tools inside the Triton wheel."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from typing import Any

import triton

INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(.*?);")
BRANCH = re.compile(r"\bBRA\b.*?\b0x([0-9a-f]+)")
LOCAL = re.compile(r"\b(?:LDL|STL)(?:\.(64|128))?")


@dataclass(frozen=True, slots=True)
class Resources:
    """One compiled kernel: bytes of shared memory a block, registers and spilled bytes a thread.

    `loop_instructions` of a warp in one pass through every loop, each once (in all of the code if it has no loop), and
    `loop_spill_bytes` that a thread moves to and from spilled registers in it. Most spills are outside of the loops and
    cost next to nothing. 0 instructions: not known for this target.
    """

    kernel: str
    shared_bytes: int
    registers: int
    spill_bytes: int
    num_warps: int
    loop_instructions: int
    loop_spill_bytes: int


def read_resources(compiled: Any) -> Resources:
    """The resources of a `triton.compiler.CompiledKernel`."""
    assembly, metadata = compiled.asm, compiled.metadata
    usage = _of_cubin(assembly["cubin"]) if "cubin" in assembly else _of_amdgcn(assembly["amdgcn"])
    registers, spill_bytes, instructions, loop_spill_bytes = usage
    return Resources(
        kernel=metadata.name,
        shared_bytes=metadata.shared,
        registers=registers,
        spill_bytes=spill_bytes,
        num_warps=metadata.num_warps,
        loop_instructions=instructions,
        loop_spill_bytes=loop_spill_bytes,
    )


def _of_cubin(cubin: bytes) -> tuple[int, int, int, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, code = (_cuobjdump(option, file.name) for option in ("--dump-resource-usage", "--dump-sass"))
    spill_bytes = _figure(usage, r"\bSTACK:(\d+)") + _figure(usage, r"\bLOCAL:(\d+)")
    return _figure(usage, r"\bREG:(\d+)"), spill_bytes, *loop_costs(code)


def _cuobjdump(option: str, path: str) -> str:
    command = [triton.knobs.nvidia.cuobjdump.path, option, path]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def loop_costs(code: str) -> tuple[int, int]:
    """Instructions inside of loops, and the bytes that those on local memory move, from NVIDIA assembly.

    A loop is what a backward branch spans; an instruction inside of several counts once.
    """
    instructions = [(int(address, 16), text) for address, text in INSTRUCTION.findall(code)]
    spans = []
    for address, text in instructions:
        branch = BRANCH.search(text)
        if branch and int(branch.group(1), 16) < address:
            spans.append((int(branch.group(1), 16), address))
    inside = [text for address, text in instructions if any(first <= address <= last for first, last in spans)]
    counted = inside if spans else [text for _, text in instructions]
    return len(counted), sum(int(width or 32) // 8 for text in counted for width in LOCAL.findall(text))


def _of_amdgcn(text: str) -> tuple[int, int, int, int]:
    """From the assembly's own notes; its loops are not looked at, so spills count as if all were in one."""
    spill_bytes = _figure(text, r"\.private_segment_fixed_size:\s*(\d+)")
    return _figure(text, r"\.vgpr_count:\s*(\d+)"), spill_bytes, 0, 2 * spill_bytes


def _figure(text: str, pattern: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"no {pattern} in the compiler's report:\n{text[:500]}")
    return int(found.group(1))
