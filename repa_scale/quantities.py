"""Quantities as people write them in a configuration: `0.1%`, `200gb`."""

from __future__ import annotations

import re

from repa_scale.errors import ConfigError

UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
UNITS |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}


def share(text: str, key: str = "data.max_bad") -> float:
    """`"0.1%"` or `"0.001"` -> 0.001.

    Raises:
        ConfigError: not a share from 0 to below 1.
    """
    try:
        value = float(str(text).removesuffix("%")) / (100 if str(text).endswith("%") else 1)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise ConfigError(f"{key}={text} must be a share below 1, such as 0.1% or 0.001")
    return value


def size_in_bytes(text: str, key: str = "data.cache_limit") -> int | None:
    """`"200gb"` -> 200_000_000_000; empty -> None: no limit.

    Raises:
        ConfigError: not a size above 0.
    """
    if not text:
        return None
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", str(text).lower())
    if found is None or found[2] not in UNITS or float(found[1]) == 0:
        raise ConfigError(f"{key}={text} must be a size such as 200gb or 1.5tb")
    return int(float(found[1]) * UNITS[found[2]])
