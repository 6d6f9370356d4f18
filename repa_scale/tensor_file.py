"""safetensors files piece by piece: slices read without mapping the file, and tensors written as they come."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from repa_scale.errors import DataError, UserError

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
CHUNK = 1 << 20  # elements that are read, converted and written at a time

Read = Callable[[str, int, int], Tensor]  # (name, start, stop) of the flattened tensor -> (stop - start,)


class TensorFile:
    """Slices of one safetensors file. What is read lies in memory of its own, and the rest of the file in none.

    Raises:
        DataError: no such file, or not a whole safetensors file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with safe_open(path, framework="pt"):  # the format's own checks of header, offsets and length
                pass
            self._file = path.open("rb", buffering=0)
            length = int.from_bytes(self._file.read(8), "little")
            header = json.loads(self._file.read(length))
        except (SafetensorError, OSError, ValueError) as error:
            raise DataError(f"{path} is not a readable safetensors file ({error}); copy or make it again") from None
        header.pop("__metadata__", None)
        if strange := [name for name, entry in header.items() if entry["dtype"] not in DTYPES]:
            kind = header[strange[0]]["dtype"]
            raise DataError(f"{path}: {strange[0]} is of type {kind}; weights are one of {', '.join(DTYPES)}")
        self._begin = 8 + length
        self._entries = header
        self.shapes: dict[str, tuple[int, ...]] = {name: tuple(entry["shape"]) for name, entry in header.items()}

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """The elements [start, stop) of a flattened tensor, (stop - start,) in the file's dtype."""
        entry = self._entries[name]
        out = torch.empty(stop - start, dtype=DTYPES[entry["dtype"]])
        wanted = memoryview(out.view(torch.uint8).numpy())
        try:
            self._file.seek(self._begin + entry["data_offsets"][0] + start * out.element_size())
            while wanted:
                got = self._file.readinto(wanted)
                if not got:
                    raise DataError(f"{self.path} ends before {name} does; copy or make it again")
                wanted = wanted[got:]
        except OSError as error:
            raise DataError(f"{self.path} cannot be read ({error}); copy or make it again") from None
        return out


def pieces(read: Read, name: str, shape: tuple[int, ...]) -> Iterator[Tensor]:
    """A flattened tensor in order, at most `CHUNK` elements at a time."""
    total = math.prod(shape)
    for start in range(0, total, CHUNK):
        yield read(name, start, min(start + CHUNK, total))


def rounded(piece: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """The values in another floating type.

    Raises:
        UserError: one of them is larger than the type can hold, and would become infinite.
    """
    values = piece.to(dtype)
    if torch.finfo(dtype).max >= torch.finfo(piece.dtype).max:
        return values
    if (lost := values.isinf() & ~piece.isinf()).any():
        raise UserError(
            f"{name} holds {float(piece[lost][0]):.3g}, and {str(dtype).removeprefix('torch.')} ends at "
            f"{torch.finfo(dtype).max:.3g}; use bf16 or fp32"
        )
    return values


def header(
    shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, metadata: Mapping[str, str] | None = None
) -> bytes:
    """The head of a safetensors file whose tensors follow it in the order of `shapes`."""
    entries: dict[str, dict] = {"__metadata__": dict(metadata)} if metadata else {}
    offset, width = 0, dtype.itemsize
    for name, shape in shapes.items():
        size = width * math.prod(shape)
        entries[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_tensors(path: Path, shapes: Mapping[str, tuple[int, ...]], read: Read, dtype: torch.dtype) -> str:
    """Writes a safetensors file from tensors that are read piece by piece, durably; returns its sha256.

    Args:
        shapes: names in the order of the file.
        read: their elements, of any floating type; they are rounded to `dtype`.

    Raises:
        UserError: a value that `dtype` cannot hold.
    """
    digest = hashlib.sha256()
    hashing: Future | None = None  # of the piece before, beside the reading of the next one
    with path.open("wb", buffering=0) as file, ThreadPoolExecutor(1) as beside:
        for data in _contents(shapes, read, dtype):
            if hashing is not None:
                hashing.result()
            hashing = beside.submit(digest.update, data)
            while data:
                data = data[file.write(data) :]
        os.fsync(file.fileno())
    return digest.hexdigest()


def _contents(shapes: Mapping[str, tuple[int, ...]], read: Read, dtype: torch.dtype) -> Iterable[memoryview]:
    yield memoryview(header(shapes, dtype, {"format": "pt"}))
    for name, shape in shapes.items():
        for piece in pieces(read, name, shape):
            yield memoryview(rounded(piece, dtype, name).contiguous().view(torch.uint8).numpy())
