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
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

PR_SET_PDEATHSIG = 1
WISHES = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
STUCK_SECONDS = 120.0  # for a process that was killed: a driver may hold it, with the memory of its GPU
TELL_SECONDS = 2.0
REMEDY = "reboot its node, or leave it out (--exclude)"
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


@dataclass(frozen=True)
class Process:
    """A process of this machine, as it was when it was found.

    Attributes:
        began: its start in clock ticks since boot, which tells it from a later one of the same number.
    """

    pid: int
    began: int
    command: str

    def __str__(self) -> str:
        return f"process {self.pid} ({self.command})"

    def there(self) -> bool:
        """Whether it still holds what it held: memory, files, GPUs."""
        return _began(self.pid) == self.began and alive(self.pid)


def end_all_marked(
    variable: str,
    value: str,
    known: Iterable[Process] = (),
    tell: Callable[[list[Process]], None] = lambda left: None,
) -> list[Process]:
    """SIGKILL to every process of this machine with `variable=value` in its environment, until there is none.

    One that a driver holds ends when the driver lets it, and its GPU's memory is not free before.

    Args:
        known: of them, found earlier. One that is ending has no environment any more by which to find it.
        tell: told once of those that are still there after TELL_SECONDS.

    Returns:
        Those that are still there after STUCK_SECONDS.
    """
    found, told, began = set(known), False, time.monotonic()
    while True:
        found |= set(marked(variable, value))
        left = sorted((process for process in found if process.there()), key=lambda process: process.pid)
        waited = time.monotonic() - began
        if not left or waited >= STUCK_SECONDS:
            return left
        if waited >= TELL_SECONDS and not told:
            told = True
            tell(left)
        for process in left:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(process.pid, signal.SIGKILL)
        time.sleep(0.1)


def marked(variable: str, value: str) -> list[Process]:
    """Living processes with `variable=value` in the environment that they were started with, this one left out."""
    wanted = f"{variable}={value}".encode()
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if wanted in (folder / "environ").read_bytes().split(b"\0") and int(folder.name) != os.getpid():
                found.append(process_of(int(folder.name)))
    return [process for process in found if process is not None and process.there()]


def process_of(pid: int) -> Process | None:
    """The process that has this number now."""
    began = _began(pid)
    if began is None:
        return None
    words = b""
    with suppress(OSError):
        words = Path(f"/proc/{pid}/cmdline").read_bytes()
    command = " ".join(words.decode(errors="replace").split("\0")).strip()
    return Process(pid, began, command if len(command) <= 120 else f"{command[:120]}...")


def alive(pid: int) -> bool:
    """Whether there is such a process with a thread that is no zombie. The first thread is one as soon as it has
    ended, though a driver may hold another, and with it all memory."""
    try:
        threads = os.listdir(f"/proc/{pid}/task")
    except OSError:
        return False
    return any((stat := _stat(f"{pid}/task/{thread}")) and stat[0] not in (b"Z", b"X") for thread in threads)


def _began(pid: int) -> int | None:
    stat = _stat(str(pid))
    return int(stat[19]) if stat else None


def _stat(of: str) -> list[bytes]:
    """The fields of /proc/OF/stat from the state on; empty where there is none."""
    try:
        return Path(f"/proc/{of}/stat").read_bytes().rsplit(b")", 1)[1].split()
    except OSError:
        return []


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
