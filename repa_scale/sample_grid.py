"""Samples during training: the EMA weights shown to the sharded model, without ever gathering it on one rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from repa_scale.config import Config
from repa_scale.ema import ShardEma
from repa_scale.engine import Engine
from repa_scale.latents import Latents
from repa_scale.ranks import Ranks
from repa_scale.sampling import sample_numbered


class Stopped(Exception):
    """Someone asks to stop; all ranks raise it together."""


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
    REPA run and its baseline can be laid side by side.

    Args:
        stopping: asked by all ranks together before each batch of images; once it is true, None is returned.
    """
    count = config.sample.count
    pieces = []
    with engine.weights_replaced(ema.values):
        try:
            for index, images in draw_blocks(engine, config, latents, shape, ranks, count, config.seed, stopping):
                pieces.append((index, images.cpu()))
        except Stopped:
            return None
    images = in_order([piece for theirs in ranks.gather_objects(pieces) for piece in theirs])
    labels = labels_of(torch.arange(count), config.model.num_classes).tolist()
    return (images.permute(0, 2, 3, 1).numpy(), labels) if ranks.is_main else None


@torch.no_grad()
def draw_blocks(
    engine: Engine,
    config: Config,
    latents: Latents,
    shape: tuple[int, int, int],
    ranks: Ranks,
    count: int,
    seed: int,
    stopping: Callable[[], bool],
) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's blocks of the samples 0 to count - 1: (N,) int64 their numbers and (N, 3, H, W) uint8.

    Every rank goes through equally many blocks of equal size, because the sharded model is gathered by all ranks
    together; what lies behind the last sample is drawn and left out.

    Args:
        stopping: asked by all ranks together before each block.

    Raises:
        Stopped: it said so.
    """
    size = min(config.sample.batch, -(-count // ranks.world_size))
    for start in range(0, count, size * ranks.world_size):
        if stopping():
            raise Stopped
        first = start + ranks.rank * size
        index = torch.arange(first, first + size)
        drawn = sample_numbered(
            lambda x, t, y: engine(x, t, y)["velocity"],
            index.to(ranks.device),
            labels_of(index, config.model.num_classes).to(ranks.device),
            config.model.num_classes,
            shape,
            seed,
            config.sample,
            config.interpolant.path,
        )
        wanted = max(0, min(size, count - first))
        yield index[:wanted], latents.decode(drawn)[:wanted]


def labels_of(index: Tensor, classes: int) -> Tensor:
    """The labels of samples by number, all classes in turn. (N,) int64 -> (N,) int64."""
    return index % classes if classes else torch.zeros_like(index)


def in_order(pieces: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Rows of all ranks' pieces, by number. (N_i,) int64 and (N_i, ...) each -> (sum N_i, ...)."""
    order = torch.cat([index for index, _ in pieces]).argsort()
    return torch.cat([rows for _, rows in pieces])[order]
