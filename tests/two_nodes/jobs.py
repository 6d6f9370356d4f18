"""Starts `repa-scale launch` inside node A and looks at what it does, for the tests of this folder."""

from __future__ import annotations

import time
from pathlib import Path

from launching import BIN, last_step
from nodes import Node, TwoNodes

from repa_scale.run_folder import read_metrics, read_status

ROOT = Path(__file__).resolve().parents[2]
OURS = ("repa_scale", "deepspeed", "pdsh")  # in the command lines of everything that a launch starts
BYSTANDER = "bystander.py"  # in those of the other job that must not be touched
PATIENCE = 150.0
TINY = (
    "experiment=demo_baseline",
    "model.name=SiT-Nano/2",
    "train.global_batch=8",
    "train.log_every=1",
    "train.checkpoint_every=100000",
    "train.sample_every=0",
    "data.workers=0",
    "tracking.uri=none",
)


class Started:
    """A launch in node A. `run` is the run folder."""

    def __init__(
        self,
        nodes: TwoNodes,
        run: Path,
        words: list[str],
        options: list[str] | None = None,
        cwd: Path | None = None,
        **environment: str,
    ) -> None:
        self.nodes, self.run = nodes, run
        cwd = cwd or run.parent
        self.output = (cwd if cwd != nodes.private else run.parent) / f"output-{time.time_ns()}"
        options = ["--hostfile", str(nodes.hostfile)] if options is None else options
        command = [BIN / "repa-scale", "launch", *options, *TINY, *words, f"run.dir={run}"]
        self.process = nodes.start(nodes.a, command, cwd, self.output, **environment)

    def text(self) -> str:
        return self.output.read_text(errors="replace")

    def wait(self, patience: float = PATIENCE) -> int:
        deadline = time.monotonic() + patience
        while self.process.poll() is None:
            assert time.monotonic() < deadline, f"did not end in {patience} s:\n{self.text()[-6000:]}"
            time.sleep(0.05)
        return self.process.returncode

    def succeed(self) -> list[dict]:
        code = self.wait()
        assert code == 0, f"code {code}:\n{self.text()[-6000:]}"
        assert read_status(self.run)["state"] == "completed"
        return read_metrics(self.run)

    def wait_for_step(self, step: int) -> None:
        deadline = time.monotonic() + PATIENCE
        while last_step(self.run) < step:
            assert self.process.poll() is None, f"ended before step {step}:\n{self.text()[-6000:]}"
            assert time.monotonic() < deadline, f"step {step} did not come:\n{self.text()[-6000:]}"
            time.sleep(0.05)

    def process_of(self, node: Node, part: str) -> int:
        """The one process of a node whose command line contains `part`."""
        (found,) = self.nodes.processes(part)[node.name]
        return found

    def wait_until_nothing_is_left(self, seconds: float) -> None:
        """No process of a launch on either node, but for those of the other job that some tests keep running there."""
        deadline = time.monotonic() + seconds
        while left := [
            line for here in self.nodes.processes(*OURS).values() for line in here.values() if BYSTANDER not in line
        ]:
            assert time.monotonic() < deadline, left
            time.sleep(0.1)
