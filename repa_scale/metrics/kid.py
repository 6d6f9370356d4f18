"""Kernel distance (KID): the squared maximum mean discrepancy of two sets of features, without bias in n."""

from __future__ import annotations

import torch
from torch import Tensor

from repa_scale.errors import DataError
from repa_scale.metrics.bootstrap import Estimate, by_resampling

BLOCK = 1000  # images of each set in a block
LEAST_BLOCKS = 10  # fewer would say little of how they scatter: smaller blocks instead


def kernel_distance(samples: Tensor, reference: Tensor, seed: int = 0, block: int | None = None) -> Estimate:
    """Mean over disjoint random blocks of `squared_mmd`; the interval by resampling blocks, which are independent.

    Blocks of 1000 as in the KID paper (Binkowski et al. 2018); with fewer than 10,000 samples a tenth of them. The
    estimate has no bias, so the block's size changes its scatter alone. Where the reference has fewer blocks they are
    used again.

    Args:
        samples: (n, d), reference: (m, d); float32 or float64.
        block: images a block.

    Raises:
        DataError: fewer than 2 images of either, or unequal widths.
    """
    if samples.shape[1] != reference.shape[1]:
        raise DataError(f"features of {samples.shape[1]} and {reference.shape[1]} numbers; use one extractor for both")
    least = min(len(samples), len(reference))
    if least < 2:
        raise DataError(f"kid of {least} images; give at least 2 of each set")
    size = block or max(2, min(BLOCK, len(samples) // LEAST_BLOCKS, len(reference)))
    size = min(size, least)
    ours, theirs = (_blocks(len(x), size, seed + i) for i, x in enumerate((samples, reference)))
    values = torch.tensor(
        [squared_mmd(samples[x], reference[theirs[i % len(theirs)]]) for i, x in enumerate(ours)],
        dtype=torch.float64,
    )
    mean = values.mean().item()
    return by_resampling(mean, values - mean, seed)


def squared_mmd(x: Tensor, y: Tensor) -> float:
    """The unbiased estimate with the kernel (x.y / d + 1)^3 (Binkowski et al. 2018, eq. 4), in float64.

    Args:
        x: (n, d), y: (m, d).
    """
    x, y = x.double(), y.double()
    n, m = len(x), len(y)
    within_x, within_y, between = _kernel(x, x), _kernel(y, y), _kernel(x, y)
    first = (within_x.sum() - within_x.diagonal().sum()) / (n * (n - 1))
    second = (within_y.sum() - within_y.diagonal().sum()) / (m * (m - 1))
    return (first + second - 2 * between.mean()).item()


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1).pow(3)


def _blocks(count: int, size: int, seed: int) -> list[Tensor]:
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return list(order[: count // size * size].split(size))
