"""From what was measured of each image to figures by depth, time and encoder: the sections of representation.json.

docs/representation.md describes them. What is measured of an image is hidden.py's business.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor

from repa_scale.alignment import AlignmentTerm
from repa_scale.evaluate.hidden import Asked, Measured, label
from repa_scale.metrics.cknna import cknna_of_neighbours, nearest
from repa_scale.metrics.probe import CHOOSE, FIT, TEST, check_split, probe, split
from repa_scale.ranks import Ranks

SPATIAL = ("lds", "cds", "rmsc")  # the order of `spatial`


class Gathered:
    """What all ranks measured, in the order of the images, whoever measured them.

    Args:
        measured: by number of the block.
    """

    def __init__(self, measured: dict[int, Measured], ranks: Ranks) -> None:
        self.measured, self.ranks = measured, ranks
        self.names = {name for part in ranks.gather_objects([*next(iter(measured.values()), {})]) for name in part}

    def holds(self, name: str) -> bool:
        return name in self.names

    def __call__(self, name: str, *at: int) -> torch.Tensor:
        """One value of each image, on every rank. `at`: indices behind the first dimension."""
        mine = {number: rows[name][(slice(None), *at)].clone() for number, rows in self.measured.items()}
        everyone = {number: rows for part in self.ranks.gather_objects(mine) for number, rows in part.items()}
        return torch.cat([everyone[number] for number in sorted(everyone)])


def sections(
    gathered: Gathered,
    asked: Asked,
    sources: list[tuple[str, str]],
    terms: dict[str, AlignmentTerm],
    neighbours: int,
    made: dict[str, Any],
) -> dict[str, Any]:
    """What was asked for, each section with the data and settings that determine it (`made`)."""
    where = {"depths": list(asked.depths), "times": list(asked.times)}
    result: dict[str, Any] = {}
    if asked.alignment:
        result["alignment"] = made | where | _alignment(gathered, asked, sources, terms, neighbours)
    if asked.probe:
        result["linear_probe"] = made | where | _probes(gathered, asked)
    if asked.denoising:
        result["denoising"] = made | _denoising(gathered, asked)
    return result


def _cells(asked: Asked) -> list[tuple[int, int, dict[str, float]]]:
    """Indices into `hidden` and what they stand for."""
    return [
        (i, j, {"depth": depth, "t": time})
        for j, depth in enumerate(asked.depths)
        for i, time in enumerate(asked.times)
    ]


def _alignment(
    gathered: Gathered, asked: Asked, sources: list[tuple[str, str]], terms: dict[str, AlignmentTerm], k: int
) -> dict[str, Any]:
    ranks, device = gathered.ranks, gathered.ranks.device
    names = [label(source) for source in sources]
    targets = {name: nearest(gathered(f"target {name}").to(device), k) for name in names}
    mine, rows = [], []
    for number, (i, j, where) in enumerate(_cells(asked)):
        features = gathered("hidden", i, j)
        structure = gathered("spatial", i, j)
        row = {**where, **{name: _mean(structure[:, c]) for c, name in enumerate(SPATIAL)}}
        rows.append(row)
        if number % ranks.world_size == ranks.rank:  # the cells are shared among the processes
            near = nearest(features.to(device), k)
            mine.append((number, {name: cknna_of_neighbours(near, target) for name, target in targets.items()}))
    scores = dict(pair for part in ranks.gather_objects(mine) for pair in part)
    encoders = {}
    for name in names:
        cells = [{**where, "value": _finite(scores[n][name])} for n, (_, _, where) in enumerate(_cells(asked))]
        there = [cell for cell in cells if cell["value"] is not None]
        structure = gathered(f"target spatial {name}")
        encoders[name] = {
            "cknna": cells,
            "best": max(there, key=lambda cell: cell["value"]) if there else None,
            "spatial": {key: _mean(structure[:, c]) for c, key in enumerate(SPATIAL)},
        }
    cosine = [
        {"term": name, "encoder": label(terms[name].source), "depth": terms[name].depth, "t": time}
        | _mean(gathered(f"cosine {name}", i))
        for name in sorted(terms)
        if label(terms[name].source) in names and gathered.holds(f"cosine {name}")
        for i, time in enumerate(asked.times)
    ]
    return {"neighbours": k, "condition": "null label", "encoders": encoders, "cosine": cosine, "spatial": rows}


def _probes(gathered: Gathered, asked: Asked) -> dict[str, Any]:
    ranks = gathered.ranks
    labels, ids = gathered("labels"), gathered("ids")
    parts = split(ids)
    check_split(parts, labels)
    mine = []
    for number, (i, j, where) in enumerate(_cells(asked)):
        features = gathered("hidden", i, j)
        if number % ranks.world_size == ranks.rank:
            found = probe(features.to(ranks.device), labels, parts)
            mine.append((number, {**where, **vars(found)}))
    cells = [cell for _, cell in sorted(pair for part in ranks.gather_objects(mine) for pair in part)]
    held_out = labels[parts == TEST]
    return {
        "condition": "null label",
        "images": {"fit": int((parts == FIT).sum()), "choose": int((parts == CHOOSE).sum()), "held_out": len(held_out)},
        "classes": len(labels.unique()),
        "most_frequent_class": float(torch.bincount(held_out).max() / len(held_out)),
        "cells": cells,
        "best": max(cells, key=lambda cell: cell["validation"]),
    }


def _denoising(gathered: Gathered, asked: Asked) -> dict[str, Any]:
    losses = gathered("denoising").double()
    edges = [number / asked.bins for number in range(asked.bins + 1)]
    rows = [{"from": low, "to": high} | _mean(losses[:, b]) for b, (low, high) in enumerate(itertools.pairwise(edges))]
    return {"condition": "the image's label", "bins": rows, "all": _mean(losses.mean(dim=1))}


def _mean(values: Tensor) -> dict[str, float | None]:
    """Mean and standard error of one value an image, (N,); None where there is none."""
    values = values.double()
    error = values.std() / math.sqrt(len(values)) if len(values) > 1 else torch.tensor(torch.nan)
    return {"mean": _finite(float(values.mean())), "standard_error": _finite(float(error))}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
