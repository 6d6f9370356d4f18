"""How float32 is multiplied: as IEEE float32, or as TF32 on tensor cores. The only place that sets torch's switches.

By default torch computes convolutions on CUDA in TF32 (10 bits of mantissa) and matrix products in float32, so that
`fp32` means two things in one network. Here `fp32` is float32 in both, on a CPU as well, and `tf32` is TF32 in both.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

MODES = {"fp32": "ieee", "tf32": "tf32"}
T = TypeVar("T")


def use(mode: str) -> None:
    """Sets the arithmetic of float32 for the rest of the process.

    Args:
        mode: a key of `MODES`.
    """
    cuda = MODES[mode]
    _set("high" if mode == "tf32" else "highest", mode == "tf32", [cuda, cuda, cuda, "ieee", "ieee"])


@contextmanager
def within(mode: str) -> Iterator[None]:
    """The arithmetic of float32 in a block. The switches are the process's: threads beside it compute alike.

    Blocks of threads may overlap: those of one mode share it, and the last to end gives back what the first found.
    """
    with _lock:
        if not (_blocks and _blocks[-1].mode == mode):
            _blocks.append(_Block(mode, _state()))
        block = _blocks[-1]
        block.inside += 1
        use(mode)
    try:
        yield
    finally:
        with _lock:
            block.inside -= 1
            if not block.inside:
                _end(block)


@dataclass(eq=False)
class _Block:
    """What `within` opened, `inside` times, and the switches it found."""

    mode: str
    before: tuple[str, bool, list[str]]
    inside: int = 0


_blocks: list[_Block] = []  # open ones, outermost first
_lock = threading.Lock()


def _end(block: _Block) -> None:
    at = _blocks.index(block)
    if block is _blocks[-1]:
        _set(*block.before)
    else:  # a thread has opened another mode since, which is in force: it gives back what this block found
        _blocks[at + 1].before = block.before
    del _blocks[at]


def of_training(precision: str) -> str:
    """The mode of a run with `train.precision`: in a 16-bit run the VAE, which alone stays in float32, may use TF32,
    whose mantissa is fp16's; a run in fp32 is one throughout."""
    return "fp32" if precision == "fp32" else "tf32"


def name(device: torch.device, mode: str) -> str:
    """What stored numbers were computed in: kind of device and arithmetic, such as `cuda bf16`. Empty for fp32 on a
    CPU, and so equal to what was stored before this was recorded."""
    return "" if device.type == "cpu" and mode == "fp32" else f"{device.type} {mode}"


def spelled(name: str) -> str:
    """`name` for a person."""
    return name or "cpu fp32 (or not recorded)"


def libraries(device: torch.device) -> dict[str, str]:
    """Versions of what multiplies on a GPU: another one may sum in another order. Empty for a CPU."""
    if device.type != "cuda":
        return {}
    if torch.version.hip:
        return {"hip": torch.version.hip, "miopen": str(torch.backends.cudnn.version())}
    return {
        "cuda": str(torch.version.cuda),
        "cublas": f"{_cublas()} {torch.backends.cuda.preferred_blas_library().name}",
        "cudnn": str(torch.backends.cudnn.version()),
    }


def _cublas() -> str:
    """The version of the cuBLAS that torch has loaded: a wheel's, a container's or the system's."""
    try:
        library = ctypes.CDLL(f"libcublas.so.{str(torch.version.cuda).partition('.')[0]}")
        parts = [ctypes.c_int() for _ in range(3)]
        for number, part in enumerate(parts):  # major, minor, patch
            if library.cublasGetProperty(number, ctypes.byref(part)):
                return "unknown"
    except (OSError, AttributeError):
        return "unknown"
    return ".".join(str(part.value) for part in parts)


def _operations() -> list[Any]:
    b = torch.backends
    return [b.cuda.matmul, b.cudnn.conv, b.cudnn.rnn, b.mkldnn.matmul, b.mkldnn.conv]


def _state() -> tuple[str, bool, list[str]]:
    found = [operation.fp32_precision for operation in _operations()]
    matmul = _read(torch.get_float32_matmul_precision, "high" if found[0] == "tf32" else "highest")
    return matmul, _read(lambda: torch.backends.cudnn.allow_tf32, found[1] == "tf32"), found


def _set(matmul: str, cudnn: bool, precisions: list[str]) -> None:
    """torch has two interfaces for the same switches. The older one is set too, and first: its readers (other
    libraries) raise where the two disagree, and alone it leaves torch.backends.fp32_precision in force."""
    torch.set_float32_matmul_precision(matmul)
    torch.backends.cudnn.allow_tf32 = cudnn
    for operation, precision in zip(_operations(), precisions, strict=True):
        operation.fp32_precision = precision


def _read(get: Callable[[], T], instead: T) -> T:
    try:
        return get()
    except RuntimeError:  # both interfaces were used before, and they disagree
        return instead
