"""Saves checkpoints behind the training: it waits for the copy to host memory alone. At most one save is in flight.

Each rank's thread writes its own file and reports it through the store of the process group; rank 0's thread then
writes the manifest and publishes. Whether that failed travels in the step's own collective (`failed`), so that all
ranks try again together.
"""

from __future__ import annotations

import atexit
import json
import logging
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from repa_scale import devices, timeouts
from repa_scale.checkpoint import KINDS, Piece, publish, step_folder, write_manifest, write_pieces
from repa_scale.config import CheckpointConfig
from repa_scale.ema import ShardEma
from repa_scale.engine import Engine
from repa_scale.errors import reason
from repa_scale.ranks import Ranks
from repa_scale.retention import prune

TRIES = 4  # of one checkpoint; then the next one that is due takes its place
PAUSE_SECONDS = 5.0  # before the first further try; doubled for each
WAITING_PAUSE_SECONDS = 1.0  # the same while training waits for it
POLL_SECONDS = 0.02
LAST_SECONDS = 20.0  # that a failed run's process still gives to the save in flight

log = logging.getLogger("repa_scale")


class SaveError(Exception):
    """A checkpoint could not be written; those before it are as they were."""


@dataclass
class Job:
    """One checkpoint on its way: what does not change between the tries to write it."""

    step: int
    attempt: int
    facts: dict
    pieces: list[Piece]
    number: int  # of the save in this process
    tries: int = 0
    problem: str | None = None  # on rank 0: why the last try failed


class Saver:
    """The checkpoints of one run, as this rank sees them.

    Args:
        folder: `RUN/checkpoints`.
        incident: called on rank 0 with (kind, facts) when a save fails.
        published: called on rank 0 when a checkpoint is complete.
    """

    def __init__(
        self,
        engine: Engine,
        ema: ShardEma,
        ranks: Ranks,
        folder: Path,
        policy: CheckpointConfig,
        incident: Callable[..., None] = lambda kind, **facts: None,
        published: Callable[[], None] = lambda: None,
    ) -> None:
        self.engine, self.ema, self.ranks, self.folder, self.policy = engine, ema, ranks, folder, policy
        self.incident, self.published = incident, published
        self.verified: set[str] = set()
        self._host: list[dict[str, Tensor]] = []
        self._store = ranks.store()
        self._job: Job | None = None
        self._thread: threading.Thread | None = None
        self._due = 0.0
        self._number = 0
        self._ending = False
        atexit.register(self._end)

    def save(
        self, step: int, attempt: int, facts: dict, wait: bool = False, trying: Callable[[], None] = lambda: None
    ) -> None:
        """Takes the state as it is now; all ranks call it together. Returns when the copy is made, or with `wait`
        when the checkpoint is published.

        Args:
            trying: called before each try that is waited for.

        Raises:
            SaveError: with `wait`, when all tries failed.
        """
        self.settle()
        if self._job is not None:
            log.error("the checkpoint of step %d was never written; step %d takes its place", self._job.step, step)
        self._number += 1
        self._job = Job(step, attempt, facts, self._copy(), self._number)
        self._start()
        if wait or not self.policy.asynchronous:
            trying()
            self.settle()
        while wait and self._job is not None and self._job.tries < TRIES:
            time.sleep(WAITING_PAUSE_SECONDS * self._job.tries)
            trying()
            self._start()
            self.settle()
        if wait and self._job is not None:
            problem = self.ranks.broadcast_object(self._job.problem)
            raise SaveError(f"the checkpoint of step {step} could not be written in {TRIES} tries: {problem}")

    @property
    def failed(self) -> bool:
        """Rank 0: the save in flight has failed, and it is time to try again."""
        job = self._job
        return (
            job is not None
            and job.problem is not None
            and job.tries < TRIES
            and not self._thread.is_alive()
            and time.monotonic() >= self._due
        )

    def retry(self) -> None:
        """Writes the copy of the failed save again; all ranks call it together."""
        self._thread.join()
        log.warning("trying again to write the checkpoint of step %d", self._job.step)
        self._start()

    def settle(self) -> None:
        """Waits for the save in flight; all ranks call it together. Then it is published, or known to have failed."""
        if self._job is None:
            return
        self._thread.join()
        if self.ranks.broadcast_object(self._job.problem) is None:
            self._job = None

    def give_up(self) -> None:
        """Waits for the save in flight, and forgets it where it has failed; all ranks call it together."""
        self.settle()
        self._job = None

    def _end(self) -> None:
        """Of the process: the save in flight is still worth a moment, when an error ends the run. After it the thread
        must not be waiting in the store, where the interpreter's end would abort the process."""
        if self._thread is not None:
            self._thread.join(LAST_SECONDS)
            self._ending = True
            self._thread.join(1.0)

    def _start(self) -> None:
        self._job.tries += 1
        self._job.problem = None
        self._thread = threading.Thread(target=self._write, args=(self._job,), name="saving", daemon=True)
        self._thread.start()

    @torch.no_grad()
    def _copy(self) -> list[Piece]:
        """The state in host memory: buffers that are made once, pinned where there is a GPU to copy from."""
        sources = [
            {"master": shard.master, **shard.moments, "ema": average}
            for shard, average in zip(self.engine.shards, self.ema.values, strict=True)
        ]
        if not self._host:
            pinned = devices.on_gpu(self.ranks.device)
            for tensors in sources:
                self._host.append({k: torch.empty(v.shape, pin_memory=pinned) for k, v in tensors.items()})
        for host, tensors in zip(self._host, sources, strict=True):
            for kind in KINDS:
                host[kind].copy_(tensors[kind], non_blocking=True)
        if devices.on_gpu(self.ranks.device):
            torch.cuda.current_stream().synchronize()
        shards = self.engine.shards
        return [Piece(s.name, s.shape, s.start, s.stop, host) for s, host in zip(shards, self._host, strict=True)]

    # Below: the thread.

    def _write(self, job: Job) -> None:
        key = f"repa_scale/save/{job.number}/{job.tries}"
        temporary = self.folder / f"{step_folder(job.step)}.tmp-{job.attempt}"
        try:
            self._make_room(key)
            temporary.mkdir(parents=True, exist_ok=True)
            entry = write_pieces(temporary, self.ranks.rank, self.ranks.world_size, job.pieces)
        except Exception as error:  # a full disk, a lost mount: rank 0 must hear of it
            entry = {"error": f"rank {self.ranks.rank}: {reason(error)}"}
        if not self.ranks.is_main:
            self._store.set(f"{key}/{self.ranks.rank}", json.dumps(entry))
            return
        try:
            entries = [entry, *(self._entry(key, rank) for rank in range(1, self.ranks.world_size))]
            for theirs in entries:
                if "error" in theirs:
                    raise OSError(theirs["error"])
            write_manifest(temporary, entries, job.facts)
            publish(temporary, self.folder / step_folder(job.step))
        except Exception as error:
            shutil.rmtree(temporary, ignore_errors=True)
            pause = PAUSE_SECONDS * 2 ** (job.tries - 1)
            self._due = time.monotonic() + pause
            job.problem = reason(error)
            log.error("the checkpoint of step %d could not be written (%s); training goes on", job.step, job.problem)
            self.incident("save_failed", step=job.step, reason=job.problem)
            return
        self.verified.add(step_folder(job.step))
        log.info("saved %s", self.folder / step_folder(job.step))
        self.published()

    def _entry(self, key: str, rank: int) -> dict:
        """What `rank` says of its file."""
        self._wait_for(f"{key}/{rank}", f"rank {rank} did not finish its file")
        entry = json.loads(self._store.get(f"{key}/{rank}"))
        self._store.delete_key(f"{key}/{rank}")
        return entry

    def _make_room(self, key: str) -> None:
        """Rank 0 deletes what need not stay; no rank writes before."""
        if not self.policy.keep_last:
            return
        if not self.ranks.is_main:
            self._wait_for(f"{key}/room", "rank 0 did not make room")
            return
        try:
            prune(self.folder, self.policy, self.verified, coming=1)
        except OSError as error:
            log.warning("old checkpoints could not be deleted: %s", error)
        self._store.set(f"{key}/room", "made")

    def _wait_for(self, name: str, otherwise: str) -> None:
        """Polls: a store that waits for one thread serves no other."""
        until = time.monotonic() + timeouts.SAVER
        while not self._store.check([name]):
            if self._ending:
                raise OSError("the run ended meanwhile")
            if time.monotonic() > until:
                raise OSError(f"{otherwise} in {timeouts.SAVER:.0f} s")
            time.sleep(POLL_SECONDS)
