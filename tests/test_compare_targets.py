"""Steps to a target: known speed-ups come back, intervals hold the truth as often as they say, bounds stay bounds."""

import math

import numpy as np
import pytest
from scipy.stats import binom, t
from sklearn.isotonic import isotonic_regression

from repa_scale.compare.targets import Curve, falling, reach, speed_up, student
from repa_scale.metrics import CONFIDENCE

STEPS = np.linspace(25_000, 400_000, 16)
TRUTH = 2.0


def quality(steps):
    """A curve of a Frechet distance: 68 at 25,000 steps, 17 at 400,000."""
    return 8 + 60 * (steps / 25_000) ** -0.7


def made_up(random, seeds, ratio, pace=0.1, noise=0.002, shared=0.0):
    """Runs that are `ratio` times as fast as `quality`, each at a pace of its own, measured with noise."""
    own = np.exp(random.normal(0, pace, len(seeds)) + shared)[:, None]
    values = quality(STEPS * ratio * own)
    return Curve(tuple(seeds), STEPS, values * (1 + random.normal(0, noise, values.shape)))


def test_the_fit_is_the_isotonic_regression():
    random = np.random.default_rng(0)
    for _ in range(50):
        values = random.normal(size=20) - 0.1 * np.arange(20)
        np.testing.assert_allclose(falling(values), isotonic_regression(values, increasing=False), atol=1e-12)


def test_students_t():
    for freedom in (1, 2, 3, 10, 29, 30):
        assert student(freedom) == pytest.approx(t.ppf(0.975, freedom), abs=1e-4)
    for freedom in (1.5, 2.7, 5.5, 40, 1e6):
        assert t.ppf(0.975, freedom) * 0.999 < student(freedom) < t.ppf(0.975, freedom) * 1.2  # never too narrow


@pytest.mark.parametrize("ratio", [0.5, 1.0, 2.0, 4.0])
def test_a_known_speed_up_comes_back_exactly(ratio):
    """Steps double, so a curve that is linear in log step stays so when it is moved by a power of two."""
    steps = 1000.0 * 2 ** np.arange(9)
    level = 100 - 7 * np.log2(steps) + 0.1 * np.log2(steps) ** 2
    shift = round(math.log2(ratio))
    shared = slice(max(0, shift), 9 + min(0, shift))  # `ours` has at a step what `other` has at `ratio` times it
    moved = slice(max(0, -shift), 9 + min(0, -shift))
    ours = Curve((0,), steps[moved], level[shared][None])
    other = Curve((0,), steps, level[None])
    for target in np.linspace(level[shared][0], level[shared][-1], 7):
        found = speed_up(ours, other, float(target))
        assert found.kind == "exact" and found.ratio == pytest.approx(ratio, rel=1e-12)


def test_a_smooth_curve_gives_its_speed_up_within_the_grid():
    for ratio in (1.3, 2.0, 3.3):
        ours, other = Curve((0,), STEPS, quality(ratio * STEPS)[None]), Curve((0,), STEPS, quality(STEPS)[None])
        for target in (None, 30.0, 25.0):
            # The first two evaluations lie a factor of two apart, and the curve bends between them.
            assert speed_up(ours, other, target).ratio == pytest.approx(ratio, rel=0.04)


@pytest.mark.parametrize("seeds, paired", [(2, True), (3, True), (3, False), (5, True)])
def test_intervals_hold_the_truth_as_often_as_they_say(seeds, paired):
    random = np.random.default_rng(3)
    experiments, held = 200, 0
    for _ in range(experiments):
        shared = random.normal(0, 0.1, seeds) if paired else 0.0
        ours = made_up(random, range(seeds), TRUTH, shared=shared)
        other = made_up(random, range(seeds) if paired else range(10, 10 + seeds), 1.0, shared=shared)
        found = speed_up(ours, other, None)
        held += found.low <= TRUTH <= found.high
    # Not below what 95 % would give in one of 1,000 such tests; an interval that always holds would say nothing.
    assert binom.ppf(0.001, experiments, CONFIDENCE) <= held < experiments, held


def test_pairs_of_a_seed_tell_more_than_strangers():
    random = np.random.default_rng(0)
    widths = {True: [], False: []}
    for _ in range(40):
        shared = random.normal(0, 0.3, 4)
        ours, other = (made_up(random, range(4), r, pace=0.02, shared=shared) for r in (TRUTH, 1.0))
        for paired in widths:
            right = other if paired else Curve((10, 11, 12, 13), other.steps, other.values)
            found = speed_up(ours, right, 30.0)
            widths[paired].append(math.log(found.high / found.low))
    assert np.median(widths[True]) < 0.3 * np.median(widths[False])


def test_errors_of_the_samples_widen_what_the_seeds_make_too_narrow():
    values = quality(STEPS * TRUTH)
    alike, other = np.stack([values, values]), np.stack([quality(STEPS)] * 2)
    narrow = speed_up(Curve((0, 1), STEPS, alike), Curve((0, 1), STEPS, other), 30.0)
    wide = speed_up(Curve((0, 1), STEPS, alike, 0.05 * alike), Curve((0, 1), STEPS, other, 0.05 * other), 30.0)
    assert narrow.high / narrow.low == pytest.approx(1.0)
    assert wide.low < 0.95 * TRUTH and wide.high > 1.05 * TRUTH


def test_one_seed_has_no_interval_and_says_so():
    found = speed_up(Curve((0,), STEPS, quality(2 * STEPS)[None]), Curve((0,), STEPS, quality(STEPS)[None]), None)
    assert found.low is None and found.why == "one seed"


def test_what_is_not_reached_is_a_bound_and_never_extrapolated():
    fast = Curve((0, 1), STEPS, np.stack([quality(3 * STEPS)] * 2))
    slow = Curve((0, 1), STEPS, np.stack([quality(STEPS)] * 2))
    best = float(fast.values[0, -1])
    found = speed_up(fast, slow, best)
    assert (found.kind, found.other.kind, found.other.step) == ("more than", "more than", 400_000)
    assert found.ratio == pytest.approx(1.0) and found.low is None
    assert speed_up(fast, slow, 20.0).kind == "exact"
    found = speed_up(slow, fast, best)
    assert found.kind == "less than" and found.ratio == pytest.approx(1.0)
    found = speed_up(fast, slow, 60.0)  # before the first evaluation of `fast`
    assert (found.kind, found.ours.kind, found.ours.step) == ("more than", "less than", 25_000)
    assert speed_up(fast, slow, 70.0).kind == "unknown"  # before the first of both
    assert speed_up(fast, slow, 1.0).ratio is None


def test_a_crossing_lies_on_the_line_in_log_step():
    steps, fit = np.array([100.0, 400.0, 1600.0]), np.array([8.0, 4.0, 2.0])
    assert reach(steps, fit, 6.0).step == pytest.approx(200.0)
    assert reach(steps, fit, 4.0).step == 400.0
    assert reach(steps, fit, 3.0).step == pytest.approx(800.0)
    assert reach(steps, fit, 9.0).kind == "less than" and reach(steps, fit, 1.0).kind == "more than"
