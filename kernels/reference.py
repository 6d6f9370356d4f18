"""Plain PyTorch of what the kernels compute: the definition that every kernel must equal, and the way without one."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NORM_EPS = 1e-12  # below this length a token is not scaled up any more (torch.nn.functional.normalize)


def cosine_loss(projected: Tensor, target: Tensor, weight: Tensor | None = None, reduction: str = "mean") -> Tensor:
    """Minus the mean cosine of projected and target tokens (REPA eq. 8). See `repa_scale.kernels.cosine_loss`.

    It is computed in float32 (float64 stays), because lengths overflow and cancel in 16 bits.
    """
    projected, target = _wide(projected), _wide(target.detach())
    cosine = (F.normalize(projected, dim=-1, eps=NORM_EPS) * F.normalize(target, dim=-1, eps=NORM_EPS)).sum(-1)
    if weight is not None:
        cosine = cosine * weight.detach().to(cosine.dtype)
    return -cosine.mean(dim=-1) if reduction == "image" else -cosine.mean()


def projector_cosine_loss(
    hidden: Tensor, projector: nn.Module, target: Tensor, weight: Tensor | None = None, reduction: str = "mean"
) -> Tensor:
    """`cosine_loss` of the projected tokens. See `repa_scale.kernels.projector_cosine_loss`."""
    return cosine_loss(project(projector, hidden), target, weight, reduction)


def project(projector: nn.Module, hidden: Tensor) -> Tensor:
    """The projector's output, without its own hooks where it is a Sequential: its forward may have called this."""
    return nn.Sequential.forward(projector, hidden) if isinstance(projector, nn.Sequential) else projector(hidden)


def normalize_tokens(
    tokens: Tensor,
    kind: str,
    prefix: int = 0,
    gamma: float = 0.6,
    eps: float = 1e-6,
    out_dtype: torch.dtype | None = None,
    affine: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Tokens without the prefix, normalised. See `repa_scale.kernels.normalize_tokens`."""
    tokens = _wide(tokens[:, prefix:])
    if kind == "layernorm":
        weight, bias = (parameter.to(tokens.dtype) for parameter in affine) if affine else (None, None)
        tokens = F.layer_norm(tokens, tokens.shape[-1:], weight, bias, eps)
    else:
        mean = tokens.mean(dim=1, keepdim=True)
        std = (tokens - mean).square().sum(dim=1, keepdim=True).div(tokens.shape[1] - 1).sqrt()
        tokens = (tokens - gamma * mean) / (std + eps)
    return tokens.to(out_dtype or tokens.dtype)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
