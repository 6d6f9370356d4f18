"""The trained networks: the SiT backbone, the projectors, their initial and public weights."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from repa_scale.config import Config
from repa_scale.models.sit import SiT, position_table
from repa_scale.sizes import backbone, latent_grid, token_grid


def build_sit(config: Config) -> SiT:
    """The backbone that a configuration names, uninitialised."""
    return SiT(**sit_sizes(config))


def sit_sizes(config: Config) -> dict[str, Any]:
    """The arguments of `SiT` that a configuration names."""
    size, patch = backbone(config.model.name)
    channels, height, _ = latent_grid(config.data.image_size, config.latents.name)
    return {
        "input_size": height,
        "patch_size": patch,
        "in_channels": channels,
        "depth": size.depth,
        "width": size.width,
        "heads": size.heads,
        "num_classes": config.model.num_classes,
        "qk_norm": size.qk_norm if config.model.qk_norm is None else config.model.qk_norm,
    }


def position_table_of(config: Config) -> Tensor:
    """The fixed position table of the backbone that a configuration names: (1, T, D) float32."""
    size, _ = backbone(config.model.name)
    across, _ = token_grid(config.data.image_size, config.latents.name, config.model.name)
    return position_table(across, size.width)
