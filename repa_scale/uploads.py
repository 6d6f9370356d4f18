"""Copies new checkpoints to an object store behind the training, from a process of its own.

The thread here only waits for that process: neither the transfer nor the library that does it may hold up the training
loop.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from repa_scale.errors import ExitCode, UserError

PAUSE_SECONDS = (5.0, 300.0)  # before the first and the last further try of an upload that failed
LOWER_PRIORITY = 10  # of the process, in steps of nice(1)
KEY = "checkpoint.upload"

log = logging.getLogger("repa_scale")


class Uploads:
    """The uploads of one run; on rank 0 alone.

    Args:
        run: the run folder.
        url: of the store; empty: nothing is uploaded.
        incident: called with (kind, facts) when an upload fails.
    """

    def __init__(self, run: Path, url: str, incident: Callable[..., None]) -> None:
        self.run, self.url, self.incident = run, url, incident
        self._changed = threading.Condition()
        self._wanted = 1  # an earlier start may have left a checkpoint that the store has not
        self._done = 0
        self._ending = False
        self._process: subprocess.Popen | None = None
        if url:
            threading.Thread(target=self._upload_for_ever, name="uploads", daemon=True).start()

    def published(self) -> None:
        """The newest checkpoint is another one now. Returns at once."""
        with self._changed:
            self._wanted += 1
            self._changed.notify_all()

    def finish(self, seconds: float) -> None:
        """Waits so long for the newest checkpoint to be in the store, then ends what is still on its way."""
        if not self.url:
            return
        with self._changed:
            there = self._changed.wait_for(lambda: self._done == self._wanted, timeout=max(0.0, seconds))
            self._ending = True
            self._changed.notify_all()
        if not there:
            log.warning(
                "%s does not have the newest checkpoint; the next start uploads it, or: repa-scale checkpoints %s "
                "--upload %s",
                self.url,
                self.run,
                self.url,
            )
        if self._process is not None and self._process.poll() is None:
            self._process.kill()

    # Below: the thread.

    def _upload_for_ever(self) -> None:
        pause = PAUSE_SECONDS[0]
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._ending or self._done != self._wanted)
                wanted = self._wanted
                if self._ending:
                    return
            began = time.monotonic()
            problem = self._upload()
            with self._changed:
                if self._ending:
                    return
                if not problem:
                    self._done = wanted
                    self._changed.notify_all()
            if not problem:
                log.info("%s has the newest checkpoint (%.1f s)", self.url, time.monotonic() - began)
                pause = PAUSE_SECONDS[0]
                continue
            log.warning("the newest checkpoint is not in %s: %s; training goes on", self.url, problem)
            self.incident("upload_failed", url=self.url, reason=problem)
            with self._changed:
                self._changed.wait_for(lambda: self._ending, timeout=pause)
            pause = min(2 * pause, PAUSE_SECONDS[1])

    def _upload(self) -> str:
        """One try; what went wrong, or an empty string."""
        command = [sys.executable, "-m", "repa_scale.uploads", str(self.run), self.url, str(os.getpid())]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        )
        _, said = self._process.communicate()
        lines = said.strip().splitlines() or [f"code {self._process.returncode}"]
        return lines[-1] if self._process.returncode else ""


def main(argv: list[str]) -> int:
    """The process: uploads once, for `RUN URL PARENT`."""
    from repa_scale.checkpoint_store import open_store, upload_newest
    from repa_scale.processes import depend_on

    run, url, parent = Path(argv[0]), argv[1], int(argv[2])
    depend_on(parent)
    os.nice(LOWER_PRIORITY)
    try:
        with open_store(run, url, KEY) as store:
            upload_newest(run, store)
    except UserError as error:
        print(error, file=sys.stderr)
        return ExitCode.BAD_INPUT
    except OSError as error:  # a checkpoint that retention deleted on its way, a full disk
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return ExitCode.FAILED
    return ExitCode.COMPLETED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
