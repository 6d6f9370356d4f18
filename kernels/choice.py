"""The one choice between a Triton kernel and plain torch: by the caller's word, the device, and the kernel's limits."""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor

KERNELS = ("auto", "triton", "torch")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
OLDEST = 8  # major compute capability: below it bf16 is not native, and nothing was compiled or counted
MAX_WIDTH = 4096  # channels of a row that one program holds
MAX_TOKENS = 2048  # tokens of an image that one program of the spatial normalisation holds

INSTALLED = importlib.util.find_spec("triton") is not None
# Triton reads the variable when it is imported, and so do we: a later change has no effect on either.
INTERPRETED = INSTALLED and os.environ.get("TRITON_INTERPRET") == "1"


def use_triton(kernel: str, tensor: Tensor, obstacle: str = "") -> bool:
    """`uses_triton` on the tensor's device, for a call that may have an obstacle of its own.

    Args:
        obstacle: what of this call the kernel cannot do; empty if it can.
    """
    return tensor.numel() > 0 and uses_triton(kernel, tensor.device, obstacle)


def uses_triton(kernel: str, device: torch.device, obstacle: str = "") -> bool:
    """Whether the Triton kernels run. `auto`: on a CUDA device wherever they can, plain torch elsewhere.

    Args:
        kernel: `auto`, `triton` or `torch`.

    Raises:
        ValueError: another word, or `triton` where the kernel cannot run.
    """
    if kernel not in KERNELS:
        raise ValueError(f"kernel={kernel!r} must be one of {', '.join(KERNELS)}")
    if kernel == "torch":
        return False
    if kernel == "auto":
        return device.type == "cuda" and not obstacle and not unavailable(device)
    if problem := obstacle or unavailable(device):
        raise ValueError(f"kernel='triton': {problem}; use kernel='auto' or 'torch'")
    return True


def unavailable(device: torch.device) -> str:
    """Why no Triton kernel runs on `device`; empty if one does."""
    if not INSTALLED:
        return "triton is not installed"
    if device.type == "cpu":
        return "" if INTERPRETED else "a CPU runs it in Triton's interpreter alone (TRITON_INTERPRET=1 at the start)"
    if device.type != "cuda" or torch.version.hip is not None:
        return f"{device.type} devices of this build of torch are not supported"
    major = torch.cuda.get_device_properties(device).major
    return "" if major >= OLDEST else f"this GPU's compute capability is {major}.x and {OLDEST}.0 is needed"


def unsupported(*tensors: Tensor) -> str:
    """What of the tensors' dtypes and widths is beyond every kernel; empty if nothing."""
    for x in tensors:
        if x.dtype not in DTYPES:
            return f"{x.dtype} is not bfloat16, float16 or float32"
        if not 1 <= x.shape[-1] <= MAX_WIDTH:
            return f"{x.shape[-1]} channels are more than {MAX_WIDTH}"
    return ""
