"""The exponential moving average of the weights, shard by shard in fp32, without communication."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class ShardEma:
    """ema <- decay * ema + (1 - decay) * weights, on this rank's slices of the fp32 master weights.

    It starts as a copy of the weights. Every rank holds the average of exactly what it owns under ZeRO, so it costs
    4 bytes a parameter over all ranks together.
    """

    def __init__(self, masters: Sequence[Tensor], decay: float) -> None:
        self.masters = list(masters)  # views: they change under us at every optimiser step
        self.values = [master.detach().clone() for master in self.masters]
        self.decay = decay

    @torch.no_grad()
    def update(self) -> None:
        """One step of the average. Call it only after a step that was applied."""
        torch._foreach_lerp_(self.values, self.masters, 1.0 - self.decay)

    @torch.no_grad()
    def restart(self) -> None:
        """Begins again from the weights as they are now."""
        for value, master in zip(self.values, self.masters, strict=True):
            value.copy_(master)
