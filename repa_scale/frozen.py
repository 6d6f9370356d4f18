"""The frozen networks of a step: the latent space and the target encoders. Images in, clean latents and targets out.

What a run reads from the set's stored features (data.source) is not made here: those networks are not run.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from repa_scale import devices
from repa_scale.alignment import AlignmentTerm
from repa_scale.clock import Clock
from repa_scale.config import Config
from repa_scale.data.features import Cached, column_of_tokens
from repa_scale.encoders import build_encoder
from repa_scale.errors import ConfigError
from repa_scale.features import weights_sha256
from repa_scale.latents import Latents, build_latents
from repa_scale.ranks import Ranks
from repa_scale.sizes import latent_grid, token_grid

NOTHING: Mapping[str, Tensor] = {}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Frozen:
    """Builds what the run's terms need, once a distinct encoder; local rank 0 first, so that a node fetches once.

    Args:
        cached: what comes with the batches instead.
    """

    def __init__(
        self, config: Config, terms: dict[str, AlignmentTerm], ranks: Ranks, clock: Clock, cached: Cached | None = None
    ) -> None:
        cached = cached or Cached()
        self.dtype = dtype = encoder_dtype(config.train.precision, ranks.device)
        self.terms = terms
        self.clock = clock
        grid = token_grid(config.data.image_size, config.latents.name, config.model.name)
        if ranks.local_rank > 0:
            ranks.barrier()
        # The VAE stays in float32: bf16 would round the posterior away. (TF32 in 16-bit runs: arithmetic.of_training.)
        # With stored moments it still draws the samples.
        self.latents = build_latents(config, ranks.device, torch.float32)
        _check_vae(cached, self.latents, config)
        stored = {one.network for one in cached.tokens}
        self.encoders = {
            key: build_encoder(*key, grid, ranks.device, dtype, config.alignment_kernel)
            for key in dict.fromkeys(term.source for term in terms.values())
            if key[0] not in stored
        }
        if ranks.local_rank == 0:
            ranks.barrier()
        self.latent_shape = latent_grid(config.data.image_size, config.latents.name)

    @torch.no_grad()
    def targets(self, images: Tensor, step: int, features: Mapping[str, Tensor] = NOTHING) -> dict[str, Tensor]:
        """Target tokens by term. A term that is off runs no encoder.

        Args:
            images: (N, 3, S, S) uint8.
            features: of the batch (Batch.features).

        Returns:
            (N, T, z) each.
        """
        active = {name: term for name, term in self.terms.items() if term.active(step)}
        with self.clock.phase("encoder"):
            wanted = {term.source for term in active.values()}
            tokens = {key: self._tokens(key, images, features) for key in wanted}
            return {name: term.prepare(tokens[term.source]) for name, term in active.items()}

    @torch.no_grad()
    def clean(self, images: Tensor, posterior: Tensor, features: Mapping[str, Tensor] = NOTHING) -> Tensor:
        """Clean latents x0. images: (N, 3, S, S) uint8, posterior: (N, C, H, W) normal -> (N, C, H, W) fp32."""
        with self.clock.phase("latent"):
            moments = features["moments"] if "moments" in features else self.latents.encode(images)
            return self.latents.draw(moments, posterior)

    def _tokens(self, source: tuple[str, str], images: Tensor, features: Mapping[str, Tensor]) -> Tensor:
        if source in self.encoders:
            return self.encoders[source](images)
        return features[column_of_tokens(source[0])].to(self.dtype)


def encoder_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Of the encoders: on a GPU the run's precision; a CPU is slower in 16 bits than in fp32."""
    return DTYPES[precision] if devices.on_gpu(device) else torch.float32


def _check_vae(cached: Cached, latents: Latents, config: Config) -> None:
    """Moments of another VAE would train a model whose samples this one cannot show."""
    if cached.moments is not None and latents.vae is not None:
        digest = weights_sha256(latents.vae)
        if digest != cached.moments.weights_sha256:
            raise ConfigError(
                f"the set's moments were made by a {config.latents.name} with other weights "
                f"({cached.moments.weights_sha256}) than latents.weights={config.latents.weights} ({digest}); "
                "give the same weights, or use data.source=image"
            )
