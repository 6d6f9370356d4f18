"""Sample grids during training: the EMA weights shown to the sharded model, without ever gathering it on one rank."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from repa_scale.config import Config
from repa_scale.ema import ShardEma
from repa_scale.engine import Engine
from repa_scale.latents import Latents
from repa_scale.ranks import Ranks
from repa_scale.sampling import sample_numbered


@torch.no_grad()
def draw_grid(
    engine: Engine,
    ema: ShardEma,
    config: Config,
    latents: Latents,
    shape: tuple[int, int, int],
    ranks: Ranks,
    stopping: Callable[[], bool] = lambda: False,
) -> tuple[np.ndarray, list[int]] | None:
    """Samples of the EMA model: (count, H, W, 3) uint8 and the labels asked for, on rank 0; None elsewhere.

    Noise depends on (seed, sample index) alone, labels go round the classes, so that grids of all steps and of a
    REPA run and its baseline can be laid side by side. Every rank makes its share, padded to equal length because
    the sharded model is gathered by all ranks together.

    Args:
        stopping: asked by all ranks together before each batch of images; once it is true, None is returned.
    """
    settings = config.sample
    classes = config.model.num_classes
    share = -(-settings.count // ranks.world_size)
    mine = torch.arange(ranks.rank * share, (ranks.rank + 1) * share)
    pieces = []
    with engine.weights_replaced(ema.values):
        for index in mine.split(settings.batch):
            if stopping():
                return None
            index = index.to(ranks.device)
            labels = index % classes if classes else torch.zeros_like(index)
            drawn = sample_numbered(
                lambda x, t, y: engine(x, t, y)["velocity"],
                index,
                labels,
                classes,
                shape,
                config.seed,
                settings,
                config.interpolant.path,
            )
            pieces.append(latents.decode(drawn).cpu())
    images = torch.cat(ranks.gather_objects(torch.cat(pieces)))[: settings.count]
    labels = [i % classes if classes else 0 for i in range(settings.count)]
    return (images.permute(0, 2, 3, 1).numpy(), labels) if ranks.is_main else None
