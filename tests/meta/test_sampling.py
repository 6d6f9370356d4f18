"""Sampling as on a GPU, on the `meta` device: the host waits for it before the first evaluation at most."""

from __future__ import annotations

import pytest
import torch
from meta_device import META, Factories, Watched

from repa_scale import rng
from repa_scale.config import SampleConfig
from repa_scale.sampling import SAMPLERS, sample_numbered

SHAPE = (4, 4, 4)
WAITS = ("upload", "read", "wait")


def waits(work) -> int:
    """How often the host waits for the device in `work()`."""
    watched = Watched({})
    with watched, Factories(watched):
        work()
    return sum(count for (kind, _), count in watched.notes.items() if kind in WAITS)


@pytest.mark.parametrize("path", ["linear", "cosine"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_samplers_wait_for_nothing(sampler, path):
    """With guidance in a part of the steps: both kinds of evaluation are met."""
    index, labels = (torch.zeros(3, dtype=torch.int64, device=META) for _ in range(2))
    settings = SampleConfig(sampler, 12, 2.0, [0.2, 0.7])
    seen = []

    def velocity(x, t, y):
        seen.append(len(x))
        return x * t.view(-1, 1, 1, 1)

    def work():
        assert sample_numbered(velocity, index, labels, 10, SHAPE, 0, settings, path).device == META

    assert waits(work) == 0 and set(seen) == {3, 6}


@pytest.mark.parametrize("fixed", [0, 4])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_pipeline_waits_for_nothing_in_its_steps(sampler, fixed):
    """Mixed guidance and intervals: the waits of 4 steps and of 12 are as many."""
    pytest.importorskip("diffusers")
    from repa_scale.serving import SiTPipeline, SiTScheduler, SiTTransformer2DModel

    model = SiTTransformer2DModel(sample_size=4, depth=1, width=8, heads=1, num_classes=10).to(META)
    pipe = SiTPipeline(model, SiTScheduler(), latent_space={"kind": "kl", "channels": 4, "factor": 8, "scale": [1.0]})
    pipe.set_progress_bar_config(disable=True)
    guided = {"guidance": [1.0, 2.0, 3.0], "interval": [(0.0, 1.0), (0.0, 1.0), (0.2, 0.7)]}

    def work(steps):
        pipe([1, 2, 3], seed=5, steps=steps, sampler=sampler, output_type="latent", fixed_batch=fixed, **guided)

    few = waits(lambda: work(4))
    assert 0 < few == waits(lambda: work(12))


def test_noise_of_keys_is_the_noise_of_their_seeds():
    keys = rng.keys_of_seeds([3, 2**40], "sampler noise")
    for step in (0, 7):
        assert torch.equal(
            rng.normal_of_keys(keys, step, SHAPE), rng.normal_of_seeds([3, 2**40], "sampler noise", step, SHAPE)
        )


def test_a_wait_in_a_step_is_found():
    """That the tests above can fail: a number that comes from the host with each step."""
    index = torch.zeros(3, dtype=torch.int64, device=META)
    settings = SampleConfig("euler", 12)

    def velocity(x, t, y):
        return x * torch.tensor(0.5, dtype=torch.float64).to(x.device)

    assert waits(lambda: sample_numbered(velocity, index, index, 10, SHAPE, 0, settings, "linear")) == 12
