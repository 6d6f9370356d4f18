"""What a child process owes its parent."""

from __future__ import annotations

import os
import signal
import threading
import time

POLL_SECONDS = 0.2


def depend_on(parent: int) -> None:
    """This process leaves Ctrl-C to `parent`, and ends when that one is gone, however it went."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(POLL_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, name="parent", daemon=True).start()
