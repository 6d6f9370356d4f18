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


def counted_peak(make: Callable[[], list[Tensor]], step: Callable[..., object]) -> int:
    """The most bytes that `step(*make())` holds at a time beyond what `make` made. Kernels are not started."""
    with ExitStack() as stack:
        stack.enter_context(FakeTensorMode())
        stack.enter_context(mock.patch("repa_scale.kernels.table.start", lambda *_: None))
        stack.enter_context(mock.patch.object(Tensor, "data_ptr", lambda _: 0))
        tensors = make()
        counter = Counter()
        counter.known(*tensors)
        with counter:
            step(*tensors)
        return counter.most


def projector_step(kernel: str, rows: int, sizes: tuple[int, int, int], chunk: int = 0) -> int:
    """Peak of forward and backward of projector and loss in bf16: `triton`, or `torch` for the plain form."""
    from repa_scale.kernels import projector, projector_cosine_loss
    from torch import nn

    width, inner, out = sizes
    images, dtype = rows // 256, torch.bfloat16
    layers = (nn.Linear(width, inner), nn.SiLU(), nn.Linear(inner, inner), nn.SiLU(), nn.Linear(inner, out))

    def make() -> list[Tensor]:
        with torch.device("cpu"):
            network = nn.Sequential(*layers)
        parameters = [torch.empty(p.shape, dtype=dtype, requires_grad=True) for p in network.parameters()]
        hidden = torch.empty(images, 256, width, dtype=dtype, requires_grad=True)
        return [hidden, torch.empty(images, 256, out, dtype=dtype), *parameters]

    def plain(hidden: Tensor, target: Tensor, *parameters: Tensor) -> object:
        network = nn.Sequential(*layers)
        for linear, weight, bias in zip(network[::2], parameters[::2], parameters[1::2], strict=True):
            linear.weight, linear.bias = nn.Parameter(weight), nn.Parameter(bias)
        loss = projector_cosine_loss(hidden, network, target, kernel="torch")
        loss.backward()
        return loss

    @torch.no_grad()
    def fused(hidden: Tensor, target: Tensor, *parameters: Tensor) -> object:
        if chunk:
            return projector.in_chunks(hidden, list(parameters), target, None, dtype, max(1, chunk // 256), True)
        loss, *saved = projector.forward(hidden, list(parameters), target, None, False, dtype)
        return loss, projector.backward(loss, hidden, list(parameters[::2]), target, None, saved, False)

    return counted_peak(make, fused if kernel == "triton" else plain)
