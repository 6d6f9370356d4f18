"""Starts real training processes for the tests, and ends them all, whatever happens."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import closing, suppress
from pathlib import Path

from repa_scale.run_folder import read_metrics, read_status

BIN = Path(sys.executable).parent
EXACT = ("loss", "denoising_loss", "alignment_loss", "grad_norm", "learning_rate", "batch_fingerprint", "loss_scale")
PATIENCE = 180.0  # seconds that a run of a test may take

# A run of seconds: the digits in pixel space, 16 tokens, the real encoder on 64-pixel images.
SMALL = (
    "experiment=demo_repa",
    "model.name=SiT-Nano/2",
    "alignment.repa.depth=1",
    "alignment.repa.projector_dim=32",
    "train.global_batch=8",
    "train.steps=12",
    "train.log_every=1",
    "train.checkpoint_every=100",
    "data.workers=0",
    "sample.count=4",
    "sample.steps=2",
    "tracking.uri=none",
)


STARTED: list[Launch] = []


def end_all() -> None:
    """Kills whatever a test left running."""
    while STARTED:
        STARTED.pop().kill()


class Launch:
    """One start of a run: alone, under `deepspeed` or under `torchrun`."""

    def __init__(
        self,
        words: list[str],
        run: Path,
        processes: int = 2,
        launcher: str = "torchrun",
        restarts: int = 0,
        **environment: str,
    ) -> None:
        STARTED.append(self)
        self.run = run
        words = [*words, f"run.dir={run}"]
        # With FAULTS the same entry runs, after the faults are laid.
        module = "faults.worker" if "FAULTS" in environment else "repa_scale.train"
        environment["PYTHONPATH"] = f"{Path(__file__).parent}:{os.environ.get('PYTHONPATH', '')}"
        if launcher == "deepspeed":
            command = [BIN / "deepspeed", "--num_gpus", processes, "--master_port", free_port(), "--module", module]
        elif launcher == "torchrun":
            command = [BIN / "torchrun", "--nproc-per-node", processes, "--master-port", free_port()]
            command += ["--max-restarts", restarts, "-m", module]
        else:
            assert processes == 1
            command = [sys.executable, "-m", module]
        self.output = run.with_name(f"{run.name}.output-{time.time_ns()}")
        with self.output.open("w") as sink:
            self.process = subprocess.Popen(
                [str(word) for word in (*command, *words)],
                stdout=sink,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", **environment},
                start_new_session=True,
            )

    def wait(self, patience: float = PATIENCE) -> int:
        """The launcher's exit code."""
        try:
            return self.process.wait(patience)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the run did not end in {patience} s:\n{self.text()}") from None
        finally:
            self.kill()

    def succeed(self) -> list[dict]:
        """Waits for the run, which must complete, and returns its metrics."""
        code = self.wait()
        assert code == 0, f"exit code {code}:\n{self.text()}"
        assert read_status(self.run)["state"] == "completed"
        return read_metrics(self.run)

    def wait_for_step(self, step: int, patience: float = PATIENCE) -> None:
        """Returns as soon as metrics.jsonl of this start holds the step."""
        deadline = time.monotonic() + patience
        while last_step(self.run) < step:
            assert self.process.poll() is None, f"the run ended before step {step}:\n{self.text()}"
            assert time.monotonic() < deadline, f"step {step} did not come:\n{self.text()}"
            time.sleep(0.005)

    def ranks(self) -> list[int]:
        """Process ids of the training processes, by rank; torchrun gives each a session of its own."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                words = (folder / "cmdline").read_bytes().split(b"\0")
                environment = (folder / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            variables = dict(entry.split(b"=", 1) for entry in environment if b"=" in entry)
            if f"run.dir={self.run}".encode() in words and b"RANK" in variables:
                found.setdefault(int(variables[b"RANK"]), int(folder.name))
        return [found[rank] for rank in sorted(found)]

    def kill(self) -> None:
        """SIGKILL to every process of this start."""
        for rank in self.ranks():
            with suppress(ProcessLookupError):
                os.kill(rank, signal.SIGKILL)
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def text(self) -> str:
        """What the processes printed."""
        return self.output.read_text(errors="replace")[-6000:]


def train(
    words: list[str], run: Path, processes: int = 2, launcher: str = "torchrun", **environment: str
) -> list[dict]:
    """Runs to the end and returns the metrics."""
    return Launch(words, run, processes, launcher, **environment).succeed()


def exact(rows: list[dict]) -> list[tuple]:
    """What must be equal to the last bit, step by step."""
    return [(row["step"], *(row.get(key) for key in EXACT)) for row in rows]


def assert_close(ours: list[dict], theirs: list[dict], relative: float) -> None:
    """Losses and norms within `relative`; the same steps and the same batches.

    The alignment loss is a cosine and starts near 0, so it is held to `relative` of at least a hundredth of its range.
    """
    assert [(row["step"], row["batch_fingerprint"]) for row in ours] == [
        (row["step"], row["batch_fingerprint"]) for row in theirs
    ]
    for a, b in zip(ours, theirs, strict=True):
        for key in ("loss", "denoising_loss", "alignment_loss", "grad_norm"):
            if key in b:
                scale = max(abs(b[key]), 0.01) if key == "alignment_loss" else abs(b[key])
                assert abs(a[key] - b[key]) <= relative * scale, (a["step"], key, a[key], b[key])


def last_step(run: Path) -> int:
    try:
        lines = (run / "metrics.jsonl").read_text().splitlines()
        return max((json.loads(line)["step"] for line in lines), default=0)
    except (OSError, ValueError):
        return 0


def free_port() -> int:
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
