"""What a compiled kernel takes and does, read from its machine code by the tools inside the Triton wheel."""

from __future__ import annotations

import math
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from typing import Any

import triton

INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(.*?);")
OPERATION = re.compile(r"^(?:\{\s*)?(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)")
BRANCH = re.compile(r"\bBRA\b.*?\b0x([0-9a-f]+)")
LOCAL = re.compile(r"\b(?:LDL|STL)(?:\.(64|128))?")
EXCHANGE = re.compile(r"\b(?:LDS|STS)(?!\.(?:64|128))\b")
DEALT_OUT = re.compile(
    r"sizePerThread = \[\d+, \d+, (\d+)\], threadsPerWarp = \[(\d+), \d+, (\d+)\], warpsPerCTA = \[\d+, (\d+), \d+\]"
)
BANKS = 32
"""Of shared memory, a word wide each."""
GROUP_PRODUCTS = ("HGMMA", "QGMMA", "UTCHMMA", "UTCQMMA")
"""Products of a whole group of warps; the others are a single warp's."""
PRODUCTS = (*GROUP_PRODUCTS, "HMMA", "IMMA", "DMMA")


@dataclass(frozen=True, slots=True)
class Resources:
    """One compiled kernel: bytes of shared memory a block, registers and spilled bytes a thread.

    `loop_instructions` of a warp in one pass through every loop, each once (in all of the code if it has no loop),
    `loop_spill_bytes` that a thread moves to and from spilled registers in it, and `loop_exchanges`, single words that
    a warp passes on through shared memory, each as many times as lanes wait for one bank with it. Most spills are
    outside of the loops and cost next to nothing. 0 instructions: not known for this target.

    The loops that hold products walk over tiles, those that every row sees whole and those at an edge, with masks:
    `tile_` and `edge_` figures are of one pass through each, and `outside_` of all other code. Instructions are those
    of a warp; `exponentials` and `loads` (from global memory) are some of them, `spills` those that move registers to
    or from memory, `products` those of the tensor cores, `group_products` if a group of four warps makes them. Without
    such a loop all are 0.
    """

    kernel: str
    shared_bytes: int
    registers: int
    spill_bytes: int
    num_warps: int
    loop_instructions: int
    loop_spill_bytes: int
    loop_exchanges: int = 0
    tile_instructions: int = 0
    tile_exponentials: int = 0
    tile_loads: int = 0
    tile_products: int = 0
    tile_spills: int = 0
    edge_instructions: int = 0
    edge_spills: int = 0
    outside_instructions: int = 0
    outside_spills: int = 0
    group_products: bool = False


def read_resources(compiled: Any) -> Resources:
    """The resources of a `triton.compiler.CompiledKernel`."""
    assembly, metadata = compiled.asm, compiled.metadata
    usage = _of_cubin(assembly["cubin"]) if "cubin" in assembly else _of_amdgcn(assembly["amdgcn"])
    if "loop_exchanges" in usage:
        usage["loop_exchanges"] *= words_in_a_bank(assembly["ttgir"])
    return Resources(kernel=metadata.name, shared_bytes=metadata.shared, num_warps=metadata.num_warps, **usage)


def _of_cubin(cubin: bytes) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, code = (_cuobjdump(option, file.name) for option in ("--dump-resource-usage", "--dump-sass"))
    instructions, loop_spill_bytes, exchanges = loop_costs(code)
    return {
        "registers": _figure(usage, r"\bREG:(\d+)"),
        "spill_bytes": _figure(usage, r"\bSTACK:(\d+)") + _figure(usage, r"\bLOCAL:(\d+)"),
        "loop_instructions": instructions,
        "loop_spill_bytes": loop_spill_bytes,
        "loop_exchanges": exchanges,
        **tile_costs(code),
    }


def _cuobjdump(option: str, path: str) -> str:
    command = [triton.knobs.nvidia.cuobjdump.path, option, path]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def words_in_a_bank(ttgir: str) -> int:
    """How many of the words that a warp passes on at a time lie in one bank, from the layout of tiles [C, T, D].

    They are sums over T, which several warps share; 1 if none do. The words of two lanes of a row lie as far apart as
    there are elements of a lane, times the warps that sum.
    """
    ways = [1]
    for vector, lanes_c, lanes_d, warps in (map(int, sizes) for sizes in DEALT_OUT.findall(ttgir)):
        if warps > 1:
            ways.append(in_a_bank(lanes_c * lanes_d, vector * warps))
    return max(ways)


def in_a_bank(words: int, apart: int) -> int:
    """How many of `words` that lie `apart` words from each other share a bank of shared memory."""
    return max(1, words * math.gcd(BANKS, apart) // BANKS)


def loop_costs(code: str) -> tuple[int, int, int]:
    """Instructions inside of loops, the bytes that those on local memory move, exchanges, from NVIDIA assembly.

    A loop is what a backward branch spans; an instruction inside of several counts once.
    """
    instructions, spans = _spans(code)
    inside = [text for address, text in instructions if any(first <= address <= last for first, last in spans)]
    counted = inside if spans else [text for _, text in instructions]
    spilled = sum(int(width or 32) // 8 for text in counted for width in LOCAL.findall(text))
    return len(counted), spilled, sum(EXCHANGE.search(text) is not None for text in counted)


def _spans(code: str) -> tuple[list[tuple[int, str]], list[tuple[int, int]]]:
    """Every instruction by its address, and the first and the last address of every loop."""
    instructions = [(int(address, 16), text) for address, text in INSTRUCTION.findall(code)]
    spans = set()
    for address, text in instructions:
        branch = BRANCH.search(text)
        if branch and int(branch.group(1), 16) < address:
            spans.add((int(branch.group(1), 16), address))
    return instructions, sorted(spans)


def tile_costs(code: str) -> dict[str, Any]:
    """The figures of `Resources` for the walks over tiles, from NVIDIA assembly; none without a product in a loop.

    Of the innermost loops that hold products the shortest walks over whole tiles, the longest over those at an edge.
    """
    instructions, spans = _spans(code)
    operations = [(address, found.group(1)) for address, text in instructions if (found := OPERATION.match(text))]
    loops = {span: Counter(op for address, op in operations if span[0] <= address <= span[1]) for span in spans}
    holding = [span for span, counts in loops.items() if any(counts[op] for op in PRODUCTS)]
    inner = [s for s in holding if not any(o != s and s[0] <= o[0] and o[1] <= s[1] for o in holding)]
    if not inner:
        return {}
    by_length = sorted((loops[span] for span in inner), key=Counter.total)
    tile, edge, everything = by_length[0], by_length[-1], Counter(op for _, op in operations)
    spills = {name: counts["LDL"] + counts["STL"] for name, counts in (("t", tile), ("e", edge), ("a", everything))}
    return {
        "tile_instructions": tile.total(),
        "tile_exponentials": tile["MUFU"],
        "tile_loads": tile["LDG"] + tile["LDGSTS"],
        "tile_products": sum(tile[op] for op in PRODUCTS),
        "tile_spills": spills["t"],
        "edge_instructions": edge.total(),
        "edge_spills": spills["e"],
        "outside_instructions": max(0, everything.total() - tile.total() - edge.total()),
        "outside_spills": max(0, spills["a"] - spills["t"] - spills["e"]),
        "group_products": any(tile[op] for op in GROUP_PRODUCTS),
    }


def _of_amdgcn(text: str) -> dict[str, Any]:
    """From the assembly's own notes; its loops are not looked at, so spills count as if all were in one."""
    spill_bytes = _figure(text, r"\.private_segment_fixed_size:\s*(\d+)")
    registers = _figure(text, r"\.vgpr_count:\s*(\d+)")
    return {
        "registers": registers, "spill_bytes": spill_bytes, "loop_instructions": 0, "loop_spill_bytes": 2 * spill_bytes
    }  # fmt: skip


def _figure(text: str, pattern: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"no {pattern} in the compiler's report:\n{text[:500]}")
    return int(found.group(1))
