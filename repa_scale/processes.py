"""Processes that belong together: found and ended by a mark in their environment, deaf to wishes, ending together; and
how a process of ours ends.

No torch.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

PR_SET_PDEATHSIG = 1
WISHES = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
TRIES = 50
POLL_SECONDS = 0.2


def end_process(code: int) -> NoReturn:
    """Ends this process with `code`: exit handlers, the last output, and no tear-down of the interpreter.

    A thread of torch or gloo that asks for Python's lock during the tear-down is cut off inside C++, which aborts: a
    completed run ended with code -6 once in a hundred times on a busy machine, and its launcher called it failed.
    """
    with suppress(Exception):
        atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def end_all_marked(variable: str, value: str) -> None:
    """SIGKILL to every process of this machine with `variable=value` in its environment, until there is none."""
    for _ in range(TRIES):
        if not (found := marked(variable, value)):
            return
        for process in found:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(process, signal.SIGKILL)
        time.sleep(0.1)


def marked(variable: str, value: str) -> list[int]:
    """Living processes with `variable=value` in the environment that they were started with, this one left out."""
    wanted = f"{variable}={value}".encode()
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if wanted in (folder / "environ").read_bytes().split(b"\0") and alive(int(folder.name)):
                found.append(int(folder.name))
    return [pid for pid in found if pid != os.getpid()]


def alive(pid: int) -> bool:
    """Whether there is such a process, and it is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_bytes().rsplit(b")", 1)[1].split()[0] not in (b"Z", b"X")
    except OSError:
        return False


def start_deaf(words: list[str], **options: object) -> subprocess.Popen:
    """Popen of a process that SIGTERM, SIGINT, SIGHUP and SIGUSR1 do not reach, nor what it starts (SIGKILL does).

    A scheduler sends its SIGTERM to every process of a job at once, and those that carry the job must outlive it.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, WISHES)  # children inherit it, also over exec
    try:
        return subprocess.Popen(words, **options)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def hear_again() -> None:
    """In a process that was started deaf, or whose parent was."""
    for number in WISHES:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, WISHES)


def die_with_parent() -> None:
    """From here on this process is killed when the one that started it ends."""
    parent = os.getppid()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it has ended before the call
        os.kill(os.getpid(), signal.SIGKILL)


def depend_on(parent: int) -> None:
    """From here on this process leaves Ctrl-C to `parent` and ends when that one is gone, whichever thread started it.

    `die_with_parent` would end it with the thread that forked it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(POLL_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, name="parent", daemon=True).start()
