"""From what training wrote to a pipeline: the sizes, the sampler's defaults, the latent space, the class names."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from repa_scale.config import Config
from repa_scale.latents import build_latents
from repa_scale.models import sit_sizes
from repa_scale.serving.pipeline import SiTPipeline
from repa_scale.serving.scheduler import SiTScheduler
from repa_scale.serving.transformer import SiTTransformer2DModel
from repa_scale.sizes import latent_spec
from repa_scale.trained import open_source


def pipeline_of(source: str | Path, weights: str = "ema") -> SiTPipeline:
    """The pipeline of a run, a checkpoint or an export in our own layout, in float32 on the CPU.

    Raises:
        DataError: nothing of the kind lies there, or it is damaged.
    """
    opened = open_source(source, weights)
    transformer = empty_transformer(opened.config)
    transformer.load_state_dict(opened.build().state_dict(), assign=True)
    latents = build_latents(opened.config, "cpu", torch.float32)
    return SiTPipeline(
        transformer.eval().requires_grad_(False),
        scheduler(opened.config),
        latents.vae,
        id2label(opened.class_names),
        latent_space(opened.config),
    )


def empty_transformer(config: Config) -> SiTTransformer2DModel:
    """The transformer of a configuration, without memory for its weights."""
    sizes = sit_sizes(config)
    with torch.device("meta"):
        return SiTTransformer2DModel(sample_size=sizes.pop("input_size"), **sizes)


def scheduler(config: Config) -> SiTScheduler:
    """The run's sampler settings, and the path that it was trained with."""
    sample = config.sample
    return SiTScheduler(
        sampler=sample.sampler,
        path=config.interpolant.path,
        num_inference_steps=sample.steps,
        guidance=sample.guidance,
        interval=tuple(sample.interval),
    )


def latent_space(config: Config) -> dict[str, Any]:
    """The row of sizes.LATENTS as JSON."""
    row = asdict(latent_spec(config.latents.name))
    return {key: list(value) if isinstance(value, tuple) else value for key, value in row.items()}


def id2label(names: list[str] | tuple[str, ...]) -> dict[str, str] | None:
    """Class names as diffusers keeps them."""
    return {str(number): name for number, name in enumerate(names)} or None
