"""What is wrong with a prepared set: index, hashes, pictures, features, labels, ids, counts; all of it is told."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from repa_scale.data.batches import decode
from repa_scale.data.dataset import DataSet, open_dataset
from repa_scale.data.features import FLIPPED, Stored, stored_features
from repa_scale.data.mds import verify_shard
from repa_scale.errors import DataError


@dataclass
class Findings:
    """Of one set.

    Attributes:
        problems: one line each, in the order in which they were found.
        decoded: samples whose picture and features were read.
        counts: samples by label, of those.
    """

    problems: list[str] = field(default_factory=list)
    decoded: int = 0
    counts: Counter[int] = field(default_factory=Counter)


def check_set(folder: Path, sample: int | None, progress: Callable[[int, int], None]) -> tuple[DataSet, Findings]:
    """Every hash, and every sample, or `sample` of them spread evenly.

    Args:
        progress: called with the samples done and to do.

    Raises:
        DataError: there is no set, or its manifest or index cannot be used at all.
    """
    dataset = open_dataset(folder)
    found = Findings()
    broken = set()
    for number, shard in enumerate(dataset.reader.shards):
        try:
            verify_shard(folder, shard)
        except DataError as error:
            broken.add(number)
            found.problems.append(str(error))
    chosen = range(dataset.count)
    if sample is not None and sample < dataset.count:
        chosen = np.linspace(0, dataset.count - 1, sample).astype(int).tolist()
    stored = stored_features(dataset.manifest)
    ids: set[int] = set()
    for done, number in enumerate(chosen):
        try:
            row = dataset.reader[number]
        except DataError as error:
            if dataset.reader.locate(number)[0] not in broken:
                found.problems.append(str(error))
            continue
        finally:
            progress(done + 1, len(chosen))
        found.problems += _problems_of(dataset, number, row, stored, ids)
        found.decoded += 1
        found.counts[row["label"]] += 1
        ids.add(row["id"])
    whole = len(chosen) == dataset.count and not broken
    if whole and dataset.class_names:
        counts = [found.counts[label] for label in range(len(dataset.class_names))]
        if counts != dataset.class_counts:
            wrong = next(i for i, (a, b) in enumerate(zip(counts, dataset.class_counts, strict=True)) if a != b)
            found.problems.append(
                f"class {dataset.class_names[wrong]} has {counts[wrong]} samples, "
                f"dataset.json says {dataset.class_counts[wrong]}"
            )
    return dataset, found


def _problems_of(dataset: DataSet, number: int, row: dict, stored: list[Stored], ids: set[int]) -> list[str]:
    name = f"{dataset.path}: sample {number} ({row['name']})"
    problems = []
    keep = dataset.manifest["recipe"].get("layout") == "keep"
    size = dataset.image_size
    try:
        shape = decode(row["image"], name).shape
        if not keep and shape != (size, size, 3):
            problems.append(f"{name} is {shape[1]} x {shape[0]} pixels, not {size} x {size}")
    except DataError as error:
        problems.append(str(error))
    if not 0 <= row["label"] < max(1, len(dataset.class_names)):
        problems.append(f"{name} has the label {row['label']}, which is no class")
    if row["id"] != int.from_bytes(hashlib.sha256(row["name"].encode()).digest()[:8], "little") >> 1:
        problems.append(f"{name} has an id that is not its name's")
    if row["id"] in ids:
        problems.append(f"{name} has the id of another sample")
    flip = dataset.manifest["recipe"].get("flip", False)
    for one in stored:
        for column in one.columns(flip):
            kind = "of the mirrored picture " if column.endswith(FLIPPED) else ""
            try:
                if not torch.isfinite(one.unpack_one(row[column], name).float()).all():
                    problems.append(f"{name}: its {one.kind} of {one.network} {kind}are not finite")
            except KeyError:
                problems.append(f"{name}: its {one.kind} of {one.network} {kind}are missing")
            except DataError as error:
                problems.append(str(error))
    return problems


def balance(counts: list[int], class_names: list[str]) -> str:
    """One line on how evenly the classes are filled."""
    if not counts:
        return "no classes"
    low, high = int(np.argmin(counts)), int(np.argmax(counts))
    if counts[low] == counts[high]:
        return f"{len(counts)} classes of {counts[low]} samples each"
    text = (
        f"{len(counts)} classes of {counts[low]} ({class_names[low]}) to {counts[high]} ({class_names[high]}) samples, "
        f"{sum(counts) / len(counts):.1f} on average"
    )
    empty = sum(count == 0 for count in counts)
    return f"{text}; {empty} are empty" if empty else text
