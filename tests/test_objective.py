"""Interpolant, alignment terms, kernels' reference, objective and samplers beyond the golden numbers."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from repa_scale.kernels import cosine_loss, normalize_tokens

from repa_scale import rng
from repa_scale.alignment import AlignmentTerm, build_terms
from repa_scale.clock import Clock
from repa_scale.config import Config, TermConfig
from repa_scale.draws import draw
from repa_scale.errors import ConfigError
from repa_scale.interpolant import PATHS, Interpolant, time_from_normal
from repa_scale.models.initial import initialize
from repa_scale.objective import build_objective, total
from repa_scale.sampling import sample


@pytest.mark.parametrize("path", PATHS)
def test_a_velocity_is_the_derivative_of_its_path(path):
    x0, noise = torch.randn(2, 3, 4, 4, 4, dtype=torch.float64)
    t = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    (ahead, _), (behind, _) = (Interpolant(path)(x0, noise, t + h) for h in (1e-6, -1e-6))
    _, velocity = Interpolant(path)(x0, noise, t)
    assert torch.allclose((ahead - behind) / 2e-6, velocity, atol=1e-8)
    ends = [Interpolant(path)(x0, noise, torch.full((3,), end, dtype=torch.float64))[0] for end in (0.0, 1.0)]
    assert torch.allclose(ends[0], x0) and torch.allclose(ends[1], noise)


@pytest.mark.parametrize("path", PATHS)
def test_lognormal_times_have_the_drawn_noise_level(path):
    n = torch.randn(100, dtype=torch.float64)
    at = PATHS[path](time_from_normal(n, path))
    assert torch.allclose(at.sigma / at.alpha, n.exp())


def exactly(path, t):
    """Coefficients of a path in extended precision, rounded once to float32: (4, N)."""
    x, half_pi = t.numpy().astype(np.longdouble), np.longdouble("3.14159265358979323846264338327950288") / 2
    if path == "linear":
        rows = (1 - x, x, -np.ones_like(x), np.ones_like(x))
    else:
        alpha, sigma = np.cos(x * half_pi), np.sin(x * half_pi)
        rows = (alpha, sigma, -half_pi * sigma, half_pi * alpha)
    return np.stack([row.astype(np.float32) for row in rows])


@pytest.mark.parametrize("path", PATHS)
def test_coefficients_are_rounded_once(path):
    """Two devices whose float64 functions are good to the last bit or two then agree, but once in 1e8 values."""
    t = rng.uniform(0, "time", 1, torch.arange(20_000), ())
    assert t.dtype == torch.float32
    at = PATHS[path](t)
    ours = torch.stack([at.alpha, at.sigma, at.d_alpha, at.d_sigma])
    assert ours.dtype == torch.float32
    assert (ours.numpy() != exactly(path, t)).sum() <= 1


@pytest.mark.parametrize("path", PATHS)
def test_lognormal_times_are_rounded_once(path):
    index = torch.arange(10_000)
    n = rng.normal(0, "time", 1, index, (), dtype=torch.float64).numpy().astype(np.longdouble)
    sigma, pi = np.exp(n), np.longdouble("3.14159265358979323846264338327950288")
    wanted = (sigma / (1 + sigma) if path == "linear" else np.arctan(sigma) * 2 / pi).astype(np.float32)
    t = draw(0, 1, index, (1, 1, 1), time="lognormal", path=path).t
    assert t.dtype == torch.float32 and (t.numpy() != wanted).sum() <= 1


@pytest.mark.gpu
@pytest.mark.parametrize("path", PATHS)
def test_a_gpu_draws_the_times_and_noisy_latents_of_a_cpu(path, gpu):
    index, shape = torch.arange(4096), (4, 8, 8)
    cpu, ours = (draw(0, 1, at, shape, time="lognormal", path=path) for at in (index, index.to(gpu)))
    assert (cpu.t != ours.t.cpu()).sum() <= 1
    given = torch.randn(4096, *shape)
    on_cpu = Interpolant(path)(given, cpu.noise, cpu.t)
    on_gpu = Interpolant(path)(given.to(gpu), cpu.noise.to(gpu), cpu.t.to(gpu))
    for a, b in zip(on_cpu, on_gpu, strict=True):
        assert (a != b.cpu()).sum() <= 256  # of a million: the values of one image, whose coefficient differs


def test_unknown_paths_are_refused():
    with pytest.raises(ConfigError, match="did you mean 'cosine'"):
        Interpolant("cosin")


def test_the_cosine_is_computed_in_float32():
    a, b = (torch.randn(4, 16, 768) * 300).to(torch.float16), torch.randn(4, 16, 768, dtype=torch.float16)
    loss = cosine_loss(a, b, reduction="image")
    assert loss.dtype == torch.float32 and loss.shape == (4,)
    exact = -F.cosine_similarity(a.double(), b.double(), dim=-1).mean(-1)
    assert torch.allclose(loss.double(), exact, atol=1e-6)
    assert torch.allclose(cosine_loss(a, a, reduction="image"), -torch.ones(4))
    assert torch.isfinite(cosine_loss(torch.zeros(1, 2, 8), torch.zeros(1, 2, 8))).all()


def test_token_normalisation_follows_its_equation():
    tokens = torch.randn(2, 16, 8, dtype=torch.float64) * 3 + 5
    spatial = normalize_tokens(tokens, "spatial", gamma=0.6)
    wanted = (tokens - 0.6 * tokens.mean(1, keepdim=True)) / (tokens.std(1, keepdim=True) + 1e-6)
    assert torch.allclose(spatial, wanted, rtol=1e-12)
    assert torch.allclose(normalize_tokens(tokens, "layernorm"), F.layer_norm(tokens, (8,), eps=1e-6))
    # A constant channel is blown up by 1 / eps; fp16 input must not overflow.
    tokens = torch.full((1, 16, 1), 2.0, dtype=torch.float16)
    assert torch.allclose(normalize_tokens(tokens, "spatial", gamma=0.6), torch.tensor(0.8 / 1e-6), rtol=1e-3)


def test_schedules_of_a_term():
    def weights(**settings):
        term = AlignmentTerm("repa", TermConfig(weight=0.5, **settings))
        return [round(term.weight_at(step), 6) for step in (1, 51, 101, 500)], [term.active(s) for s in (1, 99, 100)]

    assert weights() == ([0.5] * 4, [True] * 3)
    assert weights(schedule="linear", schedule_steps=100)[0] == [0.5, 0.25, 0.0, 0.0]
    assert weights(schedule="cosine", schedule_steps=100)[0] == [0.5, 0.25, 0.0, 0.0]
    assert weights(stop_step=100)[1] == [True, True, False]
    assert AlignmentTerm("repa", TermConfig(weight=0.0)).active(1), "a weight of 0 is no switch"


def test_a_weighting_over_time():
    tokens, t = torch.randn(3, 4, 8), torch.tensor([0.0, 0.25, 1.0])

    def identity(hidden, target, kernel):
        return cosine_loss(hidden, target, reduction="image", kernel=kernel)

    plain = AlignmentTerm("a", TermConfig()).loss(tokens, identity, tokens, t)
    data = AlignmentTerm("a", TermConfig(time_weighting="data")).loss(tokens, identity, tokens, t)
    noise = AlignmentTerm("a", TermConfig(time_weighting="noise")).loss(tokens, identity, tokens, t)
    assert torch.allclose(data, plain * (1 - t)) and torch.allclose(noise, plain * t)


def small_config(method="repa"):
    config = Config(method=method)
    config.model.name, config.model.num_classes = "SiT-Nano/2", 10
    config.data.image_size, config.latents.name = 8, "identity"
    config.alignment["repa"].depth, config.alignment["repa"].projector_dim = 1, 16
    return config


def small_batch(objective, n=4):
    generator = torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(n, 3, 8, 8, generator=generator) for _ in range(2))
    t, y = torch.rand(n, generator=generator), torch.arange(n)
    x_t, velocity = Interpolant("linear")(x0, noise, t)
    return x_t, t, y, velocity, {name: torch.randn(n, 16, 768, generator=generator) for name in objective.terms}


def test_the_baseline_is_the_same_code_with_no_terms():
    assert build_terms(small_config("baseline")) == {}
    losses = {}
    for method in ("repa", "baseline"):
        objective = build_objective(small_config(method))
        initialize(objective, seed=0)
        losses[method] = objective(*small_batch(objective))
    assert set(losses["repa"]) == {"denoising", "alignment/repa"} and set(losses["baseline"]) == {"denoising"}
    assert torch.equal(losses["repa"]["denoising"], losses["baseline"]["denoising"])
    mean = {name: value.mean() for name, value in losses["repa"].items()}
    assert torch.equal(total(losses["repa"], {"repa": 0.5}), mean["denoising"] + 0.5 * mean["alignment/repa"])
    assert torch.equal(total(losses["baseline"], {}), mean["denoising"])


def test_the_mean_over_parts_of_a_batch_is_the_mean_over_the_batch():
    objective = build_objective(small_config())
    initialize(objective, seed=0)
    x_t, t, y, velocity, targets = small_batch(objective)
    whole = objective(x_t, t, y, velocity, targets)
    halves = [
        objective(x_t[i], t[i], y[i], velocity[i], {"repa": targets["repa"][i]}) for i in torch.arange(4).split(2)
    ]
    for name, value in whole.items():
        assert torch.allclose(torch.cat([half[name] for half in halves]), value, atol=1e-6)


def test_the_time_of_the_alignment_is_counted_forward_and_backward():
    objective = build_objective(small_config())
    initialize(objective, seed=0)
    objective.clock = Clock(torch.device("cpu"))
    losses = objective(*small_batch(objective))
    forward = sum(end - begin for begin, end in objective.clock._spans["alignment"])
    objective.backward_begins()
    total(losses, {"repa": 0.5}).backward()
    seconds = objective.clock.read()
    assert 0 < forward < seconds["alignment"]


def test_a_sampler_follows_a_known_velocity_to_its_end():
    """All data at the point c: v = (x - c) / t on the linear path, so every sampler must arrive at c."""
    c = torch.full((2, 3, 4, 4), 0.7, dtype=torch.float64)
    noise, labels = torch.randn(2, 3, 4, 4, dtype=torch.float64), torch.tensor([0, 1])
    for sampler in ("euler", "heun", "sde"):
        out = sample(
            lambda x, t, y: (x - c) / t.view(-1, 1, 1, 1).clamp_min(1e-9),
            noise,
            labels,
            10,
            sampler=sampler,
            steps=50,
            step_noise=lambda i: torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(i)),
        )
        # The last stochastic step leaves the noise of t = 0.04 in another place; the ODE leaves none.
        assert (out - c).abs().mean() < (0.05 if sampler == "sde" else 1e-9), sampler


def test_guidance_acts_inside_its_interval_only():
    asked = []

    def velocity(x, t, y):
        asked.append((float(t[0]), y.tolist()))
        return y.view(-1, 1, 1, 1).double().expand_as(x)

    out = sample(velocity, torch.zeros(1, 1, 1, 1), torch.tensor([2]), 10, steps=4, guidance=3.0, interval=(0.3, 0.8))
    assert asked == [(1.0, [2]), (0.75, [2, 10]), (0.5, [2, 10]), (0.25, [2])]
    # 2 unguided steps of -2/4, and 2 guided ones of -(10 + 3 (2 - 10)) / 4.
    assert math.isclose(float(out), -0.5 - 0.5 + 14 / 4 * 2)
    with pytest.raises(ConfigError, match="did you mean 'euler'"):
        sample(velocity, torch.zeros(1, 1, 1, 1), torch.tensor([2]), 10, sampler="eulr")
