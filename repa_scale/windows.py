"""Windows of the endless order of the data. Batches count from 1: without gaps, the step that trains on it."""

from __future__ import annotations

import re
from dataclasses import dataclass

from repa_scale.errors import ConfigError


@dataclass(frozen=True)
class Window:
    """Batches `first` to `last`; `step` is the first training step that met them."""

    first: int
    last: int
    step: int


def parse_windows(text: str) -> list[tuple[int, int]]:
    """`"3-5,9"` -> [(3, 5), (9, 9)].

    Raises:
        ConfigError: anything else.
    """
    windows = []
    for part in filter(None, text.replace(" ", "").split(",")):
        found = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
        if not 1 <= first <= last:
            raise ConfigError(f"health.leave_out={text}: {part!r} is not a batch or a range; write it as 12-15,40")
        windows.append((first, last))
    return windows


def batch_number(step: int, windows: list[tuple[int, int]]) -> int:
    """The number of the batch that `step` trains on; 0 for step 0."""
    number = step
    for first, last in merged(windows):
        if first <= number:
            number += last - first + 1
    return number


def merged(windows: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same batches, in order and without overlaps."""
    out: list[tuple[int, int]] = []
    for first, last in sorted(windows):
        if out and first <= out[-1][1] + 1:
            out[-1] = (out[-1][0], max(last, out[-1][1]))
        else:
            out.append((first, last))
    return out
