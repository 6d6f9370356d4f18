"""Where benchmark figures go: JSON rows in benchmarks/results, or in the folder that `BENCHMARK_OUT` names.

A machine that only lends its GPU gets its figures carried home, so everything a run of benchmarks/gpu.sh makes lands in
one folder of a few files, and nothing in the source tree.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).resolve().parent / "results"
OUT = "BENCHMARK_OUT"  # a folder, instead of benchmarks/results
COMMIT = "BENCHMARK_COMMIT"  # of the code, where it is not in a git repository
# Files of BENCHMARK_OUT by benchmark; all others share other.jsonl, so that few files have to be carried.
FILES = {"environment": "summary", "gpu": "summary"} | {name: name for name in ("truth", "train_throughput", "kernels")}


def device_name() -> str:
    """The GPU's name, or the CPU's architecture and number of cores that this process may use."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU {platform.machine()}, {torch.get_num_threads()} threads"


def results_folder() -> Path:
    """Where results go: the folder of `BENCHMARK_OUT`, else benchmarks/results; created when absent."""
    folder = Path(os.environ.get(OUT) or RESULTS)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def write_row(name: str, row: dict[str, Any]) -> Path:
    """Append `row`, with device, versions, commit and date, to the file of benchmark `name`; return the file."""
    whole = {
        "benchmark": name,
        "device": device_name(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        **row,
    }
    path = results_folder() / f"{FILES.get(name, 'other') if os.environ.get(OUT) else name}.jsonl"
    with path.open("a") as file:
        file.write(json.dumps(whole) + "\n")
    return path


def commit() -> str:
    """The commit of the code, from `BENCHMARK_COMMIT` or git; `none` where neither knows it."""
    if known := os.environ.get(COMMIT):
        return known
    command = ["git", "rev-parse", "--short", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=RESULTS.parent)
    except OSError:  # no git on this machine
        return "none"
    return done.stdout.strip() or "none"
