"""The one question that the code asks of a device. A test answers it for a device that is none, and so walks the GPU's
branches on a machine without a GPU (tests/meta)."""

from __future__ import annotations

import torch


def on_gpu(device: torch.device) -> bool:
    """Whether work on `device` runs behind the host's back: on streams, with events, from pinned memory."""
    return device.type == "cuda"
