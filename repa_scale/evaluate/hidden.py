"""One pass of a model over a block of real images: its hidden tokens, the encoders' tokens, its denoising errors.

What is kept has one row an image; tokens live no longer than a block. Metrics over all images are representation.py's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from repa_scale import arithmetic, rng
from repa_scale.alignment import AlignmentTerm, build_terms
from repa_scale.checkpoint import MANIFEST, CheckpointReader
from repa_scale.data.features import base_name
from repa_scale.encoders import Encoder, build_encoder
from repa_scale.errors import DataError
from repa_scale.evaluate.pictures import Block
from repa_scale.interpolant import Interpolant
from repa_scale.latents import Latents, build_latents
from repa_scale.metrics.spatial import spatial
from repa_scale.models.projectors import build_projector
from repa_scale.models.sit import SiT
from repa_scale.objective import denoising_loss
from repa_scale.ranks import Ranks
from repa_scale.sizes import backbone, encoder_spec, latent_grid, token_grid
from repa_scale.trained import KINDS, Trained

Measured = dict[str, Tensor]  # one row an image in each


@dataclass(frozen=True)
class Asked:
    """What to measure, and where.

    Attributes:
        depths: blocks, counted from 1, ascending.
        times: t in [0, 1], 0 = data.
        bins: equal parts of [0, 1] for the denoising loss.
        seed: of the noise; with the image's id it decides it, whichever run and step is measured.
        alignment, probe, denoising: what is wanted.
    """

    depths: tuple[int, ...]
    times: tuple[float, ...]
    bins: int
    seed: int
    alignment: bool
    probe: bool
    denoising: bool

    @property
    def passes(self) -> int:
        """Forward passes a block."""
        return (len(self.times) if self.alignment or self.probe else 0) + (self.bins if self.denoising else 0)


class Subject:
    """The model that is measured, with the frozen networks that this takes. All in fp32, on a GPU too.

    Args:
        sources: name and weights of the encoders to align with; none: alignment is not measured.
    """

    def __init__(self, trained: Trained, sources: list[tuple[str, str]], ranks: Ranks) -> None:
        config = self.config = trained.config
        self.device = ranks.device
        self.model: SiT = trained.build(ranks.device)
        self.interpolant = Interpolant(config.interpolant.path)
        self.latent_shape = latent_grid(config.data.image_size, config.latents.name)
        self.grid = token_grid(config.data.image_size, config.latents.name, config.model.name)
        if ranks.local_rank > 0:  # so that a node fetches weights once
            ranks.barrier()
        self.latents: Latents = build_latents(config, ranks.device, torch.float32)
        self.encoders: dict[tuple[str, str], Encoder] = {
            source: build_encoder(*source, self.grid, ranks.device, torch.float32) for source in sources
        }
        if ranks.local_rank == 0:
            ranks.barrier()
        self.projected = load_projectors(trained, self.grid, ranks.device) if sources else {}
        self.projected = {name: pair for name, pair in self.projected.items() if pair[0].source in self.encoders}

    @torch.no_grad()
    def measure(self, block: Block, asked: Asked, advance: Callable[[], None]) -> Measured:
        """One row an image, on the CPU.

        Args:
            advance: called after each forward pass.

        Returns:
            `ids`, `labels` (n,); `hidden` (n, times, depths, D) mean tokens; `spatial` (n, times, depths, 3);
            by encoder (`label`) `target LABEL` (n, z) and `target spatial LABEL` (n, 3); by term `cosine NAME`
            (n, times);
            `denoising` (n, bins). Float32, int64.

        Raises:
            DataError: the model's tokens or velocities are not finite.
        """
        with arithmetic.within("fp32"):
            return self._measure(block, asked, advance)

    def _measure(self, block: Block, asked: Asked, advance: Callable[[], None]) -> Measured:
        images, ids = block.images.to(self.device), block.ids.to(self.device)
        clean = self._clean(images, ids, asked.seed)
        found = {"ids": block.ids, "labels": block.labels}
        if asked.alignment or asked.probe:
            found |= self._representation(images, clean, ids, asked, advance)
        if asked.denoising:
            found["denoising"] = self._denoising(clean, block.labels.to(self.device), ids, asked, advance)
        return {name: value.cpu() for name, value in found.items()}

    def _clean(self, images: Tensor, ids: Tensor, seed: int) -> Tensor:
        posterior = rng.normal(seed, "evaluation posterior", 0, ids, self.latent_shape)
        return self.latents.draw(self.latents.encode(images), posterior)

    def _representation(
        self, images: Tensor, clean: Tensor, ids: Tensor, asked: Asked, advance: Callable[[], None]
    ) -> Measured:
        found: dict[str, Tensor] = {}
        tokens = {source: encoder(images).float() for source, encoder in self.encoders.items()}
        for source, target in tokens.items():
            found[f"target {label(source)}"] = target.mean(dim=1)
            found[f"target spatial {label(source)}"] = self._spatial(target)
        targets = {name: term.prepare(tokens[term.source]) for name, (term, _) in self.projected.items()}
        noise = rng.normal(asked.seed, "evaluation noise", 0, ids, self.latent_shape)
        # The null label: the class must come from the image, not from the condition.
        labels = torch.full((len(ids),), self.config.model.num_classes, device=self.device)
        wanted = sorted({*asked.depths, *(term.depth for term, _ in self.projected.values())})
        pooled, structure, cosines = [], [], {name: [] for name in targets}
        for time in asked.times:
            t = torch.full((len(ids),), time, device=self.device)
            _, hidden = self.model(self.interpolant(clean, noise, t)[0], t, labels, wanted)
            pooled.append(torch.stack([self._pooled(hidden[depth], depth, time) for depth in asked.depths], dim=1))
            if asked.alignment:
                structure.append(torch.stack([self._spatial(hidden[depth]) for depth in asked.depths], dim=1))
            for name, target in targets.items():
                term, projector = self.projected[name]
                cosines[name].append(F.cosine_similarity(projector(hidden[term.depth]), target, dim=-1).mean(dim=1))
            advance()
        found["hidden"] = torch.stack(pooled, dim=1)
        if asked.alignment:
            found["spatial"] = torch.stack(structure, dim=1)
        return found | {f"cosine {name}": torch.stack(values, dim=1) for name, values in cosines.items()}

    def _denoising(
        self, clean: Tensor, labels: Tensor, ids: Tensor, asked: Asked, advance: Callable[[], None]
    ) -> Tensor:
        """(n, bins): the squared error at one t of each bin, drawn for the image."""
        losses = []
        for number in range(asked.bins):
            drawn = rng.uniform(asked.seed, "evaluation time", number, ids, (), dtype=torch.float64)
            t = ((number + drawn) / asked.bins).float()
            noise = rng.normal(asked.seed, "evaluation noise of losses", number, ids, self.latent_shape)
            x_t, velocity = self.interpolant(clean, noise, t)
            losses.append(denoising_loss(self.model(x_t, t, labels)[0], velocity))
            if not torch.isfinite(losses[-1]).all():
                raise DataError(
                    f"the model's velocity is not finite for t in [{number / asked.bins:g}, "
                    f"{(number + 1) / asked.bins:g}]; use a checkpoint from before it diverged"
                )
            advance()
        return torch.stack(losses, dim=1)

    def _pooled(self, hidden: Tensor, depth: int, time: float) -> Tensor:
        pooled = hidden.float().mean(dim=1)
        if not torch.isfinite(pooled).all():
            raise DataError(
                f"the hidden tokens behind block {depth} are not finite at t={time:g}; "
                "use a checkpoint from before it diverged"
            )
        return pooled

    def _spatial(self, tokens: Tensor) -> Tensor:
        found = spatial(tokens, self.grid)
        return torch.stack([found.lds, found.cds, found.rmsc], dim=1)


def label(source: tuple[str, str]) -> str:
    """An encoder with its weights, as reports and protocols name it: a file of weights without its folder."""
    return f"{source[0]}={base_name(source[1])}"


def load_projectors(
    trained: Trained, grid: tuple[int, int], device: torch.device
) -> dict[str, tuple[AlignmentTerm, nn.Module]]:
    """The run's terms with their trained projectors, by name. An export holds none, and neither does a baseline."""
    folder = Path(trained.facts["source"])
    if not (folder / MANIFEST).is_file():
        return {}
    reader, found = CheckpointReader(folder), {}
    for name, term in build_terms(trained.config).items():
        prefix = f"projectors.{name}."
        settings, width = term.settings, backbone(trained.config.model.name)[0].width
        projector = build_projector(
            settings.projector, width, settings.projector_dim, encoder_spec(settings.encoder).width, grid
        )
        kind = KINDS[trained.facts["weights"]]
        tensors = {full.removeprefix(prefix): full for full in reader.names if full.startswith(prefix)}
        projector.load_state_dict({short: reader.tensor(kind, full) for short, full in tensors.items()})
        found[name] = (term, projector.eval().requires_grad_(False).to(device))
    return found
