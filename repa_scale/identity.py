"""Which run this is: the keys that must not change between starts, their hash, and the pair of a run and its baseline.

Everything else in the configuration is free: steps, intervals, micro batch, activation checkpointing, compile, kernels,
ranks, ZeRO stage, workers, folders, sampling and tracking may change between two starts of one run.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import PurePath
from typing import Any

from repa_scale.config import Config

KINDS_OF_WEIGHTS = ("hub", "package", "random")


def identity_keys(config: Config, data_fingerprint: str) -> dict[str, Any]:
    """Flat dotted keys and their values, JSON types only. A baseline has no alignment keys.

    Args:
        config: completed (compose.py).
        data_fingerprint: of the prepared data set; its folder may move.
    """
    keys: dict[str, Any] = {
        "method": config.method,
        "seed": config.seed,
        "data.fingerprint": str(data_fingerprint),
        "data.image_size": config.data.image_size,
        "ema.decay": config.ema.decay,
        "train.global_batch": config.train.global_batch,
        "train.precision": config.train.precision,
        "train.init_from": _base_name(config.train.init_from),
    }
    if config.data.source != "image":  # absent else, so that older runs keep their hash
        keys["data.stored_moments"] = True
    if config.data.flip:
        keys["data.flip"] = True
    for room in ("model", "latents", "interpolant", "optimizer"):
        keys |= _flat(room, getattr(config, room))
    if config.health.leave_out:  # named only where it changes something, so that other runs keep their hash
        keys["health.leave_out"] = config.health.leave_out
    if config.method != "baseline":
        for name, term in config.alignment.items():
            keys |= _flat(f"alignment.{name}", term)
        if config.data.source == "moments+tokens":
            keys["alignment.stored_tokens"] = True
    return dict(sorted(keys.items()))


def identity_hash(keys: dict[str, Any]) -> str:
    """16 hexadecimal digits; equal for equal keys and values, whatever their order."""
    text = json.dumps(keys, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode("ascii")).hexdigest()[:16]


def pair_id(keys: dict[str, Any]) -> str:
    """The hash without method, alignment terms and seed: a REPA run and its baseline have the same one."""
    return identity_hash(
        {k: v for k, v in keys.items() if k not in ("method", "seed") and not k.startswith("alignment.")}
    )


def differing(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """`key: value in a -> value in b` for each key that differs."""
    lines = []
    for key in sorted({*a, *b}):
        before, after = (json.dumps(keys[key]) if key in keys else "absent" for keys in (a, b))
        if before != after:
            lines.append(f"{key}: {before} -> {after}")
    return lines


def _flat(prefix: str, room: Any) -> dict[str, Any]:
    values = dataclasses.asdict(room)
    if "weights" in values:
        values["weights"] = _base_name(values["weights"])
    return {f"{prefix}.{name}": value for name, value in values.items()}


def _base_name(path: str) -> str:
    """A file counts by its name: its folder may differ between machines."""
    return path if path in KINDS_OF_WEIGHTS else PurePath(path).name
