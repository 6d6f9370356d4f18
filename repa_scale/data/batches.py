"""What the trainer sees of the data: one batch a step of this rank's samples, decoded in worker processes, in order.

Position g = (step - 1) * global_batch + i of the endless global sequence belongs to rank i // share. A position's
sample follows from order.py, so ranks, workers and resumes change nothing.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import pickle
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FuturesTimeoutError

import torch
from torch.utils.data import DataLoader

from repa_scale import devices
from repa_scale.data.copies import Copies, Sent
from repa_scale.data.dali import DaliDecoder
from repa_scale.data.dataset import DataSet, check_dataset, open_dataset
from repa_scale.data.decode import decode
from repa_scale.data.slabs import Slabs
from repa_scale.data.steps import Batch, Encoded, Failure, InSlab, Onwards, Steps
from repa_scale.errors import DataError

__all__ = ["Batch", "Batches", "DataSet", "check_dataset", "decode", "open_dataset"]

PREFETCH = 4  # batches that each worker makes ahead
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
PATIENCE = 600.0  # seconds without a batch after which the loader is taken for dead


class Batches:
    """This rank's batches, step by step, without end.

    Args:
        workers: processes that read and decode; 0: this process.
        start_step: steps already done.
        flip: mirror each sample with probability one half.
        decoder: `pillow`, in those processes; `dali`, in this one and its threads, or on its GPU.
        device: where the batches are wanted. For a GPU each is copied one step ahead, on a stream of its own.
    """

    def __init__(
        self,
        dataset: DataSet,
        *,
        seed: int,
        global_batch: int,
        rank: int,
        world: int,
        workers: int,
        start_step: int,
        decoder: str = "pillow",
        flip: bool = False,
        device: torch.device | None = None,
    ) -> None:
        self._steps = Steps(dataset, seed, global_batch, rank, world, decoder, flip)
        self._start = start_step
        self._workers = workers
        self._device = device or torch.device("cpu")
        self._stream: Iterator | None = None

    def __iter__(self) -> Iterator[Batch]:
        """Raises `DataError` where samples in a row cannot be read or no batch comes for a long time, `RuntimeError`
        where a worker was killed, `DecoderError` where DALI stopped working."""
        copies = Copies(self._device)
        if not self._steps.dataset.cached.pictures:  # nothing to decode: threads read faster than processes hand over
            threads = max(1, self._workers)
            return map(copies.take, ahead(iter(Onwards(self._start)), self._read(copies), threads, copies.enter_thread))
        if self._workers and self._steps.decoder == "pillow":
            self._steps.slabs = Slabs(self._workers * PREFETCH + 1, self._steps.share, self._steps.dataset.image_size)
        batches = self._loaded()
        if self._steps.decoder == "pillow" and self._device.type == "cpu":
            return map(self._taken, batches)
        return map(copies.take, one_ahead(batches, self._finish(copies), copies.enter_thread))

    def _taken(self, batch: Batch | InSlab) -> Batch:
        """Before the next batch is asked for, which may use the slab again."""
        pinned = devices.on_gpu(self._device)
        return batch.taken(self._steps.slabs, pinned) if isinstance(batch, InSlab) else batch

    def _read(self, copies: Copies) -> Callable[[int], Sent]:
        """Reading a step's features and the copy to the device, in any thread."""
        own = threading.local()  # a reader's open files are one thread's own

        def batch_of(step: int) -> Batch:
            if not hasattr(own, "steps"):
                own.steps = pickle.loads(pickle.dumps(self._steps))
            batch = own.steps[step]
            if isinstance(batch, Failure):
                raise DataError(batch.reason)
            return batch.pin_memory() if devices.on_gpu(self._device) else batch

        return lambda step: copies.send(lambda: batch_of(step))

    def _finish(self, copies: Copies) -> Callable[[Batch | InSlab | Encoded], Sent]:
        """Decoding and the copy to the device, as one step of work for a thread of its own."""
        share, device = self._steps.share, self._device
        decoder = DaliDecoder(share, self._workers, device) if self._steps.decoder == "dali" else None

        def batch_of(batch: Batch | InSlab | Encoded) -> Batch:
            return self._steps.finish(batch, decoder) if isinstance(batch, Encoded) else self._taken(batch)

        return lambda batch: copies.send(lambda: batch_of(batch))

    def _loaded(self) -> Iterator[Batch | InSlab | Encoded]:
        loader = DataLoader(
            self._steps,
            sampler=Onwards(self._start),
            batch_size=None,
            num_workers=self._workers,
            prefetch_factor=PREFETCH if self._workers else None,
            timeout=PATIENCE if self._workers else 0,
            multiprocessing_context="fork" if self._workers else None,
            worker_init_fn=functools.partial(_leave_signals_to_the_parent, os.getpid()),
            pin_memory=self._device.type == "cuda",
        )
        # The workers are forked here, and keep the signals held until they know what to do with them.
        with _stop_signals_held(), _garbage_kept():
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
            if isinstance(batch, Failure):
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


def ahead(steps: Iterator[int], read: Callable, threads: int, begin: Callable[[], None]) -> Iterator:
    """`read` of each step, in order, by threads that call `begin` first: one each, and one more, are held at a time."""
    pool = ThreadPoolExecutor(threads, thread_name_prefix="feeding", initializer=begin)
    try:
        coming = deque(pool.submit(read, next(steps)) for _ in range(threads + 1))
        while True:
            try:
                batch = coming.popleft().result(PATIENCE)
            except FuturesTimeoutError:
                raise DataError(f"no batch came for {PATIENCE:.0f} s; is the disk of the data still there?") from None
            coming.append(pool.submit(read, next(steps)))
            yield batch
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def one_ahead(batches: Iterator, work: Callable, begin: Callable[[], None]) -> Iterator:
    """`work` of each batch, done in a thread while the batch before it is in use: two are held at a time.

    The thread calls `begin` first. An error belongs to its own batch: the one before it still comes.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="feeding", initializer=begin) as thread:
        current = thread.submit(work, next(batches))
        while True:
            batch, error = current.result(), None
            try:
                current = thread.submit(work, next(batches))
            except (DataError, RuntimeError) as raised:
                error = raised
            yield batch
            if error is not None:
                raise error


@contextlib.contextmanager
def _stop_signals_held() -> Iterator[None]:
    """Stop signals that come inside are delivered behind it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def _garbage_kept() -> Iterator[None]:
    """Processes forked inside never collect what exists now: the end of one of DALI's pipelines waits for threads that
    a forked process does not have, for ever."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _leave_signals_to_the_parent(parent: int, worker: int) -> None:
    """A job's stop signal often goes to all its processes, and the trainer needs batches until it has saved.

    The worker itself ends by its parent's word, or within a second when its parent is gone. DataLoader looks for that
    too, but a worker whose neighbour was killed with the lock of their queue in hand would never come to its end.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if not hasattr(signal, "sigtimedwait"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        return

    def listen() -> None:
        while os.getppid() == parent:
            sent = signal.sigtimedwait([signal.SIGTERM], 1.0)
            if sent is not None and sent.si_pid == parent:
                break
        os._exit(0)

    threading.Thread(target=listen, daemon=True).start()
