"""The launcher's side of the connection to a node's guard."""

from __future__ import annotations

import json
import os
import queue
import shlex
import subprocess
import sys
import threading
import time
from contextlib import suppress
from typing import Any

from repa_scale.launch.environment import plain
from repa_scale.processes import start_deaf

SSH = ("ssh", "-T", "-o", "BatchMode=yes", "-o", "ConnectTimeout=15")
GUARD = ("-u", "-m", "repa_scale.launch.guard")


class NodeError(Exception):
    """A node cannot be reached, or does not answer. It may later: starting again can help."""


class Channel:
    """A guard, on another node over ssh or on this one.

    Args:
        host: its name; empty for this machine.
        node: its place among the nodes; -1: this machine, where it is none of them.
        inbox: takes (channel, event) for each word of the guard, and (channel, {"event": "gone"}) at the end.
    """

    def __init__(self, host: str, node: int, inbox: queue.Queue) -> None:
        self.host, self.node, self.inbox = host, node, inbox
        self.name = host or "this machine"
        self.facts: dict[str, Any] = {}
        self.heard = time.monotonic()
        self.gone = False
        self.process = start_deaf(
            command(host),
            env=plain(os.environ) | _python_path(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd="/",
            start_new_session=True,  # Ctrl-C is the launcher's business
        )
        self._errors: list[str] = []
        self._threads = [threading.Thread(target=target, daemon=True) for target in (self._listen, self._read_errors)]
        for thread in self._threads:
            thread.start()

    def tell(self, action: str, **facts: object) -> None:
        """Returns at once, also where the guard is gone: `inbox` then says so."""
        with suppress(OSError, ValueError):
            self.process.stdin.write((json.dumps({"do": action, **facts}) + "\n").encode())
            self.process.stdin.flush()

    def close(self) -> None:
        """Ends the guard, which ends what is left of the job on its node."""
        self.tell("end")
        with suppress(OSError, ValueError):
            self.process.stdin.close()
        try:
            self.process.wait(5.0)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def complaint(self) -> str:
        """The last words of ssh or of the guard's Python."""
        self._threads[1].join(1.0)
        lines = [line for line in self._errors if line.strip() and not line.startswith("Warning: Permanently added")]
        return lines[-1].strip() if lines else "no reason given"

    def _listen(self) -> None:
        for line in self.process.stdout:
            self.heard = time.monotonic()
            with suppress(ValueError):  # greetings of a log-in shell
                event = json.loads(line)
                if isinstance(event, dict) and "event" in event:
                    self.inbox.put((self, event))
        self.gone = True
        self.inbox.put((self, {"event": "gone"}))

    def _read_errors(self) -> None:
        for line in self.process.stderr:
            self._errors = [*self._errors[-20:], line.decode(errors="replace")]


def command(host: str) -> list[str]:
    """What starts a guard; nothing of the job stands in it."""
    words = [sys.executable, *GUARD]
    if not host:
        return words
    if path := os.environ.get("PYTHONPATH"):
        words = ["env", f"PYTHONPATH={path}", *words]
    return [*SSH, host, f"cd / && exec {shlex.join(words)}"]  # not where a folder of the same name could lie


def _python_path() -> dict[str, str]:
    return {"PYTHONPATH": os.environ["PYTHONPATH"]} if "PYTHONPATH" in os.environ else {}


def await_all(channels: list[Channel], answer: str, seconds: float) -> None:
    """Waits until each has said `answer`; what it said with it goes to `facts` of the channel.

    Raises:
        NodeError: one is gone or does not answer.
    """
    inbox = channels[0].inbox
    waiting = set(channels)
    until = time.monotonic() + seconds
    while waiting:
        try:
            channel, event = inbox.get(timeout=max(0.0, until - time.monotonic()))
        except queue.Empty:
            names = ", ".join(sorted(channel.name for channel in waiting))
            raise NodeError(f"{names} did not answer in {seconds:.0f} s; try: {_try(next(iter(waiting)))}") from None
        if event["event"] == "gone":
            raise NodeError(
                f"{channel.name} cannot be used ({channel.complaint()}); try: {_try(channel)}; "
                "each node needs ssh without a password, and repa_scale in the same place"
            )
        if event["event"] == answer:
            channel.facts |= event
            waiting.discard(channel)


def _try(channel: Channel) -> str:
    return shlex.join([*command(channel.host)[:-1], f"{sys.executable} -c 'import repa_scale'"])
