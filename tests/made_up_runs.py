"""Run folders made from curves, for tests of the comparison: the files of docs/run_folder.md, without training."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from repa_scale import evaluations
from repa_scale.compose import compose, resolved_yaml
from repa_scale.pictures import save_sheet
from repa_scale.train import run_identity

PROTOCOL = {"extractor": "inception", "reference": "cifar10", "weights": "ema", "sampler": "sde", "steps": 250,
            "guidance": 1.0, "labels": "balanced", "seed": 0}  # fmt: skip
EVALUATED = tuple(range(25_000, 400_001, 25_000))
TERM = ("alignment.repa.encoder=dinov2-vit-b", "alignment.repa.depth=4")


def quality(step: float) -> float:
    """A FID that falls from 68 at 25,000 steps to 17 at 400,000."""
    return 8 + 60 * (step / 25_000) ** -0.7


def write_run(
    folder: Path,
    method: str = "repa",
    seed: int = 0,
    curve: Callable[[float], float] = quality,
    words: tuple[str, ...] = (),
    steps: tuple[int, ...] = EVALUATED,
    metric: str = "fid",
    count: int = 50_000,
    protocol: dict | None = None,
    step_seconds: float = 0.2,
    state: str = "completed",
    tags: dict | None = None,
    margin: float = 0.0,
    rows: int = 40,
) -> Path:
    """A run of 400,000 steps whose evaluations follow `curve`. margin: half the samples' interval, relative."""
    folder.mkdir(parents=True)
    term = TERM if method == "repa" else ()
    last = steps[-1] if steps else EVALUATED[-1]
    words = ("model.name=SiT-B/2", f"method={method}", f"seed={seed}", f"train.steps={last}", "data.path=set",
             "train.global_batch=256", f"run.dir={folder}", *term, *words)  # fmt: skip
    config = compose(list(words))
    identity = run_identity(config, "f" * 32)
    (folder / "config.yaml").write_text(resolved_yaml(config))
    (folder / "identity.json").write_text(json.dumps(identity))
    seconds = step_seconds * (1.1 if method == "repa" else 1.0)
    random = np.random.default_rng(seed)
    with (folder / "metrics.jsonl").open("w") as file:
        for step in np.linspace(last / rows, last, rows).astype(int).tolist():
            row = {
                "step": step, "attempt": 1, "time": 1.7e9 + seconds * step, "samples": 256 * step,
                "loss": 0.6 + 50 / step, "denoising_loss": 0.55 + 40 / (step + 100) + random.normal(0, 0.002),
                "grad_norm": 0.3, "learning_rate": 1e-4, "images_per_second": 256 / seconds, "step_seconds": seconds,
                "data_wait_seconds": 0.002, "encoder_seconds": 0.1 * step_seconds if method == "repa" else 0.0,
                "latent_seconds": 0.01, "alignment_seconds": 0.005 if method == "repa" else 0.0,
                "peak_memory_bytes": 2.1e10, "productive_seconds": seconds * step, "lost_startup_seconds": 60.0,
                "lost_restart_seconds": 0.0, "lost_repeated_seconds": 0.0, "goodput": 0.97, "skipped_steps": 0,
            }  # fmt: skip
            file.write(json.dumps(row) + "\n")
    for step in steps:
        value = curve(step)
        low, high = (value * (1 + side * margin) if margin else None for side in (-1, 1))
        one = evaluations.Evaluation(
            step, 1, 1.7e9 + step, metric, value, count, low, high, PROTOCOL | (protocol or {})
        )
        evaluations.append(folder, one)
    status = {"state": state, "step": last, "attempt": 1, "reason": "", "updated": 4e9}
    (folder / "status.json").write_text(json.dumps(status))
    described = {"device": "NVIDIA H100", "world_size": "8", "zero_stage": "3", "git_commit": "c" * 40}
    described |= {"versions": "torch 2.13.0", "command": "repa-scale train ...", "pair_id": identity["pair_id"]}
    (folder / "tags.json").write_text(json.dumps({**described, **(tags or {})}))
    (folder / "samples").mkdir()
    images = np.random.default_rng(seed).integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)
    save_sheet(images, folder / "samples" / f"step_{last:08d}.png")
    return folder


def write_pair(root: Path, ratio: float = 3.0, seeds: int = 3, pace: float = 0.03, noise: float = 0.005) -> list[Path]:
    """REPA `ratio` times as fast as its baseline, with seeds of a pace of their own."""
    random = np.random.default_rng(7)
    folders = []
    for seed in range(seeds):
        for method, speed in (("repa", ratio), ("baseline", 1.0)):
            own = float(np.exp(random.normal(0, pace)))

            def curve(step: float, speed: float = speed * own) -> float:
                return quality(step * speed) * (1 + random.normal(0, noise))

            folders.append(write_run(root / f"{method}-seed{seed}", method, seed, curve))
    return folders
