"""Names that the launcher, the guards and the ranks of a job must agree on. Standard library alone."""

from __future__ import annotations

import os
from pathlib import Path

JOB = "REPA_SCALE_JOB"  # the job's id in the environment of everything that it started
JOB_FILE = "job.json"  # what a rank needs to start; 0600, and gone once all ranks of the node have read it
CONFIG_FILE = "config.yaml"
LOCK_FILE = "guard.lock"  # locked while the guard lives
STOPPED_BEFORE_START = 75  # the code of a rank that is asked to stop before it has anything to save


def node_folder(job: str, node: int) -> Path:
    """The job's folder on a node: in memory where there is a memory file system, so that it never reaches a disk."""
    base = Path("/dev/shm") if os.access("/dev/shm", os.W_OK | os.X_OK) else Path("/tmp")
    return base / f"repa-scale-{job}-{node}"


def write_private(path: Path, text: str) -> None:
    """Writes a new file that its owner alone can read, whole or not at all."""
    temporary = path.with_name(f".{path.name}-{os.getpid()}")
    with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
    temporary.rename(path)
