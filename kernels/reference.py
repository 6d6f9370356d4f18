"""Plain PyTorch of what the kernels compute: the definition that every kernel must equal, and the way without one."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

NORM_EPS = 1e-12  # below this length a token is not scaled up any more (torch.nn.functional.normalize)
SPATIAL_EPS = 1e-6
LAYERNORM_EPS = 1e-6


def cosine_loss(projected: Tensor, target: Tensor) -> Tensor:
    """Minus the mean cosine of projected and target tokens, for each image (REPA eq. 8).

    It is computed in float32 (float64 stays), because lengths overflow and cancel in 16 bits.

    Args:
        projected: (N, T, z) float.
        target: (N, T, z) float; no gradient flows into it.

    Returns:
        (N,) float32, or float64.
    """
    projected, target = _wide(projected), _wide(target.detach())
    cosine = (F.normalize(projected, dim=-1, eps=NORM_EPS) * F.normalize(target, dim=-1, eps=NORM_EPS)).sum(-1)
    return -cosine.mean(dim=-1)


def normalize_tokens(tokens: Tensor, kind: str, gamma: float = 0.6) -> Tensor:
    """Normalises target tokens. (N, T, z) float -> the same shape in float32, or float64.

    Args:
        kind: `none`; `layernorm`: each token over its channels; `spatial`: each channel over the image's tokens,
            (x - gamma mean_T x) / (std_T x + eps) with unbiased std (iREPA, arXiv 2512.10794).
        gamma: how much of the mean is taken away (`spatial`).
    """
    tokens = _wide(tokens)
    if kind == "layernorm":
        return F.layer_norm(tokens, tokens.shape[-1:], eps=LAYERNORM_EPS)
    if kind == "spatial":
        mean = tokens.mean(dim=1, keepdim=True)
        std = (tokens - mean).square().sum(dim=1, keepdim=True).div(tokens.shape[1] - 1).sqrt()
        return (tokens - gamma * mean) / (std + SPATIAL_EPS)
    return tokens


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
