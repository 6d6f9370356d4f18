"""Cases of what stands around the kernels: autograd, operators, torch.compile, checkpointing, memory.

As in kernel_cases.py, a case is a function of a device.
"""

from __future__ import annotations

from functools import partial

import torch
from kernel_cases import BF16, FP16, FP32, TOLERANCE, made, papers_projector
from repa_scale.kernels import cosine_loss, normalize_tokens, projector_cosine_loss
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


def check_checkpointing(device: str) -> None:
    """Recomputed in the backward pass, it gives the same bits."""
    from torch.utils.checkpoint import checkpoint

    projector = papers_projector((48, 96, 40), FP32, device)
    hidden, target = (made((3, 5, size), FP32, "plain", i, device) for i, size in enumerate((48, 40)))
    results = []
    for wrap in (lambda f, *a: f(*a), partial(checkpoint, use_reentrant=False)):
        projector.zero_grad()
        x = hidden.clone().requires_grad_()
        wrap(lambda h: projector_cosine_loss(h, projector, target, kernel="triton"), x).backward()
        results.append([x.grad, *(p.grad.clone() for p in projector.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def check_compile(device: str, backend: str = "aot_eager") -> None:
    """torch.compile takes each function into one graph; losses and gradients are those of eager torch.

    Inductor writes the parts between our kernels anew: other orders of sums, other rounding of exponentials. What it
    may change is measured against a tensor's largest value, because gradients near zero are sums that cancel.
    """
    tolerance = 1e-6 if backend == "aot_eager" else TOLERANCE["projector fp32"]
    projector = papers_projector((48, 96, 40), FP32, device)
    hidden, target = (made((3, 5, size), FP32, "plain", i, device) for i, size in enumerate((48, 40)))

    def whole(h, chunk):
        y = normalize_tokens(target, "spatial", kernel="triton")
        y = normalize_tokens(y, "layernorm", 1, kernel="triton")
        fused = projector_cosine_loss(h[:, 1:], projector, y, chunk=chunk, kernel="triton")
        return fused + cosine_loss(projector(h[:, 1:]), y, kernel="triton")

    for chunk in (None, 4):
        results = []
        for function in (whole, torch.compile(whole, fullgraph=True, backend=backend)):
            projector.zero_grad()
            x = hidden.clone().requires_grad_()
            loss = function(x, chunk)
            loss.backward()
            results.append([loss.detach(), x.grad, *(p.grad.clone() for p in projector.parameters())])
        for compiled, eager in zip(*results, strict=True):
            error = (compiled - eager).abs().max() / eager.abs().max()
            assert error <= tolerance, f"chunk {chunk}: off by {error:.1e} of the largest value"


def check_operators(device: str) -> None:
    """torch's own check of an operator: its schema, and that its fake gives the shapes and dtypes of the real one."""
    from repa_scale.kernels import cosine, projector, tokens

    x, y = (made((3, 5, 40), BF16, "plain", seed, device) for seed in (0, 1))
    weight, upstream = torch.rand(15, device=device), torch.rand(3, device=device)
    parameters = [p.detach() for p in papers_projector((40, 48, 40), BF16, device).parameters()]
    _, scalars = cosine.forward(x, y, weight, True)
    _, *saved = projector.forward(x, parameters, y, None, True, BF16)
    check = partial(torch.library.opcheck, test_utils=("test_schema", "test_faketensor"))
    for by_image in (True, False):
        check(cosine.cosine_loss_op, (x, y, weight, by_image))
        check(projector.projector_loss_op, (x, parameters, y, None, by_image, BF16))
    check(cosine.cosine_loss_backward_op, (upstream, x, y, weight, scalars, True))
    check(projector.projector_loss_backward_op, (upstream, x, parameters[::2], y, None, saved, True))
    for gradients in (True, False):
        check(projector.projector_loss_in_chunks_op, (x, parameters, y, weight, BF16, 2, gradients))
    check(tokens.normalize_tokens_op, (x, "layernorm", 0.6, 1e-6, FP16, weight[:1].expand(40), weight[:1].expand(40)))
    check(tokens.normalize_tokens_op, (x, "spatial", 0.6, 1e-6, FP32, None, None))


def check_second_derivative(device: str) -> None:
    """It is refused in words."""
    x, y = (made((1, 3, 40), FP32, "plain", seed, device) for seed in (0, 1))
    projector = papers_projector((40, 48, 40), FP32, device)
    for loss_of in (partial(cosine_loss, target=y), partial(projector_cosine_loss, projector=projector, target=y)):
        x = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(loss_of(x, kernel="triton"), x, create_graph=True)
        try:
            gradient.square().sum().backward()
        except RuntimeError as error:
            assert "no second derivative" in str(error)
        else:
            raise AssertionError("a second derivative came out")
    x = x.detach().requires_grad_()
    try:  # its gradients are made in the forward pass: a second derivative would be zero
        torch.autograd.grad(projector_cosine_loss(x, projector, y, chunk=2, kernel="triton"), x, create_graph=True)
    except RuntimeError as error:
        assert "no second derivative" in str(error)
    else:
        raise AssertionError("a graph of the gradient came out")


class Counting(TorchDispatchMode):
    """Counts our operators: under a dispatch mode a call goes through them."""

    def __init__(self) -> None:
        super().__init__()
        self.ours = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.ours += function.namespace == "repa_scale"
        return function(*args, **(kwargs or {}))


def check_direct_calls(device: str) -> None:
    """A call that nothing traces goes past the operators, and computes the same bits."""
    projector = papers_projector((48, 96, 40), FP32, device)
    hidden, target = (made((3, 5, size), FP32, "plain", i, device) for i, size in enumerate((48, 40)))
    weight = torch.rand((3, 1), generator=torch.Generator().manual_seed(7)).to(device)

    def losses(h: Tensor) -> list[Tensor]:
        y = normalize_tokens(normalize_tokens(target, "spatial", kernel="triton"), "layernorm", kernel="triton")
        fused = partial(projector_cosine_loss, h, projector, y, weight, kernel="triton")
        plain = partial(cosine_loss, h[..., :40], y, weight, kernel="triton")
        return [fused(), fused(reduction="image"), fused(chunk=10), plain(), plain(reduction="image")]

    def step() -> list[Tensor]:
        projector.zero_grad()
        x = hidden.clone().requires_grad_()
        found = losses(x)
        sum(loss.sum() for loss in found).backward()
        return [*(loss.detach() for loss in found), x.grad, *(p.grad for p in projector.parameters())]

    direct, names = step(), set()
    loss = losses(hidden.clone().requires_grad_())[0]
    names.add(type(loss.grad_fn).__name__)
    with Counting() as counting:
        traced = step()
    assert names == {"LossBackward"} and counting.ours == 2 + 5 + 4, (names, counting.ours)
    assert all(torch.equal(a, b) for a, b in zip(direct, traced, strict=True))
