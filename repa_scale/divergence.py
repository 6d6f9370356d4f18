"""Judges each step from numbers that all ranks share: gradients that are not finite, and spikes of loss and norm."""

from __future__ import annotations

import math
import statistics
from collections import deque

from repa_scale.config import HealthConfig
from repa_scale.windows import Window

HISTORY = 128  # applied steps that a spike is measured against
NEEDED = 16  # before so many nothing is a spike
FP16_SKIPS = 10  # so many more skips in a row are the search for a loss scale


class Judge:
    """All ranks hold one and feed it the same numbers, so they agree without asking each other."""

    def __init__(self, settings: HealthConfig, precision: str) -> None:
        self.settings = settings
        self.max_skips = settings.max_skips + (FP16_SKIPS if precision == "fp16" else 0)
        self.restart()

    def restart(self) -> None:
        self._history = {name: deque(maxlen=HISTORY) for name in ("loss", "grad_norm")}
        self._row: list[tuple[int, int]] = []  # (step, batch) of the steps in a row that were not applied

    def is_spike(self, name: str, value: float) -> bool:
        """Whether a loss or norm lies more than `health.spike_deviations` robust deviations above its past."""
        past = self._history[name]
        if not self.settings.spike_deviations or len(past) < NEEDED or not math.isfinite(value):
            return False
        middle = statistics.median(past)
        deviation = 1.4826 * statistics.median(abs(x - middle) for x in past)
        return value - middle > self.settings.spike_deviations * max(deviation, 1e-3 * abs(middle), 1e-12)

    def judge(self, step: int, batch: int, loss: float, grad_norm: float, applied: bool) -> tuple[str, Window | None]:
        """What happened (empty: nothing out of the way), and the window of data to go back behind, if any.

        Args:
            batch: the number of the batch that the step trained on.
        """
        spikes = [name for name, value in (("loss", loss), ("grad_norm", grad_norm)) if self.is_spike(name, value)]
        if not applied:
            self._row.append((step, batch))
            what = "spike" if spikes else "not_finite"
            if len(self._row) <= self.max_skips:
                return what, None
            first_step, first = self._row[0]
            return what, Window(first, batch, first_step)
        self._row.clear()
        if spikes and self.settings.on_spike == "rollback":
            return "spike", Window(batch, batch, step)
        for name, value in (("loss", loss), ("grad_norm", grad_norm)):
            if math.isfinite(value):
                self._history[name].append(value)
        return "spike" if spikes else "", None

    def state(self) -> dict:
        """For the checkpoint, so that a resumed run judges as the undisturbed one. JSON."""
        return {"row": self._row, **{name: list(values) for name, values in self._history.items()}}

    def set_state(self, state: dict) -> None:
        self.restart()
        for name, values in self._history.items():
            values.extend(state.get(name, ()))
        self._row = [tuple(each) for each in state.get("row", ())]
