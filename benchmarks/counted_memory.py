"""Peak memory without running anything: tensors without contents, whose storages are counted while they live.

The allocations of a step do not depend on the device (but for cuBLAS's workspace and the allocator's rounding), so a
step of 65,536 rows can be counted on a machine that could not hold it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import ExitStack
from unittest import mock

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Counter(TorchDispatchMode):
    """Bytes of the storages that were made inside it: now, and at most."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[int] = set()
        self.now = self.most = 0

    def known(self, *tensors: Tensor) -> None:
        """Leaves these out."""
        self.seen |= {tensor.untyped_storage()._cdata for tensor in tensors}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "repa_scale":  # its stand-in for fake tensors makes no buffers on the way
            with self:
                return OPDEFS[function._schema.name]._init_fn(*args, **(kwargs or {}))
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self.seen:
                storage = tensor.untyped_storage()
                self.seen.add(storage._cdata)
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
        return out

    def _freed(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.now -= size


def counted_peak(make: Callable[[], list[Tensor]], step: Callable[..., object], traced: bool = False) -> int:
    """The most bytes that `step(*make())` holds at a time beyond what `make` made.

    Our kernels are not started, but all around them runs as it does on a GPU: their buffers, and autograd.

    Args:
        traced: go through the operators of torch.library, as under a dispatch mode.
    """
    with ExitStack() as stack:
        for name, stand_in in (("table.start", None), ("choice.unavailable", ""), ("choice.untraced", not traced)):
            patch = mock.patch(f"repa_scale.kernels.{name}", lambda *_, answer=stand_in: answer)
            stack.enter_context(patch)
        stack.enter_context(FakeTensorMode())
        stack.enter_context(mock.patch.object(Tensor, "data_ptr", lambda _: 0))
        tensors = make()
        counter = Counter()
        counter.known(*tensors)
        with counter:
            step(*tensors)
        return counter.most


def projector_step(
    kernel: str, rows: int, sizes: tuple[int, int, int], chunk: int | None = None, traced: bool = False
) -> int:
    """Peak of forward and backward of projector and loss in bf16, all gradients included.

    Args:
        kernel: `triton`, or `torch` for the plain form.
        rows: a multiple of 256.
        sizes: width of the tokens, of the projector inside, of the targets.
        chunk, traced: as of `projector_cosine_loss` and `counted_peak`.
    """
    from repa_scale.kernels import projector_cosine_loss
    from torch import nn

    width, inner, out = sizes
    images, dtype = rows // 256, torch.bfloat16
    layers = (nn.Linear(width, inner), nn.SiLU(), nn.Linear(inner, inner), nn.SiLU(), nn.Linear(inner, out))

    def make() -> list[Tensor]:
        parameters = [torch.empty(p.shape, dtype=dtype) for p in nn.Sequential(*layers).parameters()]
        hidden = torch.empty(images, 256, width, dtype=dtype, requires_grad=True)
        return [hidden, torch.empty(images, 256, out, dtype=dtype), *parameters]

    def step(hidden: Tensor, target: Tensor, *parameters: Tensor) -> list[Tensor | None]:
        network = nn.Sequential(*layers)
        for linear, weight, bias in zip(network[::2], parameters[::2], parameters[1::2], strict=True):
            linear.weight, linear.bias = nn.Parameter(weight), nn.Parameter(bias)
        projector_cosine_loss(hidden, network, target, chunk=chunk, kernel=kernel).backward()
        return [hidden.grad, *(p.grad for p in network.parameters())]

    return counted_peak(make, step, traced)
