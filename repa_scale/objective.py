"""What is minimised: the denoising loss and the alignment terms, from one forward pass (REPA eq. 9)."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from repa_scale.alignment import AlignmentTerm, build_terms
from repa_scale.clock import Clock
from repa_scale.config import Config
from repa_scale.models import build_sit
from repa_scale.models.projectors import build_projector
from repa_scale.models.sit import SiT
from repa_scale.sizes import backbone, encoder_spec, token_grid


class Objective(nn.Module):
    """Backbone and projectors together, because ZeRO shards what one module holds.

    Args:
        model: the SiT; the only part that sampling and export need.
        projectors: one a term, under the term's name.
        terms: by name; empty for the baseline.
    """

    def __init__(self, model: SiT, projectors: nn.ModuleDict, terms: dict[str, AlignmentTerm]) -> None:
        super().__init__()
        self.model = model
        self.projectors = projectors
        self.terms = terms
        self.clock: Clock | None = None  # where the time of the alignment is counted, if anyone wants it
        self._backward_mark: object = None

    def forward(
        self,
        x_t: Tensor,
        t: Tensor,
        labels: Tensor,
        velocity: Tensor | None = None,
        targets: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Losses for each image, or the bare velocity for sampling.

        Args:
            x_t: (N, C, H, W) noisy latents.
            t: (N,) in [0, 1], 0 = data, 1 = noise.
            labels: (N,) int64.
            velocity: (N, C, H, W), what the model should say. None: sampling.
            targets: (N, T, z) by term; a term without one is left out.

        Returns:
            {"denoising": (N,), "alignment/NAME": (N,) ...} float32 (float64 stays), or {"velocity": (N, C, H, W)}.
        """
        if velocity is None:
            return {"velocity": self.model(x_t, t, labels)[0]}
        targets = targets or {}
        terms = {name: self.terms[name] for name in targets}
        prediction, hidden = self.model(x_t, t, labels, [term.depth for term in terms.values()])
        losses = {"denoising": denoising_loss(prediction, velocity)}
        # After the velocity, so that in the backward pass the terms come first and their time can be told apart.
        with self.clock.phase("alignment") if self.clock and terms else nullcontext():
            for name, term in terms.items():
                tokens = self._marked(hidden[term.depth])
                losses[f"alignment/{name}"] = term.loss(tokens, self.projectors[name], targets[name], t)
        return losses

    def backward_begins(self) -> None:
        """To be called right before the backward pass, if the alignment's part of it is to be counted."""
        if self.clock is not None:
            self._backward_mark = self.clock.now()

    def _marked(self, hidden: Tensor) -> Tensor:
        """The same tokens; when their gradient arrives, the backward pass of one term is over."""
        if self.clock is None or not hidden.requires_grad:
            return hidden
        alias = hidden.view_as(hidden)
        alias.register_hook(self._term_is_through)
        return alias

    def _term_is_through(self, _gradient: Tensor) -> None:
        if self._backward_mark is not None:
            self.clock.add("alignment", self._backward_mark)
            self._backward_mark = self.clock.now()


def denoising_loss(prediction: Tensor, velocity: Tensor) -> Tensor:
    """Mean squared error of the velocity for each image (REPA eq. 3). (N, C, H, W) twice -> (N,) fp32 or fp64."""
    dtype = torch.promote_types(prediction.dtype, torch.float32)
    return (prediction.to(dtype) - velocity.to(dtype)).square().flatten(1).mean(dim=1)


def total(losses: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """The scalar to minimise: mean denoising loss plus the weighted means of the terms (REPA eq. 9).

    Args:
        losses: from `Objective.forward`.
        weights: by term.
    """
    loss = losses["denoising"].mean()
    for name, weight in weights.items():
        loss = loss + weight * losses[f"alignment/{name}"].mean()
    return loss


def build_objective(config: Config) -> Objective:
    """Backbone, projectors and terms of a configuration, uninitialised."""
    terms = build_terms(config)
    width = backbone(config.model.name)[0].width
    grid = token_grid(config.data.image_size, config.latents.name, config.model.name)
    model = build_sit(config)
    projectors = nn.ModuleDict()
    for name, term in terms.items():
        settings = term.settings
        z = encoder_spec(settings.encoder).width
        projectors[name] = build_projector(settings.projector, width, settings.projector_dim, z, grid)
    return Objective(model, projectors, terms)


def count_parameters(config: Config) -> int:
    """Trained parameters of backbone and projectors. Nothing is allocated."""
    with torch.device("meta"):
        return sum(p.numel() for p in build_objective(config).parameters())
