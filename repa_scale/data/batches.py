"""What the trainer sees of the data: one batch a step of this rank's samples, decoded in worker processes, in order.

Position g = (step - 1) * global_batch + i of the endless global sequence belongs to rank i // share. A position's
sample follows from order.py, so ranks, workers and resumes change nothing.
"""

from __future__ import annotations

import contextlib
import io
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, SequentialSampler

from repa_scale.data.dataset import DataSet, check_dataset, open_dataset
from repa_scale.data.order import sample_at
from repa_scale.errors import DataError

__all__ = ["Batch", "Batches", "DataSet", "check_dataset", "decode", "open_dataset"]

PREFETCH = 4  # batches that each worker makes ahead
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
PATIENCE = 600.0  # seconds without a batch after which the loader is taken for dead


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
    """

    images: Tensor
    labels: Tensor
    ids: Tensor
    index: Tensor
    features: dict[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str) -> Batch:
        """On `device`, where the colours of an image also become planes: a GPU does that for nothing."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True).contiguous())

    def pin_memory(self) -> Batch:
        return self._each(Tensor.pin_memory)

    def split(self, size: int | None) -> list[Batch]:
        """Micro batches of `size` samples; None: the whole."""
        size = size or len(self)
        return [self._each(lambda tensor, i=i: tensor[i : i + size]) for i in range(0, len(self), size)]

    def _each(self, change) -> Batch:
        features = {name: change(tensor) for name, tensor in self.features.items()}
        tensors = {name: change(getattr(self, name)) for name in ("images", "labels", "ids", "index")}
        return replace(self, **tensors, features=features)


class Batches:
    """This rank's batches, step by step, without end.

    Args:
        workers: processes that read and decode; 0: this process.
        start_step: steps already done.
    """

    def __init__(
        self, dataset: DataSet, *, seed: int, global_batch: int, rank: int, world: int, workers: int, start_step: int
    ) -> None:
        self._steps = _Steps(dataset, seed, global_batch, rank, world)
        self._start = start_step
        self._workers = workers
        self._stream: Iterator | None = None

    def __iter__(self) -> Iterator[Batch]:
        """Raises `DataError` for a damaged sample and where no batch comes for a long time, `RuntimeError` where a
        worker was killed."""
        loader = DataLoader(
            self._steps,
            sampler=_Onwards(self._start),
            batch_size=None,
            num_workers=self._workers,
            prefetch_factor=PREFETCH if self._workers else None,
            timeout=PATIENCE if self._workers else 0,
            multiprocessing_context="fork" if self._workers else None,
            worker_init_fn=_leave_signals_to_the_parent,
            pin_memory=torch.cuda.is_available(),
        )
        with _stop_signals_held():  # the workers are forked here, and keep them held until they know what to do
            self._stream = iter(loader)
        while True:
            try:
                batch = next(self._stream)
            except (RuntimeError, OSError, EOFError) as error:
                # The other kinds come where a worker is killed while it hands a batch over.
                alive = all(worker.is_alive() for worker in getattr(self._stream, "_workers", ()))
                self.close()  # or the news of a worker's death, a signal, would raise once more, wherever we are then
                if not alive or not isinstance(error, RuntimeError):
                    raise RuntimeError(
                        f"a loader worker died ({type(error).__name__}: {error}); "
                        f"if memory was short, use data.workers={self._workers // 2}"
                    ) from None
                if "timed out" not in str(error):
                    raise
                raise DataError(
                    f"{self._steps.dataset.path}: no batch came for {PATIENCE:.0f} s; is its disk still there?"
                ) from None
            if isinstance(batch, _Failure):
                raise DataError(batch.reason)
            yield batch

    def close(self) -> None:
        """Ends the workers, also one that stands still."""
        shut_down = getattr(self._stream, "_shutdown_workers", None)
        if shut_down is not None:
            with contextlib.suppress(RuntimeError):  # DataLoader reports a killed worker wherever the program stands
                shut_down()
            for worker in self._stream._workers:
                if worker.is_alive():
                    worker.kill()
        self._stream = None


@contextlib.contextmanager
def _stop_signals_held() -> Iterator[None]:
    """Stop signals that come inside are delivered behind it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _leave_signals_to_the_parent(worker: int) -> None:
    """A job's stop signal often goes to all its processes, and the trainer needs batches until it has saved.

    The worker itself ends by its parent's word, or within a second when its parent is gone. DataLoader looks for that
    too, but a worker whose neighbour was killed with the lock of their queue in hand would never come to its end.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if not hasattr(signal, "sigtimedwait"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        return
    parent = os.getppid()

    def listen() -> None:
        while os.getppid() == parent:
            sent = signal.sigtimedwait([signal.SIGTERM], 1.0)
            if sent is not None and sent.si_pid == parent:
                break
        os._exit(0)

    threading.Thread(target=listen, daemon=True).start()


@dataclass(frozen=True)
class _Failure:
    """An error as a value: DataLoader would wrap an exception of a worker into many lines."""

    reason: str

    def pin_memory(self) -> _Failure:
        return self


class _Steps(Dataset):
    """`[step]`, counted from 0 -> the batch of this rank."""

    def __init__(self, dataset: DataSet, seed: int, global_batch: int, rank: int, world: int) -> None:
        self.dataset, self.seed, self.global_batch = dataset, seed, global_batch
        self.share = global_batch // world
        self.offset = rank * self.share

    def __getitem__(self, step: int) -> Batch | _Failure:
        first = step * self.global_batch + self.offset
        index = torch.arange(first, first + self.share)
        numbers = sample_at(index, self.dataset.count, self.seed, self.dataset.fingerprint)
        try:
            return self._read(numbers.tolist(), index)
        except DataError as error:
            return _Failure(str(error))
        except OSError as error:
            return _Failure(f"{self.dataset.path} cannot be read ({error.strerror}); is its disk still there?")

    def _read(self, numbers: list[int], index: Tensor) -> Batch:
        cached = self.dataset.cached
        size = self.dataset.image_size if cached.pictures else 0
        images = np.empty((len(numbers), size, size, 3), np.uint8)
        labels, ids, features = [], [], []
        for i, number in enumerate(numbers):
            row = self.dataset.reader[number]
            name = f"{self.dataset.path}: sample {number} ({row['name']})"
            features.append(cached.read(row, name))
            if cached.pictures:
                image = decode(row["image"], name)
                if image.shape != (size, size, 3):
                    raise DataError(f"{name} is {image.shape}, not {size} x {size} pixels")
                images[i] = image
            labels.append(row["label"])
            ids.append(row["id"])
        stacked = {name: torch.stack([one[name] for one in features]) for name in features[0]}
        pictures = torch.from_numpy(images).permute(0, 3, 1, 2)
        return Batch(pictures, torch.tensor(labels), torch.tensor(ids), index, stacked)


class _Onwards(SequentialSampler):
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


def decode(data: bytes, name: str = "image") -> np.ndarray:
    """PNG or JPEG bytes -> (H, W, 3) uint8.

    Raises:
        DataError: it is damaged.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            picture = image if image.mode == "RGB" else image.convert("RGB")
            # np.asarray would do the same with one copy more.
            return np.frombuffer(picture.tobytes(), np.uint8).reshape(picture.height, picture.width, 3)
    except (Image.DecompressionBombError, OSError, SyntaxError, ValueError) as error:
        raise DataError(f"{name} cannot be decoded ({error}); check the set with: repa-scale prepare --check") from None
