"""The order in which a run sees its samples: a function of (seed, epoch, data fingerprint) alone.

Position g of the endless global sequence lies in epoch g // n; every epoch is a permutation of the n samples, so every
sample comes exactly once an epoch, batches go on across the ends of epochs, and nothing is dropped. Ranks, workers and
resumes only choose which positions they read.

The permutation has two levels: the shards are permuted, and the samples of each window of WINDOW neighbouring shards
are. So a reader needs WINDOW shards at a time, and a cold cache is read almost sequentially. A set of at most WINDOW
shards is one window, that is, fully shuffled.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from repa_scale import rng

WINDOW = 8  # shards


class Order:
    """The order of one run over one set.

    Args:
        samples: of each shard, in the order of the index.
        fingerprint: of the data: another set has another order under the same seed.
    """

    def __init__(self, samples: Sequence[int], seed: int, fingerprint: str) -> None:
        self.samples, self.seed, self.fingerprint = tuple(samples), seed, fingerprint
        self.count = sum(self.samples)

    def at(self, positions: Tensor) -> Tensor:
        """Which sample stands at each global position. (N,) int64, from 0 -> (N,) int64 in [0, count)."""
        epochs = positions.div(self.count, rounding_mode="floor")
        found = torch.empty_like(positions)
        for epoch in epochs.unique().tolist():
            here = epochs == epoch
            order = _epoch_order(self.samples, self.seed, self.fingerprint, epoch)
            found[here] = order[positions[here] - epoch * self.count]
        return found

    def shards_from(self, position: int) -> list[int]:
        """The shards that this position's window and the next one need: what a cache should hold now."""
        wanted: list[int] = []
        for _ in range(2):
            epoch, within = divmod(position, self.count)
            end = 0
            for window in _windows(self.samples, self.seed, self.fingerprint, epoch):
                end += sum(self.samples[shard] for shard in window)
                if within < end:
                    wanted += window
                    break
            position = epoch * self.count + end
        return wanted


def _windows(samples: tuple[int, ...], seed: int, fingerprint: str, epoch: int) -> list[list[int]]:
    """The shards of an epoch in their order, in groups that are shuffled together."""
    if len(samples) <= WINDOW:
        return [list(range(len(samples)))]
    shards = rng.permutation(seed, f"shards of {fingerprint}", epoch, len(samples)).tolist()
    return [shards[first : first + WINDOW] for first in range(0, len(shards), WINDOW)]


# Two epochs: a batch may begin in one and end in the next, and a test may walk back.
@lru_cache(maxsize=2)
def _epoch_order(samples: tuple[int, ...], seed: int, fingerprint: str, epoch: int) -> Tensor:
    sizes = torch.tensor(samples)
    starts = sizes.cumsum(0) - sizes
    windows = []
    for number, window in enumerate(_windows(samples, seed, fingerprint, epoch)):
        together = torch.cat([torch.arange(samples[shard]) + starts[shard] for shard in window])
        purpose = f"order of {fingerprint}" if number == 0 else f"order of {fingerprint}, window {number}"
        windows.append(together[rng.permutation(seed, purpose, epoch, len(together))])
    return torch.cat(windows)
