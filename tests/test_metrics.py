"""The metrics of sets of features against closed forms, SciPy, torch-fidelity and slow direct formulas."""

import logging

import numpy as np
import pytest
import scipy.linalg
import torch

from repa_scale import torchvision_fix
from repa_scale.errors import DataError
from repa_scale.evaluations import Evaluation
from repa_scale.metrics.bootstrap import by_resampling, groups_of
from repa_scale.metrics.frechet import Moments, frechet_distance, frechet_with_slope, influence
from repa_scale.metrics.inception_score import inception_score
from repa_scale.metrics.kid import kernel_distance
from repa_scale.metrics.precision_recall import covered, nearest, precision_recall


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gaussian(mean, covariance):
    return Moments.from_covariance(1000, torch.as_tensor(mean).double(), torch.as_tensor(covariance).double())


def direct(a, b):
    """The distance of two sets by NumPy's covariance and SciPy's square root of the plain product."""
    a, b = a.numpy(), b.numpy()
    first, second = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(first @ second).real
    return np.square(a.mean(0) - b.mean(0)).sum() + np.trace(first + second - 2 * root)


def test_gaussians_of_known_distance():
    """Covariances with common axes: |difference of means|^2 + sum (sqrt a - sqrt b)^2, in any rotation."""
    a, b = torch.tensor([4.0, 1.0, 9.0, 1e-8]).double(), torch.tensor([1.0, 1.0, 16.0, 0.25]).double()
    turn = torch.linalg.qr(normal(4, 4)).Q
    mean = torch.tensor([1.0, -2.0, 0.5, 0.0]).double()
    known = mean.square().sum() + (a.sqrt() - b.sqrt()).square().sum()
    for rotation in (torch.eye(4).double(), turn):
        first = gaussian(torch.zeros(4), rotation @ a.diag() @ rotation.T)
        second = gaussian(mean, rotation @ b.diag() @ rotation.T)
        assert frechet_distance(first, second) == pytest.approx(known.item(), rel=1e-10)
        assert frechet_distance(second, first) == pytest.approx(known.item(), rel=1e-10)


@pytest.mark.parametrize("width", [1, 7, 64])
def test_the_distance_is_that_of_scipy_and_of_torch_fidelity(width):
    torchvision_fix.ensure()
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    a = normal(400, width) @ normal(width, width, seed=1) + 0.3
    b = normal(300, width, seed=2) * 2
    ours = frechet_distance(Moments.of(a), Moments.of(b))
    if width > 1:  # of one number SciPy gives no matrix
        assert ours == pytest.approx(direct(a, b), rel=1e-9)
        theirs = fid_statistics_to_metric(*(fid_features_to_statistics(x) for x in (a, b)), verbose=False)
        assert ours == pytest.approx(theirs["frechet_inception_distance"], rel=1e-9)
    else:
        known = (a.mean() - b.mean()) ** 2 + (a.std() - b.std()) ** 2
        assert ours == pytest.approx(known.item(), rel=1e-9)


def test_samples_of_a_gaussian_come_near_its_distance():
    covariance = torch.diag(torch.tensor([1.0, 4.0, 0.25]).double())
    drawn = normal(200_000, 3) @ covariance.sqrt() + 1
    assert frechet_distance(Moments.of(drawn), gaussian(torch.zeros(3), torch.eye(3))) == pytest.approx(4.25, rel=0.01)


def test_streamed_moments_are_those_of_all_at_once_however_split():
    features = normal(1000, 12).float()
    whole = Moments.of(features)
    for sizes in ([1] * 10 + [990], [300, 300, 400], [999, 1]):
        streamed = Moments.empty(12)
        for part in features.split(sizes):
            streamed = streamed.add(part)
        left, right = (Moments.empty(12).add(part) for part in features.split([sizes[0], 1000 - sizes[0]]))
        for moments in (streamed, left.merge(right), right.merge(left)):
            assert moments.count == 1000
            assert torch.allclose(moments.mean, whole.mean, rtol=0, atol=1e-14)
            assert torch.allclose(moments.covariance, whole.covariance, rtol=0, atol=1e-13)
    assert np.allclose(whole.covariance, np.cov(features.numpy().astype(float), rowvar=False), rtol=0, atol=1e-13)


def test_a_far_mean_costs_no_digits():
    """Sums of squares would lose them all: 1e7 squared is 1e14, and a double holds 16 digits."""
    features = normal(2000, 5)
    far = Moments.empty(5)
    for part in (features + 1e7).split(50):
        far = far.add(part)
    assert torch.allclose(far.covariance, Moments.of(features).covariance, rtol=1e-7, atol=1e-7)


def test_fewer_images_than_numbers(caplog):
    """Two sets in spaces at right angles: the roots' product is zero, and both traces are left."""
    a, b = torch.zeros(10, 40).double(), torch.zeros(12, 40).double()
    a[:, :6], b[:, 6:20] = normal(10, 6), normal(12, 14, seed=1)
    first, second = Moments.of(a), Moments.of(b)
    known = (first.mean - second.mean).square().sum() + first.covariance.trace() + second.covariance.trace()
    with caplog.at_level(logging.WARNING):
        assert frechet_distance(first, second) == pytest.approx(known.item(), rel=1e-12)
    assert "10 images for features of 40 numbers" in caplog.text
    # Within the samples' span the distance is that of the span alone.
    turn = torch.linalg.qr(normal(40, 40, seed=2)).Q
    few, many = Moments.of(a @ turn), Moments.of(normal(500, 40, seed=3) @ turn)
    span = Moments.of(a[:, :6]), Moments.of((normal(500, 40, seed=3))[:, :6])
    rest = many.covariance.trace() - span[1].covariance.trace() + (many.mean @ turn.T)[6:].square().sum()
    assert frechet_distance(few, many) == pytest.approx(frechet_distance(*span) + rest.item(), rel=1e-9)
    assert frechet_distance(few, few) == pytest.approx(0, abs=1e-9)


def test_equal_sets_have_no_distance_and_it_is_never_negative():
    features = normal(3000, 200) * torch.logspace(-6, 3, 200, dtype=torch.float64)
    moments = Moments.of(features)
    assert 0 <= frechet_distance(moments, moments) < 1e-8 * moments.covariance.trace()


def test_what_is_no_covariance_is_refused():
    good = gaussian(torch.zeros(3), torch.eye(3))
    with pytest.raises(DataError, match="it is none"):
        frechet_distance(gaussian(torch.zeros(3), torch.diag(torch.tensor([1.0, 1.0, -0.5]))), good)
    with pytest.raises(DataError, match="fails its checks"):
        frechet_distance(good, gaussian(torch.zeros(3), torch.diag(torch.tensor([1.0, 1.0, -0.5]))))
    with pytest.raises(DataError, match="not finite"):
        frechet_distance(good, gaussian(torch.full((3,), torch.nan), torch.eye(3)))
    with pytest.raises(DataError, match="use one extractor"):
        frechet_distance(good, gaussian(torch.zeros(2), torch.eye(2)))
    with pytest.raises(DataError, match="at least 2"):
        frechet_distance(good, Moments.of(torch.zeros(1, 3)))


def test_features_that_are_not_finite_are_refused():
    features = torch.zeros(5, 3)
    features[3, 1] = torch.nan
    with pytest.raises(DataError, match="image 3 of 5 are not finite"):
        Moments.empty(3).add(features)


def test_the_influence_is_the_derivative_by_a_samples_weight():
    a, b = normal(60, 6) @ normal(6, 6, seed=1), Moments.of(normal(50, 6, seed=2) + 0.5)
    moments = Moments.of(a)
    pulls = influence(a, moments, frechet_with_slope(moments, b))
    assert pulls.mean().abs() < 1e-10
    for number in (0, 17):
        e = 1e-5
        weights = torch.ones(60).double() / 60
        weights = weights * (1 - e)
        weights[number] += e
        mean = weights @ a
        covariance = ((a - mean).T * weights) @ (a - mean) * 60 / 59
        moved = frechet_distance(Moments.from_covariance(60, mean, covariance), b)
        assert (moved - frechet_distance(moments, b)) / e == pytest.approx(pulls[number].item(), rel=1e-3)


def test_kid_is_that_of_torch_fidelity():
    torchvision_fix.ensure()
    from torch_fidelity.metric_kid import kid_features_to_metric

    a, b = normal(200, 16), normal(200, 16, seed=1) * 1.2
    theirs = kid_features_to_metric(a, b, kid_subsets=1, kid_subset_size=200, verbose=False)
    assert kernel_distance(a, b).value == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-10)
    single = kernel_distance(a.float(), b.float())
    assert single.value == pytest.approx(kernel_distance(a, b).value, rel=1e-4)
    subsets = kid_features_to_metric(a, b, kid_subsets=300, kid_subset_size=100, verbose=False)
    assert single.low < subsets["kernel_inception_distance_mean"] < single.high
    assert kernel_distance(a, a.flip(0)).value < 0, "without bias: of equal sets it is below zero"
    with pytest.raises(DataError, match="at least 2"):
        kernel_distance(a[:1], b)


def test_the_jackknife_of_kid_leaves_groups_out():
    a, b = normal(41, 3), normal(30, 3, seed=1)
    groups = groups_of(41, 20)
    without = torch.tensor([kernel_distance(a[groups != group], b).value for group in range(20)]).double()
    error = (19 / 20 * (without - without.mean()).square().sum()).sqrt().item()
    found = kernel_distance(a, b)
    assert found.high - found.value == pytest.approx(1.96 * error, rel=1e-4)


def test_the_inception_score_is_that_of_torch_fidelity():
    torchvision_fix.ensure()
    from torch_fidelity.metric_isc import isc_features_to_metric

    logits = normal(1000, 20) * 3
    theirs = isc_features_to_metric(logits, splits=4, shuffle=False)
    ours = inception_score(logits, split=250)
    assert ours.value == pytest.approx(theirs["inception_score_mean"], rel=1e-12)
    assert ours.low < ours.value < ours.high
    sure = torch.full((100, 20), -1e4).double()
    sure[torch.arange(100), torch.arange(100) % 20] = 0
    assert inception_score(sure).value == pytest.approx(20), "as sure and varied as can be"
    assert inception_score(torch.zeros(100, 20)).value == pytest.approx(1), "never sure"
    with pytest.raises(DataError, match="over 20 classes"):
        inception_score(logits[:19])


def test_precision_and_recall_on_constructed_sets():
    """Reference: two clusters. Samples: one of them and a place with nothing real."""
    here, there, nowhere = (normal(100, 8, seed=seed) * 0.1 + shift for seed, shift in ((0, 0), (1, 5), (2, -5)))
    reference = torch.cat([here, there]).float()
    samples = torch.cat([normal(100, 8, seed=3) * 0.05, nowhere]).float()
    precision, recall = precision_recall(samples, reference)
    assert precision.value == pytest.approx(0.5, abs=0.02)
    assert recall.value < 0.5
    same = precision_recall(reference, reference)
    assert same[0].value == same[1].value == 1.0
    apart = precision_recall(nowhere.float(), reference)
    assert apart[0].value == apart[1].value == 0.0


def test_precision_and_recall_by_the_slow_formula():
    samples, reference = normal(150, 4).float(), (normal(120, 4, seed=1) + 0.8).float()

    def share(points, centres):
        between = torch.cdist(centres.double(), centres.double())
        radii = between.sort(1).values[:, 3]  # the 0th is itself
        return (torch.cdist(points.double(), centres.double()) <= radii).any(1).double().mean().item()

    precision, recall = precision_recall(samples, reference)
    assert precision.value == pytest.approx(share(samples, reference), abs=1e-12)
    assert recall.value == pytest.approx(share(reference, samples), abs=1e-12)
    groups = groups_of(150, 20)
    without = torch.tensor([share(reference, samples[groups != group]) for group in range(20)]).double()
    error = (19 / 20 * (without - without.mean()).square().sum()).sqrt().item()
    assert recall.high - recall.value == pytest.approx(1.96 * error, rel=1e-3)


def test_neighbours_in_blocks_are_those_of_the_whole(monkeypatch):
    from repa_scale.metrics import precision_recall as room

    features = normal(90, 5).float()
    whole = nearest(features, 4)
    inside = covered(features + 0.1, features, whole[0][:, -1:])
    monkeypatch.setattr(room, "ROWS", 13)
    monkeypatch.setattr(room, "COLUMNS", 31)
    parts = nearest(features, 4)
    assert torch.allclose(whole[0], parts[0], atol=1e-5) and torch.equal(whole[1], parts[1])
    assert torch.equal(inside, covered(features + 0.1, features, whole[0][:, -1:]))
    features[7] = features[3]  # twins: each is the other's nearest
    twins = nearest(features, 1)
    assert twins[1][7, 0] == 3 and twins[1][3, 0] == 7 and twins[0][7, 0] == pytest.approx(0, abs=1e-5)
    with pytest.raises(DataError, match="no 3 nearest neighbours"):
        precision_recall(features[:3], features)


def test_a_far_mean_does_not_move_neighbours():
    samples, reference = normal(150, 4).float(), (normal(120, 4, seed=1) + 0.8).float()
    near = precision_recall(samples, reference)
    far = precision_recall(samples.double() + 1e4, reference.double() + 1e4)
    assert [one.value for one in near] == pytest.approx([one.value for one in far], abs=0.01)


@pytest.mark.parametrize("metric", ["fd", "kid", "is", "precision", "recall"])
def test_intervals_hold_what_other_samples_would_give(metric):
    """Of many draws of the samples, the intervals of about 95 % hold the mean over all draws."""
    mixing = normal(6, 6, seed=1) / 6**0.5
    reference = normal(300, 6, seed=2)
    real = Moments.of(reference)
    estimates = []
    for seed in range(60 if metric == "kid" else 100):
        drawn = normal(150, 6, seed=seed + 10) @ mixing + 0.3
        if metric == "fd":
            moments = Moments.of(drawn)
            distance = frechet_with_slope(moments, real)
            estimates.append(by_resampling(distance.value, influence(drawn, moments, distance)))
        elif metric == "kid":
            estimates.append(kernel_distance(drawn, reference))
        elif metric == "is":
            estimates.append(inception_score(drawn * 2))
        else:
            estimates.append(precision_recall(drawn.float(), reference.float())[metric == "recall"])
    truth = np.mean([one.value for one in estimates])
    held = np.mean([one.low <= truth <= one.high for one in estimates])
    assert 0.85 <= held <= 1.0, held
    widths = np.mean([one.high - one.low for one in estimates])
    spread = 3.92 * np.std([one.value for one in estimates])
    assert 0.75 <= widths / spread <= 1.6, (widths, spread)


def test_names_say_the_number_of_samples():
    assert Evaluation(100, 1, 0.0, "fd_effnet", 12.0, 5000).name == "eval/fd_effnet_n5000"
