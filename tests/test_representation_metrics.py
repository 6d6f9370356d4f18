"""CKNNA, spatial measures and linear probe, against slow direct formulas, constructed cases and invariances."""

import math

import numpy as np
import pytest
import torch

from repa_scale.errors import DataError
from repa_scale.metrics import cknna as module
from repa_scale.metrics.cknna import cknna
from repa_scale.metrics.probe import CHOOSE, FIT, TEST, probe, split, wilson
from repa_scale.metrics.spatial import distances, spatial


def features(count, width, seed):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def direct_hsic(k, l):  # noqa: E741
    """Song et al. (2012), equation 5, entry by entry."""
    n = len(k)
    everyone = range(n)
    trace = sum(k[i][j] * l[j][i] for i in everyone for j in everyone)
    total_k, total_l = (sum(map(sum, x)) for x in (k, l))
    product = sum(k[i][j] * l[j][m] for i in everyone for j in everyone for m in everyone)
    return (trace + total_k * total_l / ((n - 1) * (n - 2)) - 2 * product / (n - 2)) / (n * (n - 3))


def quadruples(k, l):  # noqa: E741
    """What equation 5 is a short form of, where kernels are symmetric: the mean over four different images."""
    everyone = range(len(k))
    chosen = [(i, j, q, r) for i in everyone for j in everyone for q in everyone for r in everyone]
    chosen = [four for four in chosen if len(set(four)) == 4]
    return sum(k[i][j] * (l[i][j] + l[q][r] - 2 * l[i][q]) for i, j, q, r in chosen) / len(chosen)


def direct_cknna(a, b, k, hsic=direct_hsic):
    """By loops over pairs, from the statement in cknna.py."""
    n = len(a)
    kernels, chosen = [], []
    for x in (a, b):
        rows = [[float(v) for v in row] for row in x]
        rows = [[v / math.sqrt(sum(w * w for w in row)) for v in row] for row in rows]
        kernels.append(
            [[sum(p * q for p, q in zip(rows[i], rows[j], strict=True)) for j in range(n)] for i in range(n)]
        )
        near = set()
        for i in range(n):
            order = sorted((j for j in range(n) if j != i), key=lambda j: -kernels[-1][i][j])
            near |= {(i, j) for j in order[:k]}
        chosen.append(near)

    def masked(kernel, pairs):
        return [[kernel[i][j] if (i, j) in pairs else 0.0 for j in range(n)] for i in range(n)]

    both = chosen[0] & chosen[1]
    cross = hsic(masked(kernels[0], both), masked(kernels[1], both))
    own = [hsic(masked(x, pairs), masked(x, pairs)) for x, pairs in zip(kernels, chosen, strict=True)]
    return cross / math.sqrt(own[0] * own[1])


@pytest.mark.parametrize("k", [2, 4, 8])
def test_cknna_is_the_formula_written_out(k, monkeypatch):
    monkeypatch.setattr(module, "ROWS", 4)  # so that 9 images are three blocks
    a = features(9, 5, 0)
    b = a @ features(5, 3, 1) + 0.5 * features(9, 3, 2)
    assert cknna(a, b, k) == pytest.approx(direct_cknna(a, b, k), rel=1e-10)


def test_cknna_with_all_neighbours_is_unbiased_cka():
    a = features(9, 6, 3)
    b = features(9, 6, 4) + a
    assert cknna(a, b, 8) == pytest.approx(direct_cknna(a, b, 8, quadruples), rel=1e-10)


def test_what_cknna_does_not_see():
    a = features(200, 16, 5)
    b = a[:, :8] + 0.3 * features(200, 8, 6)
    rotation, _ = torch.linalg.qr(features(16, 16, 7))
    value = cknna(a, b)
    assert cknna(a @ rotation, 7.0 * b) == pytest.approx(value, rel=1e-9)
    assert cknna(b, a) == pytest.approx(value, rel=1e-3)
    order = torch.randperm(200, generator=torch.Generator().manual_seed(8))
    assert cknna(a[order], b[order]) == pytest.approx(value, rel=1e-9)
    assert cknna(a, a) == pytest.approx(1.0, abs=1e-12)
    assert 0.05 < value < 0.95 and abs(cknna(a, features(200, 16, 9))) < 0.05


def test_cknna_of_too_little():
    a = features(12, 3, 0)
    with pytest.raises(DataError, match="needs at least 13 images"):
        cknna(a, a, 12)
    with pytest.raises(DataError, match="not finite"):
        cknna(a.index_fill(0, torch.tensor([3]), torch.nan), a, 3)
    assert math.isnan(cknna(torch.zeros(12, 3), a, 3))


def test_spatial_measures_of_constructed_maps():
    grid = (8, 8)
    far, reach = distances(grid)
    assert (far, reach) == (3, 4) and distances((16, 16)) == (6, 8)
    alike = spatial(torch.ones(1, 64, 5), grid)
    assert torch.stack([alike.lds, alike.cds, alike.rmsc]).abs().max() < 1e-6
    # Tokens that share nothing: every cosine is 0, and the mean has a length of 1 / sqrt(T).
    apart = spatial(torch.eye(64)[None], grid)
    assert abs(float(apart.lds)) < 1e-6 and abs(float(apart.cds)) < 1e-6
    assert float(apart.rmsc) == pytest.approx(math.sqrt(1 - 1 / 64), rel=1e-5)
    # A token on the circle, by its column: the cosine of two is that of the angle between them.
    angle = torch.arange(8) * (math.pi / 16)
    circle = torch.stack([angle.cos(), angle.sin()], dim=1)
    turned = spatial(3.0 * circle.repeat(8, 1)[None], grid)
    lds, cds = written_out(circle.repeat(8, 1).double().numpy(), 8, far, reach)
    assert float(turned.lds) == pytest.approx(lds, rel=1e-5) and float(turned.cds) == pytest.approx(cds, rel=1e-5)
    assert lds > 0.2 and cds > 0.02


def test_spatial_measures_of_random_tokens_and_small_grids():
    tokens = torch.randn(3, 64, 7, generator=torch.Generator().manual_seed(0))
    found = spatial(tokens, (8, 8))
    for image in range(3):
        lds, cds = written_out(tokens[image].double().numpy(), 8, 3, 4)
        assert float(found.lds[image]) == pytest.approx(lds, abs=1e-6)
        assert float(found.cds[image]) == pytest.approx(cds, abs=1e-6)
    shuffled = spatial(tokens[:, torch.randperm(64, generator=torch.Generator().manual_seed(1))], (8, 8))
    assert torch.allclose(shuffled.rmsc, found.rmsc, atol=1e-6) and not torch.allclose(shuffled.lds, found.lds)
    one = spatial(torch.randn(2, 1, 4), (1, 1))
    assert one.lds.isnan().all() and one.cds.isnan().all() and one.rmsc.abs().max() < 1e-6


def written_out(tokens, side, far, reach):
    """LDS and CDS of one image by loops over its pairs of tokens."""
    unit = tokens / np.linalg.norm(tokens, axis=1, keepdims=True)
    at = {}
    for i in range(len(unit)):
        for j in range(len(unit)):
            distance = abs(i // side - j // side) + abs(i % side - j % side)
            at.setdefault(distance, []).append(float(unit[i] @ unit[j]))
    distant = [value for distance, values in at.items() if distance >= far for value in values]
    slope = np.polyfit(range(1, reach + 1), [np.mean(at[d]) for d in range(1, reach + 1)], 1)[0]
    return np.mean(at[1]) - np.mean(distant), -slope


def test_a_probe_reads_what_is_there_and_nothing_else():
    ids = torch.arange(3000)
    parts = split(ids)
    labels = torch.arange(3000) % 5
    noise = features(3000, 20, 0)
    random = probe(noise, labels, parts)
    assert random.low < 0.2 < random.high and 0.1 < random.accuracy < 0.3
    there = probe(noise + 6 * torch.nn.functional.one_hot(labels, 20), labels, parts)
    assert there.accuracy == 1.0 and 0.99 < there.low < there.high == 1.0
    # Neither the scale of a channel nor one that is constant matters.
    scaled = torch.cat([noise * torch.logspace(-6, 6, 20), torch.full((3000, 1), 0.1)], dim=1)
    assert probe(scaled, labels, parts).accuracy == pytest.approx(random.accuracy, abs=2 / 600)


def test_a_probe_is_the_least_squares_solution():
    ids = torch.arange(400)
    parts, x = split(ids), features(400, 6, 1)
    labels = (x[:, 0] + 0.8 * features(400, 1, 2)[:, 0] > 0).long() + (x[:, 1] > 0.5)
    found = probe(x, labels, parts)
    fitted, test = (parts != TEST).numpy(), (parts == TEST).numpy()
    design = x.numpy()
    design = (design - design[fitted].mean(0)) / design[fitted].std(0)
    onehot = np.eye(3)[labels.numpy()]
    bias = onehot[fitted].mean(0)
    gram = design[fitted].T @ design[fitted] + found.penalty * fitted.sum() * np.eye(6)
    weights = np.linalg.solve(gram, design[fitted].T @ (onehot[fitted] - bias))
    accuracy = ((design[test] @ weights + bias).argmax(1) == labels.numpy()[test]).mean()
    assert found.accuracy == pytest.approx(accuracy, abs=1e-12) and 0.5 < accuracy < 0.95


def test_the_split_follows_the_id():
    ids = torch.arange(20_000) * 7919
    parts = split(ids)
    assert torch.equal(split(ids.flip(0)).flip(0), parts)
    shares = torch.bincount(parts) / len(ids)
    assert shares[TEST] == pytest.approx(0.2, abs=0.01) and shares[CHOOSE] == pytest.approx(0.16, abs=0.01)
    assert shares[FIT] == pytest.approx(0.64, abs=0.01)


def test_the_interval_is_wilsons():
    assert wilson(0.5, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)
    assert wilson(0.0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)


def test_a_probe_of_too_little():
    ids = torch.arange(200)
    with pytest.raises(DataError, match="two classes"):
        probe(features(200, 3, 0), torch.zeros(200).long(), split(ids))
    with pytest.raises(DataError, match="take more images"):
        probe(features(20, 3, 0), torch.arange(20) % 2, split(ids[:20]))
    with pytest.raises(DataError, match="not finite"):
        probe(torch.full((200, 3), torch.nan), torch.arange(200) % 2, split(ids))
