"""Everything that is random in a training step, from the counter-based generator."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from repa_scale import rng
from repa_scale.interpolant import time_from_normal, time_from_uniform


@dataclass(frozen=True)
class Draws:
    """The random numbers of the samples of one micro batch.

    Attributes:
        t: (N,) float32 in [0, 1], 0 = data, 1 = noise.
        noise: (N, C, H, W) float32, standard normal.
        posterior: (N, C, H, W) float32, standard normal: the draw from the VAE's posterior.
        drop: (N,) bool: the label becomes the null label.
    """

    t: Tensor
    noise: Tensor
    posterior: Tensor
    drop: Tensor


def draw(
    seed: int,
    step: int,
    index: Tensor,
    shape: tuple[int, int, int],
    *,
    time: str = "uniform",
    path: str = "linear",
    class_dropout: float = 0.1,
) -> Draws:
    """Draws for the samples at the global stream positions `index`: (N,) int64, on the device to draw on.

    A sample's numbers depend on (seed, step, its index, the purpose) alone: not on the other samples, the ranks, or
    how the batch is split.
    """
    if time == "uniform":
        t = time_from_uniform(rng.uniform(seed, "time", step, index, ()))
    else:
        t = time_from_normal(rng.normal(seed, "time", step, index, (), dtype=torch.float64), path)
    return Draws(
        t=t.float(),
        noise=rng.normal(seed, "noise", step, index, shape),
        posterior=rng.normal(seed, "posterior", step, index, shape),
        drop=rng.bernoulli(class_dropout, seed, "label drop", step, index),
    )


def drop_labels(labels: Tensor, drop: Tensor, null_label: int) -> Tensor:
    """Labels with the null label where `drop` says so. (N,) int64."""
    return torch.where(drop, torch.full_like(labels, null_label), labels)
