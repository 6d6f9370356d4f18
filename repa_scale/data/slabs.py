"""Memory that loader processes and the training process share, made once and used again.

A batch's pixels are written there by the loader process and copied out by the training process. Shared memory made for
each batch, as DataLoader does, costs more time than the decoding of small pictures: every page of it is new each time.
It is anonymous and inherited by fork, so it needs no room in /dev/shm and leaves nothing there.
"""

from __future__ import annotations

import mmap

import numpy as np


class Slabs:
    """`count` slabs of (N, S, S, 3) uint8; step s uses slab s % count.

    Args:
        count: more than the batches that are under way at a time.
    """

    def __init__(self, count: int, pictures: int, size: int) -> None:
        shape = (count, pictures, size, size, 3)
        self.shape = shape[1:]
        self._memory = np.frombuffer(mmap.mmap(-1, int(np.prod(shape))), np.uint8).reshape(shape)

    def __getitem__(self, step: int) -> np.ndarray:
        return self._memory[step % len(self._memory)]
