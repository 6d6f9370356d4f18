"""What every kernel is held against: shapes, dtypes, kinds of input, and tolerances with their reasons.

A case is a function of a device. `interpreted.py` runs the small ones in Triton's interpreter, `test_on_gpu.py` all of
them on a GPU. The reference is computed in float64 from the same rounded inputs, so that an error is the kernel's own.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from functools import partial
from unittest import mock

import torch
from repa_scale.kernels import cosine_loss, normalize_tokens, projector_cosine_loss
from repa_scale.kernels.choice import INTERPRETED
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
NAMES = {BF16: "bf16", FP16: "fp16", FP32: "fp32"}
DTYPES = tuple(NAMES)
EPS = 1e-12

# Half a unit in the last place, relative (a whole one where Triton's interpreter makes bf16: it cuts off instead of
# rounding); and half of the smallest step, which is all that is left of tiny results.
ROUNDING = {BF16: 2.0**-7 if INTERPRETED else 2.0**-8, FP16: 2.0**-11, FP32: 2.0**-24}
SMALLEST = {BF16: 2.0**-134, FP16: 2.0**-25, FP32: 2.0**-150}
TOLERANCE = {
    # of a row's cosine, absolute: three sums of up to 4,096 fp32 products in a tree, each a few 2^-24 of 1
    "cosine": 1e-6,
    # of a gradient, of weight / |x|: the same sums, and the difference of two terms that are each at most that large
    "gradient": 2e-6,
    # of a normalised token, of max|x| / std: mean and centring are rounded at the size of x, then divided by std
    "layernorm": 1e-6,
    # the same; sums of up to 2,048 tokens
    "spatial": 2e-6,
    # of the projector's gradients, against eager torch's own error from float64 in the same dtype: other order of the
    # sums, one rounding more (SiLU) and one less (no normalised copy of z). Rounding noise differs by this factor.
    "projector": 2.0,
    # and absolute, of the largest value: matrix products in fp32 (TF32 is off) over up to 2,048 elements
    "projector fp32": 1e-5,
}
WIDTHS = (1, 3, 112, 384, 768, 1000, 1024, 1280, 1536)
FLAVOURS = ("prefix", "offset", "strided", "zeros", "huge", "tiny", "vanishing", "weighted", "not finite")


def small_cases() -> dict[str, Callable[[str], None]]:
    """Few rows: 1 row, odd rows, every width, every pair of dtypes, every kind of input."""
    cases: dict[str, Callable[[str], None]] = {}
    for width in (*WIDTHS, 4096):
        _add(cases, check_cosine, (1, 3, width), (BF16, BF16))
        _add(cases, check_cosine, (1, 1, width), (FP32, FP32))
        _add(cases, check_layernorm, (2, 3, width), (BF16, BF16), "prefix")
    for pair in itertools.product(DTYPES, DTYPES):
        _add(cases, check_cosine, (3, 5, 768), pair)
        _add(cases, check_layernorm, (3, 3, 768), pair, "affine")
        _add(cases, check_spatial, (2, 9, 112), pair)
    for flavour, dtype in itertools.product(FLAVOURS, DTYPES):
        _add(cases, check_cosine, (3, 5, 112), (dtype, dtype), flavour)
    for flavour, dtype in itertools.product(("prefix", "offset", "strided", "large mean"), DTYPES):
        _add(cases, check_layernorm, (3, 5, 112), (dtype, dtype), flavour)
        _add(cases, check_spatial, (3, 5, 112), (dtype, dtype), flavour)
    for tokens in (2, 64, 196, 256, 1024, 2048):
        _add(cases, check_spatial, (1, tokens, 40), (BF16, FP32), "prefix")
        _add(cases, check_spatial, (1, tokens, 3), (FP16, FP32), "constant channels")
        _add(cases, check_spatial, (1, tokens, 3), (FP32, FP32), "constant channels")
    for dtype, (reduction, weighted) in itertools.product(DTYPES, (("mean", True), ("image", False))):
        cases[f"projector {NAMES[dtype]} {reduction}"] = partial(check_projector, dtype, reduction, weighted)
    for dtype in DTYPES:
        cases[f"projector {NAMES[dtype]} in chunks"] = partial(check_projector, dtype, "mean", True, chunk=7)
    from autograd_cases import (
        check_checkpointing,
        check_compile,
        check_direct_calls,
        check_operators,
        check_second_derivative,
    )

    for check in (
        check_guards, check_encoder, check_mean_over_many, check_rows_alone, check_repeats, check_autocast,
        check_parts_of_the_projector, check_checkpointing, check_compile, check_second_derivative,
        check_no_gradient_for_targets, check_refusals, check_operators, check_direct_calls, check_many_images,
    ):  # fmt: skip
        cases[check.__name__.removeprefix("check_").replace("_", " ")] = check
    return cases


def large_cases() -> dict[str, Callable[[str], None]]:
    """For a GPU: 65,537 rows and the trainer's shapes."""
    cases: dict[str, Callable[[str], None]] = {}
    for width, pair in itertools.product((768, 1000, 1536), ((BF16, BF16), (BF16, FP32), (FP32, FP32))):
        _add(cases, check_cosine, (1, 65537, width), pair)
        _add(cases, check_cosine, (32, 256, width), pair, "prefix")
        _add(cases, check_layernorm, (1, 65537, width), pair, "affine")
        _add(cases, check_spatial, (32, 256, width), pair, "prefix")
        _add(cases, check_spatial, (8, 1024, width), pair, "prefix")
    for dtype in DTYPES:
        sizes = {"shape": (32, 256), "sizes": (1152, 2048, 768)}
        cases[f"projector {NAMES[dtype]} large"] = partial(check_projector, dtype, "image", False, **sizes)
        cases[f"projector {NAMES[dtype]} large, chunks"] = partial(
            check_projector, dtype, "mean", True, chunk=999, **sizes
        )
    return cases


def _add(cases: dict, check: Callable, shape: tuple, pair: tuple, flavour: str = "plain") -> None:
    kernel, sides = check.__name__.removeprefix("check_"), "x".join(map(str, shape))
    cases[f"{kernel} {sides} {'-'.join(NAMES[d] for d in pair)} {flavour}"] = partial(check, shape, pair, flavour)


def made(shape: tuple[int, ...], dtype: torch.dtype, flavour: str, seed: int, device: str) -> Tensor:
    """(N, T, z) normal numbers, as a view or with values as the flavour says. Rows around a view hold NaN."""
    n, tokens, width = shape
    # On the device: a core takes seconds for 100 million numbers, and the tests of a GPU share the cores.
    generator = torch.Generator(device).manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64, device=device)
    # Tiny: a length of a third of EPS, where it is a constant in the gradient (fp16 does not reach so far down).
    # Vanishing: squares underflow.
    tiny, vanishing = (1e-4, 1e-7) if dtype is FP16 else (3e-14, 1e-25)
    x *= {"huge": 1e4, "tiny": tiny, "vanishing": vanishing}.get(flavour, 1.0)
    if flavour == "large mean":
        x += 50 * torch.randn(width, generator=generator, dtype=torch.float64, device=device)
    if flavour == "zeros":
        x[seed % n, 0] = 0.0
    x = x.to(dtype)
    if flavour == "not finite":
        for i, value in enumerate((math.nan, math.inf, -math.inf)):
            x.view(-1, width)[2 * i + seed, -1] = value
    around = partial(torch.full, fill_value=math.nan, dtype=dtype, device=device)
    if flavour == "prefix":
        whole = around((n, 5 + tokens, width))
        view = whole[:, 5:]
    elif flavour == "offset":
        whole = around((x.numel() + 1,))
        view = whole[1:].view(shape)
    elif flavour == "strided":
        whole = around((n, tokens, 2 * width))
        view = whole[:, :, ::2]
    else:
        return x
    view.copy_(x)
    return view


def close(value: Tensor, wanted: Tensor, tolerance: Tensor | float, what: str) -> None:
    """Within `tolerance` and the rounding of the value's dtype; or both NaN, or the same infinity."""
    dtype = value.dtype
    value, rounded = value.double().cpu(), wanted.to(dtype).double().cpu()
    wanted = wanted.double().cpu()
    allowed = torch.as_tensor(tolerance).double().cpu() + ROUNDING[dtype] * wanted.abs() + SMALLEST[dtype]
    good = ((value - wanted).abs() <= allowed) | (value == rounded) | (value.isnan() & wanted.isnan())
    worst = ((value - wanted).abs() / allowed).nan_to_num().max()
    assert good.all(), f"{what}: {int((~good).sum())} of {good.numel()} values are off, the worst {worst:.1f} times"


def differentiated(x: Tensor, y: Tensor, weight: Tensor | None, upstream: Tensor, reduction: str, kernel: str) -> tuple:
    """Loss and gradient."""
    x = x.detach().requires_grad_()
    loss = cosine_loss(x, y, weight, reduction, kernel)
    (gradient,) = torch.autograd.grad((loss * upstream.to(loss.dtype)).sum(), x)
    return loss.detach(), gradient


def check_cosine(shape: tuple[int, int, int], pair: tuple, flavour: str, device: str) -> None:
    n, tokens, _ = shape
    x, y = (made(shape, dtype, flavour, seed, device) for seed, dtype in enumerate(pair))
    generator = torch.Generator().manual_seed(7)
    weight = torch.rand((n, 1), generator=generator).to(device) if flavour == "weighted" else None
    for reduction in ("image", "mean"):
        upstream = torch.rand((n,) if reduction == "image" else (), generator=generator).to(device) + 0.5
        loss, gradient = differentiated(x, y, weight, upstream, reduction, "triton")
        assert loss.dtype == FP32 and gradient.dtype == x.dtype and gradient.is_contiguous()
        if flavour == "not finite":  # in float64 nothing overflows on the way: the plain fp32 form is what counts
            wanted, slope = differentiated(x.float(), y.float(), weight, upstream, reduction, "torch")
        else:
            wanted, slope = differentiated(x.double(), y.double(), weight, upstream, reduction, "torch")
            assert loss.isfinite().all() and (gradient.isfinite().all() or (x.dtype is FP16 and flavour == "zeros"))
        close(loss, wanted, TOLERANCE["cosine"], "loss")
        per_row = upstream.double().view(-1, 1) / (tokens if reduction == "image" else n * tokens)
        per_row = per_row * (1.0 if weight is None else weight.double())
        length = x.double().norm(dim=-1).nan_to_num().clamp_min(EPS)
        close(gradient, slope, TOLERANCE["gradient"] * (per_row / length)[..., None], "gradient")


def check_layernorm(shape: tuple[int, int, int], pair: tuple, flavour: str, device: str) -> None:
    width = shape[-1]
    x = made(shape, pair[0], flavour, 1, device)
    affine = None
    if flavour == "affine":
        affine = tuple(torch.randn(width, generator=torch.Generator().manual_seed(i)).to(device) for i in (2, 3))
    out = normalize_tokens(x, "layernorm", out_dtype=pair[1], affine=affine, kernel="triton")
    wanted = normalize_tokens(x.double(), "layernorm", affine=affine, kernel="torch")
    assert out.shape == x.shape and out.dtype == pair[1] and out.is_contiguous()
    largest = x.double().abs().amax(-1, keepdim=True) / (x.double().var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
    factor = affine[0].double().abs() if affine else 1.0
    close(out, wanted, TOLERANCE["layernorm"] * (1 + largest) * factor, "layernorm")


def check_spatial(shape: tuple[int, int, int], pair: tuple, flavour: str, device: str) -> None:
    x = made(shape, pair[0], flavour, 1, device)
    if flavour == "constant channels":
        x[:, :, :2] = torch.tensor([0.1, 3e4 if pair[0] is FP16 else 1e6], dtype=pair[0], device=device)
    prefix = made((shape[0], 5, shape[2]), pair[0], "plain", 2, device)
    whole = torch.cat([prefix, x], dim=1) if flavour == "plain" else x
    skip = 5 if flavour == "plain" else 0
    out = normalize_tokens(whole, "spatial", skip, gamma=0.6, out_dtype=pair[1], kernel="triton")
    wanted = normalize_tokens(x.double(), "spatial", gamma=0.6, kernel="torch")
    assert out.shape == x.shape and out.dtype == pair[1] and out.is_contiguous()
    largest = x.double().abs().amax(1, keepdim=True) / (x.double().std(1, keepdim=True) + 1e-6)
    close(out, wanted, TOLERANCE["spatial"] * largest, "spatial")


def check_many_images(device: str) -> None:
    """More images than one launch of the spatial kernel takes: the same bits."""
    from repa_scale.kernels import tokens

    x = made((19, 5, 40), BF16, "prefix", 1, device)
    whole = normalize_tokens(x, "spatial", kernel="triton")
    with mock.patch.object(tokens, "IMAGES", 8):
        assert torch.equal(normalize_tokens(x, "spatial", kernel="triton"), whole)


def papers_projector(sizes: tuple[int, int, int], dtype: torch.dtype, device: str) -> nn.Sequential:
    width, inner, out = sizes
    torch.manual_seed(0)
    layers = (nn.Linear(width, inner), nn.SiLU(), nn.Linear(inner, inner), nn.SiLU(), nn.Linear(inner, out))
    return nn.Sequential(*layers).to(device, dtype)


def projector_results(projector, hidden, target, weight, upstream, dtype=None, **settings) -> list[Tensor]:
    """Loss, gradient of hidden, gradients of the parameters."""
    projector = copy.deepcopy(projector).to(dtype or hidden.dtype)
    hidden = hidden.detach().to(dtype or hidden.dtype, copy=True).requires_grad_()
    loss = projector_cosine_loss(hidden, projector, target.to(dtype or target.dtype), weight, **settings)
    (loss * upstream.to(loss.dtype)).sum().backward()
    return [loss.detach(), hidden.grad, *(p.grad for p in projector.parameters())]


def check_projector(
    dtype: torch.dtype, reduction: str, weighted: bool, device: str, chunk=None, shape=(3, 5), sizes=(48, 96, 40)
) -> None:
    projector = papers_projector(sizes, dtype, device)
    hidden, target = (made((*shape, size), dtype, "prefix", i, device) for i, size in enumerate((sizes[0], sizes[2])))
    generator = torch.Generator().manual_seed(9)
    weight = torch.rand(shape, generator=generator).to(device) if weighted else None
    # A loss scale, without which fp16 gradients of a mean over many rows are lost to underflow in eager torch as well.
    upstream = (torch.rand((shape[0],) if reduction == "image" else (), generator=generator) + 0.5).to(device) * 1024
    arguments = (projector, hidden, target, weight, upstream)
    exact = projector_results(*arguments, dtype=torch.float64, reduction=reduction, kernel="torch")
    eager = projector_results(*arguments, reduction=reduction, kernel="torch")
    ours = projector_results(*arguments, reduction=reduction, chunk=chunk, kernel="triton")
    names = ["loss", "hidden", *(name for name, _ in projector.named_parameters())]
    for name, a, b, c in zip(names, ours, eager, exact, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape, name
        largest = c.abs().max()
        error, of_eager = ((value.double() - c).abs().max() / largest for value in (a, b))
        allowed = TOLERANCE["projector"] * of_eager + TOLERANCE["projector fp32"] + 2 * ROUNDING[dtype]
        assert error <= allowed, f"{name}: error {error:.1e}, eager torch's {of_eager:.1e}"


class Guarded(TorchDispatchMode):
    """Gives every buffer that is allocated inside it a frame of a known value on both sides."""

    EMPTY = (torch.ops.aten.empty.memory_format, torch.ops.aten.new_empty.default, torch.ops.aten.empty_like.default)
    FRAME, VALUE = 4096, 77.0

    def __init__(self) -> None:
        super().__init__()
        self.buffers: list[Tensor] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function not in self.EMPTY or not out.is_floating_point():
            return out
        framed = torch.full((out.numel() + 2 * self.FRAME,), self.VALUE, dtype=out.dtype, device=out.device)
        self.buffers.append(framed)
        return framed[self.FRAME : self.FRAME + out.numel()].view(out.shape)

    def intact(self) -> bool:
        ends = [end for b in self.buffers for end in (b[: self.FRAME], b[-self.FRAME :])]
        return len(ends) > 0 and all(bool((end == self.VALUE).all()) for end in ends)


def check_guards(device: str) -> None:
    """Nothing is written outside a buffer, and (the inputs stand among NaN) nothing outside is used."""
    from repa_scale.kernels import cosine, projector, tokens

    for width, dtype in itertools.product((1, 3, 112, 1000), (BF16, FP32)):
        x, y = (made((3, 5, width), dtype, "prefix", seed, device) for seed in (0, 1))
        with Guarded() as guarded:
            loss, scalars = cosine.forward(x, y, None, True)
            gradient = cosine.backward(torch.ones_like(loss), x, y, None, scalars, True)
            mean, _ = cosine.forward(x, y, None, False)
            normed = [tokens.normalize(x, kind, 0.6, 1e-6, dtype, None) for kind in ("layernorm", "spatial")]
            before = x.reshape(-1, width)
            after, sums = projector.through_silu(y.reshape(-1, width).clone(), before)
        assert guarded.intact(), (width, dtype)
        assert all(t.isfinite().all() for t in (loss, gradient, mean, *normed, after, sums))


def check_encoder(device: str) -> None:
    """The norm of a ViT and the cut of its prefix tokens in one pass, against timm's norm and a slice."""
    from repa_scale.encoders import PatchNorm, build_encoder

    images = torch.randint(0, 256, (2, 3, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    fused, plain = (
        build_encoder("dinov2-reg-vit-s", "random", (2, 2), device, FP32, kernel) for kernel in ("triton", "torch")
    )
    assert isinstance(fused.network.norm, PatchNorm) and not isinstance(plain.network.norm, PatchNorm)
    ours, theirs = (encoder(images.to(device)) for encoder in (fused, plain))
    assert ours.shape == (2, 4, 384) and ours.is_contiguous()
    close(
        ours, theirs, 1e-4 if device == "cuda" else 1e-5, "encoder"
    )  # the networks before it are cuDNN's and cuBLAS's


def check_mean_over_many(device: str) -> None:
    """More rows than one group of the sum over all rows."""
    x, y = (made((1, 2100, 3), FP32, "plain", seed, device) for seed in (0, 1))
    close(cosine_loss(x, y, kernel="triton"), cosine_loss(x.double(), y.double(), kernel="torch"), 1e-7, "mean")


def check_rows_alone(device: str) -> None:
    """A row's loss and gradient are the same bits whatever stands around it."""
    x, y = (made((9, 1, 384), BF16, "plain", seed, device) for seed in (0, 1))
    one = torch.ones(9, device=device)
    loss, gradient = differentiated(x, y, None, one, "image", "triton")
    for i in range(9):
        alone, slope = differentiated(x[i : i + 1].clone(), y[i : i + 1].clone(), None, one[:1], "image", "triton")
        assert torch.equal(alone[0], loss[i]) and torch.equal(slope[0], gradient[i]), i


def check_repeats(device: str, times: int = 3) -> None:
    """The same bits every time."""
    x, y = (made((2, 50, 768), BF16, "plain", seed, device) for seed in (0, 1))
    runs = [differentiated(x, y, None, torch.ones((), device=device), "mean", "triton") for _ in range(times)]
    assert all(torch.equal(a, b) for run in runs for a, b in zip(run, runs[0], strict=True))


def check_parts_of_the_projector(device: str) -> None:
    """A projector that is not the paper's is called, and its output goes through the cosine's kernel."""
    x, y = (made((2, 3, 112), FP32, "plain", seed, device) for seed in (0, 1))
    linear = nn.Sequential(nn.Linear(112, 112)).to(device)
    fused = projector_cosine_loss(x, linear, y, reduction="image", kernel="triton")
    close(fused, cosine_loss(linear(x), y, reduction="image", kernel="torch"), 1e-6, "linear")


def check_autocast(device: str) -> None:
    """fp32 parameters under bf16 autocast: as eager torch does, with gradients in fp32."""
    projector = papers_projector((48, 96, 40), FP32, device)
    hidden, target = (made((3, 5, size), FP32, "plain", i, device) for i, size in enumerate((48, 40)))
    arguments = (projector, hidden, target, None, torch.ones(3, device=device))
    with torch.autocast(device, BF16):
        ours, eager = (
            projector_results(*arguments, reduction="image", kernel=kernel) for kernel in ("triton", "torch")
        )
    exact = projector_results(*arguments, dtype=torch.float64, reduction="image", kernel="torch")
    for a, b, c in zip(ours, eager, exact, strict=True):
        assert a.dtype == FP32 == b.dtype
        error, of_eager = ((value.double() - c).norm() / c.norm() for value in (a, b))
        assert error + of_eager > 1e-4 and error <= TOLERANCE["projector"] * of_eager + 2 * ROUNDING[BF16]


def check_no_gradient_for_targets(device: str) -> None:
    x, y = (made((1, 3, 40), FP32, "plain", seed, device).requires_grad_() for seed in (0, 1))
    for kernel in ("triton", "torch"):
        x.grad = None
        cosine_loss(x, y, kernel=kernel).backward()
        assert x.grad is not None and y.grad is None
    with torch.no_grad():
        assert not cosine_loss(x, y, kernel="triton").requires_grad


def check_refusals(device: str) -> None:
    """What a kernel cannot do is said; `auto` does not fail on it."""
    x = made((1, 3, 40), FP32, "plain", 0, device)
    affine = (torch.ones(40, device=device, requires_grad=True), torch.zeros(40, device=device))
    wide, long = torch.ones(1, 1, 5000, device=device), torch.ones(1, 2049, 1, device=device)
    for call, words in (
        (lambda kernel: cosine_loss(x.double(), x, kernel=kernel), "float64"),
        (lambda kernel: cosine_loss(wide, wide, kernel=kernel), "5000 channels"),
        (lambda kernel: normalize_tokens(long, "spatial", kernel=kernel), "2049 tokens"),
        (lambda kernel: normalize_tokens(x.requires_grad_(), "layernorm", kernel=kernel), "no gradient"),
        (lambda kernel: normalize_tokens(x.detach(), "layernorm", affine=affine, kernel=kernel), "no gradient"),
    ):
        assert call("auto").isfinite().all()
        try:
            call("triton")
        except ValueError as error:
            assert words in str(error)
        else:
            raise AssertionError(words)
