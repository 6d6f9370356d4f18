"""Runs into variants (a method with its alignment settings) and seeds; names for both. Pure functions."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from repa_scale.compare.run_data import RunData
from repa_scale.errors import DataError

NAMES = {"repa": "REPA", "baseline": "baseline"}
OWN = ("method", "seed")  # identity keys that runs of a comparison may differ in, besides the alignment's


@dataclass(frozen=True)
class Variant:
    """One curve of the report: runs that differ by the seed alone. runs: by key, in the order of the seeds."""

    key: str
    label: str
    runs: dict[str, RunData]

    @property
    def seeds(self) -> list[int]:
        return [run.seed for run in self.runs.values()]


@dataclass(frozen=True)
class Groups:
    """All variants by key, REPA's first; `baseline` is the one that the others are held against.

    alike: all runs have the same settings, so that each is shown alone.
    """

    variants: dict[str, Variant]
    baseline: str
    alike: bool

    @property
    def runs(self) -> dict[str, RunData]:
        return {key: run for variant in self.variants.values() for key, run in variant.runs.items()}

    @property
    def others(self) -> list[Variant]:
        return [variant for key, variant in self.variants.items() if key != self.baseline]

    def variant_of(self, run_key: str) -> Variant:
        return next(variant for variant in self.variants.values() if run_key in variant.runs)


def is_own(key: str) -> bool:
    """Whether an identity key is what the comparison is about."""
    return key in OWN or key.startswith("alignment.")


def group(runs: list[RunData], allowed: tuple[str, ...] = ()) -> Groups:
    """Variants of the runs.

    Args:
        allowed: identity keys that runs may differ in besides: then they tell variants apart, too.

    Raises:
        DataError: fewer than two runs, or two of one variant and seed.
    """
    if len(runs) < 2:
        raise DataError("one run cannot be compared with itself alone; name at least two with --runs")
    found: dict[str, list[RunData]] = {}
    for run in runs:
        found.setdefault(json.dumps(_variant_keys(run, allowed), sort_keys=True), []).append(run)
    alike = len(found) == 1
    if alike:
        found = {str(i): [run] for i, run in enumerate(runs)}
        labels = _names_of(runs)
    else:
        labels = _labels([_variant_keys(members[0], allowed) for members in found.values()])
    pairs = sorted(zip(labels, found.values(), strict=True), key=lambda pair: pair[1][0].method == "baseline")
    variants: dict[str, Variant] = {}
    for label, members in pairs:
        key = "-".join(label.lower().replace("=", " ").split())
        variants[key] = Variant(key, label, _by_seed(key, label, members))
    baselines = [key for key, variant in variants.items() if next(iter(variant.runs.values())).method == "baseline"]
    return Groups(variants, (baselines or list(variants)[-1:])[0], alike)


def _variant_keys(run: RunData, allowed: tuple[str, ...]) -> dict[str, Any]:
    keys = {key: value for key, value in run.identity.items() if key != "seed" and (is_own(key) or key in allowed)}
    return {**keys, "method": run.method}


def _labels(variants: list[dict[str, Any]]) -> list[str]:
    """The method's name; where a method has several variants, with the values that tell them apart."""
    labels = []
    for keys in variants:
        label = NAMES.get(keys["method"], keys["method"])
        siblings = [other for other in variants if other["method"] == keys["method"]]
        for key in sorted({key for other in siblings for key in other}):
            if len({json.dumps(other.get(key)) for other in siblings}) > 1 and key in keys:
                label += f" {_short(key)}={keys[key]}"
        labels.append(label)
    return [label if labels.count(label) == 1 else f"{label} {i + 1}" for i, label in enumerate(labels)]


def _short(key: str) -> str:
    """`alignment.repa.weight` -> `weight`; other terms keep their name."""
    return key.removeprefix("alignment.").removeprefix("repa.")


def _names_of(runs: list[RunData]) -> list[str]:
    names = [run.name for run in runs]
    unique = [run.name if names.count(run.name) == 1 else f"{run.name} ({run.run_id[:6]})" for run in runs]
    return [name if unique.count(name) == 1 else f"{name} {i + 1}" for i, name in enumerate(unique)]


def _by_seed(key: str, label: str, members: list[RunData]) -> dict[str, RunData]:
    if len(members) == 1:
        return {key: members[0]}
    seeds = [run.seed for run in members]
    for seed in seeds:
        if seeds.count(seed) > 1:
            same = ", ".join(run.run_id for run in members if run.seed == seed)
            raise DataError(f"runs {same} are all {label} with seed {seed}; name one run of each seed with --runs")
    return {f"{key}-seed{run.seed}": run for run in sorted(members, key=lambda run: run.seed)}
