"""The interpreter's results, made once in a process of their own, and the counts at the end of the output."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from counts import COUNTS

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def interpreted():
    """Case -> traceback, empty where it passed; and under `launches` every kind of start that was seen.

    Triton reads TRITON_INTERPRET when it is imported, and other tests have imported it here already.
    """
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, HERE / "interpreted.py"], env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    *rows, last = (json.loads(line) for line in done.stdout.splitlines())
    COUNTS["interpreter cases"] = len(rows)
    return {row["case"]: row["problem"] for row in rows} | last


def pytest_terminal_summary(terminalreporter):
    if COUNTS:
        counts = ", ".join(f"{count} {what}" for what, count in COUNTS.items())
        terminalreporter.write_line(f"kernels: {counts}")
