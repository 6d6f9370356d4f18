"""The counter-based generator: known answers, independence of split and order, and good statistics."""

import math

import pytest
import torch

from repa_scale import rng


def words(*values):
    return [torch.tensor([v]) for v in values]


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_known_answers_of_its_authors(counter, key, answer):
    assert tuple(int(w) for w in rng.philox(*words(*counter), key)) == answer


def test_a_sample_depends_on_nothing_but_its_index():
    index = torch.arange(1000, 1064)
    whole = rng.normal(7, "noise", 3, index, (4, 8, 8))
    for parts in (2, 4, 64):
        pieces = [rng.normal(7, "noise", 3, part, (4, 8, 8)) for part in index.chunk(parts)]
        assert torch.equal(torch.cat(pieces), whole)
    order = torch.randperm(64)
    assert torch.equal(rng.normal(7, "noise", 3, index[order], (4, 8, 8)), whole[order])
    # A smaller shape is the beginning of a larger one only by accident; but the same shape is the same numbers.
    assert torch.equal(
        rng.uniform(7, "t", 3, index, ()), torch.cat([rng.uniform(7, "t", 3, i[None], ()) for i in index])
    )


def test_every_coordinate_of_the_counter_matters():
    index = torch.arange(64)
    base = rng.normal(0, "noise", 1, index, (64,))
    others = {
        "seed": rng.normal(1, "noise", 1, index, (64,)),
        "purpose": rng.normal(0, "posterior", 1, index, (64,)),
        "step": rng.normal(0, "noise", 2, index, (64,)),
        "index": rng.normal(0, "noise", 1, index + 64, (64,)),
        "high word of the index": rng.normal(0, "noise", 1, index + 2**32, (64,)),
    }
    for name, other in others.items():
        assert (base == other).sum() == 0, name
        assert abs(correlation(base, other)) < 5 / math.sqrt(base.numel()), name


def correlation(a, b):
    return float(torch.corrcoef(torch.stack([a.flatten().double(), b.flatten().double()]))[0, 1])


def test_ranges_are_pieces_of_one_stream():
    for draw in (rng.normal_range, rng.uniform_range):
        whole = draw(5, "weights", 0, 1003)
        assert torch.equal(
            torch.cat([draw(5, "weights", 0, 7), draw(5, "weights", 7, 500), draw(5, "weights", 500, 1003)]), whole
        )
    assert rng.normal_range(5, "weights", 3, 3).shape == (0,)


def test_long_ranges_agree_across_the_inner_chunks(monkeypatch):
    whole = rng.normal_range(5, "weights", 1, 999)
    monkeypatch.setattr(rng, "CHUNK", 16)
    assert torch.equal(rng.normal_range(5, "weights", 1, 999), whole)


@pytest.fixture
def stats():
    """scipy.stats; a machine that only runs the GPU tests may lack it."""
    return pytest.importorskip("scipy.stats")


@pytest.mark.parametrize("source", ["samples", "range"])
def test_normal_numbers_are_normal(source, stats):
    if source == "samples":
        x = rng.normal(0, "noise", 1, torch.arange(500), (400,), dtype=torch.float64).flatten()
    else:
        x = rng.normal_range(0, "weights", 0, 200_000).double()
    n = len(x)
    assert abs(float(x.mean())) < 4 / math.sqrt(n)
    assert abs(float(x.var()) - 1) < 4 * math.sqrt(2 / n)
    assert abs(float((x**3).mean())) < 4 * math.sqrt(15 / n)
    assert abs(float((x**4).mean()) - 3) < 4 * math.sqrt(96 / n)
    assert stats.kstest(x.numpy(), "norm").pvalue > 1e-3


def test_uniform_numbers_are_uniform_and_never_0_or_1(stats):
    u = rng.uniform(0, "t", 1, torch.arange(200_000), (), dtype=torch.float64)
    assert float(u.min()) > 0 and float(u.max()) < 1
    assert abs(float(u.mean()) - 0.5) < 4 / math.sqrt(12 * len(u))
    assert abs(float(u.var()) - 1 / 12) < 4 * math.sqrt(1 / 180 / len(u))
    assert stats.kstest(u.numpy(), "uniform").pvalue > 1e-3
    extremes = torch.tensor([[[0], [rng.MASK]]])
    assert [float(v) for v in rng._to_uniform((extremes, 2))[0].float()] == [2.0**-24, 1 - 2.0**-24]


def test_neighbours_are_not_correlated_in_any_coordinate():
    steps = torch.stack([rng.normal(0, "noise", step, torch.arange(64), (4, 16)) for step in range(1, 33)])
    for dim, name in enumerate(["step", "index", "channel", "element"]):
        n = steps.shape[dim]
        a, b = steps.narrow(dim, 0, n - 1), steps.narrow(dim, 1, n - 1)
        assert abs(correlation(a, b)) < 4.5 / math.sqrt(a.numel()), name
        assert abs(correlation(a.abs(), b.abs())) < 4.5 / math.sqrt(a.numel()), name


def test_bernoulli_hits_its_probability():
    hits = rng.bernoulli(0.1, 0, "label drop", 1, torch.arange(100_000)).double()
    assert abs(float(hits.mean()) - 0.1) < 4 * math.sqrt(0.09 / 100_000)
    assert not rng.bernoulli(0.0, 0, "label drop", 1, torch.arange(1000)).any()
    assert rng.bernoulli(1.0, 0, "label drop", 1, torch.arange(1000)).all()


def test_permutations_are_permutations_and_differ():
    orders = [rng.permutation(0, "order", epoch, 10_000) for epoch in range(3)]
    for order in orders:
        assert torch.equal(order.sort().values, torch.arange(10_000))
    assert (orders[0] == orders[1]).sum() < 20
    assert torch.equal(rng.permutation(0, "order", 0, 10_000), orders[0])
    # Where an element lands says nothing of where it came from.
    assert abs(correlation(torch.arange(10_000), orders[0])) < 4.5 / 100


def test_a_fingerprint_is_a_sum_over_parts_and_sees_every_id():
    ids = torch.arange(1000) * 7919 + 2**40
    whole = rng.fingerprint(ids)
    assert sum(rng.fingerprint(part) for part in ids.chunk(4)) % 2**64 == whole
    assert rng.fingerprint(ids.flip(0)) == whole
    assert rng.fingerprint(ids + 1) != whole
    assert len(set(rng.hash64(torch.arange(100_000)).tolist())) == 100_000


@pytest.mark.gpu
def test_a_gpu_draws_what_a_cpu_draws(gpu):
    index = torch.arange(256)
    cpu = rng.normal(0, "noise", 1, index, (4, 32, 32))
    ours = rng.normal(0, "noise", 1, index.to(gpu), (4, 32, 32))
    assert ours.device.type == gpu
    # The words are equal; the float64 logarithm may differ in its last bit, which float32 shows once in 1e8 numbers.
    assert (cpu != ours.cpu()).sum() <= 2 and torch.allclose(cpu, ours.cpu(), rtol=2e-7, atol=0)
    assert torch.equal(rng.uniform(0, "t", 1, index, ()), rng.uniform(0, "t", 1, index.to(gpu), ()).cpu())
