"""Checksums of files, as `"ALGORITHM:hex"`: each names its algorithm, so old checkpoints still verify."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

from repa_scale.errors import DataError, require

BLOCK = 1 << 22  # bytes; hashing and reading release the interpreter's lock for so long at most


def _xxh3(data: bytes = b"") -> Any:
    return require("xxhash", "train").xxh3_128(data)


ALGORITHMS: dict[str, Callable[..., Any]] = {"xxh3-128": _xxh3, "sha256": hashlib.sha256}


def default_algorithm() -> str:
    """xxh3-128 (several GB/s a core, benchmarks/durability.py), or sha256 where xxhash is not installed."""
    return "xxh3-128" if importlib.util.find_spec("xxhash") else "sha256"


def checksum_bytes(data: bytes, algorithm: str) -> str:
    """The checksum of `data`."""
    return f"{algorithm}:{_hasher(algorithm, data).hexdigest()}"


def checksum_file(path: Path, algorithm: str) -> str:
    """The checksum of a file, read block by block."""
    digest = _hasher(algorithm)
    with path.open("rb", buffering=0) as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return f"{algorithm}:{digest.hexdigest()}"


def algorithm_of(checksum: str) -> str:
    """The algorithm that a checksum names.

    Raises:
        DataError: one that this version does not know.
    """
    name = str(checksum).partition(":")[0]
    if name not in ALGORITHMS:
        raise DataError(f"a checksum of the unknown kind {name[:20]!r}")
    return name


def _hasher(algorithm: str, data: bytes = b"") -> Any:
    return ALGORITHMS[algorithm](data)
