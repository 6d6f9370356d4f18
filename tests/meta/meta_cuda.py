"""Streams, events, waits and each thread's current GPU of `torch.cuda`, as the code asks for them, without CUDA."""

from __future__ import annotations

import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

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
            self.waited: list[Event] = []

        def synchronize(self) -> None:
            watched.note("wait")

        def record_event(self) -> Event:
            event = Event()
            event.stream = self
            return event

        def wait_event(self, event: Event) -> None:
            assert event.stream is not None, "CUDA lets nobody wait for an event that was not recorded"
            self.waited.append(event)

    class Event:
        def __init__(self, enable_timing: bool = False) -> None:
            self.done: bool | None = None if enable_timing else True
            self.stream: Stream | None = None

        def record(self) -> None:
            assert self.done is None, "made for timing"
            self.done = False
            events.append(self)

        def elapsed_time(self, end: Event) -> float:
            assert self.done and end.done, "CUDA refuses to time events that it has not reached"
            return 0.0

    class Thread(threading.local):
        """What belongs to each thread: it starts on GPU 0, on that GPU's default stream."""

        gpu: object = 0
        stream: Stream | None = None

    def set_device(gpu: torch.device) -> None:
        thread.gpu = gpu

    @contextmanager
    def within(stream: Stream):
        before, thread.stream = thread.stream, stream
        yield
        thread.stream = before
        watched.contexts.add(thread.gpu)  # it goes back to the thread's GPU, where CUDA starts if it has not

    def record_stream(tensor: torch.Tensor, stream: Stream) -> None:
        tensor.used_on = [*getattr(tensor, "used_on", []), stream]

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
    thread, default = Thread(), Stream(META)
    set_device(META)  # as Ranks.start does
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(devices, "on_gpu", lambda device: device == META)
        patch.setattr(torch.cuda, "Stream", Stream)
        patch.setattr(torch.cuda, "Event", Event)
        patch.setattr(torch.cuda, "synchronize", synchronize)
        patch.setattr(torch.cuda, "stream", within)
        patch.setattr(torch.cuda, "current_stream", lambda device=None: thread.stream or default)
        patch.setattr(torch.cuda, "set_device", set_device)
        patch.setattr(torch.Tensor, "record_stream", record_stream)
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
