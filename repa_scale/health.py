"""The wish to stop, from a signal or the file RUN/stop, and the step's one small collective that carries it."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from repa_scale.ranks import Ranks

CHUNKS = 4  # a 64-bit fingerprint travels as four 16-bit numbers, whose sums a float64 holds exactly


class StopRequest:
    """Set by SIGTERM, SIGUSR1 or one SIGINT on this rank, or by the file RUN/stop on rank 0. A second SIGINT quits."""

    def __init__(self, folder: Path | None) -> None:
        self._file = folder / "stop" if folder is not None else None
        self._signal: str = ""
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._receive)

    def _receive(self, number: int, _frame: object) -> None:
        if number == signal.SIGINT and self._signal == "SIGINT":
            raise KeyboardInterrupt
        self._signal = signal.Signals(number).name

    @property
    def asked(self) -> bool:
        return bool(self._signal) or (self._file is not None and self._file.exists())


def reduce_step(
    ranks: Ranks, means: Sequence[torch.Tensor], fingerprint: int, stop: bool
) -> tuple[list[float], int, bool]:
    """The step's own collective: means, the sum of fingerprints modulo 2**64, and whether anyone asks to stop.

    Args:
        means: scalars of this rank.
    """
    chunks = [(fingerprint >> (16 * k)) & 0xFFFF for k in range(CHUNKS)]
    scalars = torch.stack([m.detach().double() for m in means]) / ranks.world_size
    rest = torch.tensor([*chunks, float(stop)], dtype=torch.float64, device=ranks.device)
    packed = torch.cat([scalars.to(ranks.device), rest])
    if ranks.world_size > 1:
        dist.all_reduce(packed)
    values = packed.tolist()
    *reduced, stops = values
    total = sum(int(chunk) << (16 * k) for k, chunk in enumerate(reduced[-CHUNKS:])) % 2**64
    return reduced[:-CHUNKS], total, stops > 0
