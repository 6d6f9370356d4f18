"""A prepared set as training sees it: opened, checked against the configuration, its shards verified."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from repa_scale.config import DataConfig
from repa_scale.data.features import Cached
from repa_scale.data.manifest import data_fingerprint, read_manifest
from repa_scale.data.mds import MdsReader, Shard, read_index
from repa_scale.data.remote import RemoteReader, check_limit, open_remote
from repa_scale.errors import ConfigError, DataError
from repa_scale.quantities import size_in_bytes


class DataSet:
    """A finished set: its manifest and random access to its samples. Made by `open_dataset`; can be pickled.

    Attributes:
        path: its folder.
        manifest: `dataset.json`.
        reader: sample number in [0, count) -> columns image (PNG or JPEG bytes), label, id, name, stored features.
        cached: which of the stored features a run reads; by default none.
    """

    def __init__(self, path: Path, manifest: dict[str, Any], reader: MdsReader) -> None:
        self.path = path
        self.manifest = manifest
        self.reader = reader
        self.verified = False
        self.cached = Cached()

    @property
    def name(self) -> str:
        return self.manifest["name"]

    @property
    def count(self) -> int:
        return self.manifest["count"]

    @property
    def fingerprint(self) -> str:
        """32 hex digits: equal for equal samples in equal order, wherever the set lies."""
        return self.manifest["fingerprint"]

    @property
    def image_size(self) -> int:
        return self.manifest["image_size"]

    @property
    def class_names(self) -> list[str]:
        """In the order of the labels; empty for unlabelled data, whose samples all have label 0."""
        return self.manifest["class_names"]

    @property
    def class_counts(self) -> list[int]:
        return self.manifest["class_counts"]

    def verify(self, part: int = 0, parts: int = 1) -> dict[int, str]:
        """Checks the hashes of every `parts`-th shard from `part` on, in threads, and takes the set as verified.

        The processes of a node share the work: each calls this with its local rank, and they exchange what they found
        before training.

        Returns:
            What is wrong, by the shard's number: it is missing or is not the one that was prepared.
        """
        numbers = range(part, len(self.reader.shards), parts)

        def problem(number: int) -> str | None:
            try:
                self.reader.verify(number)
            except DataError as error:
                return str(error)
            return None

        with ThreadPoolExecutor(min(8, len(os.sched_getaffinity(0)))) as threads:
            found = dict(zip(numbers, threads.map(problem, numbers), strict=True))
        self.verified = True
        return {number: reason for number, reason in found.items() if reason}


def open_dataset(path: str | Path, verify: bool = True) -> DataSet:
    """Opens a prepared set; its index and manifest are checked here, the shards by `DataSet.verify`.

    Args:
        path: the folder that `repa-scale prepare` wrote.
        verify: False takes the shards as they are: their hashes will not be checked before use.

    Raises:
        DataError: missing, empty, unfinished or damaged.
    """
    if not str(path):
        raise DataError("data.path is empty; set it to a folder that `repa-scale prepare` made")
    return _opened(Path(path), verify, MdsReader)


def open_configured(data: DataConfig) -> DataSet:
    """The set of a run: in a folder, or in a store behind a cache folder.

    Raises:
        UserError: it cannot be opened.
    """
    if not data.remote:
        return open_dataset(data.path, data.verify)
    limit = size_in_bytes(data.cache_limit)
    folder = open_remote(data.remote, data.cache, limit)
    dataset = _opened(folder, True, lambda where, shards: RemoteReader(where, shards, data.remote, limit))
    check_limit(dataset.reader, data.cache_limit)
    return dataset


def _opened(folder: Path, verify: bool, read: Callable[[Path, list[Shard]], MdsReader]) -> DataSet:
    manifest = read_manifest(folder)
    shards = read_index(folder)
    reader = read(folder, shards)
    if hashlib.sha256((folder / "index.json").read_bytes()).hexdigest() != manifest["index_sha256"]:
        raise DataError(f"{folder / 'index.json'} is not the index that dataset.json was made with; prepare it again")
    if len(reader) != manifest["count"]:
        raise DataError(
            f"{folder}: the index lists {len(reader)} samples, dataset.json {manifest['count']}; prepare again"
        )
    if data_fingerprint(manifest["recipe"], manifest["class_names"], shards) != manifest["fingerprint"]:
        raise DataError(f"{folder}: the fingerprint in dataset.json does not fit the index; prepare the set again")
    dataset = DataSet(folder, manifest, reader)
    dataset.verified = not verify
    return dataset


def check_dataset(dataset: DataSet, num_classes: int, image_size: int, global_batch: int) -> None:
    """Compares a set with what the run's configuration says of it.

    Raises:
        ConfigError: another number of classes or image size, or too few samples for one global batch.
    """
    found = len(dataset.class_names)
    if found != num_classes:
        kind = f"has {found} classes" if found else "is unlabelled"
        raise ConfigError(
            f"model.num_classes={num_classes}, but the data set {dataset.path} {kind}; use model.num_classes={found}"
        )
    if dataset.image_size != image_size:
        raise ConfigError(
            f"data.image_size={image_size}, but the data set {dataset.path} holds images of {dataset.image_size} px; "
            f"use data.image_size={dataset.image_size}, or prepare it with --size {image_size}"
        )
    if dataset.count < global_batch:
        raise ConfigError(
            f"train.global_batch={global_batch}, but the data set {dataset.path} has only {dataset.count} samples; "
            f"use a batch of at most {dataset.count}"
        )
