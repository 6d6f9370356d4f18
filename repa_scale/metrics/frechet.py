"""The Fréchet distance of two sets of features, and their means and covariances, streamed and merged in float64."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from repa_scale.errors import DataError

TOLERANCE = 1e-6  # relative to the distance's largest part; what rounding may do to it is smaller by far
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Moments:
    """Mean and covariance of n vectors of d numbers, without the vectors.

    Attributes:
        count: n.
        mean: (d,) float64.
        scatter: (d, d) float64, the sum of (x - mean)(x - mean)^T.
    """

    count: int
    mean: Tensor
    scatter: Tensor

    @classmethod
    def empty(cls, width: int, device: torch.device | str = "cpu") -> Moments:
        """Of no vectors yet; `add` and `merge` go on from it."""
        zeros = torch.zeros(width, width, dtype=torch.float64, device=device)
        return cls(0, zeros[0].clone(), zeros)

    @classmethod
    def of(cls, features: Tensor) -> Moments:
        """Of (n, d) features at once: two passes, the first for the mean.

        Raises:
            DataError: a value is not finite.
        """
        x = features.double()
        mean = x.mean(0)
        if not torch.isfinite(mean).all():
            bad = int((~torch.isfinite(x)).any(1).nonzero()[0])
            raise DataError(
                f"the features of image {bad} of {len(x)} are not finite; check the extractor's weights and the images"
            )
        x = x - mean
        return cls(len(x), mean, x.T @ x)

    @classmethod
    def from_covariance(cls, count: int, mean: Tensor, covariance: Tensor) -> Moments:
        """Of stored statistics, whose covariance is the unbiased one."""
        return cls(count, mean.double(), covariance.double() * (count - 1))

    def add(self, features: Tensor) -> Moments:
        """With (n, d) further vectors. The scatter is of deviations from means throughout, never a difference of large
        sums, so a far mean costs no digits (Chan, Golub and LeVeque 1983, eq. 2.1)."""
        return self.merge(Moments.of(features.to(self.mean.device))) if len(features) else self

    def merge(self, other: Moments) -> Moments:
        """With the vectors of another set of moments."""
        if not self.count or not other.count:
            return self if self.count else other
        count = self.count + other.count
        delta = other.mean - self.mean
        scatter = self.scatter + other.scatter
        scatter.addr_(delta, delta, alpha=self.count * other.count / count)
        return Moments(count, self.mean + delta * (other.count / count), scatter)

    def merge_ranks(self) -> Moments:
        """Of all ranks of the process group, on each of them: two sums, whatever their number. Alone: itself."""
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return self
        first = torch.cat([self.mean * self.count, self.mean.new_tensor([self.count])])
        dist.all_reduce(first)
        count = round(first[-1].item())
        if not count:
            return self
        mean = first[:-1] / count
        delta = self.mean - mean
        scatter = torch.addr(self.scatter, delta, delta, alpha=float(self.count))
        dist.all_reduce(scatter)
        return Moments(count, mean, scatter)

    def to(self, device: torch.device | str) -> Moments:
        return Moments(self.count, self.mean.to(device), self.scatter.to(device))

    @property
    def covariance(self) -> Tensor:
        """(d, d) float64, unbiased: divided by n - 1."""
        if self.count < 2:
            raise DataError(f"{self.count} images have no covariance; give at least 2")
        return self.scatter / (self.count - 1)


@dataclass(frozen=True)
class Frechet:
    """A distance with its derivative.

    Attributes:
        value: squared distance of the two Gaussians.
        slope: (d, d) float64, of the value with respect to the first covariance; of zero in directions that the first
            set does not span.
        shift: (d,) float64, of the value with respect to the first mean.
    """

    value: float
    slope: Tensor
    shift: Tensor


def frechet_distance(a: Moments, b: Moments) -> float:
    """|mean_a - mean_b|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2), A and B the covariances (Dowson and Landau 1982, eq. 4).

    Raises:
        DataError: unequal widths, values that are not finite, matrices that are no covariances.
    """
    return _distance(a, b)[0]


def frechet_with_slope(a: Moments, b: Moments) -> Frechet:
    """The distance, and how it changes with the first set (for metrics/bootstrap.py)."""
    value, roots, inner = _distance(a, b)
    # dT/dA of 2 tr (A^1/2 B A^1/2)^1/2 is the map that carries the first Gaussian to the second.
    inverse = _pseudo_inverse(roots)
    transport = inverse @ _root(inner) @ inverse.T
    vectors = _span(roots)
    return Frechet(value, vectors @ vectors.T - transport, 2 * (a.mean - b.mean))


def influence(features: Tensor, a: Moments, distance: Frechet) -> Tensor:
    """How much each of the first set's vectors pulls the distance: derivatives with respect to their weights, times n.

    Args:
        features: (m, d), any of those that `a` was made of.

    Returns:
        (m,) float64, of mean 0 over all of the set.
    """
    x = features.to(a.mean.device).double() - a.mean
    squares = ((x @ distance.slope) * x).sum(1) * (a.count / (a.count - 1))
    return x @ distance.shift + squares - (distance.slope * a.covariance).sum()


def _distance(a: Moments, b: Moments) -> tuple[float, Tensor, Tensor]:
    """The value; R (d, r) with R R^T = A, r the rank; R^T B R (r, r)."""
    if a.mean.shape != b.mean.shape:
        raise DataError(
            f"features of {len(a.mean)} and of {len(b.mean)} numbers have no distance; use one extractor for both sets"
        )
    for moments in (a, b):
        if not (torch.isfinite(moments.mean).all() and torch.isfinite(moments.scatter).all()):
            raise DataError("a mean or covariance is not finite; check the extractor's weights, and make it again")
    least = min(a.count, b.count)
    if least <= len(a.mean):
        log.warning(
            "%d images for features of %d numbers: a singular covariance, and a distance far above that of many; "
            "compare it with such of equally many images alone",
            least,
            len(a.mean),
        )
    first, second = a.covariance, b.covariance.to(a.mean.device)
    difference = a.mean - b.mean.to(a.mean.device)
    roots = _factor(first)
    inner = roots.T @ second @ roots
    inner = (inner + inner.T) / 2
    eigenvalues = torch.linalg.eigvalsh(inner)
    traces = (first.trace() + second.trace()).item()
    common = eigenvalues.clamp(min=0).sqrt().sum().item()
    _check(eigenvalues, first, second, traces, common)
    # What is left of rounding may be below zero by a little for equal sets.
    return difference.dot(difference).item() + max(traces - 2 * common, 0.0), roots, inner


def _check(eigenvalues: Tensor, first: Tensor, second: Tensor, traces: float, common: float) -> None:
    """Independent bounds of the result: the eigenvalues' sum is tr(AB), and the roots' at most (tr A tr B)^1/2."""
    product = (first * second).sum().item()
    scale = first.trace().item() * second.trace().item()
    sound = (
        abs(eigenvalues.sum().item() - product) <= TOLERANCE * max(product, TOLERANCE * scale)
        and eigenvalues.min().item() >= -TOLERANCE * max(eigenvalues.max().item(), TOLERANCE * scale)
        and common <= scale**0.5 * (1 + TOLERANCE)
        and 2 * common <= traces * (1 + TOLERANCE)
    )
    if not sound:
        raise DataError(
            "the root of the covariances' product fails its checks (their entries are not those of a covariance, or "
            "span too many orders of magnitude); make the statistics again"
        )


def _factor(covariance: Tensor) -> Tensor:
    """R (d, r) with R R^T = covariance. Directions with no more than rounding's variance are left out: their roots
    would count, and the root of rounding is larger than rounding."""
    values, vectors = torch.linalg.eigh(covariance)
    noise = len(values) * torch.finfo(torch.float64).eps * values[-1].clamp(min=0)
    if values[0] < -1e3 * noise - 1e-12:
        raise DataError(
            f"a covariance has the eigenvalue {values[0].item():.3g}: it is none; make the statistics again in float64"
        )
    kept = values > noise
    return vectors[:, kept] * values[kept].sqrt()


def _root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp(min=0).sqrt() @ vectors.T


def _span(roots: Tensor) -> Tensor:
    return roots / roots.norm(dim=0, keepdim=True)


def _pseudo_inverse(roots: Tensor) -> Tensor:
    """(d, r): R (R^T R)^-1; R's columns are orthogonal."""
    return roots / roots.square().sum(0, keepdim=True)
