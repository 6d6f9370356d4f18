"""The Python side of `torch.cuda` over the pretend device. Streams and events keep their place in time, and no order:
all work is done when a call returns."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import torch

NAME = "pretend GPU"
GIBIBYTE = 2**30
CAPABILITY = (9, 0)


class Stream:
    """What `torch.cuda.Stream` can be asked for."""

    device = torch.device("cuda", 0)
    cuda_stream = 0

    def __init__(self, device: object = None, priority: int = 0, **_: object) -> None:
        assert device is None or torch.device(device).type == "cuda", device

    def synchronize(self) -> None: ...

    def wait_stream(self, stream: Stream) -> None:
        assert isinstance(stream, Stream)

    def wait_event(self, event: Event) -> None:
        assert event.at is not None, "CUDA lets nobody wait for an event that was not recorded"

    def query(self) -> bool:
        return True

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def __enter__(self) -> Stream:
        _stack().append(self)
        return self

    def __exit__(self, *_: object) -> None:
        _stack().pop()


class Event:
    """What `torch.cuda.Event` can be asked for."""

    def __init__(self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False) -> None:
        self.timing = enable_timing
        self.at: float | None = None

    def record(self, stream: Stream | None = None) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, end: Event) -> float:
        assert self.timing and end.timing, "CUDA times only events made with enable_timing=True"
        return 1e3 * (end.at - self.at)

    def synchronize(self) -> None: ...

    def wait(self, stream: Stream | None = None) -> None: ...

    def query(self) -> bool:
        return True


DEFAULT = Stream()
_local = threading.local()


def _stack() -> list[Stream]:
    """This thread's current streams, the innermost last."""
    if not hasattr(_local, "stack"):
        _local.stack = [DEFAULT]
    return _local.stack


@contextmanager
def _stream(stream: Stream | None):
    if stream is None:
        yield
        return
    with stream:
        yield


def _nothing():
    """A function of its own each time: the compiler keeps rules by function."""
    return lambda *_, **__: None


def install() -> None:
    """Replaces what `torch.cuda` would ask CUDA for."""
    cuda = torch.cuda
    properties = SimpleNamespace(
        name=NAME,
        major=CAPABILITY[0],
        minor=CAPABILITY[1],
        total_memory=80 * GIBIBYTE,
        multi_processor_count=132,
        gcnArchName="",
    )
    replaced = {
        # there is a device
        "_is_compiled": lambda: True,
        "_lazy_init": _nothing(),
        "is_initialized": lambda: True,
        "is_available": lambda: True,
        "is_bf16_supported": lambda *_, **__: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": _nothing(),
        "device": nullcontext,
        "device_of": lambda tensor: nullcontext(),
        "get_device_name": lambda device=None: NAME,
        "get_device_capability": lambda device=None: CAPABILITY,
        "get_device_properties": lambda device=None: properties,
        # its memory
        "empty_cache": _nothing(),
        "memory_allocated": lambda device=None: GIBIBYTE,
        "max_memory_allocated": lambda device=None: GIBIBYTE,
        "memory_stats": lambda device=None: OrderedDict(num_alloc_retries=0),
        "mem_get_info": lambda device=None: (70 * GIBIBYTE, 80 * GIBIBYTE),
        "reset_peak_memory_stats": _nothing(),
        # its order of work
        "Stream": Stream,
        "Event": Event,
        "stream": _stream,
        "current_stream": lambda device=None: _stack()[-1],
        "default_stream": lambda device=None: DEFAULT,
        "synchronize": _nothing(),
        "is_current_stream_capturing": lambda: False,
        # its random numbers, which are the CPU's
        "manual_seed": _nothing(),
        "manual_seed_all": _nothing(),
        "get_rng_state": lambda device=None: torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": _nothing(),
    }
    for name, value in replaced.items():
        setattr(cuda, name, value)
    cuda.nvtx.range_push, cuda.nvtx.range_pop = _nothing(), _nothing()
    torch._C._cuda_getDevice = lambda: 0
    torch._C._cuda_getCurrentRawStream = lambda device: 0
    torch.Tensor.record_stream = _nothing()
    torch.version.cuda = "13.0"
