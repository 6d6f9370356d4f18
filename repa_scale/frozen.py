"""The frozen networks of a step: the latent space and the target encoders. Images in, clean latents and targets out."""

from __future__ import annotations

import torch
from torch import Tensor

from repa_scale.alignment import AlignmentTerm
from repa_scale.clock import Clock
from repa_scale.config import Config
from repa_scale.encoders import build_encoder
from repa_scale.latents import build_latents
from repa_scale.ranks import Ranks
from repa_scale.sizes import latent_grid, token_grid

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Frozen:
    """Builds what the run's terms need, once a distinct encoder; local rank 0 first, so that a node fetches once."""

    def __init__(self, config: Config, terms: dict[str, AlignmentTerm], ranks: Ranks, clock: Clock) -> None:
        # bf16 convolutions are slower than fp32 ones on a CPU; on a GPU the frozen networks follow the run's precision.
        dtype = DTYPES[config.train.precision] if ranks.device.type == "cuda" else torch.float32
        self.terms = terms
        self.clock = clock
        grid = token_grid(config.data.image_size, config.latents.name, config.model.name)
        if ranks.local_rank > 0:
            ranks.barrier()
        # The VAE stays in fp32: bf16 would round the posterior away.
        self.latents = build_latents(config, ranks.device, torch.float32)
        self.encoders = {
            key: build_encoder(*key, grid, ranks.device, dtype, config.alignment_kernel)
            for key in dict.fromkeys(term.source for term in terms.values())
        }
        if ranks.local_rank == 0:
            ranks.barrier()
        self.latent_shape = latent_grid(config.data.image_size, config.latents.name)

    @torch.no_grad()
    def targets(self, images: Tensor, step: int) -> dict[str, Tensor]:
        """Target tokens by term. images: (N, 3, S, S) uint8 -> (N, T, z) each. A term that is off runs no encoder."""
        active = {name: term for name, term in self.terms.items() if term.active(step)}
        with self.clock.phase("encoder"):
            wanted = {term.source for term in active.values()}
            tokens = {key: encoder(images) for key, encoder in self.encoders.items() if key in wanted}
            return {name: term.prepare(tokens[term.source]) for name, term in active.items()}

    @torch.no_grad()
    def clean(self, images: Tensor, posterior: Tensor) -> Tensor:
        """Clean latents x0. images: (N, 3, S, S) uint8, posterior: (N, C, H, W) normal -> (N, C, H, W) fp32."""
        with self.clock.phase("latent"):
            return self.latents.draw(self.latents.encode(images), posterior)
