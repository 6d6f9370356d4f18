"""Streams, events and waits of `torch.cuda`, as the code asks for them, on a machine without CUDA."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext

import pytest
import torch
from meta_device import META, Factories, Watched
from repa_scale.kernels import choice

from repa_scale import devices
from repa_scale.data import batches


@contextmanager
def as_cuda(watched: Watched, kernel: str = "torch"):
    """Inside, `meta` counts as a GPU: the code takes its branches for CUDA, with the stand-ins below behind them.

    Args:
        kernel: what `alignment.kernel=auto` comes to.
    """

    class Stream:
        def __init__(self, device: torch.device) -> None:
            assert device == META

        def synchronize(self) -> None:
            watched.note("wait")

    class Event:
        def __init__(self, enable_timing: bool = False) -> None:
            assert enable_timing
            self.done: bool | None = None

        def record(self) -> None:
            self.done = False
            events.append(self)

        def elapsed_time(self, end: Event) -> float:
            assert self.done and end.done, "CUDA refuses to time events that it has not reached"
            return 0.0

    def synchronize(device: object = None) -> None:
        watched.note("wait")
        for event in events:
            event.done = True

    class Pool(ThreadPoolExecutor):
        """Modes belong to a thread, so that of this one goes along."""

        def submit(self, work, *args):
            def watching():
                with watched, Factories(watched):
                    return work(*args)

            return super().submit(watching)

    events: list[Event] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(devices, "on_gpu", lambda device: device == META)
        patch.setattr(torch.cuda, "Stream", Stream)
        patch.setattr(torch.cuda, "Event", Event)
        patch.setattr(torch.cuda, "synchronize", synchronize)
        patch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
        patch.setattr(torch.cuda, "current_stream", lambda device=None: Stream(META))
        patch.setattr(torch.cuda, "max_memory_allocated", lambda device=None: 0)
        patch.setattr(batches, "ThreadPoolExecutor", Pool)
        patch.setattr(
            sys.modules[torch.optim.Optimizer.__module__], "_get_fused_kernels_supported_devices", lambda: ["meta"]
        )
        autocasting = torch.is_autocast_enabled
        patch.setattr(torch, "is_autocast_enabled", lambda kind: autocasting("cuda" if kind == "meta" else kind))
        if kernel == "triton":
            patch.setattr(choice, "unavailable", lambda device: "")
        yield
