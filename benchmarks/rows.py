"""Where benchmark figures go: one JSON file a benchmark and device in benchmarks/results, one row a run."""

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


def device_name() -> str:
    """The GPU's name, or the CPU's architecture and number of cores that this process may use."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU {platform.machine()}, {torch.get_num_threads()} threads"


def results_folder() -> Path:
    """Where results go: $BENCHMARK_OUT, created when absent; without it benchmarks/results."""
    folder = Path(os.environ.get("BENCHMARK_OUT") or RESULTS)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def write_row(name: str, row: dict[str, Any]) -> Path:
    """Appends `row`, with device, versions, commit and time, to NAME.jsonl in `results_folder`."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=RESULTS.parent)
    whole = {
        "benchmark": name,
        "device": device_name(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit.stdout.strip() or "none",
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        **row,
    }
    path = results_folder() / f"{name}.jsonl"
    with path.open("a") as file:
        file.write(json.dumps(whole) + "\n")
    return path
