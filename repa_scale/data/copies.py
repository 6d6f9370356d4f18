"""Copy batches to the device ahead of their use: on a stream of its own, ordered before the stream that uses them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import torch

from repa_scale import devices
from repa_scale.data.steps import Batch


@dataclass(frozen=True)
class Sent:
    """A batch whose copy may still be under way.

    Attributes:
        batch: on the device.
        copied: reached once the copy is done; None on a CPU.
        source: what is copied. Where it is pinned, torch's allocator keeps the memory until the copy is done; holding
            it here until the hand-over covers a source that torch did not pin.
    """

    batch: Batch
    copied: torch.cuda.Event | None
    source: Batch


class Copies:
    """Copies to `device`. Threads make and send batches (`enter_thread`, `send`), the training takes them (`take`).

    No thread waits for a copy: the training's stream does, on the device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device) if devices.on_gpu(device) else None

    def enter_thread(self) -> None:
        """What a thread calls first: the `initializer` of its pool."""
        devices.use(self.device)

    def send(self, make: Callable[[], Batch]) -> Sent:
        """Makes a batch and starts its copy. `make` has let go of memory that others write to when it returns."""
        with torch.cuda.stream(self._stream) if self._stream else contextlib.nullcontext():
            source = make()
            batch = source.to(self.device)
            copied = self._stream.record_event() if self._stream else None
        return Sent(batch, copied, source)

    def take(self, sent: Sent) -> Batch:
        """The batch, for work on the caller's current stream."""
        if sent.copied is not None:
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(sent.copied)
            # Its memory belongs to the copies' stream, which would use it again while `stream` still reads it.
            sent.batch.record_stream(stream)
        return sent.batch
