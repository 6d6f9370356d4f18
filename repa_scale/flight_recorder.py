"""PyTorch's flight recorder: the last collectives of each rank, kept in memory, written when a run hangs.

`torchfrtrace --prefix flight_recorder_rank_ RUN/log` compares the files of all ranks and names the collective.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import MutableMapping
from pathlib import Path

PREFIX = "flight_recorder_rank_"
SECONDS = 10.0  # for a dump: NCCL may hold what it asks for
ENTRIES = 2000  # collectives, about 1 kB each
# torch reads the first of these that is set.
SIZE = ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE")
FILE = ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE")

log = logging.getLogger("repa_scale")


def prepare(folder: Path, environment: MutableMapping[str, str] = os.environ) -> None:
    """Switches it on, and sends NCCL's own dumps to `folder` too. Before the process group; set variables stay."""
    environment.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    for names, value in ((SIZE, str(ENTRIES)), (FILE, str(folder.absolute() / PREFIX))):
        if not any(name in environment for name in names):
            environment[names[0]] = value


def dump(folder: Path, rank: int, device: str) -> Path | None:
    """Writes what this rank has recorded. None: nothing could be had in `SECONDS`.

    Args:
        device: `cuda` or `cpu`, where the collectives run.
    """
    from torch._C import _distributed_c10d as c10d

    ask = getattr(c10d, "_dump_nccl_trace" if device == "cuda" else "_dump_fr_trace", None)
    if ask is None:  # a torch without it
        return None
    path = folder / f"{PREFIX}{rank}"
    written = threading.Event()

    def write() -> None:
        try:
            # Without stacks: to name their lines takes seconds, and the log has Python's.
            path.write_bytes(ask(includeCollectives=True, includeStackTraces=False, onlyActive=False))
            written.set()
        except (OSError, RuntimeError) as error:
            log.error("the flight recorder cannot be written: %s", error)

    thread = threading.Thread(target=write, name="flight recorder", daemon=True)
    thread.start()
    thread.join(SECONDS)
    return path if written.is_set() else None
