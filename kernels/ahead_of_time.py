"""Every kernel variant compiled for a GPU that need not be there: registers, shared memory, spills, bytes moved.

A variant is what the table of tiles can pick: a kernel, its dtypes and its tile. The width is compiled in as well; each
tile is built for the narrowest encoder that it serves (the one with most masks), or for its full width.
"""

from __future__ import annotations

import importlib
import itertools
import math
import os
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from repa_scale.kernels.choice import INTERPRETED
from repa_scale.kernels.table import ARCHITECTURES, SUM_OF_ALL, SUM_OF_IMAGE, TILES, Tile

DTYPES = ("bf16", "fp16", "fp32")
PAIRS = tuple(itertools.product(DTYPES, DTYPES))
BYTES = {"bf16": 2, "f16": 2, "fp16": 2, "f32": 4, "fp32": 4}
WIDTHS = (112, 384, 768, 1024, 1280, 1536)  # of the encoders that the trainer knows
PROJECTOR_WIDTH = 2048
USUAL = (("bf16", "bf16"), ("fp32", "fp32"))  # dtypes that are built for every tile unless all are asked for

# kernel -> file, row of the table, and for each pointer its dtype: fixed, or the variant's first or second.
KERNELS: dict[str, tuple[str, str, dict[str, str | int]]] = {
    "cosine_forward": (
        "cosine", "cosine", {"projected": 0, "target": 1, "weight": "fp32", "scalars": "fp32"}
    ),
    "cosine_backward": (
        "cosine", "cosine",
        {"projected": 0, "target": 1, "weight": "fp32", "scalars": "fp32", "upstream": "fp32", "gradient": 0},
    ),
    "group_sums": ("cosine", "", {"values": "fp32", "sums": "fp32"}),
    "layernorm": ("tokens", "layernorm", {"x": 0, "weight": "fp32", "bias": "fp32", "out": 1}),
    "spatial": ("tokens", "spatial", {"x": 0, "out": 1}),
    "silu_backward": ("projector", "silu", {"gradient": 0, "before": 0, "after": 0, "sums": "fp32"}),
}  # fmt: skip
FLOATS = ("scale", "eps", "gamma")

# Of an SM: registers, threads, programs, shared memory in bytes (CUDA programming guide, compute capabilities).
REGISTERS, THREADS, PROGRAMS = 65536, 2048, 32
SHARED = {80: 164 * 1024, 90: 228 * 1024, 100: 228 * 1024}


@dataclass(frozen=True)
class Variant:
    """A kernel as it can be started."""

    kernel: str
    dtypes: tuple[str, ...]
    width: int
    tile: Tile
    architecture: int

    @property
    def name(self) -> str:
        tile = f"{self.tile.rows}x{self.tile.columns}" if KERNELS[self.kernel][1] else "any"
        return f"{self.kernel} {'-'.join(self.dtypes) or 'fp32'} {tile} z={self.width} sm_{self.architecture}"

    @property
    def key(self) -> tuple:
        """What tells it from others when it is started: all but width and architecture."""
        return self.kernel, tuple(self.pointers().values()), self.tile.rows, self.tile.columns, self.tile.warps

    def pointers(self) -> dict[str, str]:
        """Name of each pointer argument -> dtype."""
        return {
            name: dtype if isinstance(dtype, str) else self.dtypes[dtype]
            for name, dtype in KERNELS[self.kernel][2].items()
        }


@dataclass(frozen=True)
class Built:
    """What the compiler made of a variant.

    Attributes:
        registers: a thread.
        shared: bytes a program.
        spilled: bytes a thread of local memory.
        occupancy: upper bound of the share of an SM's threads that can be resident.
        bytes_a_row: read and written for one row of `width` channels, from the loads and stores in the code.
        thread_bytes: (loaded, stored) by one thread that is not masked, from the machine code's global accesses.
    """

    variant: Variant
    registers: int
    shared: int
    spilled: int
    occupancy: float
    bytes_a_row: float
    thread_bytes: tuple[int, int]


def variants(complete: bool = False, architectures: tuple[int, ...] = ARCHITECTURES) -> list[Variant]:
    """All of them; unless `complete`, mixed dtypes for the tile of 768 channels (256 tokens) alone."""
    found = []
    for architecture in architectures:
        for kernel, (_, row, pointers) in KERNELS.items():
            arity = 1 + max((dtype for dtype in pointers.values() if isinstance(dtype, int)), default=-1)
            if kernel == "group_sums":
                tiles = (SUM_OF_IMAGE, SUM_OF_ALL)
                found += [Variant(kernel, (), tile.columns, tile, architecture) for tile in tiles]
            elif arity == 1:
                tile = TILES[row][architecture][64]
                found += [Variant(kernel, (dtype,), PROJECTOR_WIDTH, tile, architecture) for dtype in DTYPES]
            else:
                for size, tile in TILES[row][architecture].items():
                    width = 768 if row == "spatial" else _width(size)
                    pairs = PAIRS if complete or size == (256 if row == "spatial" else 1024) else USUAL
                    found += [Variant(kernel, pair, width, tile, architecture) for pair in pairs]
    return found


def build(variant: Variant) -> Built:
    """Compiles a variant. Needs no GPU, and a process without TRITON_INTERPRET."""
    if INTERPRETED:
        raise RuntimeError("nothing is compiled under TRITON_INTERPRET=1; unset it")
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = getattr(importlib.import_module(f"repa_scale.kernels.{KERNELS[variant.kernel][0]}"), variant.kernel)
    pointers = variant.pointers()
    constants = {"WIDTH": variant.width, "ROWS": variant.tile.rows, "COLUMNS": variant.tile.columns}
    constants = {name: value for name, value in constants.items() if name in function.arg_names}
    types = {name: "fp32" if name in FLOATS else "i32" for name in function.arg_names}
    types |= {name: f"*{dtype}" for name, dtype in pointers.items()} | dict.fromkeys(constants, "constexpr")
    loose = function.params
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(function.arg_names)
        if name in pointers and not loose[i].do_not_specialize_on_alignment
    }
    positions = {(function.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(function, types, constexprs=positions, attrs=attributes)
    target = GPUTarget("cuda", variant.architecture, 32)
    compiled = triton.compile(source, target=target, options={"num_warps": variant.tile.warps})
    registers, spilled = _resources(compiled.asm["cubin"], Path(triton.__file__).parent)
    shared = compiled.metadata.shared
    return Built(
        variant,
        registers,
        shared,
        spilled,
        _occupancy(variant, registers, shared),
        _bytes_a_row(variant, compiled.asm["ttir"]),
        _thread_bytes(compiled.asm["ptx"]),
    )


def _width(size: int) -> int:
    """The narrowest encoder of those for which `size` is the next power of two; `size` itself if there is none."""
    return min((w for w in WIDTHS if size // 2 < w <= size), default=size)


def _resources(cubin: bytes, triton_folder: Path) -> tuple[int, int]:
    """Registers and bytes of local memory a thread, as NVIDIA's own tool reads them from the machine code."""
    tool = triton_folder / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin", delete=False) as file:
        file.write(cubin)
    try:
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    finally:
        os.unlink(file.name)
    used = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return used["REG"], used["STACK"] + used["LOCAL"]


def _occupancy(variant: Variant, registers: int, shared: int) -> float:
    warps = variant.tile.warps
    by_registers = REGISTERS // (warps * 32 * (math.ceil(registers / 8) * 8))
    # Each program takes 1 KB of shared memory for itself.
    by_shared = SHARED[variant.architecture] // (shared + 1024)
    return min(by_registers, by_shared, PROGRAMS, THREADS // (32 * warps)) * 32 * warps / THREADS


def _bytes_a_row(variant: Variant, ttir: str) -> float:
    """Sums over the tensors that the code loads and stores: a plane counts its width, a column of rows one element."""
    total = 0.0
    for shape, dtype in re.findall(r"tt\.(?:load|store) .*?tensor<([\dx]+)x!tt\.ptr<(\w+)>>", ttir):
        sides = [int(side) for side in shape.split("x")]
        if len(sides) == 2:
            elements = float(variant.width)
        elif sides[0] == variant.tile.columns:  # once a program: affine weights, partial sums
            elements = variant.width / variant.tile.rows
        else:
            elements = 1.0
        total += elements * BYTES[dtype]
    return total


def _thread_bytes(ptx: str) -> tuple[int, int]:
    sums = {"ld": 0, "st": 0}
    for kind, vector, bits in re.findall(r"\b(ld|st)\.global(?:\.L\w+::\w+)*(?:\.v(\d))?\.[bfu](\d+)", ptx):
        sums[kind] += int(vector or 1) * int(bits) // 8
    return sums["ld"], sums["st"]
