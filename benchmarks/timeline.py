"""Reads a trace of one step: time by phase, and the longest gaps of the GPU with what the host did meanwhile.

Pure functions of spans, in microseconds; a trace is the list of events that torch.profiler exports for Chrome.
"""

from __future__ import annotations

import gzip
import itertools
import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
RUNTIME = ("cuda_runtime", "cuda_driver")
HOST = ("cpu_op", "user_annotation", *RUNTIME)
# What the host blocks in until the GPU has caught up.
BLOCKING = (
    "cudaDeviceSynchronize",
    "cudaStreamSynchronize",
    "cudaEventSynchronize",
    "cudaMemcpy",
    "cuStreamSynchronize",
)
OTHER = "other"
# What a trace loses first when it is too large.
EXPENDABLE = ("ac2g", "fwdbwd", "overhead", "gpu_user_annotation", "Trace", "cuda_runtime", "cuda_driver", "cpu_op")


@dataclass(frozen=True)
class Span:
    """One event.

    Attributes:
        kind: its category in the trace, such as `cpu_op` or `kernel`.
        thread: of the host; empty on the device.
        correlation: joins a launch and what it launched; 0: none.
    """

    name: str
    kind: str
    start: float
    end: float
    thread: str = ""
    correlation: int = 0

    @property
    def annotation(self) -> bool:
        return self.kind == "user_annotation"


@dataclass(frozen=True)
class Gap:
    """A time without work on the device.

    Attributes:
        start, length: microseconds since the window's start, and of it.
        phase: where most of it lies.
        host: (what the host did, microseconds), the longest first.
    """

    start: float
    length: float
    phase: str
    host: tuple[tuple[str, float], ...]


def spans_of(events: Iterable[dict[str, Any]]) -> list[Span]:
    """The host's and the device's work of a trace's events."""
    found = []
    for event in events:
        kind = event.get("cat", "")
        if event.get("ph") == "X" and kind in DEVICE + HOST:
            start, arguments = float(event["ts"]), event.get("args", {})
            thread = "" if kind in DEVICE else f"{event.get('pid')}/{event.get('tid')}"
            end = start + float(event.get("dur", 0))
            found.append(Span(event["name"], kind, start, end, thread, int(arguments.get("correlation", 0) or 0)))
    return found


def window_of(spans: Sequence[Span], name: str) -> tuple[float, float]:
    """Start and end of the one annotation of that name.

    Raises:
        ValueError: there is none.
    """
    found = [span for span in spans if span.annotation and span.name == name]
    if not found:
        raise ValueError(f"the trace has no annotation {name}")
    return found[0].start, found[0].end


def device_spans(spans: Sequence[Span]) -> list[Span]:
    """The device's work. Of a trace without any the innermost operations of the CPU stand in for it."""
    device = [span for span in spans if span.kind in DEVICE]
    if device:
        return device
    leaves = []
    for mine in _by_thread(span for span in spans if span.kind == "cpu_op").values():
        for span, following in zip(mine, [*mine[1:], None], strict=True):
            if following is None or following.start >= span.end:
                leaves.append(span)
    return leaves


def phase_table(
    spans: Sequence[Span], device: Sequence[Span], phases: Sequence[str], window: tuple[float, float]
) -> dict[str, dict[str, float]]:
    """Host time, waiting, device time and launches by phase, and `other` for what lies in none.

    A phase inside another counts for itself alone. What the device runs belongs to the phase that launched it.

    Returns:
        {phase: {"host_us", "waiting_us", "device_us", "launches"}}; waiting is part of the host time.
    """
    marks = [span for span in spans if span.annotation and span.name in phases and _overlap(span, *window) > 0]
    table = {name: {"host_us": 0.0, "waiting_us": 0.0, "device_us": 0.0, "launches": 0} for name in (*phases, OTHER)}
    for start, end, active in _segments(marks, *window):
        table[_innermost(active)]["host_us"] += end - start
    launches = {span.correlation: span.start for span in spans if span.kind in RUNTIME and span.correlation}
    at = _Lookup(marks)
    for span in spans:
        if span.kind in RUNTIME and span.name in BLOCKING and _overlap(span, *window) > 0:
            table[at.phase(span.start)]["waiting_us"] += span.end - span.start
    for span in device:
        launched = launches.get(span.correlation, span.start)
        if window[0] <= launched < window[1]:
            row = table[at.phase(launched)]
            row["device_us"] += span.end - span.start
            row["launches"] += 1
    return table


def find_gaps(
    device: Sequence[Span], host: Sequence[Span], phases: Sequence[str], window: tuple[float, float], count: int = 20
) -> list[Gap]:
    """The `count` longest times in `window` in which no stream of the device worked, the longest first.

    What the host did is the innermost operation of any thread at each moment; where none runs, Python inside the
    innermost annotation.
    """
    idle = sorted(_idle(device, *window), key=lambda gap: gap[0] - gap[1])[:count]
    gaps = []
    for start, end in idle:
        near = [span for span in host if span.kind in HOST and _overlap(span, start, end) > 0]
        doing: dict[str, float] = defaultdict(float)
        inside: dict[str, float] = defaultdict(float)
        for begin, finish, active in _segments(near, start, end):
            operations = [span for span in active if not span.annotation]
            if operations:
                doing[max(operations, key=lambda span: span.start).name] += finish - begin
            else:
                name = _innermost([span for span in active if span.annotation])
                doing[f"Python in {name}"] += finish - begin
            inside[_innermost([span for span in active if span.annotation and span.name in phases])] += finish - begin
        longest = tuple(sorted(doing.items(), key=lambda item: -item[1])[:3])
        gaps.append(Gap(start - window[0], end - start, max(inside, key=inside.__getitem__), longest))
    return gaps


def busy_share(device: Sequence[Span], window: tuple[float, float]) -> float:
    """Share of the window in which at least one stream of the device worked."""
    idle = sum(end - start for start, end in _idle(device, *window))
    return 1.0 - idle / (window[1] - window[0])


def write_trace(trace: dict[str, Any], path: Path, limit: int) -> list[str]:
    """Writes a trace as .json.gz of at most `limit` bytes.

    Returns:
        The categories that were dropped for that, in the order of `EXPENDABLE`.
    """
    dropped: list[str] = []
    while True:
        events = [event for event in trace["traceEvents"] if event.get("cat") not in dropped]
        packed = gzip.compress(json.dumps({**trace, "traceEvents": events}, separators=(",", ":")).encode(), 6)
        left = [name for name in EXPENDABLE if any(event.get("cat") == name for event in events)]
        if len(packed) <= limit or not left:
            path.write_bytes(packed)
            return dropped
        dropped.append(left[0])


def as_row(gap: Gap) -> dict[str, Any]:
    """A gap for JSON."""
    return {**asdict(gap), "host": [{"what": what, "us": length} for what, length in gap.host]}


class _Lookup:
    """The innermost of a few annotations at a moment."""

    def __init__(self, marks: Sequence[Span]) -> None:
        self.marks = marks

    def phase(self, moment: float) -> str:
        return _innermost([span for span in self.marks if span.start <= moment < span.end])


def _innermost(active: Sequence[Span]) -> str:
    return max(active, key=lambda span: (span.start, -span.end)).name if active else OTHER


def _overlap(span: Span, start: float, end: float) -> float:
    return min(span.end, end) - max(span.start, start)


def _by_thread(spans: Iterable[Span]) -> dict[str, list[Span]]:
    threads: dict[str, list[Span]] = defaultdict(list)
    for span in spans:
        threads[span.thread].append(span)
    return {thread: sorted(mine, key=lambda span: (span.start, -span.end)) for thread, mine in threads.items()}


def _idle(device: Sequence[Span], start: float, end: float) -> list[tuple[float, float]]:
    """What is left of [start, end) between the device's spans, which may overlap."""
    gaps, reached = [], start
    for span in sorted(device, key=lambda span: span.start):
        if span.end <= start or span.start >= end:
            continue
        if span.start > reached:
            gaps.append((reached, span.start))
        reached = max(reached, span.end)
    return [*gaps, (reached, end)] if reached < end else gaps


def _segments(spans: Sequence[Span], start: float, end: float) -> Iterable[tuple[float, float, list[Span]]]:
    """[start, end) cut wherever a span begins or ends: (from, to, the spans that cover it)."""
    moments = sorted({start, end, *(m for span in spans for m in (span.start, span.end) if start < m < end)})
    waiting = sorted(spans, key=lambda span: -span.start)
    active: list[Span] = []
    for begin, finish in itertools.pairwise(moments):
        while waiting and waiting[-1].start <= begin:
            active.append(waiting.pop())
        active = [span for span in active if span.end > begin]
        yield begin, finish, list(active)
