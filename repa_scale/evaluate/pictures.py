"""Real images to measure a model on: of a prepared set, or of a folder or archive, cropped here; and which of them the
run was trained on. What is measured is not decided here.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from repa_scale.config import Config
from repa_scale.data.batches import DataSet, open_dataset
from repa_scale.data.crop import center_crop
from repa_scale.data.decode import rgb
from repa_scale.data.manifest import MANIFEST
from repa_scale.data.sources import open_source
from repa_scale.errors import DataError, UserError
from repa_scale.identity import identity_hash, identity_keys
from repa_scale.rng import permutation

LARGEST_SEARCH = 4 << 30  # bytes of a training set that are read for the ids of its images


@dataclass(frozen=True)
class Pictures:
    """A set of real images.

    Attributes:
        fingerprint: of the prepared set, or of the names and sizes in a folder.
        prepared: whether it is a prepared set.
        class_names: in the order of the labels; empty for unlabelled images.
        read: number in [0, count) -> bytes of its file, label, id, name.
        ids: those of all images, in order.
        size: pixels an axis of the images that come out.
        crop: whether they still have to be cropped.
    """

    path: str
    fingerprint: str
    prepared: bool
    class_names: list[str]
    count: int
    read: Callable[[int], tuple[bytes, int, int, str]]
    ids: Callable[[], Iterator[int]]
    size: int
    crop: bool

    def pixels(self, number: int) -> tuple[np.ndarray, int, int]:
        """(S, S, 3) uint8, label, id.

        Raises:
            DataError: it cannot be decoded, or has another size than its set says.
        """
        data, label, identity, name = self.read(number)
        try:
            with Image.open(io.BytesIO(data)) as image:
                image = rgb(image)
                pixels = np.asarray(center_crop(image, self.size) if self.crop else image)
        except (Image.DecompressionBombError, OSError, SyntaxError, ValueError) as error:
            raise DataError(
                f"{self.path}: {name} cannot be decoded ({error}); take it out of the set: a measurement leaves "
                "nothing out"
            ) from None
        if pixels.shape != (self.size, self.size, 3):
            raise DataError(
                f"{self.path}: {name} is {pixels.shape[1]} x {pixels.shape[0]} pixels, not {self.size} x {self.size}"
            )
        return pixels, label, identity


def open_pictures(path: str, size: int) -> Pictures:
    """Opens a prepared set of `size` pixels, or whatever `repa-scale prepare` takes as a source.

    Raises:
        DataError: missing, damaged, or a prepared set of another size.
    """
    if (Path(path) / MANIFEST).is_file():
        return _prepared(path, open_dataset(path), size)
    source = open_source(path)

    def read(number: int) -> tuple[bytes, int, int, str]:
        item = source.items[number]
        try:
            return source.read(item.key), item.label, item.id, item.name
        except Exception as error:  # a damaged archive makes its library raise anything
            raise DataError(f"{path}: {item.name} cannot be read ({error}); fetch it again") from None

    def ids() -> Iterator[int]:
        return (item.id for item in source.items)

    return Pictures(path, source.fingerprint, False, source.class_names, len(source.items), read, ids, size, True)


def _prepared(path: str, dataset: DataSet, size: int) -> Pictures:
    if dataset.image_size != size:
        raise DataError(
            f"--data {path} holds images of {dataset.image_size} px, the model was trained on {size} px; "
            f"prepare it with --size {size}, or give the folder of the images"
        )

    def read(number: int) -> tuple[bytes, int, int, str]:
        row = dataset.reader[number]
        return row["image"], row["label"], row["id"], row["name"]

    return Pictures(
        path,
        dataset.fingerprint,
        True,
        dataset.class_names,
        dataset.count,
        read,
        lambda: (dataset.reader[number]["id"] for number in range(dataset.count)),
        size,
        dataset.manifest["recipe"].get("layout") == "keep",
    )


@dataclass(frozen=True)
class Seen:
    """What the run was trained on, as far as it can be told.

    Attributes:
        everything: the images to measure on are the run's own set.
        ids: of the run's set, if it could be looked into.
    """

    everything: bool
    ids: frozenset[int] | None

    def of(self, ids: Tensor) -> str:
        """`all`, `none`, `some` or `not checked`: how many of the images with these ids the run was trained on."""
        if self.everything:
            return "all"
        if self.ids is None:
            return "not checked"
        known = sum(identity in self.ids for identity in ids.tolist())
        return "none" if not known else "all" if known == len(ids) else "some"


def seen(pictures: Pictures, config: Config, identity: str, folder: str, named: bool = False) -> Seen:
    """By the fingerprint, which is part of the run's identity hash; else by the ids (names) of the run's set.

    Args:
        identity: the identity hash of the run.
        folder: where the run's set should lie; empty: not known.
        named: someone says that it is there.

    Raises:
        DataError: it is not there, although named.
    """
    if pictures.prepared and _trained_on(config, pictures.fingerprint, identity):
        return Seen(True, None)
    try:
        trained = open_dataset(folder)
    except UserError:
        if named:
            raise
        return Seen(False, None)
    if not _trained_on(config, trained.fingerprint, identity):
        if named:
            raise DataError(f"--trained-on {folder} is not the set that the run was trained on; name that one")
        return Seen(False, None)
    if sum(shard.bytes for shard in trained.reader.shards) > LARGEST_SEARCH and not named:
        return Seen(False, None)
    return Seen(False, frozenset(trained.reader[number]["id"] for number in range(trained.count)))


def _trained_on(config: Config, fingerprint: str, identity: str) -> bool:
    return identity_hash(identity_keys(config, fingerprint)) == identity


def choose(pictures: Pictures, count: int, leave_out: Seen | None) -> list[int]:
    """Numbers of at most `count` images, ascending: always the same ones of a set.

    Args:
        leave_out: what the run was trained on, if that is to be left out.

    Raises:
        DataError: nothing is left.
    """
    order = permutation(0, "evaluated images", 0, pictures.count).tolist()
    if leave_out is not None:
        if leave_out.ids is None and not leave_out.everything:
            raise DataError(
                "--unseen needs the set that the run was trained on, to tell its images; it is not where the run "
                "says, or too large to look through unasked: name it with --trained-on"
            )
        known = leave_out.ids or frozenset()
        fresh = [not leave_out.everything and identity not in known for identity in pictures.ids()]
        order = [number for number in order if fresh[number]]
    if not order:
        raise DataError(f"--data {pictures.path} holds no image that the run was not trained on; give others")
    return sorted(order[:count])


@dataclass(frozen=True)
class Block:
    """Consecutive chosen images, the unit of work: whichever process measures it, it is computed whole.

    Attributes:
        images: (n, 3, S, S) uint8; labels, ids: (n,) int64.
    """

    number: int
    images: Tensor
    labels: Tensor
    ids: Tensor


def blocks(pictures: Pictures, chosen: list[int], batch: int, rank: int, world: int) -> Iterator[Block]:
    """This rank's blocks of `batch` images, each read while the one before it is in use."""
    starts = range(0, len(chosen), batch)[rank::world]

    def load(start: int) -> Block:
        rows = [pictures.pixels(number) for number in chosen[start : start + batch]]
        images = torch.from_numpy(np.stack([row[0] for row in rows])).permute(0, 3, 1, 2).contiguous()
        labels, ids = (torch.tensor([row[i] for row in rows]) for i in (1, 2))
        return Block(start // batch, images, labels, ids)

    # One thread: a reader's open files are one thread's own.
    with ThreadPoolExecutor(1, thread_name_prefix="reading") as thread:
        coming = thread.submit(load, starts[0]) if len(starts) else None
        for start in [*starts[1:], None] if coming else []:
            block = coming.result()
            coming = None if start is None else thread.submit(load, start)
            yield block
