"""Steps to a target: how much earlier one method reaches a quality than another, and how sure that is. numpy alone.

Curves fall: lower is better (the caller turns the sign of metrics that rise). S seeds, K evaluated steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from repa_scale.metrics import NORMAL

DRAWS = 200  # of the errors of the samples
# Student's t of CONFIDENCE, two-sided, for 1, 2, ... 30 degrees of freedom.
STUDENT = (
    12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281, 2.2010, 2.1788, 2.1604, 2.1448,
    2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860, 2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484,
    2.0452, 2.0423,
)  # fmt: skip

EXACT, MORE, LESS = "exact", "more than", "less than"
ONE_LESS = "without one of the seeds, it is not reached"  # a reason to give no interval

Cost = Callable[[np.ndarray, float], float]


@dataclass(frozen=True)
class Curve:
    """A metric of one method, of several runs that differ by the seed.

    Attributes:
        seeds: S of them.
        steps: (K,) float64, rising, above 0.
        values: (S, K) float64.
        errors: (S, K) float64 standard errors from the samples, or None where they were not measured.
    """

    seeds: tuple[int, ...]
    steps: np.ndarray
    values: np.ndarray
    errors: np.ndarray | None = None

    def of(self, rows: np.ndarray) -> Curve:
        """Of some seeds alone."""
        errors = None if self.errors is None else self.errors[rows]
        return Curve(tuple(self.seeds[row] for row in rows), self.steps, self.values[rows], errors)

    def fit(self) -> np.ndarray:
        """(K,) the falling curve nearest to the mean over the seeds."""
        return falling(self.values.mean(axis=0))


@dataclass(frozen=True)
class Reached:
    """When a level was reached. kind: `exact`; `more than`: not until `step`, the last evaluated one; `less than`: by
    `step` at the latest, the first evaluated one."""

    kind: str
    step: float


@dataclass(frozen=True)
class SpeedUp:
    """Cost of the other method over cost of ours, to one level.

    Attributes:
        level: the quality.
        ours, other: when each reached it.
        kind: of `ratio`: `exact`; `more than`, `less than`: a bound, for one of the two is censored; `unknown`.
        ratio: above 1: ours is faster; None where it is unknown.
        low, high: CONFIDENCE interval, or None with the reason in `why`.
        why: why there is no interval.
    """

    level: float
    ours: Reached
    other: Reached
    kind: str
    ratio: float | None
    low: float | None = None
    high: float | None = None
    why: str = ""


def falling(values: np.ndarray) -> np.ndarray:
    """(K,) -> (K,): the non-increasing sequence with the least squared distance (pool adjacent violators)."""
    means: list[float] = []
    counts: list[int] = []
    for value in values:
        means.append(float(value))
        counts.append(1)
        while len(means) > 1 and means[-1] > means[-2]:
            count = counts[-2] + counts[-1]
            means[-2] += (means[-1] - means[-2]) * counts[-1] / count
            counts[-2] = count
            del means[-1], counts[-1]
    return np.repeat(means, counts)


def reach(steps: np.ndarray, fit: np.ndarray, level: float) -> Reached:
    """The first crossing of `level`, linear in log step between the points; nothing is extrapolated.

    Args:
        steps, fit: (K,) rising steps, and values that do not rise.
    """
    below = fit <= level
    if not below.any():
        return Reached(MORE, float(steps[-1]))
    i = int(np.argmax(below))
    if fit[i] == level:
        return Reached(EXACT, float(steps[i]))
    if i == 0:
        return Reached(LESS, float(steps[0]))
    share = (fit[i - 1] - level) / (fit[i - 1] - fit[i])
    return Reached(EXACT, float(math.exp((1 - share) * math.log(steps[i - 1]) + share * math.log(steps[i]))))


def speed_up(ours: Curve, other: Curve, level: float | None, costs: tuple[Cost, Cost] | None = None) -> SpeedUp:
    """How many times less ours costs than the other to reach `level`.

    Point estimate: from the mean curve of each. Interval: on the logarithm of the ratio, the wider of two: Student's t
    with the jackknife over seeds (pairs of runs with one seed where both methods have the same seeds, else each
    method's runs alone, with Welch's degrees of freedom), and the normal one of the errors of the samples.

    Args:
        level: None: what the other reached at its last evaluated step, found anew in each replicate.
        costs: of ours and of the other, (rows of the seeds, step) -> cost; default: the step itself.
    """
    mine, theirs = costs or (_step, _step)
    all_ours, all_other = np.arange(len(ours.seeds)), np.arange(len(other.seeds))

    def both(a: Curve, b: Curve) -> tuple[float, Reached, Reached]:
        fit = b.fit()
        target = float(fit[-1]) if level is None else level
        return target, reach(a.steps, a.fit(), target), reach(b.steps, fit, target)

    def log_ratio(a: np.ndarray, b: np.ndarray, left: Curve = ours, right: Curve = other) -> float:
        _, early, late = both(left.of(a), right.of(b))
        if (early.kind, late.kind) != (EXACT, EXACT):
            return math.nan
        return math.log(theirs(b, late.step)) - math.log(mine(a, early.step))

    target, early, late = both(ours, other)
    kind = _kind(early.kind, late.kind)
    if kind == "unknown":
        return SpeedUp(target, early, late, kind, None, why="neither reached it" if early.kind == MORE else "too early")
    ratio = theirs(all_other, late.step) / mine(all_ours, early.step)
    if kind != EXACT:
        return SpeedUp(target, early, late, kind, ratio, why="a bound, not a value")
    spread, why = _seed_spread(ours, other, log_ratio)
    if why:
        return SpeedUp(target, early, late, kind, ratio, why=why)
    samples = _sample_spread(ours, other, lambda a, b: log_ratio(all_ours, all_other, a, b))
    if math.isnan(spread) or math.isnan(samples):
        return SpeedUp(target, early, late, kind, ratio, why=ONE_LESS)
    half = math.exp(min(max(spread, samples), 700.0))
    return SpeedUp(target, early, late, kind, ratio, ratio / half, ratio * half)


def student(freedom: float) -> float:
    """The two-sided quantile of CONFIDENCE; between whole numbers linear in 1 / freedom."""
    freedom = max(1.0, freedom)
    if freedom >= len(STUDENT):
        return NORMAL + (STUDENT[-1] - NORMAL) * len(STUDENT) / freedom
    whole = int(freedom)
    low, high = STUDENT[whole - 1], STUDENT[min(whole, len(STUDENT) - 1)]
    share = (1 / whole - 1 / freedom) / (1 / whole - 1 / (whole + 1))
    return low + (high - low) * share


def _step(rows: np.ndarray, step: float) -> float:
    return step


def _kind(early: str, late: str) -> str:
    """What is known of late / early."""
    if early == late == EXACT:
        return EXACT
    # A late numerator or an early denominator bounds the ratio from below.
    if (early in (EXACT, LESS)) and (late in (EXACT, MORE)):
        return MORE
    if (early in (EXACT, MORE)) and (late in (EXACT, LESS)):
        return LESS
    return "unknown"


def _seed_spread(ours: Curve, other: Curve, log_ratio: Callable[..., float]) -> tuple[float, str]:
    """Half the interval's width of the log ratio by the seeds, or why there is none."""
    counts = len(ours.seeds), len(other.seeds)
    if min(counts) < 2:
        return math.nan, "one seed"
    rows = [np.arange(count) for count in counts]
    if ours.seeds == other.seeds:
        variance = _jackknife([log_ratio(np.delete(rows[0], i), np.delete(rows[1], i)) for i in rows[0]])
        return student(counts[0] - 1) * math.sqrt(variance), ""
    parts = (
        _jackknife([log_ratio(np.delete(rows[0], i), rows[1]) for i in rows[0]]),
        _jackknife([log_ratio(rows[0], np.delete(rows[1], i)) for i in rows[1]]),
    )
    below = sum(part**2 / (count - 1) for part, count in zip(parts, counts, strict=True))
    freedom = sum(parts) ** 2 / below if below else math.inf
    return student(freedom) * math.sqrt(sum(parts)), ""


def _jackknife(values: list[float]) -> float:
    """The variance of an estimate, from its values without each of the n runs (Tukey 1958)."""
    n = len(values)
    return (n - 1) * float(np.var(values))


def _sample_spread(ours: Curve, other: Curve, log_ratio: Callable[[Curve, Curve], float]) -> float:
    """The same by the errors of the samples alone, 0 where they are not known."""
    if ours.errors is None and other.errors is None:
        return 0.0
    random = np.random.default_rng(0)

    def shaken(curve: Curve) -> Curve:
        if curve.errors is None:
            return curve
        noise = random.standard_normal(curve.values.shape) * curve.errors
        return Curve(curve.seeds, curve.steps, curve.values + noise)

    found = np.array([log_ratio(shaken(ours), shaken(other)) for _ in range(DRAWS)])
    found = found[np.isfinite(found)]
    return NORMAL * float(found.std()) if len(found) > DRAWS // 2 else math.nan
