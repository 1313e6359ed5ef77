"""What a kernel's loops do, read from its Triton IR: the part of a prediction that needs no back end.

The IR of a tile shape is made in a fifth of a second and is the same for every number of warps and stages, so whole
spaces can be ranked before anything is compiled to machine code.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

ELEMENT_BYTES = {"f64": 8, "i64": 8, "f32": 4, "i32": 4, "bf16": 2, "f16": 2, "i16": 2, "i8": 1, "i1": 1}
LOOP = re.compile(r"\bscf\.(for|while)\b")
TENSOR = re.compile(r"tensor<((?:\d+x)+)(?:!tt\.ptr<)?([a-z]+\d+)")
DOT = re.compile(r"\btt\.dot\b.*: *(tensor<[^>]*>) *\* *(tensor<[^>]*>) *-> *(tensor<[^>]*>)")
LOAD = re.compile(r"\btt\.load\b.*: *(tensor<[^ ]*>)")
ARITHMETIC = re.compile(r"\barith\.(?:addf|subf|mulf)\b.*: *(tensor<[^ ]*>)")


@dataclass(frozen=True, slots=True)
class Traits:
    """Per pass through every loop of a kernel, each once.

    `dot_flops`: operations of matrix products; `dot_rows`: fewest rows of one, 0 without any. `load_bytes`: bytes
    that tiles load (of straight-line code if there is no loop). `stage_bytes`: most bytes that one iteration with a
    product loads as matrices, what each further pipeline stage must buffer. `live_bytes`: most bytes of floating point
    that must be held at once: the largest tile of any sum or product; in a loop what it carries from iteration to
    iteration, and the largest matrix product besides. `working_bytes`: the same with every product of the loop, as the
    compiler orders them where one does not wait for another.
    """

    dot_flops: float
    dot_rows: int
    load_bytes: float
    stage_bytes: int
    live_bytes: int
    working_bytes: int


UNKNOWN = Traits(0.0, 0, 0.0, 0, 0, 0)


@dataclass
class _Loop:
    """`carried`: shapes and element types carried on; `dots`: rows, columns, inner; `loads`: shapes and bytes."""

    carried: list[tuple[list[int], str]] = field(default_factory=list)
    dots: list[tuple[int, int, int]] = field(default_factory=list)
    loads: list[tuple[list[int], int]] = field(default_factory=list)

    def matrix_bytes(self) -> int:
        """Bytes that an iteration loads as matrices."""
        return sum(size for shape, size in self.loads if len(shape) > 1 and min(shape) > 1)

    def held_bytes(self) -> tuple[int, int]:
        """Bytes that it carries with its largest product that is not one of those, and with all of them."""
        products = [[rows, columns] for rows, columns, _ in self.dots]
        for shape, _ in self.carried:
            if shape in products:
                products.remove(shape)
        carried = sum(math.prod(shape) * ELEMENT_BYTES[kind] for shape, kind in self.carried)
        sizes = [4 * math.prod(shape) for shape in products]
        return carried + max(sizes, default=0), carried + sum(sizes)


def _tensors(text: str) -> Iterator[tuple[list[int], str]]:
    for dims, element in TENSOR.findall(text):
        yield [int(dim) for dim in dims.split("x") if dim], element


def _carried(header: str) -> list[tuple[list[int], str]]:
    results = header.split("->", 1)[1] if "->" in header else ""
    return [(shape, kind) for shape, kind in _tensors(results.replace("!tt.ptr<", "ptr ")) if kind in ("f32", "f64")]


def _read(line: str, loop: _Loop) -> None:
    if dot := DOT.search(line):
        rows, inner = next(_tensors(dot.group(1)))[0][-2:]
        columns = next(_tensors(dot.group(3)))[0][-1]
        loop.dots.append((rows, columns, inner))
    if load := LOAD.search(line):
        shape, kind = next(_tensors(load.group(1)))
        loop.loads.append((shape, math.prod(shape) * ELEMENT_BYTES[kind]))


def _loops(ttir: str) -> tuple[_Loop, list[_Loop]]:
    """The straight-line part and every loop; what an inner loop holds is its own only."""
    straight = _Loop()
    found: list[_Loop] = []
    open_loops: list[tuple[str, _Loop]] = []
    for line in ttir.splitlines():
        indent = line[: len(line) - len(line.lstrip())]
        if LOOP.search(line):
            loop = _Loop(_carried(line))
            found.append(loop)
            open_loops.append((indent, loop))
        elif open_loops and line.startswith(open_loops[-1][0] + "}") and "do {" not in line:
            open_loops.pop()
        else:
            _read(line, open_loops[-1][1] if open_loops else straight)
    return straight, found


def read_traits(ttir: str) -> Traits:
    """The traits of the one kernel in `ttir`."""
    straight, loops = _loops(ttir)
    busy = [loop for loop in loops if loop.dots or loop.loads] or [straight]
    dots = [dot for loop in busy for dot in loop.dots]
    arithmetic = max(_arithmetic_bytes(ttir), default=0)
    held = [loop.held_bytes() for loop in loops]
    return Traits(
        dot_flops=float(sum(2 * math.prod(dot) for dot in dots)),
        dot_rows=min((rows for rows, _, _ in dots), default=0),
        load_bytes=float(sum(size for loop in busy for _, size in loop.loads)),
        stage_bytes=max((loop.matrix_bytes() for loop in busy if loop.dots), default=0),
        live_bytes=max((arithmetic, *(least for least, _ in held))),
        working_bytes=max((arithmetic, *(most for _, most in held))),
    )


def _arithmetic_bytes(ttir: str) -> Iterator[int]:
    for tile in ARITHMETIC.findall(ttir):
        for shape, kind in _tensors(tile):
            yield math.prod(shape) * ELEMENT_BYTES[kind]
