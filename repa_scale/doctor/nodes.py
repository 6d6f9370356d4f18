"""The asking side of the doctor: starts doctor.node on every node at once, here or over ssh, and hears its answers."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from repa_scale.doctor.finding import FAIL, Finding, Look
from repa_scale.launch.environment import plain
from repa_scale.launch.remote import events, last_words, python_on

CLOCK_QUESTIONS = 5
AT_ONCE = 64  # ssh connections


@dataclass
class Answer:
    """What a node said.

    Attributes:
        facts: of software.facts; empty where it did not come so far.
        address: at which ssh reached it.
        offset, uncertainty: seconds by which its clock is ahead of this machine's, and how well that is known.
    """

    node: str
    findings: list[Finding] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    address: str = ""
    offset: float = 0.0
    uncertainty: float = float("inf")


def ask_all(hosts: list[str], looks: list[Look], patience: float) -> list[Answer]:
    """The answers of all nodes, in their order. A host that is empty is this machine.

    Args:
        patience: seconds for one node; what hangs longer is a finding.
    """
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(lambda pair: ask(*pair, patience), zip(hosts, looks, strict=True)))


def ask(host: str, look: Look, patience: float) -> Answer:
    """One node's answer."""
    answer = Answer(host or os.uname().nodename)
    process = start(host, "repa_scale.doctor.node", subprocess.PIPE)
    timer = threading.Timer(patience, process.kill)
    timer.start()
    doing = "the connection"
    try:
        if (ready := _event(process)) is None:
            return _unreached(answer, host, process, timer)
        doing, answer.address = "its clock", ready["address"]
        for _ in range(CLOCK_QUESTIONS):
            _measure_clock(process, answer)
        _tell(process, ask="look", look=dataclasses.asdict(look))
        while (event := _event(process)) is not None:
            if event["event"] == "begins":
                doing = event["check"]
            elif event["event"] == "done":
                answer.findings = [Finding(**{**each, "node": answer.node}) for each in event["findings"]]
                answer.facts = event["facts"]
                return answer
        raise OSError
    except (OSError, ValueError):
        hung = not timer.is_alive()
        found = f"no answer in {patience:.0f} s" if hung else f"it ended: {last_words(process.stderr)}"
        remedy = "a file system or driver that hangs is the usual reason: try it by hand on the node"
        answer.findings = [Finding(doing, FAIL, found, remedy, answer.node)]
        return answer
    finally:
        timer.cancel()
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout, process.stderr):
            stream.close()


def start(host: str, module: str, stdin: int, *words: str, variables: Sequence[str] = ()) -> subprocess.Popen:
    """`python -m module words` on a node (launch/remote.py), with pipes for what it says."""
    return subprocess.Popen(
        python_on(host, module, *words, variables=variables),
        env=plain(os.environ) if host else None,
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd="/",
    )


def _unreached(answer: Answer, host: str, process: subprocess.Popen, timer: threading.Timer) -> Answer:
    hung = not timer.is_alive()
    process.kill()
    words = "no answer" if hung else last_words(process.stderr)
    remedy = f"ssh {host} true must work without a question: its name, its key in known_hosts, yours in authorized_keys"
    if process.wait() not in (255, -9):
        remedy = f"the same Python must be on every node: {sys.executable} with repa-scale installed"
    answer.findings = [Finding("reached", FAIL, words, remedy, answer.node)]
    return answer


def _measure_clock(process: subprocess.Popen, answer: Answer) -> None:
    """The node's time lies within the question's way there and back: the quickest of several tells most."""
    before = time.time()
    _tell(process, ask="clock")
    event = _event(process)
    after = time.time()
    if event is None:
        raise OSError
    if (after - before) / 2 < answer.uncertainty:
        answer.uncertainty = (after - before) / 2
        answer.offset = event["time"] - (before + after) / 2


def _tell(process: subprocess.Popen, **words: object) -> None:
    process.stdin.write((json.dumps(words) + "\n").encode())
    process.stdin.flush()


def _event(process: subprocess.Popen) -> dict | None:
    """The next event; None: there will be none."""
    return next(events(process.stdout), None)
