"""95 % confidence intervals of metrics over the choice of samples. How a metric depends on a sample, each metric says.

A metric that is smooth in the samples' weights is linearised: resampling n samples with replacement changes it by the
mean of their influences (infinitesimal jackknife, Efron 1982). That costs one pass, where computing a distance anew for
each resample costs an eigendecomposition; and it is free of the bias by which a resample, having fewer distinct images,
is further from everything. The intervals say what another draw of as many samples would give. They hold neither the
bias of n itself nor the choice of reference images.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from repa_scale.metrics import CONFIDENCE, NORMAL

RESAMPLES = 1000
CHUNK = 1 << 22  # drawn indices at a time


@dataclass(frozen=True)
class Estimate:
    """A value and its interval; None: it cannot be said."""

    value: float
    low: float | None = None
    high: float | None = None

    def within(self, least: float, most: float) -> Estimate:
        """With the interval cut to the values that the metric can have."""
        edges = (None if edge is None else min(max(edge, least), most) for edge in (self.low, self.high))
        return Estimate(self.value, *edges)


def by_resampling(value: float, influence: Tensor, seed: int = 0, resamples: int = RESAMPLES) -> Estimate:
    """Percentile interval by resampling influences.

    Args:
        influence: (n,) float64 of mean 0: a sample with the weight (1 + e) / n moves the value by e influence / n. Of a
            plain mean over samples it is each one's deviation.
    """
    count = len(influence)
    if count < 2:
        return Estimate(value)
    influence = influence.cpu().double()
    generator = torch.Generator().manual_seed(seed)
    means = []
    for part in torch.arange(resamples).split(max(1, CHUNK // count)):
        chosen = torch.randint(count, (len(part), count), generator=generator)
        means.append(influence[chosen].mean(1))
    edges = torch.tensor([(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], dtype=torch.float64)
    low, high = torch.quantile(torch.cat(means), edges).tolist()
    return Estimate(value, value + low, value + high)


def by_jackknife(value: float, without: Tensor) -> Estimate:
    """Normal interval from the values with one of G random groups of samples left out (delete-a-group jackknife, Kott
    2001): for what cannot be resampled, because a sample drawn twice is its own nearest neighbour.

    Args:
        without: (G,) values.
    """
    groups = len(without)
    if groups < 2:
        return Estimate(value)
    error = ((groups - 1) / groups * (without - without.mean()).square().sum()).sqrt().item()
    return Estimate(value, value - NORMAL * error, value + NORMAL * error)


def groups_of(count: int, groups: int, seed: int = 0) -> Tensor:
    """(count,) int64: a random group of each sample, of sizes that differ by one at most."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return (order * groups) // count
