"""Times functions on the GPU without the host's launching in the figure, or says that the host bounds them.

Before the timed calls the GPU sleeps for a while, so that the host has launched them all when the first one starts. How
long it must sleep follows from the host's own time, measured first, and from the GPU's clock, measured too. Whether the
lead sufficed is checked in every round: the event in front of the first call must not have happened when the last call
is launched. CUDA takes about 1,000 launches ahead; a function with more can never be covered and is host-bound.
"""

from __future__ import annotations

import functools
import gc
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Work = Callable[[dict[str, Tensor]], Tensor]
ROTATED = 512 << 20  # bytes that are gone through before a buffer comes again; the largest L2 has 50 MB
CALLS = 20
LEAD = 0.02  # seconds that the host is ahead, at most
SPARE = 1.5  # of the host's time, for which the GPU sleeps
LEAST_ROUNDS = 3


@dataclass(frozen=True)
class Timing:
    """Medians over rounds.

    Attributes:
        seconds: per call on the device; host-bound: from the first launch to the end of the device's work.
        host_seconds: per call until the host has launched it.
        host_bound: the host could not stay ahead of the device.
        calls, rounds: timed calls of each round, and rounds.
    """

    seconds: float
    host_seconds: float
    host_bound: bool
    calls: int
    rounds: int


# Runs so many calls -> seconds of the device, of the host, and whether the device started after the last launch.
Round = Callable[[int], tuple[float, float, bool]]


def run(work: Work, inputs: dict[str, Tensor], backward: bool) -> None:
    """One call; `backward` makes the gradient of its `x` too, and drops it."""
    out = work(inputs)
    if backward and out.requires_grad:
        out.backward()
        inputs["x"].grad = None


def timed(
    work: Work,
    inputs: list[dict[str, Tensor]],
    device: torch.device,
    rounds: int,
    backward: bool,
    seconds: float = math.inf,
) -> Timing:
    """Times `work` over the inputs in turn: `rounds` rounds, fewer when `seconds` are over but at least 3."""
    for i in inputs[:3]:
        run(work, i, backward)
    deadline = time.perf_counter() + seconds
    turn = 0

    def launch(calls: int) -> float:
        nonlocal turn
        began = time.perf_counter()
        for _ in range(calls):
            run(work, inputs[turn % len(inputs)], backward)
            turn += 1
        return time.perf_counter() - began

    if device.type != "cuda":
        found = []
        while len(found) < rounds and (len(found) < LEAST_ROUNDS or time.perf_counter() < deadline):
            found.append(launch(1))
        return Timing(statistics.median(found), statistics.median(found), False, 1, len(found))
    alone = []
    for _ in range(LEAST_ROUNDS):
        torch.cuda.synchronize(device)
        alone.append(launch(1))
    host = min(alone)

    def covered_round(calls: int) -> tuple[float, float, bool]:
        torch.cuda.synchronize(device)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(int((SPARE * calls * host + 1e-4) * cycles_per_second(device)))
        begin.record()
        spent = launch(calls)
        covered = not begin.query()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3, spent, covered

    def bare_round(calls: int) -> tuple[float, float, bool]:
        torch.cuda.synchronize(device)
        began = time.perf_counter()
        spent = launch(calls)
        torch.cuda.synchronize(device)
        return time.perf_counter() - began, spent, True

    calls = settled(covered_round, min(CALLS, max(1, int(LEAD / host))))
    one_round = covered_round if calls else bare_round
    found, lost = [], 0
    while len(found) < rounds and (len(found) < LEAST_ROUNDS or time.perf_counter() < deadline):
        on_device, on_host, covered = one_round(calls or 1)
        if covered:
            found.append((on_device / (calls or 1), on_host / (calls or 1)))
            continue
        lost += 1
        if lost > rounds:  # a host that is disturbed all the time
            one_round, calls, found = bare_round, 0, []
    middle = [statistics.median(values) for values in zip(*found, strict=True)]
    return Timing(*middle, host_bound=not calls, calls=calls or 1, rounds=len(found))


def settled(one_round: Round, calls: int) -> int:
    """The largest of `calls`, half of it, and so on down to 1, that the host launches ahead of the device; 0: none."""
    while calls and not any(one_round(calls)[2] for _ in range(2)):
        calls //= 2
    return calls


@functools.cache
def cycles_per_second(device: torch.device) -> float:
    """The rate of the clock that `torch.cuda._sleep` counts."""
    cycles = 10_000_000
    torch.cuda._sleep(cycles)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    torch.cuda._sleep(cycles)
    end.record()
    torch.cuda.synchronize(device)
    return cycles / (begin.elapsed_time(end) / 1e3)


def copy_bandwidth(device: torch.device, rounds: int) -> float:
    """Bytes per second, read and written, of one large copy."""
    source = torch.ones(ROTATED // 4 if device.type == "cuda" else 16 << 20, device=device)
    target = torch.empty_like(source)
    found = timed(lambda i: i["y"].copy_(i["x"]), [{"x": source, "y": target}], device, rounds, backward=False)
    return 2 * source.numel() * source.element_size() / found.seconds


def peak_bytes(call: Callable[[], None], device: torch.device) -> int:
    """The most bytes that one call of CUDA work has allocated at a time, beyond what lives before it."""
    call()
    gc.collect()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before
