"""The wish to stop, from a signal or the file RUN/stop, and the step's one small collective that carries it."""

from __future__ import annotations

import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
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
        self._since = 0.0
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._receive)

    def _receive(self, number: int, _frame: object) -> None:
        if number == signal.SIGINT and self._signal == "SIGINT":
            raise KeyboardInterrupt
        self._signal = signal.Signals(number).name
        self._since = self._since or time.monotonic()

    @property
    def asked(self) -> bool:
        return bool(self._signal) or (self._file is not None and self._file.exists())

    @property
    def seconds(self) -> float:
        """Since the first signal; 0: there was none."""
        return time.monotonic() - self._since if self._since else 0.0

    def anywhere(self, ranks: Ranks) -> bool:
        """Whether any rank is asked to stop; a collective of its own, for work outside the steps."""
        flag = torch.tensor(float(self.asked), device=ranks.device)
        if ranks.world_size > 1:
            dist.all_reduce(flag)
        return bool(flag > 0)


@dataclass(frozen=True)
class Shared:
    """What the ranks tell each other in a step.

    Attributes:
        means: over the ranks.
        counts: summed over the ranks.
        fingerprint: the sum of all ranks' fingerprints modulo 2**64.
        flags: whether any rank sets it.
        seconds: of the local phases, by rank.
    """

    means: list[float]
    counts: list[float]
    fingerprint: int
    flags: list[bool]
    seconds: list[list[float]]


def reduce_step(
    ranks: Ranks,
    means: Sequence[torch.Tensor],
    fingerprint: int,
    flags: Sequence[bool],
    seconds: Sequence[float] = (),
    counts: Sequence[float] = (),
) -> Shared:
    """The step's own collective, one small reduction for all of these.

    Args:
        means: scalars of this rank, on its device.
        counts: numbers of this rank, on the host.
        seconds: of this rank's local phases (stragglers.py).
    """
    chunks = [(fingerprint >> (16 * k)) & 0xFFFF for k in range(CHUNKS)]
    table = [0.0] * (len(seconds) * ranks.world_size)
    table[ranks.rank * len(seconds) : (ranks.rank + 1) * len(seconds)] = seconds
    scalars = torch.stack([m.detach().double() for m in means]) / ranks.world_size
    rest = torch.tensor([*chunks, *map(float, flags), *counts, *table], dtype=torch.float64, device=ranks.device)
    packed = torch.cat([scalars, rest])
    if ranks.world_size > 1:
        dist.all_reduce(packed)
    values = iter(packed.tolist())
    reduced = list(islice(values, len(means)))
    total = sum(int(chunk) << (16 * k) for k, chunk in enumerate(islice(values, CHUNKS))) % 2**64
    raised = [value > 0 for value in islice(values, len(flags))]
    summed = list(islice(values, len(counts)))
    return Shared(reduced, summed, total, raised, [list(islice(values, len(seconds))) for _ in range(ranks.world_size)])
