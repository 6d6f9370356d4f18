"""`repa-scale compare` on an MLflow store of 20 runs with 100,000 logged points each: under 20 s from start to page.

python -m benchmarks.evaluate_compare [--runs 20] [--points 100000]

The store is filled by SQL, for filling it through MLflow takes longer than all the rest; it is read as any store is.
"""

from __future__ import annotations

import argparse
import json
import random
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.rows import write_row
from repa_scale.compose import compose
from repa_scale.evaluations import PREFIX
from repa_scale.tracking import flatten, mlflow_client
from repa_scale.train import run_identity

GOAL = 20.0  # seconds
RUNS, POINTS = 20, 100_000
EXPERIMENT = "sweep"
KEYS = (
    "attempt", "samples", "loss", "denoising_loss", "alignment_loss", "grad_norm", "learning_rate",
    "images_per_second", "step_seconds", "data_wait_seconds", "encoder_seconds", "latent_seconds", "alignment_seconds",
    "peak_memory_bytes", "goodput", "productive_seconds", "lost_startup_seconds", "lost_data_seconds",
    "lost_save_seconds", "lost_restart_seconds",
)  # fmt: skip
EVERY = 50  # steps between rows
METRIC = f"{PREFIX}fid_n50000"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=RUNS)
    parser.add_argument("--points", type=int, default=POINTS, help="of each run, all metrics together")
    args = parser.parse_args()
    for row in rows(args.runs, args.points):
        print(json.dumps(row, indent=1))
        write_row("evaluate_compare", row)


def rows(runs: int = RUNS, points: int = POINTS) -> Iterator[dict[str, Any]]:
    """One row: seconds of the whole command, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        uri = f"sqlite:///{folder}/mlflow.db"
        fill(uri, runs, points)
        command = [sys.executable, "-m", "repa_scale", "compare", "--uri", uri, "--experiment", EXPERIMENT]
        began = time.perf_counter()
        subprocess.run([*command, "--out", f"{folder}/report"], check=True, capture_output=True)
        seconds = time.perf_counter() - began
        size = Path(folder, "report", "index.html").stat().st_size
    yield {"runs": runs, "points_a_run": points, "seconds": round(seconds, 2), "page_bytes": size, "goal": GOAL}


def fill(uri: str, runs: int, points: int) -> None:
    """Half of the runs REPA, half baselines, of runs / 2 seeds; 16 evaluations each."""
    client = mlflow_client(uri)
    experiment = client.create_experiment(EXPERIMENT)
    logged = points // len(KEYS)
    for i in range(runs):
        method, seed = ("repa", "baseline")[i % 2], i // 2
        config = compose(["model.name=SiT-B/2", f"method={method}", f"seed={seed}", "data.path=set"])
        identity = run_identity(config, "f" * 32)
        run = client.create_run(experiment, run_name=f"{method}-{seed}").info.run_id
        tags = {"method": method, "seed": str(seed), "data_fingerprint": "f" * 32, "model": config.model.name,
                "pair_id": identity["pair_id"], "identity_hash": identity["identity_hash"],
                METRIC: json.dumps({"extractor": "inception"})}  # fmt: skip
        for key, value in tags.items():
            client.set_tag(run, key, value)
        with closing(sqlite3.connect(uri.removeprefix("sqlite:///"))) as database, database:
            settings = [(key, str(value), run) for key, value in flatten(asdict(config)).items()]
            database.executemany("INSERT INTO params (key, value, run_uuid) VALUES (?, ?, ?)", settings)
            write = "INSERT INTO {} (key, value, timestamp, run_uuid, step, is_nan) VALUES (?, ?, ?, ?, ?, 0)"
            values = _values(method, seed, run, logged)
            database.executemany(write.format("metrics"), values)
            newest = {value[0]: value for value in values}
            database.executemany(write.format("latest_metrics"), newest.values())
        client.set_terminated(run)


def _values(method: str, seed: int, run: str, logged: int) -> list[tuple[str, float, int, str, int]]:
    draw = random.Random(seed).random
    rows = [(i * EVERY, 1_700_000_000_000 + i * 10_000) for i in range(1, logged + 1)]
    values = [
        (key, 1.0 if key == "attempt" else draw() + 0.2, stamp, run, step) for key in KEYS for step, stamp in rows
    ]
    speed = 3.0 if method == "repa" else 1.0
    for i in range(1, 17):
        step, stamp = rows[i * logged // 16 - 1]
        fid = 8 + 60 * (speed * step / (logged * EVERY / 16)) ** -0.7 + 0.1 * draw()
        values += [
            (METRIC + end, fid * by, stamp, run, step) for end, by in (("", 1.0), ("_low", 0.99), ("_high", 1.01))
        ]
    return values


if __name__ == "__main__":
    main()
