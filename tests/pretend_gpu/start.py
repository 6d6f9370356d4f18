"""`python -m pretend_gpu.start LIBRARY RECORD CHANGES VERB ...`: `repa-scale VERB ...` on the pretend GPU.

LIBRARY is what build.py built, RECORD the file for record.py, CHANGES names of changes.py joined by commas. Faults of
`faults/worker.py` are laid as there, by FAULTS.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import sys
from pathlib import Path


def install(library: str) -> None:
    """Makes the pretend GPU this process's CUDA device. torch must not be imported yet: it looks for CUDA once."""
    assert "torch" not in sys.modules
    os.environ["TRITON_INTERPRET"] = "1"  # Triton would compile for a driver that is not there
    ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)
    from pretend_gpu import process_group, torch_cuda

    torch_cuda.install()
    process_group.install()


def main(library: str, record_file: str, changes: str, *words: str) -> int:
    """Runs a verb and returns its exit code."""
    install(library)
    from pretend_gpu import record

    record.install()
    for change in filter(None, changes.split(",")):
        getattr(importlib.import_module("pretend_gpu.changes"), change)()
    if "FAULTS" in os.environ:
        from faults import worker

        worker.lay()
    from repa_scale.cli import main as run

    try:
        return run(list(words))
    finally:
        record.write(Path(record_file))


if __name__ == "__main__":
    from repa_scale.processes import end_process

    end_process(main(*sys.argv[1:]))
