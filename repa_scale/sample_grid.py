"""Sample grids during training: the EMA weights shown to the sharded model, without ever gathering it on one rank."""

from __future__ import annotations

import numpy as np
import torch

from repa_scale import rng
from repa_scale.config import Config
from repa_scale.ema import ShardEma
from repa_scale.engine import Engine
from repa_scale.latents import Latents
from repa_scale.ranks import Ranks
from repa_scale.sampling import sample


@torch.no_grad()
def draw_grid(
    engine: Engine, ema: ShardEma, config: Config, latents: Latents, shape: tuple[int, int, int], ranks: Ranks
) -> tuple[np.ndarray, list[int]] | None:
    """Samples of the EMA model: (count, H, W, 3) uint8 and the labels asked for, on rank 0; None elsewhere.

    Noise depends on (seed, sample index) alone, labels go round the classes, so that grids of all steps and of a
    REPA run and its baseline can be laid side by side. Every rank makes its share, padded to equal length because
    the sharded model is gathered by all ranks together.
    """
    settings = config.sample
    classes = config.model.num_classes
    share = -(-settings.count // ranks.world_size)
    mine = torch.arange(ranks.rank * share, (ranks.rank + 1) * share)
    pieces = []
    with engine.weights_replaced(ema.values):
        for index in mine.split(settings.batch):
            index = index.to(ranks.device)
            labels = index % classes if classes else torch.zeros_like(index)
            pieces.append(latents.decode(sample_at(engine, config, index, labels, shape)).cpu())
    images = torch.cat(ranks.gather_objects(torch.cat(pieces)))[: settings.count]
    labels = [i % classes if classes else 0 for i in range(settings.count)]
    return (images.permute(0, 2, 3, 1).numpy(), labels) if ranks.is_main else None


def sample_at(engine: Engine, config: Config, index: torch.Tensor, labels: torch.Tensor, shape: tuple) -> torch.Tensor:
    """Latents of the samples `index`. index, labels: (N,) int64 -> (N, C, H, W)."""
    settings = config.sample
    return sample(
        lambda x, t, y: engine(x, t, y)["velocity"],
        rng.normal(config.seed, "sample noise", 0, index, shape),
        labels,
        config.model.num_classes,
        sampler=settings.sampler,
        steps=settings.steps,
        guidance=settings.guidance,
        interval=tuple(settings.interval),
        path=config.interpolant.path,
        step_noise=lambda i: rng.normal(config.seed, "sampler noise", i, index, shape),
    )
