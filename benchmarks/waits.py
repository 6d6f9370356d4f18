"""True host time: how much of a step the host worked, and how much it only waited for the GPU.

A step calls functions that block until the GPU has caught up: DeepSpeed reads the gradient norm, the record reads the
losses, the clock synchronizes. Wall time up to the last launch therefore contains GPU time. Holding the GPU back behind
`torch.cuda._sleep` would not help, because each of these calls would wait for the sleep. So `Waits` times the calls
themselves, in the very steps that are reported, and host time is the step's wall time minus the time inside them.

Two limits. A call that blocks inside C++ is not timed: `unlisted` finds those with CUDA's synchronization debug mode.
And CUDA takes about 1,000 launches ahead of the GPU before a launch itself blocks; a step that is bound by the GPU and
launches more than that between two waits therefore reads as more host time than it needs. A step with hardly any
waiting is bound by the host.
"""

from __future__ import annotations

import collections
import sys
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

READS = ("item", "tolist", "__bool__", "__float__", "__int__", "__index__", "__complex__", "cpu", "numpy")
MAKERS = ("tensor", "as_tensor")  # a list that becomes a CUDA tensor is copied from pageable memory, which blocks
SYNCHRONIZERS = ((torch.cuda, "synchronize"), (torch.cuda.Event, "synchronize"), (torch.cuda.Stream, "synchronize"))
WARNING = "called a synchronizing CUDA operation"


@dataclass
class Wait:
    """Blocking calls made from one line.

    Attributes:
        place: file and line of the caller, as in `repa_scale/engine.py:104 __float__`.
    """

    place: str
    calls: int = 0
    seconds: float = 0.0


class Waits:
    """Inside the context, times the Python calls that block the host; from any thread, nested calls once.

    Args:
        device: reads of tensors on another device do not count. On a CPU nothing blocks, so what counts there is the
            reads themselves, microseconds each.
    """

    def __init__(self, device: torch.device) -> None:
        self.type = device.type
        self._found: dict[tuple[Any, int, str], Wait] = {}
        self._inside = threading.local()
        self._undo: list[Callable[[], None]] = []

    def __enter__(self) -> Waits:
        for name in READS:
            self._replace(Tensor, name, self._read)
        self._replace(Tensor, "to", self._move)
        self._replace(Tensor, "cuda", self._move)
        for name in MAKERS:
            self._replace(torch, name, self._make)
        for owner, name in SYNCHRONIZERS:
            self._replace(owner, name, self._synchronize)
        return self

    def __exit__(self, *_: object) -> None:
        while self._undo:
            self._undo.pop()()

    @property
    def blocked(self) -> bool:
        """Whether this thread is inside one of the calls."""
        return getattr(self._inside, "deep", False)

    def take(self) -> list[Wait]:
        """The waits since the last `take`, the longest first."""
        found, self._found = self._found, {}
        return sorted(found.values(), key=lambda wait: -wait.seconds)

    def _replace(self, owner: Any, name: str, around: Callable[[str, Callable], Callable]) -> None:
        original = getattr(owner, name)
        own = name in vars(owner)
        setattr(owner, name, around(name, original))
        self._undo.append((lambda: setattr(owner, name, original)) if own else (lambda: delattr(owner, name)))

    def _timed(self, name: str, call: Callable, args: tuple, kwargs: dict, counts: Callable[[Any], bool]) -> Any:
        if self.blocked:
            return call(*args, **kwargs)
        self._inside.deep = True
        began = time.perf_counter()
        try:
            result = call(*args, **kwargs)
        finally:
            seconds = time.perf_counter() - began
            self._inside.deep = False
        if counts(result):
            frame = sys._getframe(2)
            key = (frame.f_code, frame.f_lineno, name)
            if key not in self._found:
                self._found[key] = Wait(f"{_short(frame.f_code.co_filename)}:{frame.f_lineno} {name}")
            self._found[key].calls += 1
            self._found[key].seconds += seconds
        return result

    def _read(self, name: str, original: Callable) -> Callable:
        def read(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            if tensor.device.type != self.type:
                return original(tensor, *args, **kwargs)
            return self._timed(name, original, (tensor, *args), kwargs, lambda _: True)

        return read

    def _move(self, name: str, original: Callable) -> Callable:
        def move(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if kwargs.get("non_blocking"):
                return original(tensor, *args, **kwargs)
            before = tensor.device
            return self._timed(name, original, (tensor, *args), kwargs, lambda moved: moved.device != before)

        return move

    def _make(self, name: str, original: Callable) -> Callable:
        def make(*args: Any, **kwargs: Any) -> Tensor:
            return self._timed(name, original, args, kwargs, lambda made: made.device.type == "cuda")

        return make

    def _synchronize(self, name: str, original: Callable) -> Callable:
        def synchronize(*args: Any, **kwargs: Any) -> Any:
            return self._timed(name, original, args, kwargs, lambda _: True)

        return synchronize


def unlisted(step: Callable[[], object], waits: Waits) -> dict[str, int]:
    """Runs one step and returns the blocking CUDA operations that `waits`, which must be entered, does not time.

    Returns:
        {place: calls}; empty without CUDA. Operations of the backward pass are reported where it is started.
    """
    found: dict[str, int] = collections.Counter()
    if not torch.cuda.is_available():
        step()
        return found

    def note(message: Warning | str, category: type, filename: str, line: int, *_: object) -> None:
        if WARNING in str(message) and not waits.blocked:
            found[f"{_short(filename)}:{line}"] += 1

    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    return dict(found)


def _short(file: str) -> str:
    return "/".join(Path(file).parts[-2:])
