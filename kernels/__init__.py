"""The arithmetic around tokens that is worth a kernel of its own: three functions, in Triton and in plain torch.

`reference.py` defines them; `choice.py` chooses; `cosine.py`, `projector.py` and `tokens.py` hold a kernel each and are
imported when one is chosen, so that Triton is never needed otherwise. docs/kernels.md has tolerances and speeds.
"""

from __future__ import annotations

import torch
from repa_scale.kernels import reference
from repa_scale.kernels.choice import MAX_TOKENS, unavailable, unsupported, use_triton, uses_triton
from torch import Tensor, nn

__all__ = ["cosine_loss", "normalize_tokens", "projector_cosine_loss", "unavailable", "uses_triton"]


def cosine_loss(
    projected: Tensor, target: Tensor, weight: Tensor | None = None, reduction: str = "mean", kernel: str = "auto"
) -> Tensor:
    """Minus the mean cosine of projected and target rows, in fp32 (REPA eq. 8). Lengths are floored at 1e-12.

    Args:
        projected: (..., z) bf16, fp16 or fp32, z from 1 to 4096; float64 in plain torch.
        target: like `projected`, in any of these dtypes; no gradient flows into it.
        weight: factor of each row, to be broadcast to (...): a mask, or a weighting over t. The mean still divides by
            the number of rows. No gradient flows into it.
        reduction: `mean` over all rows, or `image`: of (N, T, z) over T.
        kernel: `auto` (Triton on CUDA, else torch), `triton` or `torch`.

    Returns:
        () or (N,) float32 (float64 of float64). Triton: the same bits every time, and a row's part of them does not
        depend on the other rows. There is no second derivative.

    Raises:
        ValueError: shapes that do not fit, or a kernel that cannot run here.
    """
    _check_rows(projected.shape, target, weight, reduction)
    if not use_triton(kernel, projected, unsupported(projected, target)):
        return reference.cosine_loss(projected, target, weight, reduction)
    from repa_scale.kernels.cosine import loss_of

    if target.requires_grad:
        target = target.detach()
    return loss_of(_images(projected), _images(target), _row_weights(weight, projected), reduction == "image")


def projector_cosine_loss(
    hidden: Tensor,
    projector: nn.Module,
    target: Tensor,
    weight: Tensor | None = None,
    reduction: str = "mean",
    chunk: int | None = None,
    kernel: str = "auto",
) -> Tensor:
    """`cosine_loss(projector(hidden), target, weight, reduction)`, with the paper's projector as one operator.

    The matrix products are cuBLAS's; SiLU is recomputed in the backward pass. Under ZeRO-3 it has to be called inside
    the forward of a leaf module that holds the projector, so that its weights are gathered.

    Args:
        hidden: (..., D) bf16, fp16 or fp32; float64 in plain torch.
        projector: (..., D) -> (..., z). The paper's (a Sequential of Linear, SiLU, Linear, SiLU, Linear) is fused; the
            output of any other goes through `cosine_loss`.
        target: (..., z), in any of these dtypes; no gradient flows into it.
        weight: as of `cosine_loss`.
        reduction: as of `cosine_loss`.
        chunk: with `mean` and the fused projector: make the gradients in the forward pass, about so many rows at a time
            (whole images), so that no activation outlives its chunk. Plain torch takes no notice of it.
        kernel: `auto` (Triton on CUDA, else torch), `triton` or `torch`.

    Returns:
        () or (N,) float32 (float64 of float64).

    Raises:
        ValueError: shapes that do not fit, or a kernel that cannot run here.
    """
    if chunk is not None and (chunk < 1 or reduction != "mean"):
        raise ValueError(f"chunk={chunk} with reduction={reduction!r}: it needs 1 row or more and reduction='mean'")
    if not _is_papers(projector):
        return cosine_loss(reference.project(projector, hidden), target, weight, reduction, kernel)
    _check_rows((*hidden.shape[:-1], projector[4].out_features), target, weight, reduction)
    if not use_triton(kernel, hidden, unsupported(hidden, target)):
        return reference.projector_cosine_loss(hidden, projector, target, weight, reduction)
    from repa_scale.kernels.projector import loss_in_chunks_of, loss_of

    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    parameters = [p for layer in projector[::2] for p in (layer.weight, layer.bias)]
    row_weights, target = _row_weights(weight, hidden), target.detach()
    if chunk is None:
        return loss_of(_images(hidden), parameters, _images(target), row_weights, reduction == "image", dtype)
    if hidden.ndim == 2:  # each row an image, so that there is something to cut
        hidden, target = hidden.unsqueeze(1), target.unsqueeze(1)
    hidden = _images(hidden)
    gradients = torch.is_grad_enabled() and any(p.requires_grad for p in (hidden, *parameters))
    images = max(1, chunk // hidden.shape[1])
    inputs = (hidden, parameters, _images(target), row_weights, dtype, images, gradients)
    return loss_in_chunks_of(*inputs) / (hidden.shape[0] * hidden.shape[1])


def normalize_tokens(
    tokens: Tensor,
    kind: str,
    prefix: int = 0,
    gamma: float = 0.6,
    eps: float = 1e-6,
    out_dtype: torch.dtype | None = None,
    affine: tuple[Tensor, Tensor] | None = None,
    kernel: str = "auto",
) -> Tensor:
    """Target tokens without the prefix, normalised in fp32.

    Args:
        tokens: (N, prefix + T, z) bf16, fp16 or fp32; float64 in plain torch.
        kind: `layernorm`: each token over its channels; `spatial`: each channel over the image's T tokens,
            (x - gamma mean_T x) / (std_T x + eps) with unbiased std (iREPA, arXiv 2512.10794).
        prefix: class and register tokens in front, which are left out.
        out_dtype: default: float32 (float64 of float64).
        affine: weight (z,) and bias (z,) of `layernorm`.
        kernel: `auto` (Triton on CUDA, else torch), `triton` or `torch`. Triton gives no gradient: `auto` takes torch
            where one is asked for, and where T is above 2048 in `spatial`.

    Returns:
        (N, T, z) in `out_dtype`.

    Raises:
        ValueError: an unknown kind, a prefix that leaves too little, or a kernel that cannot run here.
    """
    if kind not in ("layernorm", "spatial"):
        raise ValueError(f"kind={kind!r} must be layernorm or spatial")
    least = 2 if kind == "spatial" else 1
    if tokens.ndim != 3 or prefix < 0 or tokens.shape[1] - prefix < least:
        raise ValueError(f"tokens of shape {tuple(tokens.shape)} need {least} or more behind a prefix of {prefix}")
    obstacle = unsupported(tokens)
    if kind == "spatial" and tokens.shape[1] - prefix > MAX_TOKENS:
        obstacle = f"{tokens.shape[1] - prefix} tokens an image are more than {MAX_TOKENS}"
    if torch.is_grad_enabled() and any(x.requires_grad for x in (tokens, *(affine or ()))):
        obstacle = "the normalisation of tokens has no gradient; detach tokens, weight and bias"
    if not use_triton(kernel, tokens, obstacle):
        return reference.normalize_tokens(tokens, kind, prefix, gamma, eps, out_dtype, affine)
    from repa_scale.kernels.tokens import normalized

    return normalized(tokens[:, prefix:], kind, gamma, eps, out_dtype or torch.float32, affine)


def _check_rows(shape: tuple[int, ...], target: Tensor, weight: Tensor | None, reduction: str) -> None:
    """shape: of the projected rows."""
    if len(shape) < 2 or target.shape != shape:
        shape = tuple(shape)
        raise ValueError(f"projected {shape} and target {tuple(target.shape)} must have one shape (..., z)")
    if reduction not in ("mean", "image") or (reduction == "image" and len(shape) != 3):
        raise ValueError(f"reduction={reduction!r} of shape {tuple(shape)}: it is mean, or image for (N, T, z)")
    if weight is not None:
        try:
            weight.expand(shape[:-1])
        except RuntimeError:
            raise ValueError(f"weight {tuple(weight.shape)} does not broadcast to {tuple(shape[:-1])}") from None


def _is_papers(projector: nn.Module) -> bool:
    """Whether it is Linear-SiLU-Linear-SiLU-Linear with biases."""
    if not isinstance(projector, nn.Sequential) or len(projector) != 5:
        return False
    linear = all(type(layer) is nn.Linear and layer.bias is not None for layer in projector[::2])
    return linear and all(type(layer) is nn.SiLU for layer in projector[1::2])


def _images(x: Tensor) -> Tensor:
    """(..., T, z) -> (N, T, z)."""
    return x if x.ndim == 3 else x.unsqueeze(0) if x.ndim == 2 else x.flatten(0, -3)


def _row_weights(weight: Tensor | None, projected: Tensor) -> Tensor | None:
    """(rows,) fp32, contiguous."""
    return None if weight is None else weight.detach().float().expand(projected.shape[:-1]).reshape(-1)
