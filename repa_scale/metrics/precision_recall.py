"""Improved precision and recall: shares of one set that lie within the other's manifold of nearest-neighbour balls."""

from __future__ import annotations

import torch
from torch import Tensor

from repa_scale.errors import DataError
from repa_scale.metrics.bootstrap import Estimate, by_jackknife, by_resampling, groups_of

NEIGHBOURS = 3
GROUPS = 20  # of the jackknife of recall
ROWS = 1024  # of a block of distances
COLUMNS = 16384


def precision_recall(
    samples: Tensor, reference: Tensor, k: int = NEIGHBOURS, seed: int = 0
) -> tuple[Estimate, Estimate]:
    """(precision, recall) (Kynkäänniemi et al. 2019): samples within a ball around a reference image, reference images
    within a ball around a sample; a ball reaches to the k-th nearest other image of its own set.

    Precision is a mean over samples and its interval comes from resampling them. Recall depends on the samples as
    balls: its interval comes from leaving groups of them out.

    Args:
        samples: (n, d), reference: (m, d) float32.

    Returns:
        Distances are those of float32 features, centred so that a far mean costs no digits. (The ADM suite, otherwise
        the same, computes them in float16.)

    Raises:
        DataError: no more than k images of either, or unequal widths.
    """
    if samples.shape[1] != reference.shape[1]:
        raise DataError(f"features of {samples.shape[1]} and {reference.shape[1]} numbers; use one extractor for both")
    if min(len(samples), len(reference)) <= k:
        raise DataError(f"{min(len(samples), len(reference))} images have no {k} nearest neighbours; give {k + 1}")
    centre = reference.mean(0, dtype=torch.float64)
    samples, reference = (_minus(x, centre) for x in (samples, reference))
    inside = covered(samples, reference, nearest(reference, k)[0][:, -1:])[:, 0].double()
    precision = inside.mean().item()

    distances, indices = nearest(samples, min(4 * k, len(samples) - 1))
    groups = min(GROUPS, len(samples) // (2 * k))
    group = groups_of(len(samples), groups, seed).to(samples.device) if groups > 1 else None
    radii = distances[:, k - 1 : k]
    if group is not None:
        radii = torch.cat([radii, _without_each(distances, group[indices], group, groups, k)], 1)
    shares = covered(reference, samples, radii).double().mean(0)
    recall = by_jackknife(shares[0].item(), shares[1:])
    return by_resampling(precision, inside - precision, seed), recall.within(0.0, 1.0)


def nearest(features: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Squared distances (n, k), ascending, to the k nearest other vectors, and their numbers (n, k)."""
    found, numbers = [], []
    for start in range(0, len(features), ROWS):
        rows = features[start : start + ROWS]
        best = rows.new_empty(len(rows), 0)
        which = torch.empty(len(rows), 0, dtype=torch.int64, device=rows.device)
        for left in range(0, len(features), COLUMNS):
            block = squared_distances(rows, features[left : left + COLUMNS])
            own = torch.arange(start, start + len(rows), device=rows.device) - left
            here = (own >= 0) & (own < block.shape[1])
            block[here, own[here]] = torch.inf
            values, places = block.topk(min(k, block.shape[1]), largest=False)
            values, places = torch.cat([best, values], 1), torch.cat([which, places + left], 1)
            best, order = values.topk(min(k, values.shape[1]), largest=False)
            which = places.gather(1, order)
        found.append(best)
        numbers.append(which)
    return torch.cat(found), torch.cat(numbers)


def covered(points: Tensor, centres: Tensor, radii: Tensor) -> Tensor:
    """Whether each point lies within a ball around any centre: (p, r) bool for r choices of the radii.

    Args:
        points: (p, d), centres: (c, d).
        radii: (c, r) squared; negative: no ball.
    """
    rows = []
    for part in points.split(ROWS):
        inside = torch.zeros(len(part), radii.shape[1], dtype=torch.bool, device=points.device)
        for left in range(0, len(centres), COLUMNS):
            block = squared_distances(part, centres[left : left + COLUMNS])
            for choice in range(radii.shape[1]):
                inside[:, choice] |= (block <= radii[left : left + COLUMNS, choice]).any(1)
        rows.append(inside)
    return torch.cat(rows)


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """(n, m) for (n, d) and (m, d), by one matrix product; at least 0."""
    squares = x.double().square().sum(1).float()[:, None] + y.double().square().sum(1).float()
    return torch.addmm(squares, x, y.T, alpha=-2).clamp_(min=0)


def _minus(x: Tensor, centre: Tensor) -> Tensor:
    """x - centre in float64, rounded to float32; (n, d), by blocks because twice 50,000 features count."""
    moved = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    for start in range(0, len(x), ROWS):
        moved[start : start + ROWS] = x[start : start + ROWS].double() - centre
    return moved


def _without_each(distances: Tensor, theirs: Tensor, own: Tensor, groups: int, k: int) -> Tensor:
    """Squared radii (n, groups) when one group is left out: to the k-th of the nearest that are not in it; -1 for the
    balls of the group itself.

    Args:
        distances: (n, K) ascending, K > k.
        theirs: (n, K) groups of those neighbours; own: (n,) of the vectors.
    """
    columns = []
    for number in range(groups):
        rank = (theirs != number).cumsum(1)
        place = (rank < k).sum(1).clamp(max=distances.shape[1] - 1)
        radii = distances.gather(1, place[:, None])[:, 0]
        columns.append(torch.where(own == number, -1.0, radii))
    return torch.stack(columns, 1)
