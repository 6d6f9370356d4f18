"""A node's side of the doctor: `python -m repa_scale.doctor.node`. Answers in lines of JSON on its standard output.

First `clock` questions, for the time that passes on the way, then a Look; each check is announced before it begins, so
that the asking side can name one that hangs.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
import traceback

from repa_scale.doctor.finding import FAIL, Finding, Look


def main() -> int:
    """Reads questions until the standard input ends."""
    speak = _own_output()
    connection = os.environ.get("SSH_CONNECTION", "").split()  # client and its port, this node and its port
    speak(event="ready", address=connection[2] if len(connection) == 4 else "127.0.0.1")
    for line in sys.stdin:
        question = json.loads(line)
        if question["ask"] == "clock":
            speak(event="clock", time=time.time())
        else:
            answer(Look(**question["look"]), speak)
    return 0


def answer(look: Look, speak) -> None:
    """Runs every check (with `fetch` that of the weights alone), and tells the findings and facts."""
    from repa_scale.doctor import software
    from repa_scale.doctor.table import CHECKS

    os.environ.update(look.variables)
    chosen = {"weights": CHECKS["weights"]} if look.fetch else CHECKS
    findings = []
    for name, check in chosen.items():
        speak(event="begins", check=name)
        findings += run(name, check, look)
    speak(
        event="done",
        findings=[dataclasses.asdict(each) for each in findings],
        facts={} if look.fetch else software.facts(look),
    )


def run(name: str, check, look: Look) -> list[Finding]:
    """A check's findings; one that breaks is a finding too."""
    try:
        return check(look)
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        words = f"{type(error).__name__}: {error} ({os.path.basename(last.filename)}:{last.lineno})"
        return [Finding(name, FAIL, f"the check itself failed: {words}", "mend that, or report it")]


def _own_output():
    """Takes the standard output for the answers alone: what libraries print goes to the standard error."""
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def speak(**words) -> None:
        out.write(json.dumps(words) + "\n")

    return speak


if __name__ == "__main__":
    sys.exit(main())
