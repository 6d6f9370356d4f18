"""A run on two nodes that is broken at random each minute, under `supervise`: it completes, with the undisturbed curve.

The nodes are namespaces of this machine (tests/two_nodes/nodes.py; root, sshd, pdsh). First the run is trained
undisturbed, on two processes of one node; then over both nodes, while something of it is killed or the network is
parted. Losses, norms and batches of every step must be equal to the last bit.

    python -m benchmarks.soak --minutes 30
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from benchmarks.rows import write_row
from repa_scale.run_folder import read_metrics, read_status

ROOT = Path(__file__).resolve().parents[1]
sys.path += [str(ROOT / "tests"), str(ROOT / "tests" / "two_nodes")]

from jobs import TINY, last_step  # noqa: E402
from launching import BIN, exact  # noqa: E402
from nodes import TwoNodes, why_not  # noqa: E402

# What is killed: a node, and a part of the command line.
VICTIMS = {
    "rank on A": ("a", "repa_scale.launch.entry"),
    "rank on B": ("b", "repa_scale.launch.entry"),
    "launch.py on A": ("a", "deepspeed.launcher.launch --world_info"),
    "launch.py on B": ("b", "deepspeed.launcher.launch --world_info"),
    "deepspeed": ("a", "bin/deepspeed"),
    "launch": ("a", "bin/repa-scale launch"),
    "guard on B": ("b", "repa_scale.launch.guard"),
}
PARTED_SECONDS = 12.0
LOST_AFTER = 6


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0, help="how long it is disturbed, at least about")
    parser.add_argument("--every", type=float, default=40.0, help="seconds that each start trains until it is broken")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if reason := why_not():
        print(f"soak: {reason}", file=sys.stderr)
        return 1
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    try:
        with TwoNodes(folder / "nodes") as nodes:
            soak(nodes, folder, args)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return 0


def soak(nodes: TwoNodes, folder: Path, args: argparse.Namespace) -> None:
    data = folder / "digits"
    done = nodes.run(nodes.a, BIN / "repa-scale", "prepare", "digits", "--out", data, "--size", "8")
    assert done.returncode == 0, done.stderr
    words = [*TINY, f"data.path={data}", "train.checkpoint_every=50", "checkpoint.keep_last=2"]

    alone = [BIN / "repa-scale", "launch", "--num_gpus", "2", *words]
    calibration = nodes.run(nodes.a, *alone, "train.steps=60", f"run.dir={folder}/calibration")
    assert calibration.returncode == 0, calibration.stdout[-3000:] + calibration.stderr
    seconds = [row["step_seconds"] for row in read_metrics(folder / "calibration")[20:]]
    # About a third of each minute goes into starting again.
    steps = max(100, round(0.6 * 60.0 * args.minutes / (sum(seconds) / len(seconds))))
    words.append(f"train.steps={steps}")
    print(f"soak: {steps} steps of {1000 * sum(seconds) / len(seconds):.0f} ms", flush=True)

    run = folder / "run"
    command = [BIN / "repa-scale", "supervise", "--pause", 1, "--", BIN / "repa-scale", "launch"]
    command += ["--hostfile", nodes.hostfile, "--lost_after", LOST_AFTER, *words, f"run.dir={run}"]
    began = time.monotonic()
    process = nodes.start(nodes.a, command, folder, folder / "output")
    faults = disturb(nodes, process, run, args.every, random.Random(args.seed))
    code, took = process.wait(), time.monotonic() - began
    text = (folder / "output").read_text(errors="replace")
    assert code == 0 and read_status(run)["state"] == "completed", f"code {code}\n{text[-4000:]}"
    left = [line for here in nodes.processes("repa_scale", "deepspeed").values() for line in here.values()]
    assert not left, left

    undisturbed = nodes.run(nodes.a, *alone, f"train.steps={steps}", f"run.dir={folder}/undisturbed")
    assert undisturbed.returncode == 0, undisturbed.stderr
    assert exact(read_metrics(run)) == exact(read_metrics(folder / "undisturbed")), "another curve"
    starts = read_status(run)["attempt"]
    print(
        f"soak: {len(faults)} faults in {took / 60:.1f} minutes, {starts} starts, {steps} steps: the undisturbed curve"
    )
    path = write_row(
        "soak", {"minutes": took / 60, "steps": steps, "starts": starts, "faults": faults, "seed": args.seed}
    )
    print(f"soak: a row in {path}")


def disturb(nodes: TwoNodes, process, run: Path, every: float, chance: random.Random) -> list[str]:
    """One fault each time that a start has trained for `every` seconds, until the run ends. Returns their names."""
    faults, broken, trains_since = [], 0, 0.0  # `broken`: the last attempt that was disturbed
    while process.poll() is None:
        time.sleep(0.2)
        attempt = last_attempt(run)
        if attempt <= broken:
            trains_since = 0.0
            continue
        trains_since = trains_since or time.monotonic()
        if time.monotonic() - trains_since < every:
            continue
        fault = chance.choice([*VICTIMS, "network"])
        if fault == "network":
            nodes.part()
            time.sleep(PARTED_SECONDS)
            nodes.rejoin()
        else:
            node, part = VICTIMS[fault]
            name = nodes.a.name if node == "a" else nodes.b.name
            victims = [pid for pid, line in nodes.processes(part)[name].items() if "supervise" not in line]
            if not victims:
                continue
            with suppress(ProcessLookupError):
                os.kill(victims[0], signal.SIGKILL)
        broken = attempt
        faults.append(fault)
        print(f"soak: start {attempt}, step {last_step(run)}: {fault}", flush=True)
    return faults


def last_attempt(run: Path) -> int:
    """Of the last row of metrics.jsonl; 0: there is none."""
    try:
        return json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["attempt"]
    except (OSError, ValueError, IndexError):
        return 0


if __name__ == "__main__":
    sys.exit(main())
