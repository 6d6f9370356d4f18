"""One run as the comparison sees it, wherever it was read from. Arrays and plain values; nothing is read here."""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, get_args, get_origin, get_type_hints

import numpy as np

from repa_scale.config import Config, TermConfig, from_dict
from repa_scale.evaluations import Evaluation
from repa_scale.identity import identity_keys

RUNNING = "RUNNING"
FINISHED = "FINISHED"
SETTINGS = "config.yaml"


@dataclass(frozen=True)
class History:
    """A metric at the rows that count. steps: (R,) int64, rising; values: (R,) float64, as metrics.jsonl has them."""

    steps: np.ndarray
    values: np.ndarray

    def __len__(self) -> int:
        return len(self.steps)


@dataclass(frozen=True)
class Rows:
    """The rows of metrics.jsonl that count: of one step the highest attempt, of equal attempts the later.

    steps, attempts: (R,) int64; times: (R,) float64 unix seconds.
    """

    steps: np.ndarray
    times: np.ndarray
    attempts: np.ndarray


@dataclass(frozen=True)
class RunData:
    """One run.

    Attributes:
        source: where it was read from: the store without its passwords, or the folder.
        params: the flattened configuration, as text.
        history: by metric.
        grids: by step, what reads the PNG of the sample grid.
        evaluations: those that count.
        representation: of each evaluated step, what `repa-scale evaluate CKPT` wrote, in the order of the steps.
        incidents: what went wrong and was dealt with; None: not known.
        problems: what of the run could not be read.
        config, identity: from `params`.
    """

    run_id: str
    name: str
    status: str
    source: str
    params: dict[str, str]
    tags: dict[str, str]
    rows: Rows = field(repr=False)
    history: dict[str, History] = field(repr=False)
    grids: dict[int, Callable[[], bytes]] = field(repr=False)
    evaluations: list[Evaluation] = field(repr=False)
    representation: list[dict[str, Any]] = field(repr=False)
    incidents: list[dict[str, Any]] | None
    problems: list[str]
    config: Config = field(repr=False)
    identity: dict[str, Any] = field(repr=False)

    @property
    def method(self) -> str:
        return self.config.method

    @property
    def seed(self) -> int:
        return self.config.seed

    @property
    def terms(self) -> dict[str, TermConfig]:
        """The alignment terms; a baseline has none, whatever its configuration says."""
        return {} if self.method == "baseline" else self.config.alignment

    @property
    def encoders(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(term.encoder for term in self.terms.values()))


def configuration(params: dict[str, str]) -> Config:
    """The configuration that was flattened to text; keys that this version does not know are left out."""
    nested: dict[str, Any] = {}
    for key, text in params.items():
        *rooms, name = key.split(".")
        here = nested
        for room in rooms:
            inner = here.setdefault(room, {})
            if not isinstance(inner, dict):
                break
            here = inner
        else:
            here[name] = _value(text)
    return from_dict(_known(nested, Config))


def identity_of(config: Config, fingerprint: str) -> dict[str, Any]:
    """Flat identity keys, lists as lists: comparable between a store and a folder."""
    keys = identity_keys(config, fingerprint)
    return {key: list(value) if isinstance(value, tuple) else value for key, value in keys.items()}


def count(
    steps: dict[str, np.ndarray], stamps: dict[str, np.ndarray], values: dict[str, np.ndarray]
) -> tuple[Rows, dict[str, History]]:
    """The rows that count, and their values by metric.

    The values of a row share its step and time stamp. A step that a resumed run repeated has several rows, of which one
    counts as a whole: a value that only the others have (it was not finite in the one that counts) is left out.

    Args:
        steps, stamps: (n,) int64 by metric; stamps in milliseconds. `attempt` is the metric that says the start.
        values: (n,) float64 by metric.
    """
    empty = np.zeros(0, np.int64)
    pairs = np.concatenate([np.stack([steps[key], stamps[key]], 1) for key in steps] or [np.zeros((0, 2), np.int64)])
    pairs = np.unique(pairs, axis=0)
    attempts = np.ones(len(pairs), np.int64)
    if len(steps.get("attempt", empty)):
        at = _positions(pairs, steps["attempt"], stamps["attempt"])
        attempts[at] = values["attempt"].astype(np.int64)
    order = np.lexsort((pairs[:, 1], attempts, pairs[:, 0]))
    last = np.append(np.diff(pairs[order, 0]) != 0, True)[: len(order)]
    chosen = order[last]
    counts = np.zeros(len(pairs), bool)
    counts[chosen] = True
    history = {}
    for key in steps:
        keep = counts[_positions(pairs, steps[key], stamps[key])]
        rank = np.argsort(steps[key][keep], kind="stable")
        history[key] = History(steps[key][keep][rank], values[key][keep][rank])
    return Rows(pairs[chosen, 0], pairs[chosen, 1] / 1000, attempts[chosen]), history


def _positions(pairs: np.ndarray, steps: np.ndarray, stamps: np.ndarray) -> np.ndarray:
    """Where (step, stamp) stands among the sorted `pairs`, which hold it."""
    both = np.dtype([("step", np.int64), ("stamp", np.int64)])
    known = np.ascontiguousarray(pairs).view(both).ravel()
    asked = np.ascontiguousarray(np.stack([steps, stamps], 1)).view(both).ravel()
    return np.searchsorted(known, asked)


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError):
        return text


def _known(values: dict[str, Any], of: type) -> dict[str, Any]:
    hints = get_type_hints(of)
    kept = {}
    for one in fields(of):
        if one.name not in values:
            continue
        value, hint = values[one.name], hints[one.name]
        if is_dataclass(hint):
            value = _known(value, hint) if isinstance(value, dict) else {}
        elif get_origin(hint) is dict and is_dataclass(inner := get_args(hint)[1]):
            value = {name: _known(term, inner) for name, term in value.items() if isinstance(term, dict)}
        kept[one.name] = value
    return kept
