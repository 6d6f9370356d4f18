"""A linear probe: how well a linear map reads the classes off features, on images that it was not fitted to.

Ridge regression on one-hot classes in closed form, in float64: the same features give the same figure, with no
optimiser to tune.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from repa_scale import rng
from repa_scale.errors import DataError
from repa_scale.metrics import NORMAL

HELD_OUT, VALIDATION = 0.2, 0.2  # shares of the images: the second is of those that are left, and chooses the penalty
PENALTIES = tuple(10.0**power for power in range(-5, 3))  # times the identity, beside the features' correlations
LEAST = 10  # images in each part
FIT, CHOOSE, TEST = range(3)


@dataclass(frozen=True)
class Probe:
    """What a probe gave.

    Attributes:
        accuracy: share of the held-out images whose class it reads.
        low, high: 95 % interval of it (Wilson), for these features: the choice among several is not in it.
        validation: accuracy on the images that chose the penalty; the honest ground to choose among features by.
        penalty: the one chosen.
    """

    accuracy: float
    low: float
    high: float
    validation: float
    penalty: float


def split(ids: Tensor) -> Tensor:
    """(N,) int64 ids -> (N,) int64 `FIT`, `CHOOSE` or `TEST`, by the id alone: an image is always on the same side."""
    drawn = rng.uniform(0, "probe split", 0, ids.cpu(), (), dtype=torch.float64)
    parts = torch.full_like(ids.cpu(), FIT)
    parts[drawn < HELD_OUT + VALIDATION * (1 - HELD_OUT)] = CHOOSE
    parts[drawn < HELD_OUT] = TEST
    return parts


def check_split(parts: Tensor, labels: Tensor) -> None:
    """Raises `DataError` where the parts are too small, or the images fitted to are of one class. (N,) both."""
    counts = torch.bincount(parts.cpu(), minlength=3).tolist()
    if min(counts) < LEAST or len(labels[parts.to(labels.device) == FIT].unique()) < 2:
        raise DataError(
            f"a linear probe needs two classes, and {LEAST} images to fit, to choose and to test on; there are "
            f"{counts[FIT]}, {counts[CHOOSE]} and {counts[TEST]}, of {len(labels.unique())} classes: take more images"
        )


def probe(features: Tensor, labels: Tensor, parts: Tensor) -> Probe:
    """Fits and tests a probe.

    Args:
        features: (N, D) float; each is standardised by the images fitted to.
        labels: (N,) int64, the classes.
        parts: (N,) from `split`.

    Raises:
        DataError: a value is not finite, or as `check_split`.
    """
    if not torch.isfinite(features).all():
        raise DataError("the features hold values that are not finite; use a checkpoint from before it diverged")
    check_split(parts, labels)
    x, y, parts = features.double(), labels.to(features.device), parts.to(features.device)
    fit, choose, test = (parts == part for part in (FIT, CHOOSE, TEST))
    classes = int(y.max()) + 1
    solved = _Ridge(x[fit], y[fit], classes)
    # Of equal ones the larger penalty.
    validation, penalty = max((_accuracy(solved(p), x[choose], y[choose]), p) for p in PENALTIES)
    accuracy = _accuracy(_Ridge(x[~test], y[~test], classes)(penalty), x[test], y[test])
    low, high = wilson(accuracy, int(test.sum()))
    return Probe(accuracy, low, high, validation, penalty)


def wilson(share: float, count: int, z: float = NORMAL) -> tuple[float, float]:
    """95 % interval of a probability, of which `count` trials gave `share` (Wilson 1927)."""
    centre = share + z * z / (2 * count)
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    low, high = ((centre + sign * half) / (1 + z * z / count) for sign in (-1, 1))
    return 0.0 if share == 0 else low, 1.0 if share == 1 else high


class _Ridge:
    """Ridge regression from one-hot classes, decomposed once for all penalties.

    Args:
        x: (M, D) float64; y: (M,) int64.
    """

    def __init__(self, x: Tensor, y: Tensor, classes: int) -> None:
        self.mean = x.mean(dim=0)
        deviation = x.std(dim=0, correction=0)
        # A channel without variation says nothing; divided by its rounding errors it would be noise of full size.
        self.scale = torch.where(deviation > 1e-7 * self.mean.abs(), 1 / deviation, 0.0)
        x = (x - self.mean) * self.scale
        y = F.one_hot(y, classes).double()
        self.bias = y.mean(dim=0)
        self.values, self.vectors = torch.linalg.eigh(x.T @ x / len(x))
        self.products = self.vectors.T @ (x.T @ (y - self.bias)) / len(x)

    def __call__(self, penalty: float):
        """(M, D) -> (M, classes), what each class scores."""
        weights = self.vectors @ (self.products / (self.values.clamp(min=0) + penalty)[:, None])
        return lambda x: (x - self.mean) * self.scale @ weights + self.bias


def _accuracy(scores, x: Tensor, y: Tensor) -> float:
    return float((scores(x).argmax(dim=1) == y).double().mean())
