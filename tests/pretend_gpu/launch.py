"""Starts `repa-scale VERB` on the pretend GPU, in a process of its own, and reads what it left."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from launching import PATIENCE, SMALL
from torch import Tensor

from repa_scale.checkpoint import CheckpointReader
from repa_scale.run_folder import read_metrics

TESTS = Path(__file__).resolve().parents[1]
# Seconds of training: a grid of samples at the end, and a checkpoint on the way. DALI would ask the GPU's own decoder.
WORDS = (*SMALL, "train.steps=4", "train.checkpoint_every=2", "train.sample_every=4", "data.decoder=pillow")


@dataclass(frozen=True)
class Ended:
    """Exit code, output, and the programs that the process started."""

    code: int
    text: str
    programs: list[str]


class PretendGpu:
    """Starts verbs on the device of `library`. Record files go to `folder`."""

    def __init__(self, library: Path, folder: Path) -> None:
        self.library, self.folder = library, folder
        self.count = 0

    def start(self, *words: object, change: str = "", **environment: str) -> Ended:
        """Runs a verb to its end, whatever that is. change: of changes.py."""
        self.count += 1
        record = self.folder / f"record-{self.count}.json"
        done = subprocess.run(
            [sys.executable, "-m", "pretend_gpu.start", self.library, record, change, *map(str, words)],
            env=environment_of_child() | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=PATIENCE,
        )
        programs = json.loads(record.read_text())["programs"] if record.exists() else []
        return Ended(done.returncode, done.stdout, programs)

    def run(self, *words: object, **options: str) -> Ended:
        """Runs a verb, which must succeed, and must start nothing but git."""
        ended = self.start(*words, **options)
        assert ended.code == 0, f"exit code {ended.code}:\n{ended.text[-6000:]}"
        assert set(ended.programs) <= {"git"}, "on a GPU machine too a start compiles nothing and asks no other program"
        return ended

    def train(self, run: Path, *words: object, **options: str) -> list[dict]:
        """Trains to the end, and returns the metrics."""
        self.run("train", *WORDS, "train.device=cuda", f"run.dir={run}", *words, **options)
        return read_metrics(run)


def environment_of_child() -> dict[str, str]:
    """This process's, without the choice of DeepSpeed's accelerator: it has to find the GPU by itself."""
    inherited = {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"}
    return inherited | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{TESTS}:{os.environ.get('PYTHONPATH', '')}"}


def newest(run: Path) -> CheckpointReader:
    return CheckpointReader(run / "checkpoints" / (run / "checkpoints" / "latest").read_text().strip())


def state(run: Path, kind: str) -> Tensor:
    """All values of one kind (`master`, `exp_avg`, `exp_avg_sq`, `ema`) of the newest checkpoint, in one row."""
    reader = newest(run)
    return torch.cat([reader.read(kind, name, 0, math.prod(reader.shape(name))) for name in reader.names])


def sheet(run: Path) -> bytes:
    """The file of the last grid of samples."""
    return max((run / "samples").iterdir()).read_bytes()


def finite(rows: list[dict], *but: int) -> bool:
    """Whether losses and norms of all steps, `but` these, are numbers."""
    wanted = [row[key] for row in rows if row["step"] not in but for key in ("loss", "denoising_loss", "grad_norm")]
    return all(isinstance(value, float) and math.isfinite(value) for value in wanted)
