"""A bounded queue of images and the one thread that draws them: images of many callers share a batch."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np

from repa_scale.serving.faults import LOST, NotDrawn, let_go

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Wish:
    """One image that somebody asked for. Wishes with the same `kind` can share a batch."""

    label: int
    seed: int
    steps: int
    sampler: str
    guidance: float
    interval: tuple[float, float]

    @property
    def kind(self) -> tuple[int, str]:
        return self.steps, self.sampler


@dataclass(eq=False)
class Job:
    """A wish on its way: `image` becomes (H, W, 3) uint8, or raises NotDrawn. `abandoned`: nobody waits for it any
    more."""

    wish: Wish
    image: Future = field(default_factory=Future)
    abandoned: bool = False
    since: float = field(default_factory=time.monotonic)


class QueueFull(Exception):
    """There is no room for all images of a request."""


class Closing(Exception):
    """The server takes no more requests."""


# (wishes, is anybody still waiting?) -> (N, H, W, 3) uint8; what it gives for a batch without waiters is not used
Draw = Callable[[Sequence[Wish], Callable[[], bool]], np.ndarray]
Observe = Callable[[Sequence[Job], float], None]  # (jobs of a batch, seconds that it took)


class Batcher:
    """Collects jobs into batches of one kind, oldest first, and draws them in its own thread.

    Args:
        draw: makes the images of a batch.
        max_batch: images in one batch.
        max_queue: images that may wait.
        linger: seconds that the oldest image waits for company, where a batch is not full.
        observe: told of each finished batch.
        on_lost: called once from the drawing thread when nothing can be drawn any more and every job has its answer.
    """

    def __init__(
        self,
        draw: Draw,
        max_batch: int,
        max_queue: int,
        linger: float = 0.005,
        observe: Observe = lambda jobs, seconds: None,
        on_lost: Callable[[], None] = lambda: None,
    ) -> None:
        self._draw, self._observe, self._on_lost = draw, observe, on_lost
        self.max_batch, self.max_queue, self.linger = max_batch, max_queue, linger
        self._waiting: deque[Job] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self.lost = False  # the device, or the drawing thread
        self._thread = threading.Thread(target=self._work, name="batcher", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Images in the queue."""
        return len(self._waiting)

    @property
    def alive(self) -> bool:
        """Whether images can still be drawn."""
        return self._thread.is_alive() and not self.lost

    def submit(self, wishes: Sequence[Wish]) -> list[Job]:
        """Queues all images of a request, or none.

        Raises:
            QueueFull, Closing: they are not taken.
        """
        with self._changed:
            if self._closing:
                raise Closing
            if len(self._waiting) + len(wishes) > self.max_queue:
                raise QueueFull
            jobs = [Job(wish) for wish in wishes]
            self._waiting.extend(jobs)
            self._changed.notify()
        return jobs

    def abandon(self, jobs: Sequence[Job]) -> None:
        """Nobody waits for these any more: those in the queue leave it, and a batch of such alone is cut short."""
        with self._changed:
            for job in jobs:
                job.abandoned = True
            self._waiting = deque(job for job in self._waiting if not job.abandoned)

    def close(self, timeout: float | None = None) -> None:
        """Takes no more, and returns when all that was taken is drawn."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(timeout)

    def _work(self) -> None:
        try:
            while (taken := self._next_batch()) is not None:
                if self._answer(taken):
                    self._lose()
        except BaseException:  # without this thread every request would wait until its time is over
            log.exception("the drawing thread died")
            self._lose()

    def _answer(self, taken: list[Job]) -> bool:
        """Draws a batch; whatever happens to it, its jobs are answered. Returns whether the device is lost.

        A function of its own, so that nothing of a batch outlives it while the thread waits for the next.
        """
        # From here on nobody can cancel the future, so that setting it never fails.
        batch = [job for job in taken if job.image.set_running_or_notify_cancel()]
        if not batch:
            return False
        began = time.monotonic()
        problem = None
        try:
            images = list(self._draw([job.wish for job in batch], lambda: not all(job.abandoned for job in batch)))
            if len(images) != len(batch):
                raise RuntimeError(f"{len(images)} images were drawn for {len(batch)}")
        except BaseException as error:
            problem = let_go(error, len(batch))
        for number, job in enumerate(batch):
            if problem is None:
                job.image.set_result(images[number])
            else:
                job.image.set_exception(problem)
        self._observe(batch, time.monotonic() - began)
        return problem is not None and problem.lost

    def _lose(self) -> None:
        """Nothing can be drawn any more: those that wait are told, and no more are taken."""
        with self._changed:
            self.lost = self._closing = True
            left, self._waiting = self._waiting, deque()
        for job in left:
            if job.image.set_running_or_notify_cancel():
                job.image.set_exception(NotDrawn(LOST, 503, lost=True))
        self._on_lost()

    def _next_batch(self) -> list[Job] | None:
        """The oldest job and those of its kind; waits for one. None: closed, and all is done."""
        with self._changed:
            while True:
                if not self._waiting:
                    if self._closing:
                        return None
                    self._changed.wait()
                    continue
                oldest = self._waiting[0]
                batch = [job for job in self._waiting if job.wish.kind == oldest.wish.kind][: self.max_batch]
                left = oldest.since + self.linger - time.monotonic()
                if len(batch) == self.max_batch or left <= 0 or self._closing:
                    chosen = set(map(id, batch))
                    self._waiting = deque(job for job in self._waiting if id(job) not in chosen)
                    return batch
                self._changed.wait(left)
