"""Python on another node, over ssh without questions: what starts it, the events that it says, why it ended.

No process is started here: doctor/nodes.py and channel.py do, each in its way.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

SSH = ("ssh", "-T", "-o", "BatchMode=yes", "-o", "ConnectTimeout=15")


def python_on(host: str, module: str, *words: str, variables: Sequence[str] = ()) -> list[str]:
    """The command of `python -m module words`: the same Python at the same path. To be run in `/`, as it is over ssh.

    Args:
        host: its name; empty for this machine.
        variables: `NAME=VALUE` for the environment on another node; nothing secret, for everyone sees command lines.
    """
    command = [sys.executable, "-u", "-m", module, *words]
    if not host:
        return command
    path = [f"PYTHONPATH={os.environ['PYTHONPATH']}"] if os.environ.get("PYTHONPATH") else []
    # Not in a folder where another one of the package's name could lie.
    return [*SSH, host, f"cd / && exec {shlex.join(['env', *path, *variables, *command])}"]


def events(lines: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    """The objects with an `event` among the lines. Greetings of a log-in shell are passed over."""
    for line in lines:
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict) and "event" in event:
            yield event


def last_words(lines: Iterable[bytes]) -> str:
    """The last line that ssh or the node's Python wrote to stderr."""
    said = [text for line in lines if (text := line.decode(errors="replace").strip())]
    said = [text for text in said if not text.startswith("Warning: Permanently added")]
    return said[-1] if said else "no reason given"
