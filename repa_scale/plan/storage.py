"""Bytes and seconds of checkpoints and of the data's way to the GPUs: formulas, no torch."""

from __future__ import annotations

CHECKPOINT_BYTES = 16  # a parameter: fp32 master weights, two moments, EMA
COPY_RATE = 25e9  # bytes a second from a GPU to host memory over PCIe 4 x16, pinned: data sheet, not measured
# One image of 256 px, as prepared: bytes, and images that one core decodes in a second.
IMAGE_BYTES = {"jpeg": 40e3, "png": 130e3}
DECODE_RATE = {"jpeg": 1879.0, "png": 523.0}
READ_RATE = 3400.0  # samples of 400 KB a second and process that are read and not decoded


def checkpoint_bytes(parameters: int) -> float:
    """Of one checkpoint, over all ranks.

    Source: the format (docs/run_folder.md).
    """
    return CHECKPOINT_BYTES * parameters


def copy_seconds(total: float, ranks: int) -> float:
    """From the GPUs to host memory: how long training waits for an asynchronous checkpoint.

    Source: 25 GB/s a GPU, inferred.
    """
    return total / ranks / COPY_RATE


def disk_seconds(total: float, nodes: int, disk: float) -> float:
    """Writing or reading a checkpoint, every node its ranks' part.

    Args:
        disk: GB/s of a node.

    Source: the key `disk`; `repa-scale doctor` measures it.
    """
    return total / nodes / (disk * 1e9)


def image_bytes(kind: str, pixels: int) -> float:
    """Of one prepared image.

    Source: measured at 256 px: JPEG 40 KB (quality 95, 4:4:4), PNG 130 KB; in proportion to the pixels.
    """
    return IMAGE_BYTES[kind] * pixels / 256**2


def sample_bytes(source: str, image: float, moments: float, tokens: float) -> float:
    """What training reads of a sample (data.source). A row of a shard is read whole, the image with its features.

    Source: read, data/mds.py.
    """
    return image + (moments if source != "image" else 0) + (tokens if source == "moments+tokens" else 0)


def loader_rate(decoded: bool, kind: str, pixels: int, workers: int) -> float:
    """Images a second that a rank's loader gives.

    Args:
        decoded: whether a network looks at the image.

    Source: measured, one core: 1,879 JPEG or 523 PNG of 256 px decoded; stored tokens of 400 KB read 3,400.
    """
    return max(1, workers) * (DECODE_RATE[kind] * 256**2 / pixels if decoded else READ_RATE)
