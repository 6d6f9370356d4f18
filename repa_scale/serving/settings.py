"""What an image may be asked with: checks of seeds, guidance and intervals, for the pipeline and the server alike."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from repa_scale.errors import UserError

LARGEST_GUIDANCE = 1000.0
LARGEST_SEED = 2**63 - 1
SHOWN = 60  # characters of a wrong value in a message


def check_guidance(value: Any) -> float:
    """A finite guidance from 0 on; 1 or less means none."""
    if not _is_number(value) or not 0 <= value <= LARGEST_GUIDANCE:
        raise UserError(f"guidance={shown(value)} must be a number from 0 to {LARGEST_GUIDANCE:g}; 1 means none")
    return float(value)


def check_interval(value: Any) -> tuple[float, float]:
    """The times [low, high] at which guidance acts."""
    right = isinstance(value, (list, tuple)) and len(value) == 2 and all(_is_number(each) for each in value)
    if not right or not 0 <= value[0] <= value[1] <= 1:
        raise UserError(
            f"interval={shown(value)} must be two times low <= high between 0 (data) and 1 (noise), such as [0, 0.7]"
        )
    return float(value[0]), float(value[1])


def check_seed(value: Any) -> int:
    """A whole number from 0 on."""
    if not _is_whole(value) or not 0 <= value <= LARGEST_SEED:
        raise UserError(f"seed={shown(value)} must be a whole number from 0 to 2**63 - 1")
    return int(value)


def check_whole(name: str, value: Any, low: int, high: int) -> int:
    """A whole number between two limits."""
    if not _is_whole(value) or not low <= value <= high:
        raise UserError(f"{name}={shown(value)} must be a whole number from {low} to {high}")
    return int(value)


def spread(name: str, values: Any, count: int) -> list:
    """One value an image: a single one counts for all.

    Raises:
        UserError: as many values as neither one nor `count`.
    """
    values = list(values) if isinstance(values, Sequence) and not isinstance(values, str) else [values]
    if len(values) not in (1, count):
        raise UserError(f"{name} has {len(values)} values for {count} images; give one, or one an image")
    return values * count if len(values) == 1 else values


def shown(value: Any) -> str:
    """A value as an error shows it: on one line, and not at any length."""
    text = repr(value)
    return text if len(text) <= SHOWN else text[:SHOWN] + "..."


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_whole(value: Any) -> bool:
    return hasattr(value, "__index__") and not isinstance(value, bool)
