"""What a client asks for: bytes of a request to wishes, every value checked, each mistake told in one line."""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass
from typing import Any

from repa_scale.errors import UserError, did_you_mean
from repa_scale.sampling import SAMPLERS
from repa_scale.serving.batcher import Wish
from repa_scale.serving.labels import LabelNames
from repa_scale.serving.settings import check_guidance, check_interval, check_seed, check_whole, shown

KEYS = ("class", "seed", "n", "steps", "guidance", "interval", "sampler", "format")
FORMATS = ("png", "json")
RANDOM_BITS = 31


class NotJson(UserError):
    """A body that is no JSON object."""


@dataclass(frozen=True)
class Limits:
    """What a single request may ask."""

    n: int = 16
    steps: int = 1000


@dataclass(frozen=True)
class Defaults:
    """What counts where a request says nothing."""

    steps: int
    guidance: float
    interval: tuple[float, float]
    sampler: str


@dataclass(frozen=True)
class Asked:
    """A request: its images, and how they are wanted."""

    wishes: list[Wish]
    format: str


def parse(body: bytes, labels: LabelNames, defaults: Defaults, limits: Limits) -> Asked:
    """Reads `{"class": 207, "seed": 1, "n": 4, "steps": 250, "guidance": 1.8, "interval": [0, 0.7]}`.

    The images of a request have the seeds seed, seed + 1, and so on; without a seed, random ones.

    Raises:
        NotJson: it is no JSON object.
        UserError: a key or a value that cannot be.
    """
    asked = _load(body)
    if unknown := sorted(set(asked) - set(KEYS)):
        raise UserError(f"{shown(unknown[0])} is not a key of a request{did_you_mean(unknown[0][:60], KEYS)}")
    n = check_whole("n", asked.get("n", 1), 1, limits.n)
    label = labels.number(asked.get("class"))
    steps = check_whole("steps", asked.get("steps", defaults.steps), 1, limits.steps)
    guidance = check_guidance(asked.get("guidance", defaults.guidance))
    interval = check_interval(asked.get("interval", defaults.interval))
    sampler = asked.get("sampler", defaults.sampler)
    if not isinstance(sampler, str) or sampler not in SAMPLERS:
        raise UserError(f"sampler={shown(sampler)} is not a sampler{did_you_mean(str(sampler)[:60], SAMPLERS)}")
    form = asked.get("format", "png" if n == 1 else "json")
    if form not in FORMATS:
        raise UserError(f"format={shown(form)} must be png or json")
    if form == "png" and n > 1:
        raise UserError(f"format=png holds one image, but n={n}; ask for format=json")
    first = asked.get("seed")
    first = secrets.randbits(RANDOM_BITS) if first is None else check_seed(first)
    check_seed(first + n - 1)
    return Asked([Wish(label, first + i, steps, sampler, guidance, interval) for i in range(n)], form)


def _load(body: bytes) -> dict[str, Any]:
    try:
        value = json.loads(body, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise NotJson(f'the body is not JSON ({error}); send an object such as {{"class": 1}}') from None
    if not isinstance(value, dict):
        raise NotJson('the body is JSON, but no object; send one such as {"class": 1}')
    return value


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not a number that can be used")
