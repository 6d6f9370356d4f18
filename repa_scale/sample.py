"""`repa-scale sample`: a run, a checkpoint or an export becomes images, on any number of processes the same ones."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch

from repa_scale.errors import ConfigError, ExitCode
from repa_scale.latents import build_latents
from repa_scale.pictures import save_sheet
from repa_scale.ranks import Ranks
from repa_scale.sampling import SAMPLERS, sample_numbered
from repa_scale.sizes import latent_grid
from repa_scale.trained import KINDS, load_trained

EXAMPLE = "repa-scale sample runs/first --out samples --count 64 --guidance 1.8 --interval 0 0.7"
SHEET_LIMIT = 100  # images on grid.png


def main(argv: list[str]) -> int:
    """Writes OUT/grid.png, OUT/samples.npz (arr_0: (N, H, W, 3) uint8, labels: (N,) int64) and OUT/samples.json."""
    args = _parse(argv)
    ranks = Ranks.from_environment(args.device)
    ranks.start()
    trained = load_trained(args.source, args.weights)
    config = trained.config
    settings = config.sample
    for key in ("sampler", "steps", "guidance", "interval", "count", "batch"):
        if getattr(args, key) is not None:
            setattr(settings, key, getattr(args, key))
    if settings.count < 1 or settings.steps < 1 or settings.batch < 1:
        raise ConfigError("--count, --steps and --batch must be at least 1")
    seed = config.seed if args.seed is None else args.seed
    labels = _labels(args.labels, settings.count, config.model.num_classes)

    model = trained.build(ranks.device)
    latents = build_latents(config, ranks.device, torch.float32)
    shape = latent_grid(config.data.image_size, config.latents.name)
    pieces = []
    with _progress(ranks.is_main) as bar:
        mine = torch.arange(settings.count)[ranks.rank :: ranks.world_size]
        for index in bar.track(mine.split(settings.batch), description="sampling"):
            drawn = sample_numbered(
                lambda x, t, y: model(x, t, y)[0],
                index.to(ranks.device),
                labels[index].to(ranks.device),
                config.model.num_classes,
                shape,
                seed,
                settings,
                config.interpolant.path,
            )
            pieces.append(latents.decode(drawn).cpu())
    images = torch.empty((settings.count, 3, config.data.image_size, config.data.image_size), dtype=torch.uint8)
    for rank, part in enumerate(ranks.gather_objects(torch.cat(pieces) if pieces else None)):
        if part is not None:
            images[rank :: ranks.world_size] = part
    if ranks.is_main:
        made_by = {
            **trained.facts,
            "seed": seed,
            "sampler": settings.sampler,
            "steps": settings.steps,
            "guidance": settings.guidance,
            "interval": list(settings.interval),
            "count": settings.count,
            "rounding": "round((x + 1) / 2 * 255)",
        }
        _write(Path(args.out), images.permute(0, 2, 3, 1).numpy(), labels.numpy(), made_by)
        source, step = trained.facts["source"], trained.facts["step"]
        print(f"{settings.count} samples of {source} at step {step}: {args.out}/grid.png")
    ranks.barrier()
    ranks.leave()
    return ExitCode.COMPLETED


def _write(out: Path, images: np.ndarray, labels: np.ndarray, made_by: dict) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        np.savez(out / "samples.npz", arr_0=images, labels=labels)
        (out / "samples.json").write_text(json.dumps(made_by, indent=1) + "\n")
        save_sheet(images[:SHEET_LIMIT], out / "grid.png", captions=[str(label) for label in labels[:SHEET_LIMIT]])
    except OSError as error:
        raise ConfigError(f"--out {out} cannot be written ({error.strerror}); choose another folder") from None


def _labels(asked: list[int] | None, count: int, classes: int) -> torch.Tensor:
    """The labels to draw, (count,): those asked for in turn, else all classes in turn."""
    if not asked:
        return torch.arange(count) % max(1, classes)
    if bad := [label for label in asked if not 0 <= label <= classes]:
        raise ConfigError(f"--labels {bad[0]}: this model has labels 0 to {classes - 1}, and {classes} for none")
    return torch.tensor(asked).repeat(-(-count // len(asked)))[:count]


def _progress(show: bool):
    from rich.progress import Progress

    return Progress(disable=not show, transient=True)


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="repa-scale sample", description=__doc__, epilog=f"example: {EXAMPLE}")
    parser.add_argument("source", help="a run folder, a checkpoint folder or an export")
    parser.add_argument("--out", default="samples", help="folder to write to (default: samples)")
    parser.add_argument("--weights", choices=sorted(KINDS), default="ema", help="default: ema")
    parser.add_argument("--count", type=int, help="how many images")
    parser.add_argument("--labels", type=int, nargs="+", help="classes to draw in turn (default: all)")
    parser.add_argument("--sampler", choices=sorted(SAMPLERS))
    parser.add_argument("--steps", type=int, help="steps of the sampler")
    parser.add_argument("--guidance", type=float, help="classifier-free guidance; 1: none")
    parser.add_argument("--interval", type=float, nargs=2, metavar=("LOW", "HIGH"), help="times at which it acts")
    parser.add_argument("--seed", type=int, help="default: the run's")
    parser.add_argument("--batch", type=int, help="images at a time")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    return parser.parse_args(argv)
