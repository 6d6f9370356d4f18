"""The samplers of sampling.py one step at a time, as a scheduler of diffusers: Euler, Heun and the SDE, bit for bit."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from torch import Tensor

from repa_scale.errors import UserError, did_you_mean
from repa_scale.sampling import SAMPLERS, SDE_LAST_TIME, reverse_drift


@dataclass
class SiTSchedulerOutput(BaseOutput):
    """prev_sample: (N, C, H, W) float64, the state at the next time."""

    prev_sample: Tensor


class SiTScheduler(SchedulerMixin, ConfigMixin):
    """From noise at t = 1 to data at t = 0 along a velocity. The state is float64, as the trainer's is.

    One entry of `timesteps` is one evaluation of the model: Heun has two a step, but for its last. For each evaluation:
    `convert_model_output` makes the velocity a drift, guidance combines drifts, `step` goes on.

    Args:
        sampler: `euler`, `heun` or `sde`.
        path: `linear` or `cosine`, the interpolant that the model was trained with.
        num_inference_steps, guidance, interval: what a pipeline uses where its caller says nothing.
    """

    order = 1

    @register_to_config
    def __init__(
        self,
        sampler: str = "euler",
        path: str = "linear",
        num_inference_steps: int = 50,
        guidance: float = 1.0,
        interval: tuple[float, float] = (0.0, 1.0),
    ) -> None:
        self.timesteps = torch.empty(0, dtype=torch.float64)
        self.times: list[float] = []
        self.guidance_times: list[float] = []
        self.init_noise_sigma = 1.0
        self._position = 0

    def set_timesteps(
        self, num_inference_steps: int, device: torch.device | str | None = None, sampler: str | None = None
    ) -> None:
        """Begins a sampling of `num_inference_steps` steps.

        Sets `timesteps`, (E,) float64: the time of each evaluation; `times`, the same as plain numbers, for which
        nobody waits; and `guidance_times`, the time at which each asks whether guidance acts: that of the step's
        beginning.
        """
        sampler = self.config.sampler if sampler is None else sampler
        if sampler not in SAMPLERS:
            raise UserError(f"sampler={sampler} is not a sampler{did_you_mean(sampler, SAMPLERS)}")
        if num_inference_steps < 1:
            raise UserError(f"steps={num_inference_steps}: at least 1 step is needed")
        self._sampler, self._position, self._first = sampler, 0, None
        count = num_inference_steps
        if sampler == "sde":
            self._grid = [*torch.linspace(1.0, SDE_LAST_TIME, count, dtype=torch.float64).tolist(), 0.0]
        else:
            self._grid = torch.linspace(1, 0, count + 1, dtype=torch.float64).tolist()
        if sampler == "heun":
            self._step_of = [i // 2 for i in range(2 * count - 1)]
            times = [self._grid[(i + 1) // 2] for i in range(2 * count - 1)]
        else:
            self._step_of, times = list(range(count)), self._grid[:-1]
        self.guidance_times = [self._grid[i] for i in self._step_of]
        self.times = times
        self.timesteps = torch.tensor(times, dtype=torch.float64, device=device)

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor | None = None) -> Tensor:
        """The state as the model takes it: as it is."""
        return sample

    @property
    def step_index(self) -> int:
        """The number of the step that the next evaluation belongs to."""
        return self._step_of[self._position]

    def needs_noise(self) -> bool:
        """Whether the next `step` adds noise."""
        return self._sampler == "sde" and self._position < len(self._step_of) - 1

    def convert_model_output(self, model_output: Tensor, sample: Tensor) -> Tensor:
        """(N, C, H, W) velocity and float64 state -> the float64 drift: of the SDE, v - w/2 * score."""
        velocity = model_output.double()
        if self._sampler != "sde":
            return velocity
        now = self._grid[self.step_index]
        return reverse_drift(now, 2 * now, self.config.path)(velocity, sample)

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
    ) -> SiTSchedulerOutput | tuple[Tensor]:
        """The state at the next time.

        Args:
            model_output: (N, C, H, W) float64 drift.
            timestep: the entry of `timesteps` that it was evaluated at; steps are taken in their order.
            sample: (N, C, H, W) float64 state; for Heun's second evaluation, what the first `step` returned.
            noise: (N, C, H, W) standard normal, where `needs_noise()`; by default drawn from `generator`.
        """
        if not self._position < len(self._step_of):
            raise UserError("all steps were taken; call set_timesteps first")
        i = self.step_index
        now, then = self._grid[i], self._grid[i + 1]
        if self._sampler == "heun":
            result = self._heun(model_output, sample, now, then, last=i == len(self._grid) - 2)
        else:
            result = sample + (then - now) * model_output
            if self.needs_noise():
                if noise is None:
                    noise = torch.randn(
                        sample.shape, generator=generator, device=generator.device if generator else sample.device
                    )
                result = result + (2 * now * (now - then)) ** 0.5 * noise.to(result)
        self._position += 1
        return SiTSchedulerOutput(prev_sample=result) if return_dict else (result,)

    def _heun(self, drift: Tensor, sample: Tensor, now: float, then: float, last: bool) -> Tensor:
        if self._first is None:
            if not last:
                self._first = sample, drift
            return sample + (then - now) * drift
        (begin, first), self._first = self._first, None
        return begin + (then - now) * 0.5 * (first + drift)

    def __len__(self) -> int:
        return len(self.timesteps)
