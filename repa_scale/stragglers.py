"""Finds the rank that the others wait for, from phases of a step in which no rank waits for another."""

from __future__ import annotations

import statistics

LOCAL_PHASES = ("data_wait", "encoder", "latent")  # no collective inside; what a slow rank takes there is its own
LATE = 1.5  # times the median of the ranks
SHARE = 0.1  # of the step


class Stragglers:
    """Adds up each rank's seconds in the local phases between two rows of metrics.jsonl.

    Args:
        hosts: of each rank.
    """

    def __init__(self, hosts: list[str]) -> None:
        self.hosts = hosts
        self._clear()

    def _clear(self) -> None:
        self._sums = [[0.0] * len(self.hosts) for _ in LOCAL_PHASES]
        self._steps = 0

    def add(self, seconds: list[list[float]]) -> None:
        """Seconds of one step, by rank and phase."""
        self._steps += 1
        for rank, phases in enumerate(seconds):
            for phase, value in enumerate(phases):
                self._sums[phase][rank] += value

    def report(self, step_seconds: float) -> dict | None:
        """The slowest rank since the last report, with its phase and what it costs each step; None: none stands out."""
        found = None
        for name, sums in zip(LOCAL_PHASES, self._sums, strict=True):
            means = [value / max(self._steps, 1) for value in sums]
            middle = statistics.median_low(means)
            excess = max(means) - middle
            if (
                max(means) > LATE * middle
                and excess > SHARE * step_seconds
                and (found is None or excess > found["straggler_seconds"])
            ):
                rank = means.index(max(means))
                found = {
                    "straggler_rank": rank,
                    "straggler_host": self.hosts[rank],
                    "straggler_phase": name,
                    "straggler_seconds": excess,
                }
        self._clear()
        return found
