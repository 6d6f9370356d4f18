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
from repa_scale.launch.remote import events, last_words, python_on
from repa_scale.processes import STUCK_SECONDS, start_deaf

GUARD = "repa_scale.launch.guard"
END_SECONDS = 5.0  # for a guard to end its node's part of the job


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
        self.left: list[str] = []  # processes that outlive their SIGKILL on its node
        self.process = start_deaf(
            python_on(host, GUARD),  # nothing of the job stands in it
            env=plain(os.environ) | _python_path(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd="/",
            start_new_session=True,  # Ctrl-C is the launcher's business
        )
        self._errors: list[bytes] = []
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
        began = time.monotonic()
        # Longer only where the guard says what it waits for.
        while time.monotonic() - began < (END_SECONDS if not self.left else STUCK_SECONDS + END_SECONDS):
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(0.2)
                self._threads[0].join(1.0)  # its last words
                return
        self.process.kill()
        self.process.wait()

    def complaint(self) -> str:
        """The last words of ssh or of the guard's Python."""
        self._threads[1].join(1.0)
        return last_words(self._errors)

    def _listen(self) -> None:
        for event in events(self.process.stdout):
            self.heard = time.monotonic()
            if event["event"] == "left":
                self.left = event["processes"]
            if event["event"] != "pong":  # that one was heard is enough
                self.inbox.put((self, event))
        self.gone = True
        self.inbox.put((self, {"event": "gone"}))

    def _read_errors(self) -> None:
        for line in self.process.stderr:
            self._errors = [*self._errors[-20:], line]


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
    words = [sys.executable, "-m", "repa_scale", "--version"]
    return shlex.join(["ssh", channel.host, *words] if channel.host else words)
