"""Where a run's time went, over all its starts: productive steps, and what was lost by cause."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

CAUSES = ("startup", "data", "save", "sample", "evaluate", "restart", "repeated")
PRODUCTIVE = "productive_seconds"


class Goodput:
    """Seconds of rank 0, carried on from start to start through metrics.jsonl.

    `startup` is the time from the start of the process to its first step, `restart` the time from the last row of a
    start that died to the next start, `repeated` steps that had been trained before and were lost, `data` waiting for
    a batch, `save` the stop of training for a checkpoint.

    Args:
        before: the status that the last start left; the time after a preemption is the scheduler's, and not counted.
    """

    def __init__(self, run: Path, before: str) -> None:
        self.seconds = dict.fromkeys((PRODUCTIVE, *map(lost, CAUSES)), 0.0)
        self.highest = 0  # the last step that any start has trained
        last: dict = {}
        for row in _rows(run / "metrics.jsonl"):
            self.highest = max(self.highest, row.get("step", 0))
            if PRODUCTIVE in row:
                last = row
        for key in self.seconds:
            self.seconds[key] = float(last.get(key, 0.0))
        age = process_age()
        self.add("startup", age)
        if last and before in ("running", "failed"):
            self.add("restart", max(0.0, time.time() - age - last["time"]))
        self._mark: float | None = time.perf_counter()

    def add(self, cause: str, seconds: float) -> None:
        self.seconds[lost(cause)] += seconds

    def first_step_begins(self) -> None:
        """Everything since the object was made was start-up; after a rollback there is none."""
        if self._mark is not None:
            self.add("startup", time.perf_counter() - self._mark)
            self._mark = None

    def step(self, step: int, seconds: float, waited: float) -> None:
        """A step took `seconds`, of which it `waited` for its batch."""
        self.add("data", waited)
        if step > self.highest:
            self.seconds[PRODUCTIVE] += seconds - waited
            self.highest = step
        else:
            self.add("repeated", seconds - waited)

    def row(self) -> dict[str, float]:
        """For metrics.jsonl: the seconds so far, and the productive share."""
        total = sum(self.seconds.values())
        return {**self.seconds, "goodput": self.seconds[PRODUCTIVE] / total if total else 1.0}


def lost(cause: str) -> str:
    return f"lost_{cause}_seconds"


def process_age() -> float:
    """Seconds since this process was started; 0 where the system does not say."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
        uptime = float(Path("/proc/uptime").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return 0.0
    return max(0.0, uptime - ticks / os.sysconf("SC_CLK_TCK"))


def _rows(path: Path):
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            yield row
