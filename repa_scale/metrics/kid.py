"""Kernel distance (KID): the squared maximum mean discrepancy of two sets of features, without bias in n."""

from __future__ import annotations

import torch
from torch import Tensor

from repa_scale.errors import DataError
from repa_scale.metrics.bootstrap import Estimate, by_jackknife, groups_of

GROUPS = 20  # of the jackknife
ROWS = 4096  # of a block of kernels


def kernel_distance(samples: Tensor, reference: Tensor, seed: int = 0) -> Estimate:
    """The unbiased estimate over all pairs (Binkowski et al. 2018, eq. 4), with the kernel (x.y / d + 1)^3.

    The usual mean over random subsets of 1000 estimates the same; all pairs scatter least. Its interval comes from
    leaving out groups of samples, because for near sets the terms of second order count.

    Args:
        samples: (n, d), reference: (m, d); kernels are computed in their type, float32 or float64, and summed in
            float64.

    Raises:
        DataError: fewer than 2 images of either, or unequal widths.
    """
    if samples.shape[1] != reference.shape[1]:
        raise DataError(f"features of {samples.shape[1]} and {reference.shape[1]} numbers; use one extractor for both")
    n, m = len(samples), len(reference)
    if min(n, m) < 2:
        raise DataError(f"kid of {min(n, m)} images; give at least 2 of each set")
    groups = min(GROUPS, n // 2)
    group = groups_of(n, groups, seed).to(samples.device)
    parts = [samples[group == number] for number in range(groups)]
    inner = torch.stack([_sums(part, parts) for part in parts])  # (G, G): kernels between groups
    outer = torch.stack([_sums(part, [reference])[0] for part in parts])  # (G,)
    own = torch.stack([_diagonal(part) for part in parts])
    real = (_sums(reference, [reference])[0] - _diagonal(reference)) / (m * (m - 1))

    def estimate(within: Tensor, between: Tensor, count: Tensor) -> Tensor:
        return within / (count * (count - 1)) + real - 2 * between / (count * m)

    sizes = inner.new_tensor([len(part) for part in parts])
    whole = estimate(inner.sum() - own.sum(), outer.sum(), sizes.sum())
    kept = inner.sum() - 2 * inner.sum(1) + inner.diagonal() - (own.sum() - own)
    without = estimate(kept, outer.sum() - outer, sizes.sum() - sizes)
    return by_jackknife(whole.item(), without.cpu()) if groups > 1 else Estimate(whole.item())


def _sums(x: Tensor, others: list[Tensor]) -> Tensor:
    """Sums of the kernels between x and each of the others, (len(others),) float64."""
    totals = []
    for y in others:
        total = x.new_zeros((), dtype=torch.float64)
        for rows in x.split(ROWS):
            for columns in y.split(ROWS):
                total += (rows @ columns.T).div_(x.shape[1]).add_(1).pow_(3).sum(dtype=torch.float64)
        totals.append(total)
    return torch.stack(totals)


def _diagonal(x: Tensor) -> Tensor:
    """The sum of each vector's kernel with itself."""
    return (x.double().square().sum(1) / x.shape[1] + 1).pow(3).sum()
