"""A thread that ends a process which hangs, and says where: phase, step and the stacks of all ranks.

Each phase of the loop has a deadline learned from its own past (timeouts.py). When one passes, the stacks and the last
collectives go to this rank's log, the other ranks are asked for theirs through the store, status.json gets the reason,
and the process exits with code 70. A rank in a collective goes on waiting while another says that it is patient: that
one waits for something, such as a batch, that ends by itself and then has the better message.
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
from contextlib import suppress
from pathlib import Path

import torch.distributed as dist

from repa_scale import flight_recorder, timeouts
from repa_scale.config import HealthConfig
from repa_scale.errors import LOST, ExitCode, summary
from repa_scale.files import write_atomically
from repa_scale.ranks import Ranks
from repa_scale.run_folder import RunFolder, read_status

PAST = 50
POLL_SECONDS = 0.5
ANSWER_SECONDS = 5.0  # how long the other ranks may take to answer
FAILURE_SECONDS = 2.0  # that rank 0 waits for an error of its own, after one of another rank
LAST_SECONDS = 120  # after which a process that cannot even say where it hangs ends all the same
ASK = "repa_scale/watchdog/ask"
PATIENT = "repa_scale/watchdog/patient"  # how many ranks still wait for something that gives up by itself
FAILED = "repa_scale/watchdog/failed"

log = logging.getLogger("repa_scale")


def report_failure(ranks: Ranks, reason: str) -> None:
    """An error ends this rank, and rank 0, which writes status.json, may be in a collective with it: rank 0's watchdog
    is told, so that the reason is not lost or taken for a hang."""

    def tell() -> None:
        # Over the connection that is there: a new one would wait for a rank 0 that is gone.
        with suppress(RuntimeError, ValueError):
            store = dist.distributed_c10d._get_default_store()
            # The first report stays: those that follow have only lost a rank.
            store.compare_set(FAILED, "", f"rank {ranks.rank} on {platform.node()} failed: {reason}")

    teller = threading.Thread(target=tell, name="failure", daemon=True)
    teller.start()
    teller.join(ANSWER_SECONDS)


def cause(error: BaseException) -> str:
    """Why rank 0 ends with `error`, for status.json. Where it has only lost another rank, that one's report: it is in
    the store before that rank's connections close."""
    text = summary(error)
    if text.startswith(LOST):
        with suppress(RuntimeError, ValueError):
            store = dist.distributed_c10d._get_default_store()
            if store.check([FAILED]):
                return store.get(FAILED).decode()
    return text


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
        self._patient_since: float | None = None  # of the phase for which this rank has asked the others to wait
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
        asked = failed = False
        while not self._closed.wait(POLL_SECONDS):
            phase, step, since = self._now
            stuck = time.monotonic() - since
            stopping = self._stopping()
            self._say_patient(phase, since, stuck)
            if stuck > self._deadline(phase) and not self._excused(stuck):
                self._end(f"hung in {phase} of step {step} for {stuck:.0f} s")
            elif stopping > self.settings.grace_seconds:
                self._end(
                    f"was asked to stop {stopping:.0f} s ago and has not saved within health.grace_seconds="
                    f"{self.settings.grace_seconds:g}: in {phase} of step {step}"
                )
            elif not asked and (reason := self._read(ASK)):
                asked = True
                self._answer(reason)
            elif not failed and self.run is not None and (reason := self._read(FAILED)):
                failed = True
                if not self._closed.wait(FAILURE_SECONDS):
                    self._note("rank_failed", reason)

    def _deadline(self, phase: str) -> float:
        past = self._past.get(phase)
        return timeouts.deadline(phase, max(past) if past else None, self.settings)

    def _say_patient(self, phase: str, since: float, stuck: float) -> None:
        """Counts this rank among the patient while it is in a phase that may last longer than the others' deadlines."""
        said = self._patient_since
        try:
            if said is None and timeouts.floor(phase, self.settings) > stuck > self.settings.hang_seconds / 2:
                self._patient_since = since
                self._store.add(PATIENT, 1)
            elif said is not None and said != since:
                self._patient_since = None
                self._store.add(PATIENT, -1)
        except RuntimeError:  # the process that holds the store is gone
            return

    def _excused(self, stuck: float) -> bool:
        """Whether this rank may be waiting for a patient one."""
        try:
            return stuck < timeouts.LONGEST and self._patient_since is None and self._store.add(PATIENT, 0) > 0
        except RuntimeError:
            return False

    def _read(self, name: str) -> str:
        try:
            return self._store.get(name).decode() if self._store.check([name]) else ""
        except RuntimeError:
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
            self._note("hang", reason)
        self._record()

    def _end(self, what: str) -> None:
        reason = f"watchdog: rank {self.ranks.rank} on {platform.node()} {what}"
        faulthandler.dump_traceback_later(LAST_SECONDS, exit=True)  # C code may hold Python's lock
        self._write_stacks(what)
        others = self._ask(reason)
        log.error("%s; %s", reason, "; ".join(others))
        self._note("hang", "; ".join([reason, *others]))
        self._record()  # last: it may wait for NCCL
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

    @property
    def _log(self) -> Path:
        return self.run_dir / "log"

    def _note(self, kind: str, reason: str) -> None:
        """status.json and incidents.jsonl; written by any rank, since rank 0 may be the one that hangs."""
        try:
            if self.run is not None:
                self.run.incident(kind, reason=reason)
                self.run.fail(reason)
                return
            status = read_status(self.run_dir)
            if status.get("state") == "running":
                status.update(state="failed", reason=reason, updated=time.time())
                write_atomically(self.run_dir / "status.json", json.dumps(status))
        except OSError as error:
            log.error("status.json cannot be written: %s", error)

    def _record(self) -> None:
        """The last collectives, and in status.json where the first rank's are; the others' lie beside them."""
        trace = flight_recorder.dump(self._log, self.ranks.rank, self.ranks.device.type)
        try:
            status = read_status(self.run_dir)
            if trace and status.get("state") == "failed" and "flight_recorder" not in status:
                status["flight_recorder"] = str(trace)
                write_atomically(self.run_dir / "status.json", json.dumps(status))
        except OSError as error:
            log.error("status.json does not name %s: %s", trace, error)

    def _write_stacks(self, why: str) -> None:
        try:
            with (self._log / f"rank_{self.ranks.rank}.log").open("a") as file:
                file.write(f"{self._where()} ({why}); Python stacks of all threads:\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError as error:
            log.error("stacks cannot be written: %s", error)
