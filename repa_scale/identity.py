"""Which run this is: the keys that must not change between starts, their hash, and the pair of a run and its baseline.

Everything else in the configuration is free: steps, intervals, micro batch, activation checkpointing, compile, kernels,
ranks, ZeRO stage, workers, folders, sampling and tracking may change between two starts of one run.

An absent key means the behavior from before the key existed (`config.added`), never today's default. So the hashes of
older runs stay as they are, and a new run that behaves like an older one has its hash.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields
from pathlib import PurePath
from typing import Any

from repa_scale.config import Config, TermConfig, value_before

KINDS_OF_WEIGHTS = ("hub", "package", "random")
FILES = ("weights", "init_from")  # fields that may name a file
KEYS = (
    "method",
    "seed",
    "data.image_size",
    "data.flip",
    "ema.decay",
    "train.global_batch",
    "train.precision",
    "train.init_from",
    "health.leave_out",
)
SECTIONS = ("model", "latents", "interpolant", "optimizer")  # every key of these, and of the alignment terms
# What `data.source` reads as the set stores it.
STORED_MOMENTS, STORED_TOKENS = "data.stored_moments", "alignment.stored_tokens"


def identity_keys(config: Config, data_fingerprint: str) -> dict[str, Any]:
    """Flat dotted keys and their values, JSON types only. A baseline has no alignment keys.

    Args:
        config: completed (compose.py).
        data_fingerprint: of the prepared data set; its folder may move.
    """
    keys = {"data.fingerprint": str(data_fingerprint)}
    keys |= {key: True for key, on in stored_features(config).items() if on}
    for key, owner, field in (*settings(config), *term_settings(config)):
        value = identity_value(owner, field)
        if (before := value_before(field)) is MISSING or value != before:
            keys[key] = value
    return dict(sorted(keys.items()))


def settings(config: Config) -> Iterator[tuple[str, Any, Field]]:
    """(dotted key, the dataclass that holds it, its field) of each identity key outside the alignment terms."""
    for key in KEYS:
        *sections, name = key.split(".")
        owner = getattr(config, sections[0]) if sections else config
        yield key, owner, owner.__dataclass_fields__[name]
    for section in SECTIONS:
        yield from _fields(section, getattr(config, section))


def term_settings(config: Config) -> Iterator[tuple[str, Any, Field]]:
    """The same of the alignment terms; a baseline has none, whatever its configuration still holds."""
    for name, term in ({} if config.method == "baseline" else config.alignment).items():
        yield from _fields(f"alignment.{name}", term)


def identity_value(owner: Any, field: Field) -> Any:
    """A key's value as the identity has it. A file counts by its name: its folder may differ between machines."""
    value = getattr(owner, field.name)
    if isinstance(value, list):
        return list(value)
    return PurePath(value).name if field.name in FILES and value not in KINDS_OF_WEIGHTS else value


def stored_features(config: Config) -> dict[str, bool]:
    """The two keys that stand for `data.source`."""
    source = config.data.source
    return {
        STORED_MOMENTS: source != "image",
        STORED_TOKENS: source == "moments+tokens" and config.method != "baseline",
    }


def filled(keys: dict[str, Any]) -> dict[str, Any]:
    """The keys, and those absent from them with the value that absence stands for."""
    known = Config()
    known.alignment = {name: TermConfig() for name in term_names(keys)}
    absent = {STORED_MOMENTS: False, STORED_TOKENS: False}
    for key, _, field in (*settings(known), *term_settings(known)):
        if (before := value_before(field)) is not MISSING:
            absent[key] = before
    return {**absent, **keys}


def term_names(keys: dict[str, Any]) -> list[str]:
    """Names of the alignment terms among identity keys, in their order."""
    return list(
        dict.fromkeys(key.split(".")[1] for key in keys if key.startswith("alignment.") and key.count(".") == 2)
    )


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
    """`key: value in a -> value in b` for each key that differs; an absent key is what its absence stands for."""
    a, b = filled(a), filled(b)
    lines = []
    for key in sorted({*a, *b}):
        before, after = (json.dumps(keys[key]) if key in keys else "absent" for keys in (a, b))
        if before != after:
            lines.append(f"{key}: {before} -> {after}")
    return lines


def _fields(prefix: str, section: Any) -> Iterator[tuple[str, Any, Field]]:
    return ((f"{prefix}.{field.name}", section, field) for field in fields(section))
