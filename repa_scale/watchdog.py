"""A thread that ends a process which hangs, and says where: phase, step and the stacks of all ranks.

Each phase of the loop has a deadline learned from its own past. When one passes, the stacks go to this rank's log, the
other ranks are asked for theirs through the store, status.json gets the reason, and the process ends with code 70.
"""

from __future__ import annotations

import atexit
import faulthandler
import json
import logging
import os
import platform
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

from repa_scale.config import HealthConfig
from repa_scale.errors import ExitCode
from repa_scale.files import write_atomically
from repa_scale.ranks import Ranks
from repa_scale.run_folder import RunFolder, read_status

FIRST_SECONDS = 1800.0  # the deadline of a phase without a past
FACTOR = 10.0  # of a phase with one: so many times its longest of late
PAST = 50
POLL_SECONDS = 0.5
ANSWER_SECONDS = 5.0  # how long the other ranks may take to answer
ASK = "repa_scale/watchdog/ask"

log = logging.getLogger("repa_scale")


class Watchdog:
    """Off where `health.hang_seconds` is 0.

    Args:
        run: on rank 0.
        stopping: seconds since this rank was asked to stop; 0: it was not.
    """

    def __init__(
        self,
        ranks: Ranks,
        run_dir: Path,
        run: RunFolder | None,
        settings: HealthConfig,
        stopping: Callable[[], float],
    ) -> None:
        self.ranks, self.run_dir, self.run, self.settings = ranks, run_dir, run, settings
        self._stopping = stopping
        self._past: dict[str, deque[float]] = {}
        self._now = ("start-up", 0, time.monotonic())  # replaced as a whole: the thread sees one phase or the next
        self._closed = threading.Event()
        if settings.hang_seconds:
            self._store = ranks.store()
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
            atexit.register(self.close)  # a thread that the interpreter's end cuts off in the store aborts the process

    def enter(self, phase: str, step: int) -> None:
        """The loop goes on to `phase`; its time in the one before is learned."""
        before, _, since = self._now
        now = time.monotonic()
        self._past.setdefault(before, deque(maxlen=PAST)).append(now - since)
        self._now = (phase, step, now)

    def close(self) -> None:
        self._closed.set()
        if self.settings.hang_seconds:
            self._thread.join(ANSWER_SECONDS)

    # Below: the thread.

    def _watch(self) -> None:
        asked = False
        while not self._closed.wait(POLL_SECONDS):
            phase, step, since = self._now
            stuck = time.monotonic() - since
            stopping = self._stopping()
            if stuck > self._deadline(phase):
                self._end(f"hung in {phase} of step {step} for {stuck:.0f} s")
            elif stopping > self.settings.grace_seconds:
                self._end(
                    f"was asked to stop {stopping:.0f} s ago and has not saved within health.grace_seconds="
                    f"{self.settings.grace_seconds:g}: in {phase} of step {step}"
                )
            elif not asked and (reason := self._asked()):
                asked = True
                self._answer(reason)

    def _deadline(self, phase: str) -> float:
        past = self._past.get(phase)
        if not past:
            return max(FIRST_SECONDS, self.settings.hang_seconds)
        return max(self.settings.hang_seconds, FACTOR * max(past))

    def _asked(self) -> str:
        try:
            return self._store.get(ASK).decode() if self._store.check([ASK]) else ""
        except RuntimeError:  # the process that holds the store is gone
            return ""

    def _where(self) -> str:
        phase, step, since = self._now
        return (
            f"rank {self.ranks.rank} on {platform.node()}: {phase} of step {step} for {time.monotonic() - since:.0f} s"
        )

    def _answer(self, reason: str) -> None:
        """Another rank hangs: this rank's stacks, and where it stands."""
        self._write_stacks(f"asked by another rank, which {reason}")
        try:
            self._store.set(f"{ASK}/{self.ranks.rank}", self._where())
        except RuntimeError:
            return
        if self.run is not None:
            self._note(reason)

    def _end(self, what: str) -> None:
        reason = f"watchdog: rank {self.ranks.rank} on {platform.node()} {what}"
        self._write_stacks(what)
        others = self._ask(reason)
        log.error("%s; %s", reason, "; ".join(others))
        self._note("; ".join([reason, *others]))
        logging.shutdown()
        os._exit(ExitCode.FAILED)

    def _ask(self, reason: str) -> list[str]:
        """Where the other ranks stand; one that does not answer is stopped, or its machine is gone."""
        waiting = [rank for rank in range(self.ranks.world_size) if rank != self.ranks.rank]
        answers = []
        until = time.monotonic() + ANSWER_SECONDS
        try:
            self._store.set(ASK, reason)
            while waiting and time.monotonic() < until:
                for rank in list(waiting):
                    if self._store.check([f"{ASK}/{rank}"]):
                        answers.append(self._store.get(f"{ASK}/{rank}").decode())
                        waiting.remove(rank)
                time.sleep(0.1)
        except RuntimeError:
            pass
        return answers + [f"rank {rank} does not answer" for rank in waiting]

    def _note(self, reason: str) -> None:
        """status.json and incidents.jsonl; written by any rank, since rank 0 may be the one that hangs."""
        try:
            if self.run is not None:
                self.run.incident("hang", reason=reason)
                self.run.fail(reason)
                return
            status = read_status(self.run_dir)
            if status.get("state") == "running":
                status.update(state="failed", reason=reason, updated=time.time())
                write_atomically(self.run_dir / "status.json", json.dumps(status))
        except OSError as error:
            log.error("status.json cannot be written: %s", error)

    def _write_stacks(self, why: str) -> None:
        try:
            with (self.run_dir / "log" / f"rank_{self.ranks.rank}.log").open("a") as file:
                file.write(f"{self._where()} ({why}); Python stacks of all threads:\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError as error:
            log.error("stacks cannot be written: %s", error)
