"""A step's samples of one rank, read from the shards and decoded: what a loader process does.

A sample that cannot be read is left out and another takes its place, the same one for any number of ranks (bad.py).
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, SequentialSampler, get_worker_info

from repa_scale import rng
from repa_scale.data import device_crop
from repa_scale.data.bad import TRIES, BadSample, replacement
from repa_scale.data.crop import center_crop
from repa_scale.data.dali import DaliDecoder, DecoderFault
from repa_scale.data.dataset import DataSet
from repa_scale.data.decode import decode, rgb
from repa_scale.data.order import Order
from repa_scale.data.slabs import Slabs
from repa_scale.errors import DataError, UserError


@dataclass(frozen=True)
class Batch:
    """Samples of one step on one rank.

    Attributes:
        images: (N, 3, S, S) uint8; as they come from the loader, with the pixels of a colour three bytes apart. S is 0
            where the run needs no pictures.
        labels: (N,) int64.
        ids: (N,) int64, read with the images: what the batch fingerprint is made of.
        index: (N,) int64, positions in the global sequence: what the random numbers depend on.
        features: stored ones that the run reads instead of making them: `moments` (N, 2C, h, w) fp32, and by encoder
            `tokens.NAME` (N, T, z).
        bad: samples that were left out on the way.
        faults: of the decoder, while it decoded this batch.
    """

    images: Tensor
    labels: Tensor
    ids: Tensor
    index: Tensor
    features: dict[str, Tensor] = field(default_factory=dict)
    bad: tuple[BadSample, ...] = ()
    faults: tuple[DecoderFault, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str) -> Batch:
        """On `device`, where the colours of an image also become planes: a GPU does that for nothing."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True).contiguous())

    def pin_memory(self) -> Batch:
        return self._each(Tensor.pin_memory)

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        """Tells the allocator that `stream` works on the batch too: memory that it frees waits for that work."""
        for tensor in (self.images, self.labels, self.ids, self.index, *self.features.values()):
            tensor.record_stream(stream)

    def split(self, size: int | None) -> list[Batch]:
        """Micro batches of `size` samples; None: the whole."""
        size = size or len(self)
        return [self._each(lambda tensor, i=i: tensor[i : i + size]) for i in range(0, len(self), size)]

    def _each(self, change) -> Batch:
        features = {name: change(tensor) for name, tensor in self.features.items()}
        tensors = {name: change(getattr(self, name)) for name in ("images", "labels", "ids", "index")}
        return replace(self, **tensors, features=features)


@dataclass(frozen=True)
class Failure:
    """An error as a value: DataLoader would wrap an exception of a worker into many lines."""

    reason: str

    def pin_memory(self) -> Failure:
        return self


@dataclass(frozen=True)
class Sample:
    """One sample: its picture as bytes, as pixels (H, W, 3) uint8, or None where the run needs none."""

    image: bytes | np.ndarray | None
    label: int
    id: int
    name: str
    number: int
    flipped: bool
    tried: int  # samples that could not be read at this position before


@dataclass(frozen=True)
class Encoded:
    """A batch whose pictures are still bytes, for a decoder in the training process."""

    samples: list[Sample]
    index: Tensor
    features: dict[str, Tensor]  # as they are stored: Cached.buffers
    bad: tuple[BadSample, ...]

    def pin_memory(self) -> Encoded:
        return self


@dataclass(frozen=True)
class InSlab:
    """A batch on its way from a loader process: its pixels are in the slab of its step (slabs.py).

    The rest is numpy: DataLoader hands each tensor over in shared memory of its own, which costs more than it holds.
    """

    step: int
    labels: np.ndarray
    ids: np.ndarray
    index: np.ndarray
    features: dict[str, Tensor]
    bad: tuple[BadSample, ...]

    def pin_memory(self) -> InSlab:
        return self

    def taken(self, slabs: Slabs, pinned: bool) -> Batch:
        """The batch, with pixels of its own."""
        if pinned:
            images = torch.empty(slabs.shape, dtype=torch.uint8, pin_memory=True)
            images.numpy()[:] = slabs[self.step]
        else:
            images = torch.from_numpy(slabs[self.step].copy())
        numbers = (torch.from_numpy(array) for array in (self.labels, self.ids, self.index))
        return Batch(images.permute(0, 3, 1, 2), *numbers, self.features, self.bad)


class Steps(Dataset):
    """`[step]`, counted from 0 -> the batch of this rank.

    Args:
        decoder: `pillow`: batches of pixels come out; `dali`: bytes, for `finish`.
        flip: mirror each sample with probability one half, by (seed, step, position).

    Attributes:
        slabs: where loader processes put pixels; None: into each batch itself.
    """

    slabs: Slabs | None = None

    def __init__(
        self,
        dataset: DataSet,
        seed: int,
        global_batch: int,
        rank: int,
        world: int,
        decoder: str = "pillow",
        flip: bool = False,
    ) -> None:
        self.dataset, self.seed, self.global_batch, self.decoder, self.flip = dataset, seed, global_batch, decoder, flip
        self.order = Order([shard.samples for shard in dataset.reader.shards], seed, dataset.fingerprint)
        self.keep = dataset.manifest["recipe"].get("layout") == "keep"
        self.share = global_batch // world
        self.offset = rank * self.share

    def __getitem__(self, step: int) -> Batch | InSlab | Encoded | Failure:
        first = step * self.global_batch + self.offset
        index = torch.arange(first, first + self.share)
        try:
            self.dataset.reader.expect(lambda: self.order.shards_from(first))
            bad: list[BadSample] = []
            numbers = self.order.at(index).tolist()
            if not self.dataset.cached.pictures:  # nothing else to do meanwhile
                self.dataset.reader.will_need(numbers)
            features = self.dataset.cached.buffers(len(numbers))
            places = zip(index.tolist(), numbers, self._flips(step, index), strict=True)
            samples = [
                self.sample(position, number, flipped, bad, self.dataset.cached.places(features, row, flipped))
                for row, (position, number, flipped) in enumerate(places)
            ]
            if self.decoder == "dali" and self.dataset.cached.pictures:
                return Encoded(samples, index, features, tuple(bad))
            return self._batch(step, samples, index, features, bad)
        except UserError as error:
            return Failure(str(error))

    def sample(
        self,
        position: int,
        number: int,
        flipped: bool,
        bad: list[BadSample],
        places: dict[str, memoryview],
        tried: int = 0,
    ) -> Sample:
        """The sample of a position, or what takes its place; what could not be read is appended to `bad`.

        Args:
            places: where its features are read to.
            tried: samples that could not be read at this position before.

        Raises:
            DataError: TRIES in a row could not be read.
        """
        while True:
            row: dict = {}
            try:
                row = self.dataset.reader.read(number, places)
                return self._read(row, number, flipped, tried)
            except (DataError, OSError) as error:
                reason = str(error) if isinstance(error, DataError) else f"it cannot be read ({error.strerror})"
            number, tried = self._replaced(number, row.get("id"), position, tried, reason, bad)

    def _replaced(
        self, number: int, identity: int | None, position: int, tried: int, reason: str, bad: list[BadSample]
    ) -> tuple[int, int]:
        """Leaves a sample out. Returns the one that takes its place, and how many were tried at this position."""
        shard = self.dataset.reader.shards[self.dataset.reader.locate(number)[0]].basename
        bad.append(BadSample(number, identity, shard, reason, position))
        tried += 1
        if tried >= TRIES:
            raise DataError(f"{self.dataset.path}: {tried} samples in a row cannot be read, the last one: {reason}")
        return replacement(position, tried, self.dataset.count, self.seed, self.dataset.fingerprint), tried

    def finish(self, encoded: Encoded, decoder: DaliDecoder) -> Batch:
        """Decodes with `decoder`; what it cannot read is replaced as anywhere, and decoded by it too.

        Raises:
            DataError: TRIES samples in a row could not be read.
            DecoderError: the decoder stopped working.
        """
        bad, samples = list(encoded.bad), list(encoded.samples)
        found = decoder([sample.image for sample in samples], [self._where(s.number, s.name) for s in samples])
        pictures = []
        for i, picture in enumerate(found):
            shown = self._shown(picture, samples[i])
            while isinstance(shown, DataError):
                old, position = samples[i], int(encoded.index[i])
                number, tried = self._replaced(old.number, old.id, position, old.tried, str(shown), bad)
                places = self.dataset.cached.places(encoded.features, i, old.flipped)
                new = samples[i] = self.sample(position, number, old.flipped, bad, places, tried)
                (picture,) = decoder([new.image], [self._where(new.number, new.name)])
                shown = self._shown(picture, new)
            pictures.append(shown)
        batch = self._assembled(torch.stack(pictures), samples, encoded.index, encoded.features, bad)
        return replace(batch, faults=decoder.take_faults())

    def _shown(self, picture: Tensor | DataError, sample: Sample) -> Tensor | DataError:
        """A decoded picture as it is trained on: cropped and mirrored."""
        if isinstance(picture, DataError):
            return picture
        try:
            cut = self._cut(picture, self._where(sample.number, sample.name))
        except DataError as error:
            return error
        return cut.flip(1) if sample.flipped else cut

    def _where(self, number: int, name: str) -> str:
        return f"{self.dataset.path}: sample {number} ({name})"

    def _flips(self, step: int, index: Tensor) -> list[bool]:
        if not self.flip:
            return [False] * len(index)
        return rng.bernoulli(0.5, self.seed, "flip", step + 1, index).tolist()

    def _read(self, row: dict, number: int, flipped: bool, tried: int) -> Sample:
        image = None
        if self.dataset.cached.pictures:
            image = row["image"]
            if self.decoder == "pillow":
                image = self._pixels(image, self._where(number, row["name"]))
                image = image[:, ::-1] if flipped else image
        return Sample(image, row["label"], row["id"], row["name"], number, flipped, tried)

    def _pixels(self, data: bytes, where: str) -> np.ndarray:
        if not self.keep:
            return self._cut(decode(data, where), where)
        try:
            with Image.open(io.BytesIO(data)) as image:
                return np.asarray(center_crop(rgb(image), self.dataset.image_size))
        except (Image.DecompressionBombError, OSError, SyntaxError, ValueError) as error:
            raise DataError(f"{where} cannot be decoded ({error})") from None

    def _cut(self, picture, where: str):
        size = self.dataset.image_size
        if self.keep:
            return device_crop.center_crop(picture, size)
        if tuple(picture.shape) != (size, size, 3):
            raise DataError(f"{where} is {picture.shape[1]} x {picture.shape[0]} pixels, not {size} x {size}")
        return picture

    def _batch(
        self, step: int, samples: list[Sample], index: Tensor, features: dict[str, Tensor], bad: list[BadSample]
    ) -> Batch | InSlab:
        size = self.dataset.image_size if self.dataset.cached.pictures else 0
        if self.slabs is not None and get_worker_info() is not None:
            self._fill(self.slabs[step], samples)
            labels, ids = (np.array([getattr(sample, name) for sample in samples]) for name in ("label", "id"))
            return InSlab(step, labels, ids, index.numpy(), self.dataset.cached.values(features), tuple(bad))
        images = np.empty((len(samples), size, size, 3), np.uint8)
        if size:
            self._fill(images, samples)
        return self._assembled(torch.from_numpy(images), samples, index, features, bad)

    @staticmethod
    def _fill(images: np.ndarray, samples: list[Sample]) -> None:
        for place, sample in zip(images, samples, strict=True):
            place[:] = sample.image

    def _assembled(
        self,
        images: Tensor,
        samples: list[Sample],
        index: Tensor,
        features: dict[str, Tensor],
        bad: list[BadSample],
    ) -> Batch:
        return Batch(
            images.permute(0, 3, 1, 2),
            torch.tensor([sample.label for sample in samples]),
            torch.tensor([sample.id for sample in samples]),
            index,
            self.dataset.cached.values(features),
            tuple(bad),
        )


class Onwards(SequentialSampler):
    """start, start + 1, ... without end."""

    def __init__(self, start: int) -> None:
        self.start = start

    def __iter__(self) -> Iterator[int]:
        step = self.start
        while True:
            yield step
            step += 1

    def __len__(self) -> int:
        return 2**62
