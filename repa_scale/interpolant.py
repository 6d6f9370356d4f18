"""The path between data (t = 0) and noise (t = 1), and how t is drawn (SiT paper, section 2; REPA, section 2).

Cosines and exponentials are computed in float64 and rounded once: in float32 a GPU's last bits differ from a CPU's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from repa_scale.errors import ConfigError, did_you_mean


@dataclass(frozen=True)
class Coefficients:
    """alpha_t, sigma_t and their derivatives by t; each has the shape of t."""

    alpha: Tensor
    sigma: Tensor
    d_alpha: Tensor
    d_sigma: Tensor


def _linear(t: Tensor) -> Coefficients:
    return Coefficients(1 - t, t, -torch.ones_like(t), torch.ones_like(t))


def _cosine(t: Tensor) -> Coefficients:
    angle = t.double() * (math.pi / 2)
    alpha, sigma = torch.cos(angle), torch.sin(angle)
    exact = alpha, sigma, -math.pi / 2 * sigma, math.pi / 2 * alpha
    return Coefficients(*(value.to(t.dtype) for value in exact))


PATHS: dict[str, Callable[[Tensor], Coefficients]] = {"linear": _linear, "cosine": _cosine}


class Interpolant:
    """x_t = alpha_t x0 + sigma_t eps and its velocity v = alpha'_t x0 + sigma'_t eps (REPA eq. 1, 2)."""

    def __init__(self, path: str) -> None:
        if path not in PATHS:
            raise ConfigError(f"interpolant.path={path} is not a path{did_you_mean(path, PATHS)}")
        self.coefficients = PATHS[path]

    def __call__(self, x0: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """x0, noise: (N, C, H, W) float; t: (N,) in [0, 1] -> x_t and v, both (N, C, H, W)."""
        at = self.coefficients(t.view(-1, 1, 1, 1))
        return at.alpha * x0 + at.sigma * noise, at.d_alpha * x0 + at.d_sigma * noise


def time_from_uniform(u: Tensor) -> Tensor:
    """Uniform t, from u uniform in (0, 1)."""
    return u


def time_from_normal(n: Tensor, path: str) -> Tensor:
    """Log-normal t, from n standard normal: sigma = exp(n) is the ratio of noise to data (EDM). (N,) float64, for the
    caller to round: n should be float64 too."""
    sigma = n.double().exp()
    return sigma / (1 + sigma) if path == "linear" else torch.atan(sigma) * (2 / math.pi)
