"""The order in which a run sees its samples: a function of (seed, epoch, data fingerprint) alone.

Position g of the endless global sequence lies in epoch g // n; every epoch is a permutation of the n samples, so every
sample comes exactly once an epoch, batches go on across the ends of epochs, and nothing is dropped. Ranks, workers and
resumes only choose which positions they read.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from repa_scale import rng


def sample_at(positions: Tensor, count: int, seed: int, fingerprint: str) -> Tensor:
    """Which sample stands at each global position.

    Args:
        positions: (N,) int64, from 0.
        count: samples of the set.
        fingerprint: of the data: another set has another order under the same seed.

    Returns:
        (N,) int64 sample numbers in [0, count).
    """
    epochs = positions.div(count, rounding_mode="floor")
    samples = torch.empty_like(positions)
    for epoch in epochs.unique().tolist():
        here = epochs == epoch
        samples[here] = _epoch_order(seed, fingerprint, epoch, count)[positions[here] - epoch * count]
    return samples


# Two epochs: a batch may begin in one and end in the next, and a test may walk back.
@lru_cache(maxsize=2)
def _epoch_order(seed: int, fingerprint: str, epoch: int, count: int) -> Tensor:
    return rng.permutation(seed, f"order of {fingerprint}", epoch, count)
