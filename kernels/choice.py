"""The one choice between a Triton kernel and plain torch: by the caller's word, the device, and the kernel's limits."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

KERNELS = ("auto", "triton", "torch")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
PLAIN = frozenset((Tensor, torch.nn.Parameter, type(None)))
OLDEST = 8  # major compute capability: below it bf16 is not native, and nothing was compiled or counted
MAX_WIDTH = 4096  # channels of a row that one program holds
MAX_TOKENS = 2048  # tokens of an image that one program of the spatial normalisation holds
MAX_ROWS = 1 << 30  # rows are numbered in 32 bits, with room for the last tile

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
    major = capability(device)[0]
    return "" if major >= OLDEST else f"this GPU's compute capability is {major}.x and {OLDEST}.0 is needed"


def capability(device: torch.device) -> tuple[int, int]:
    """Major and minor compute capability of a GPU, asked for once: torch takes longer to answer than to launch."""
    return _asked(device) if torch.compiler.is_compiling() else _remembered(device)  # Dynamo warns of caches


def _asked(device: torch.device) -> tuple[int, int]:
    properties = torch.cuda.get_device_properties(device)
    return properties.major, properties.minor


_remembered = functools.cache(_asked)


def unsupported(*tensors: Tensor) -> str:
    """What of the tensors' dtypes and shapes is beyond every kernel; empty if nothing."""
    for x in tensors:
        if x.dtype not in DTYPES:
            return f"{x.dtype} is not bfloat16, float16 or float32"
        width = x.shape[-1]
        if not 1 <= width <= MAX_WIDTH:
            return f"{width} channels are more than {MAX_WIDTH}"
        if x.numel() > MAX_ROWS * width:
            return f"{x.numel() // width} rows are more than {MAX_ROWS}"
    return ""


def untraced(*tensors: Tensor | None) -> bool:
    """Whether a call may go past the operators of torch.library, whose dispatch takes longer than a small kernel.

    It may not where something looks on: torch.compile, a trace, a dispatch mode (fake tensors, selective
    checkpointing), a transform of torch.func, a tensor of a subclass.
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or torch._C._get_tracing_state():
        return False
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    return PLAIN.issuperset(map(type, tensors))


def apply_of(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """`function.apply` for calls that are `untraced`: without torch's own look for transforms of torch.func."""
    return super(torch.autograd.Function, function).apply
