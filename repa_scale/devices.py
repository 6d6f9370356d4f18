"""The one question that the code asks of a device, and what a thread does before it works on one. A test answers for a
device that is none, and so walks the GPU's branches on a machine without a GPU (tests/meta)."""

from __future__ import annotations

import torch


def on_gpu(device: torch.device) -> bool:
    """Whether work on `device` runs behind the host's back: on streams, with events, from pinned memory."""
    return device.type == "cuda"


def use(device: torch.device) -> None:
    """Makes `device` the current GPU of the calling thread; on a CPU, nothing.

    Each new thread starts on GPU 0, whatever its process works on. A stream context that it leaves goes back there and
    opens a CUDA context (about 0.5 GiB), and Triton launches there too: every thread that works on a GPU calls this.
    """
    if on_gpu(device):
        torch.cuda.set_device(device)
