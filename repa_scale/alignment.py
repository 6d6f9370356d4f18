"""Alignment terms: what pulls the hidden tokens towards the tokens of a frozen encoder (REPA, section 3)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from repa_scale import cuda
from repa_scale.config import Config, TermConfig
from repa_scale.errors import ConfigError, MachineError
from repa_scale.kernels import normalize_tokens, unavailable


@dataclass(frozen=True)
class AlignmentTerm:
    """One term, under the name that it has in the configuration. Its projector is the objective's."""

    name: str
    settings: TermConfig
    kernel: str = "auto"  # auto | triton | torch (repa_scale.kernels)

    @property
    def depth(self) -> int:
        """The block, counted from 1, behind which the hidden tokens are taken."""
        return self.settings.depth

    @property
    def source(self) -> tuple[str, str]:
        """Name and weights of the target encoder; terms with the same source share it."""
        return self.settings.encoder, self.settings.weights

    def prepare(self, targets: Tensor) -> Tensor:
        """What is aligned to, from the encoder's tokens. (N, T, z) -> (N, T, z)."""
        if self.settings.normalize == "none":
            return targets
        return normalize_tokens(targets, self.settings.normalize, gamma=self.settings.gamma, kernel=self.kernel)

    def loss(self, hidden: Tensor, projector: nn.Module, targets: Tensor, t: Tensor) -> Tensor:
        """The term for each image (REPA eq. 8).

        Args:
            hidden: (N, T, D) tokens behind block `depth`.
            projector: of models/projectors.py.
            targets: (N, T, z) from `prepare`.
            t: (N,) in [0, 1], 0 = data.

        Returns:
            (N,) float32, or float64: minus the mean cosine, weighted over t.
        """
        loss = projector(hidden, targets, self.kernel)
        weighting = self.settings.time_weighting
        if weighting == "none":
            return loss
        return loss * (1 - t if weighting == "data" else t).to(loss.dtype)

    def weight_at(self, step: int) -> float:
        """Factor of the term in the total loss of `step`, counted from 1."""
        settings = self.settings
        if settings.schedule == "constant" or settings.schedule_steps is None:
            return settings.weight
        progress = min(1.0, (step - 1) / settings.schedule_steps)
        left = 1.0 - progress if settings.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
        return settings.weight * left

    def active(self, step: int) -> bool:
        """Whether the term, and its encoder, is run in `step` at all. A weight of 0 does not switch it off."""
        return self.settings.stop_step is None or step < self.settings.stop_step


def build_terms(config: Config) -> dict[str, AlignmentTerm]:
    """The run's terms by name; none for the baseline."""
    if config.method == "baseline":
        return {}
    return {name: AlignmentTerm(name, term, config.alignment_kernel) for name, term in config.alignment.items()}


def check_kernel(config: Config, device: torch.device) -> None:
    """Refuses a start whose Triton kernels would fail at the first step.

    Raises:
        ConfigError: `alignment.kernel=triton` where no Triton kernel runs.
        MachineError: Triton can't build their launchers.
    """
    if config.alignment_kernel == "triton" and (problem := unavailable(device)):
        raise ConfigError(f"alignment.kernel=triton: {problem}; use alignment.kernel=auto")
    if device.type != "cuda" or config.method == "baseline" or config.alignment_kernel == "torch":
        return
    if not unavailable(device) and (problem := cuda.compiler_problem(*cuda.find_compiler())):  # else `auto` takes torch
        raise MachineError(f"alignment.kernel={config.alignment_kernel}: {problem}")
