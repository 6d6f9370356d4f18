"""Samplers: from noise at t = 1 to data at t = 0 along the learned velocity, with guidance (SiT paper, section 3)."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from repa_scale import rng
from repa_scale.config import SampleConfig
from repa_scale.errors import ConfigError, did_you_mean
from repa_scale.interpolant import Interpolant

SDE_LAST_TIME = 0.04  # the stochastic steps end here; one last step without noise goes to 0

Velocity = Callable[[Tensor, Tensor, Tensor], Tensor]  # (x (N, C, H, W), t (N,), labels (N,)) -> (N, C, H, W)
Convert = Callable[[Tensor, Tensor], Tensor]  # (velocity, state) -> drift
StepNoise = Callable[[int], Tensor]  # number of the step -> (N, C, H, W) standard normal


@torch.no_grad()
def sample(
    velocity: Velocity,
    noise: Tensor,
    labels: Tensor,
    null_label: int,
    *,
    sampler: str = "euler",
    steps: int = 50,
    guidance: float = 1.0,
    interval: tuple[float, float] = (0.0, 1.0),
    path: str = "linear",
    step_noise: StepNoise | None = None,
) -> Tensor:
    """Samples of the model.

    Args:
        velocity: the model.
        noise: (N, C, H, W) standard normal, the state at t = 1.
        labels: (N,) int64.
        null_label: the label of the unconditional velocity.
        sampler: `euler`, `heun` (ODE) or `sde` (Euler-Maruyama).
        guidance: v_null + guidance (v - v_null) while t lies in `interval`; 1 or less: none.
        step_noise: the noise of each stochastic step, for `sde`.

    Returns:
        (N, C, H, W) float64, the state at t = 0. The state is float64 throughout: hundreds of small steps are added up.
    """
    if sampler not in SAMPLERS:
        raise ConfigError(f"sample.sampler={sampler} is not a sampler{did_you_mean(sampler, SAMPLERS)}")
    run = _Guided(velocity, labels, null_label, guidance, interval, noise.dtype)
    return SAMPLERS[sampler](run, noise.double(), steps, path, step_noise)


def sample_numbered(
    velocity: Velocity,
    index: Tensor,
    labels: Tensor,
    null_label: int,
    shape: tuple[int, int, int],
    seed: int,
    settings: SampleConfig,
    path: str,
) -> Tensor:
    """Samples number `index`: their noise depends on (seed, number) alone, not on batches or processes.

    Args:
        index, labels: (N,) int64.
        shape: (C, H, W) of a latent.

    Returns:
        (N, C, H, W) float64 latents.
    """
    return sample(
        velocity,
        rng.normal(seed, "sample noise", 0, index, shape),
        labels,
        null_label,
        sampler=settings.sampler,
        steps=settings.steps,
        guidance=settings.guidance,
        interval=(settings.interval[0], settings.interval[1]),
        path=path,
        step_noise=lambda i: rng.normal(seed, "sampler noise", i, index, shape),
    )


class _Guided:
    """The model with guidance: `drift(x, t, at)` of both labels, combined where the time `at` lies in the interval."""

    def __init__(
        self,
        velocity: Velocity,
        labels: Tensor,
        null_label: int,
        scale: float,
        interval: tuple[float, float],
        dtype: torch.dtype,
    ) -> None:
        self.velocity, self.scale, self.interval, self.dtype = velocity, scale, interval, dtype
        self.labels, self.nulls = labels, torch.full_like(labels, null_label)

    def __call__(self, x: Tensor, t: float, at: float, convert: Convert | None = None) -> Tensor:
        """The drift at (x, t). convert: None, where the velocity is the drift."""
        guided = self.scale > 1.0 and self.interval[0] <= at <= self.interval[1]
        states, labels = (torch.cat([x, x]), torch.cat([self.labels, self.nulls])) if guided else (x, self.labels)
        times = torch.full((len(states),), t, dtype=self.dtype, device=x.device)
        drift = self.velocity(states.to(self.dtype), times, labels).double()
        if convert is not None:
            drift = convert(drift, states)
        if not guided:
            return drift
        conditional, null = drift.chunk(2)
        return null + self.scale * (conditional - null)


def _euler(drift: _Guided, x: Tensor, steps: int, path: str, step_noise: StepNoise | None) -> Tensor:
    times = torch.linspace(1, 0, steps + 1, dtype=torch.float64).tolist()
    for now, then in pairwise(times):
        x = x + (then - now) * drift(x, now, now)
    return x


def _heun(drift: _Guided, x: Tensor, steps: int, path: str, step_noise: StepNoise | None) -> Tensor:
    """Heun's method; its last step is Euler's, and the guidance interval sees the time at which a step begins."""
    times = torch.linspace(1, 0, steps + 1, dtype=torch.float64).tolist()
    for i, (now, then) in enumerate(pairwise(times)):
        d_now = drift(x, now, now)
        ahead = x + (then - now) * d_now
        if i < steps - 1:
            ahead = x + (then - now) * 0.5 * (d_now + drift(ahead, then, now))
        x = ahead
    return x


def _sde(drift: _Guided, x: Tensor, steps: int, path: str, step_noise: StepNoise | None) -> Tensor:
    """Euler-Maruyama of the reverse SDE with diffusion w(t) = 2t (SiT paper, eq. 5)."""
    if step_noise is None:
        raise ValueError("the sampler sde needs step_noise")
    times = [*torch.linspace(1.0, SDE_LAST_TIME, steps, dtype=torch.float64).tolist(), 0.0]
    for i, (now, then) in enumerate(pairwise(times)):
        diffusion = 2 * now
        mean = x + (then - now) * drift(x, now, now, reverse_drift(now, diffusion, path))
        last = i == len(times) - 2
        x = mean if last else mean + (diffusion * (now - then)) ** 0.5 * step_noise(i).double()
    return x


def reverse_drift(t: float, diffusion: float, path: str) -> Convert:
    """v - w/2 * score, where score = (r v - x) / (sigma^2 - r sigma' sigma) and r = alpha / alpha'."""
    at = Interpolant(path).coefficients(torch.tensor(t, dtype=torch.float64))
    # Plain numbers: a tensor of the host would be copied to the device in every step.
    r = (at.alpha / at.d_alpha).item()
    variance = (at.sigma**2 - r * at.d_sigma * at.sigma).item()

    def convert(v: Tensor, x: Tensor) -> Tensor:
        score = (r * v - x) / variance
        return v - 0.5 * diffusion * score

    return convert


SAMPLERS: dict[str, Callable[..., Tensor]] = {"euler": _euler, "heun": _heun, "sde": _sde}
