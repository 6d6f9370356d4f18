"""Batches that a run leaves out: those that it was told to, and the windows behind which it was rolled back."""

from __future__ import annotations

import json
import time
from pathlib import Path

from repa_scale.errors import UserError
from repa_scale.files import write_atomically
from repa_scale.windows import Window, parse_windows

FILE = "left_out.json"


class LeftOut:
    """The windows of one run: `health.leave_out` and RUN/left_out.json, where a rollback notes its own."""

    def __init__(self, run: Path, told: str) -> None:
        self._file = run / FILE
        try:
            self.noted: list[dict] = json.loads(self._file.read_text())["windows"]
        except FileNotFoundError:
            self.noted = []
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(
                f"{self._file} is damaged, so which batches this run leaves out is not known; mend it from "
                f"incidents.jsonl beside it, or choose another run.dir"
            ) from None
        self.windows = parse_windows(told) + [(each["first"], each["last"]) for each in self.noted]

    def __contains__(self, number: int) -> bool:
        return any(first <= number <= last for first, last in self.windows)

    def add(self, window: Window, reason: str, write: bool) -> None:
        """Notes a window, before anything is trained without it.

        Args:
            write: on rank 0 alone.
        """
        noted = {"first": window.first, "last": window.last, "step": window.step, "reason": reason, "time": time.time()}
        self.noted.append(noted)
        self.windows.append((window.first, window.last))
        if write:
            write_atomically(self._file, json.dumps({"windows": self.noted}, indent=1))
