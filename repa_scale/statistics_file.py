"""Files with statistics of real images: an .npz with its own sha256 behind it, so that damage anywhere is seen.

Who makes the statistics, and where the files lie: evaluate/reference.py and online.py.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from repa_scale.files import write_atomically
from repa_scale.metrics.frechet import Moments

VERSION = 2  # of the files, and of how their statistics are computed
DIGEST = hashlib.sha256().digest_size  # bytes

log = logging.getLogger(__name__)


def statistics_name(prefix: str, *essence: object, arithmetic: str = "") -> str:
    """The file's name, which changes with all that the statistics depend on.

    Args:
        essence: plain JSON.
        arithmetic: of arithmetic.name; empty for fp32 on a CPU, whose files keep the names of earlier releases.
    """
    parts = [VERSION, *essence] + ([arithmetic] if arithmetic else [])
    return f"{prefix}_{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]}.npz"


def write_statistics(file: Path, moments: dict[str, Moments], kept: dict[str, Tensor]) -> None:
    """Writes what `read_statistics` gives back, all or nothing.

    Args:
        moments: by part of the features, on any device.
        kept: by part, (m, d) rows of features on the CPU.

    Raises:
        OSError: the folder is not there, or cannot be written.
    """
    arrays = {f"kept_{part}": rows.numpy() for part, rows in kept.items()}
    for part, one in moments.items():
        arrays |= {f"count_{part}": np.int64(one.count), f"mean_{part}": one.mean.cpu().numpy()}
        arrays[f"scatter_{part}"] = one.scatter.cpu().numpy()
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    data = buffer.getvalue()
    write_atomically(file, data + hashlib.sha256(data).digest())


def read_statistics(file: Path) -> tuple[dict[str, Moments], dict[str, Tensor]] | None:
    """`moments`, on the CPU, and `kept`, as they were written; None: no such file, or one that must be made again."""
    try:
        data = memoryview(file.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        log.warning("%s cannot be read (%s); its statistics are made again", file, error)
        return None
    if hashlib.sha256(data[:-DIGEST]).digest() != data[-DIGEST:]:
        log.warning("%s is damaged; its statistics are made again", file)
        return None
    with np.load(io.BytesIO(data[:-DIGEST]), allow_pickle=False) as arrays:
        tensors = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    parts = [name.removeprefix("mean_") for name in tensors if name.startswith("mean_")]
    kept = {name.removeprefix("kept_"): rows for name, rows in tensors.items() if name.startswith("kept_")}
    return {
        part: Moments(int(tensors[f"count_{part}"]), tensors[f"mean_{part}"], tensors[f"scatter_{part}"])
        for part in parts
    }, kept
