"""CKNNA, the similarity of two representations of the same images; the features come from elsewhere.

Huh et al., "The Platonic Representation Hypothesis" (arXiv 2405.07987, section 3 and its public code), which REPA's
figures use with k = 10. Stated exactly, because the paper leaves some of it open:
- each feature vector is divided by its length (at least 1e-12); the kernel is the inner product, K_ij = <a_i, a_j>;
- j is a neighbour of i if it is among the k largest K_ij with j != i; a pair counts if it is one in *both* kernels;
- what does not count becomes 0 in both kernels, and CKNNA = HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)), in the last two
  with each kernel's own pairs, where HSIC is the unbiased estimator (Song et al. 2012, eq. 5), which needs no centring;
- all arithmetic in float64. With k = N - 1 this is unbiased CKA. Below that the pairs are not symmetric, and the order
  of the two representations shows in the fourth digit.
The formula printed in the paper centres each row of the kernel instead; published figures come from the code.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from repa_scale.errors import DataError

ROWS = 1024  # of the kernel at a time: with N = 10,000 a block takes 82 MB
LEAST = 4  # images: the unbiased estimator divides by N - 3


@dataclass(frozen=True)
class Neighbours:
    """The k nearest neighbours of each image, and their inner products.

    Attributes:
        index: (N, k) int64, ascending in each row.
        value: (N, k) float64, K_ij.
    """

    index: Tensor
    value: Tensor


def cknna(a: Tensor, b: Tensor, k: int = 10) -> float:
    """CKNNA of two representations of the same images; about 1 where they agree, 0 where they share nothing.

    Args:
        a: (N, D) float; b: (N, E) float. N at least 4.
        k: neighbours, from 2 to N - 1.

    Returns:
        nan where one of them has no structure at all (all rows equal).

    Raises:
        DataError: a value is not finite, or too few images for k.
    """
    return cknna_of_neighbours(nearest(a, k), nearest(b, k))


def nearest(features: Tensor, k: int) -> Neighbours:
    """The neighbours in one representation, from blocks of rows of its kernel.

    Args:
        features: (N, D) float.

    Raises:
        DataError: as `cknna`.
    """
    count = len(features)
    if count < LEAST or not 2 <= k <= count - 1:
        raise DataError(
            f"CKNNA with k={k} needs at least {max(LEAST, k + 1)} images and k of at least 2; there are {count}: "
            "take more images, or fewer neighbours"
        )
    if not torch.isfinite(features).all():
        raise DataError("the features hold values that are not finite; use a checkpoint from before it diverged")
    unit = F.normalize(features.double(), dim=1)
    index, value = [], []
    for start in range(0, count, ROWS):
        block = unit[start : start + ROWS] @ unit.T
        rows = torch.arange(len(block), device=block.device)
        block[rows, start + rows] = -torch.inf
        chosen = block.topk(k, dim=1).indices.sort(dim=1).values
        index.append(chosen)
        value.append(block.gather(1, chosen))
    return Neighbours(torch.cat(index), torch.cat(value))


def cknna_of_neighbours(a: Neighbours, b: Neighbours) -> float:
    """`cknna` from what `nearest` gave for the same images and k: each representation needs it only once."""
    count = len(a.index)
    pairs_a, pairs_b = _pairs(a, count), _pairs(b, count)
    both = torch.isin(pairs_a, pairs_b, assume_unique=True)
    value_b = b.value.flatten()[torch.searchsorted(pairs_b, pairs_a[both])]
    cross = _hsic(pairs_a[both], a.value.flatten()[both], value_b, count)
    own_a, own_b = (_hsic(p, n.value.flatten(), n.value.flatten(), count) for p, n in ((pairs_a, a), (pairs_b, b)))
    if own_a <= 0 or own_b <= 0:
        return float("nan")
    return cross / (own_a * own_b) ** 0.5


def _pairs(neighbours: Neighbours, count: int) -> Tensor:
    """i * N + j of each pair, ascending: (N * k,) int64."""
    rows = torch.arange(count, device=neighbours.index.device)[:, None]
    return (rows * count + neighbours.index).flatten()


def _hsic(pairs: Tensor, k: Tensor, l: Tensor, n: int) -> float:  # noqa: E741
    """The unbiased estimator for kernels that are 0 but at `pairs`, none of them on the diagonal.

    (tr(KL) + 1'K1 1'L1 / ((n - 1)(n - 2)) - 2 1'KL1 / (n - 2)) / (n (n - 3)), with K, L of N x N never built.

    Args:
        pairs: (P,) int64, i * N + j, ascending.
        k, l: (P,) float64, the kernels' values there. Neither kernel need be symmetric.
    """
    i, j = pairs // n, pairs % n
    mirrored = j * n + i
    at = torch.searchsorted(pairs, mirrored).clamp(max=len(pairs) - 1)
    there = pairs[at] == mirrored if len(pairs) else pairs.bool()
    trace = (k[there] * l[at[there]]).sum()
    columns = torch.zeros(n, dtype=k.dtype, device=k.device).index_add_(0, j, k)
    rows = torch.zeros_like(columns).index_add_(0, i, l)
    value = trace + k.sum() * l.sum() / ((n - 1) * (n - 2)) - 2 * (columns * rows).sum() / (n - 2)
    return float(value) / (n * (n - 3))
