"""Block sizes and warps of every kernel, by width and architecture, and how a kernel is started with them.

Nothing is tuned at start, so that all ranks, and two machines, compute the same bits. `benchmarks/kernel_tuning.py`
measures the alternatives. Rows a program do not depend on the number of rows: neither may a row's result.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from repa_scale.kernels.choice import capability
from torch import Tensor

ARCHITECTURES = (80, 90, 100)  # sm_80 A100, sm_90 H100 and H200, sm_100 B200


@dataclass(frozen=True)
class Tile:
    """What one program works on.

    Attributes:
        rows: rows of tokens (spatial: tokens of an image).
        columns: channels; a power of two.
        warps: of 32 threads.
    """

    rows: int
    columns: int
    warps: int


SMALLEST = 64  # what the first tile of every kernel holds
# One row of `width` channels is held in registers, so `columns` is the next power of two. 16 elements of an operand a
# thread: two 128-bit loads of 16-bit values each, about 50 registers, and half of an SM's threads resident.
_ROWWISE = {
    64: Tile(32, 64, 4),
    128: Tile(16, 128, 4),
    256: Tile(8, 256, 4),
    512: Tile(4, 512, 4),
    1024: Tile(2, 1024, 4),
    2048: Tile(1, 2048, 4),
    4096: Tile(1, 4096, 8),
}
# One operand alone, so twice the rows: they share the affine weights, which are read once a program.
_LAYERNORM = {size: Tile(2 * tile.rows, size, 2 * tile.warps) for size, tile in _ROWWISE.items()}
# All tokens of an image are held in registers: 16 to 64 elements a thread; a warp reads at least 64 contiguous bytes.
_SPATIAL = {
    64: Tile(64, 32, 4),
    128: Tile(128, 32, 4),
    256: Tile(256, 32, 8),
    512: Tile(512, 32, 16),
    1024: Tile(1024, 32, 16),
    2048: Tile(2048, 16, 16),
}
# SiLU's gradient works on a plane of any size; the rows of a tile make one partial sum of the bias gradient.
_SILU = {64: Tile(64, 64, 8)}

# Sums of the rows' losses: one program for each image, or one for all rows. A second launch would cost more than the
# longer way through the rows does.
SUM_OF_IMAGE, SUM_OF_ALL = Tile(1, 1024, 4), Tile(1, 8192, 16)

# kernel -> architecture -> next power of two of what the program must hold -> tile. The cosine's rows must stay equal
# between architectures (the order of its sums is promised); those of the others may part.
TILES: dict[str, dict[int, dict[int, Tile]]] = {
    "cosine": dict.fromkeys(ARCHITECTURES, _ROWWISE),
    "layernorm": dict.fromkeys(ARCHITECTURES, _LAYERNORM),
    "spatial": dict.fromkeys(ARCHITECTURES, _SPATIAL),
    "silu": dict.fromkeys(ARCHITECTURES, _SILU),
}


def tile(kernel: str, size: int, architecture: int) -> Tile:
    """The tile for `size` channels (`spatial`: tokens). Of an architecture that is not listed: the next older one's."""
    by_architecture = TILES[kernel]
    if architecture not in by_architecture:
        architecture = max((a for a in ARCHITECTURES if a <= architecture), default=ARCHITECTURES[0])
    return by_architecture[architecture][max(SMALLEST, 1 << (size - 1).bit_length())]


def architecture_of(device: torch.device) -> int:
    """80, 90, 100 ... of a GPU; 90 for the interpreter."""
    if device.type != "cuda":
        return 90
    major, minor = capability(device)
    return 10 * major + minor


def start(kernel: Any, grid: tuple[int, ...], arguments: tuple, constants: dict[str, int], warps: int) -> None:
    """Runs a Triton kernel on the device of its first argument. Every launch of this package goes through here."""
    first = arguments[0]
    # Triton launches on the current device, which nearly always is that of the tensors.
    if not first.is_cuda or first.get_device() == torch.cuda.current_device():
        kernel[grid](*arguments, **constants, num_warps=warps)
    else:
        with torch.cuda.device_of(first):
            kernel[grid](*arguments, **constants, num_warps=warps)


def blocks(size: int, of: int) -> int:
    """Programs that cover `size`, `of` each. triton.cdiv does the same, more slowly."""
    return -(-size // of)


def constants(width: int, tile: Tile) -> dict[str, int]:
    """What is compiled into a kernel that works on rows of `width` channels."""
    return {"WIDTH": width, "ROWS": tile.rows, "COLUMNS": tile.columns}


@functools.lru_cache(maxsize=1024)
def rowwise(kernel: str, rows: int, width: int, device: torch.device) -> tuple[tuple[int], dict[str, int], int]:
    """Grid, constants and warps of a kernel whose programs hold whole rows. Remembers `TILES` as it was."""
    chosen = tile(kernel, width, architecture_of(device))
    return (blocks(rows, chosen.rows),), constants(width, chosen), chosen.warps


def laid_out(x: Tensor) -> tuple[Tensor, int]:
    """`x` (N, T, z) so that a program can read it, and rows from one image to the next.

    Tokens behind a prefix are read where they stand. Other strides, and what does not begin at a multiple of 16 bytes
    (128-bit loads need it), are copied first.
    """
    _, tokens, width = x.shape
    if x.is_contiguous():
        return (x if x.data_ptr() % 16 == 0 else x.clone()), tokens
    if x.stride(2) == 1 and x.stride(1) == width and x.stride(0) % width == 0 and x.data_ptr() % 16 == 0:
        return x, x.stride(0) // width
    return x.contiguous(), tokens
