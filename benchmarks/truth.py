"""Does training on this device compute what it computes on a CPU? A small SiT through the real trainer, under ZeRO.

Losses of 30 steps against those of a CPU (truth_reference.json), in fp32 and bf16 and under every ZeRO stage; a stopped
and resumed run against an undisturbed one, to the last bit; samples against those that a CPU draws from the checkpoint.
The runs are independent processes and go side by side.

    python -m benchmarks.truth                       on this machine's GPU, or its CPU
    python -m benchmarks.truth --write-reference     on a CPU: record the losses anew
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.command import Parser, answered, put_row
from benchmarks.rows import OUT, results_folder
from benchmarks.truth_data import make_encoder, make_set
from benchmarks.truth_run import ENCODER, GRID
from repa_scale.checkpoint import KINDS, CheckpointReader, step_folder
from repa_scale.errors import DataError, ExitCode
from repa_scale.ranks import pick_device
from repa_scale.run_folder import read_metrics

REFERENCE = Path(__file__).with_name("truth_reference.json")
TAR = "truth_checkpoint.tar"
STEPS, STOP = 30, 15
REHEARSED_STEPS, REHEARSED_STOP = 6, 3
CURVES = ("loss", "denoising_loss", "alignment_loss", "grad_norm")
# Largest difference from the CPU's curve, in units of the curve's largest value. Between one thread and two it is 2e-7;
# bf16 on a CPU is 3e-4 (losses) and 3e-3 (gradient norm) away from fp32.
FP32_BOUNDS = {"loss": 5e-5, "denoising_loss": 5e-5, "alignment_loss": 5e-5, "grad_norm": 5e-4}
# A GPU's bf16 rounds elsewhere: as far away as a few times what bf16 itself changes (the encoder too runs in bf16).
BF16_FACTOR = 4.0
LEVELS = 1  # of 255, by which a sample may differ from the CPU's


@dataclass(frozen=True)
class Check:
    """A figure and the bound that it has to keep."""

    case: str
    what: str
    value: float
    bound: float

    @property
    def passed(self) -> bool:
        return self.value <= self.bound  # false for nan

    def __str__(self) -> str:
        verdict = "ok" if self.passed else "WRONG"
        return f"{verdict:5s}  {self.case:16s}  {self.what:44s}  {self.value:.3g} (at most {self.bound:.3g})"


@dataclass(frozen=True)
class Run:
    """Arguments of one start of truth_run, and the exit code it should have."""

    name: str
    arguments: tuple[str, ...]
    wanted: ExitCode = ExitCode.COMPLETED


def main(argv: list[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.add_argument("--device", default="auto", choices=("auto", "cuda", "cpu"))
    parser.add_argument("--write-reference", action="store_true", help="record the losses of a CPU")
    args = parser.parse_args(argv)
    return answered(lambda: run(args))


def run(args: argparse.Namespace) -> int:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_set(folder / "set")
        make_encoder(folder / "encoder.safetensors", ENCODER, GRID)
        if args.write_reference:
            return write_reference(folder)
        steps, stop = (REHEARSED_STEPS, REHEARSED_STOP) if args.rehearse else (STEPS, STOP)
        device = pick_device("cpu" if args.rehearse else args.device).type
        checks = measure(folder, device, steps, stop)
    for check in checks:
        print(check)
        row = {"case": check.case, "check": check.what, "value": check.value, "bound": check.bound}
        put_row("truth", {**row, "passed": check.passed, "steps": steps}, args.rehearse)
    return 0 if all(check.passed for check in checks) else 1


def measure(folder: Path, device: str, steps: int, stop: int) -> list[Check]:
    """Runs all cases, and compares them."""
    exact = ("--steps", str(steps), "--deterministic")
    chains = [
        [Run("whole", exact)],
        [Run("resumed", (*exact, "--stop-after", str(stop)), ExitCode.PREEMPTED), Run("resumed", exact)],
        [Run("bf16", ("--steps", str(steps), "--precision", "bf16"))],
        [Run("stage2", ("--steps", str(steps), "--stage", "2"))],
        [Run("stage1", ("--steps", str(steps), "--stage", "1"))],
    ]
    started = [check for checks in _side_by_side(folder, device, chains) for check in checks]
    if not all(check.passed for check in started):
        return started
    reference = json.loads(REFERENCE.read_text())["curves"]
    curves = {name: curves_of(folder / name) for name in ("whole", "bf16", "stage2", "stage1")}
    checks = [*started]
    checks += against("fp32, stage 3", curves["whole"], reference["fp32"], FP32_BOUNDS)
    checks += against("fp32, stage 2", curves["stage2"], reference["fp32"], FP32_BOUNDS)
    checks += against("fp32, stage 1", curves["stage1"], reference["fp32"], FP32_BOUNDS)
    own = {key: BF16_FACTOR * distance(reference["bf16"][key], reference["fp32"][key]) for key in CURVES}
    checks += against("bf16, stage 3", curves["bf16"], reference["bf16"], own)
    checks += resumed(folder / "whole", folder / "resumed", steps, stop)
    file = (results_folder() if os.environ.get(OUT) else folder) / TAR  # to be carried home, or for this check alone
    pack(folder / "whole", steps, file)
    return [*checks, *read_back(file)]


def _side_by_side(folder: Path, device: str, chains: list[list[Run]]) -> Iterable[list[Check]]:
    """The chains in parallel processes: all at once on a GPU, one per core elsewhere."""
    cores = len(os.sched_getaffinity(0))
    together = len(chains) if device != "cpu" else min(cores, len(chains))
    threads = max(1, cores // together)
    with ThreadPoolExecutor(together) as pool:
        yield from pool.map(lambda chain: [start(folder, device, threads, run) for run in chain], chains)


def start(folder: Path, device: str, threads: int, run: Run) -> Check:
    """Trains in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.truth_run", folder / run.name, "--data", folder / "set"]
    command += ["--encoder", folder / "encoder.safetensors", "--device", device, *run.arguments]
    done = subprocess.run(
        list(map(str, command)),
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    print(f"-- {run.name} {' '.join(run.arguments)}: exit code {done.returncode}")
    if done.returncode != run.wanted:
        print("\n".join(done.stdout.splitlines()[-40:]), flush=True)
    return Check(run.name, f"exit code: difference from {int(run.wanted)}", abs(done.returncode - run.wanted), 0)


def curves_of(run: Path) -> dict[str, list]:
    """The curves of a run, and the fingerprints of its batches."""
    rows = read_metrics(run)
    return {key: [row.get(key) for row in rows] for key in (*CURVES, "batch_fingerprint")}


def against(case: str, curves: dict, reference: dict, bounds: dict[str, float]) -> list[Check]:
    """The curves of a run against as many steps of the reference."""
    steps = len(curves["loss"])
    others = sum(a != b for a, b in zip(curves["batch_fingerprint"], reference["batch_fingerprint"], strict=False))
    checks = [Check(case, f"{steps} steps: batches that are not the CPU's", others, 0)]
    for key, bound in bounds.items():
        checks.append(Check(case, f"{key} against the CPU's", distance(curves[key], reference[key]), bound))
    return checks


def distance(values: list[float], reference: list[float]) -> float:
    """Largest difference of the steps that both have, in units of the reference's largest value; nan if one is."""
    pairs = list(zip(map(float, values), map(float, reference), strict=False))
    differences = [abs(a - b) for a, b in pairs]
    if not pairs or any(map(math.isnan, differences)):
        return math.nan
    return max(differences) / max(abs(b) for _, b in pairs)


def resumed(whole: Path, stopped: Path, steps: int, stop: int) -> list[Check]:
    """A run that was stopped and resumed against one that was not: the same bits."""
    attempts = {row["attempt"] for row in read_metrics(stopped)}
    a, b = (CheckpointReader(run / "checkpoints" / step_folder(steps)) for run in (whole, stopped))
    other = sum(not torch.equal(a.tensor(kind, name), b.tensor(kind, name)) for kind in KINDS for name in a.names)
    curves = [{key: values[stop:] for key, values in curves_of(run).items()} for run in (whole, stopped)]
    case = f"stop at {stop}, resume"
    return [
        Check(case, "number of starts, difference from 2", abs(len(attempts) - 2), 0),
        Check(case, f"tensors of {len(KINDS) * len(a.names)} that differ", other, 0),
        Check(
            case, "curves that differ after the resume", sum(curves[0][key] != curves[1][key] for key in curves[0]), 0
        ),
    ]


def pack(run: Path, steps: int, file: Path) -> None:
    """The checkpoint, the samples that this device drew of it, and the curves, to be read on another machine."""
    step = step_folder(steps)
    with tarfile.open(file, "w") as tar:
        tar.add(run / "checkpoints" / step, step)
        tar.add(run / "samples" / f"{step}.png", "samples.png")
        tar.add(run / "metrics.jsonl", "metrics.jsonl")


def read_back(file: Path) -> list[Check]:
    """Reads the checkpoint of `pack` on this machine's CPU, and draws its samples again.

    Raises:
        DataError: the file is damaged, or holds something else.
    """
    with tempfile.TemporaryDirectory() as name:
        try:
            with tarfile.open(file) as tar:
                tar.extractall(name, filter="data")
            (folder,) = Path(name).glob("step_*")
            theirs = np.asarray(Image.open(Path(name) / "samples.png", formats=["PNG"])).astype(int)
        except (OSError, ValueError, tarfile.TarError) as error:
            raise DataError(f"{file} cannot be read ({error}); copy it again") from None
        reader = CheckpointReader(folder)
        wrong = len(reader.problems())
        checks = [Check("checkpoint", "files whose checksum does not match", wrong, 0)]
        if wrong:
            return checks
        values = (reader.tensor(kind, name) for kind in KINDS for name in reader.names)
        checks.append(Check("checkpoint", "tensors not finite", sum(not t.isfinite().all() for t in values), 0))
        ours = samples_of(folder, Path(name)).astype(int)
    differ = float(np.abs(ours - theirs).max()) if ours.shape == theirs.shape else math.inf
    return [*checks, Check("samples", "max difference from this CPU's samples (of 255)", differ, LEVELS)]


@torch.no_grad()
def samples_of(checkpoint: Path, folder: Path) -> np.ndarray:
    """The sample sheet of a checkpoint, drawn on the CPU as the trainer does: (H, W, 3) uint8."""
    from repa_scale.latents import build_latents
    from repa_scale.pictures import save_sheet
    from repa_scale.sample_grid import labels_of
    from repa_scale.sampling import sample_numbered
    from repa_scale.sizes import latent_grid
    from repa_scale.trained import open_source

    source = open_source(checkpoint)
    config, model = source.config, source.build()
    index = torch.arange(config.sample.count)
    drawn = sample_numbered(
        lambda x, t, y: model(x, t, y)[0],
        index,
        labels_of(index, config.model.num_classes),
        config.model.num_classes,
        latent_grid(config.data.image_size, config.latents.name),
        config.seed,
        config.sample,
        config.interpolant.path,
    )
    images = build_latents(config, "cpu", torch.float32).decode(drawn)
    save_sheet(images.permute(0, 2, 3, 1).numpy(), folder / "ours.png")
    return np.asarray(Image.open(folder / "ours.png"))


def write_reference(folder: Path) -> int:
    """Records the curves of a CPU."""
    chains = [[Run(name, ("--steps", str(STEPS), "--precision", name))] for name in ("fp32", "bf16")]
    checks = [check for checks in _side_by_side(folder, "cpu", chains) for check in checks]
    if not all(check.passed for check in checks):
        return 1
    curves = {name: curves_of(folder / name) for name in ("fp32", "bf16")}
    for curve in curves.values():
        for key in CURVES:
            curve[key] = [float(f"{value:.9g}") for value in curve[key]]
    REFERENCE.write_text(json.dumps({"torch": torch.__version__, "numpy": np.__version__, "curves": curves}, indent=1))
    print(f"wrote {REFERENCE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
