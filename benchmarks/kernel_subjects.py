"""What the kernel benchmark compares: for each kernel its inputs, the bytes it must move, and the competitors."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from repa_scale.kernels import cosine_loss, normalize_tokens, projector_cosine_loss
from torch import Tensor, nn

from benchmarks.kernel_timing import Work

TOKENS = 256  # of an image
HEAD = (1152, 2048)  # width of SiT-XL and of its projector
COMPILED = "compile"
PRODUCTS = "matrix products alone"


@dataclass(frozen=True)
class Subject:
    """One kernel at one size.

    Attributes:
        bytes: what must move, forward and backward.
        flops: of the matrix products, forward and backward.
        build: makes inputs; `x` is the one with a gradient.
        works: by competitor. `compile` is plain: see `compiled`.
    """

    bytes: int
    flops: int
    build: Callable[[], dict[str, Tensor]]
    works: dict[str, Work]


def subject(kernel: str, rows: int, width: int, device: torch.device, head: tuple[int, int] = HEAD) -> Subject:
    """`cosine`, `layernorm`, `spatial` or `projector`, `rows` x `width`; bf16 on CUDA, fp32 on a CPU.

    Args:
        head: width of the tokens and of the hidden layers of the projector.
    """
    images = rows // TOKENS
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32  # a CPU multiplies bf16 slowly

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=dtype)

    if kernel == "cosine":
        return Subject(
            rows * (5 * dtype.itemsize * width + 32),
            0,
            lambda: {"x": normal(images, TOKENS, width).requires_grad_(), "y": normal(images, TOKENS, width)},
            {
                "ours": lambda i: cosine_loss(i["x"], i["y"], kernel="triton"),
                "eager": lambda i: cosine_loss(i["x"], i["y"], kernel="torch"),
                "public loop": public_loop,
                COMPILED: lambda i: cosine_loss(i["x"], i["y"], kernel="torch"),
            },
        )
    if kernel in ("layernorm", "spatial"):
        affine = (torch.randn(width, device=device), torch.randn(width, device=device))
        settings = {
            "kind": kernel,
            "prefix": 1,
            "out_dtype": dtype,
            "affine": affine if kernel == "layernorm" else None,
        }
        works: dict[str, Work] = {
            "ours": lambda i: normalize_tokens(i["x"], **settings, kernel="triton"),
            "eager": lambda i: normalize_tokens(i["x"], **settings, kernel="torch"),
        }
        if kernel == "layernorm" and device.type == "cuda" and importlib.util.find_spec("liger_kernel"):
            from liger_kernel.ops.layer_norm import LigerLayerNormFunction as Liger

            works["Liger, then a slice"] = lambda i: Liger.apply(i["x"], *affine, 1e-6)[:, 1:].contiguous()
        works[COMPILED] = lambda i: normalize_tokens(i["x"], **settings, kernel="torch")
        moved = rows * width * 2 * dtype.itemsize
        return Subject(moved, 0, lambda: {"x": normal(images, 1 + TOKENS, width)}, works)
    torch.manual_seed(0)
    sizes = ((head[0], head[1]), (head[1], head[1]), (head[1], width))
    linears = [nn.Linear(*size, device=device, dtype=dtype) for size in sizes]
    for parameter in (p for linear in linears for p in linear.parameters()):
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))  # no sums over calls
    projector = nn.Sequential(linears[0], nn.SiLU(), linears[1], nn.SiLU(), linears[2])

    def loss(i: dict[str, Tensor], chosen: str, chunk: int | None = None) -> Tensor:
        return projector_cosine_loss(i["x"], projector, i["y"], chunk=chunk, kernel=chosen)

    return Subject(
        rows * 5 * dtype.itemsize * width,
        3 * 2 * rows * sum(a * b for a, b in sizes),
        lambda: {"x": normal(images, TOKENS, head[0]).requires_grad_(), "y": normal(images, TOKENS, width)},
        {
            "ours": lambda i: loss(i, "triton"),
            "ours, chunks of 8192": lambda i: loss(i, "triton", 8192),
            "eager": lambda i: loss(i, "torch"),
            PRODUCTS: lambda i: products(i["x"].detach().flatten(0, 1), linears),
            COMPILED: lambda i: loss(i, "torch"),
        },
    )


def compiled(work: Work, backend: str) -> Work:
    """`work` compiled with nothing of an earlier case in the way.

    torch.compile keeps its graphs by code object, which all cases share: the ninth shape would run eagerly. With
    `fullgraph` that, like a graph break, is an error instead.
    """
    torch._dynamo.reset()
    return torch.compile(work, dynamic=False, fullgraph=True, backend=backend)


def public_loop(i: dict[str, Tensor]) -> Tensor:
    """The alignment loss as the public REPA code computes it: image by image, in fp32."""
    total = torch.zeros((), device=i["x"].device)
    for x, y in zip(i["x"].float(), i["y"].float(), strict=True):
        total = total - (F.normalize(x, dim=-1) * F.normalize(y, dim=-1)).sum(-1).mean()
    return total / len(i["x"])


def products(x: Tensor, linears: list[nn.Linear]) -> Tensor:
    """The nine matrix products of a projector's forward and backward pass, and nothing else."""
    inputs = [x]
    with torch.no_grad():
        for linear in linears:
            inputs.append(torch.addmm(linear.bias, inputs[-1], linear.weight.t()))
        gradient = inputs[-1]
        for linear, before in zip(reversed(linears), reversed(inputs[:-1]), strict=True):
            weight = gradient.t() @ before
            gradient = gradient @ linear.weight
    return weight
