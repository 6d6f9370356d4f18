"""Seconds spent in the phases of a step, on the CPU and on CUDA, without waiting for the device in between."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from repa_scale import devices


class Clock:
    """Adds up seconds by phase. On CUDA it records events, which are read only in `read`."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = devices.on_gpu(device)
        self._spans: dict[str, list[tuple]] = defaultdict(list)

    def now(self) -> object:
        """A moment that `add` understands."""
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def add(self, phase: str, begin: object) -> None:
        """Counts the time since `begin` as `phase`."""
        self._spans[phase].append((begin, self.now()))

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        begin = self.now()
        try:
            yield
        finally:
            self.add(name, begin)

    def read(self) -> dict[str, float]:
        """Seconds by phase since the last `read`. On CUDA it waits until the work is done."""
        if self._cuda and self._spans:
            torch.cuda.synchronize()
        seconds = {
            name: sum(begin.elapsed_time(end) / 1e3 if self._cuda else end - begin for begin, end in spans)
            for name, spans in self._spans.items()
        }
        self._spans.clear()
        return seconds
