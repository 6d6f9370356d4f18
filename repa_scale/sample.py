"""`repa-scale sample`: a run, a checkpoint or an export becomes images, on any number of processes the same ones.

The unit of work is a block of consecutive samples, computed whole by one thread of one process and written at once. A
command that was ended goes on with the blocks that are missing; the last step puts them together.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable

import torch

from repa_scale import arithmetic
from repa_scale.config import SampleConfig
from repa_scale.errors import ConfigError, ExitCode, UserError
from repa_scale.features import weights_sha256
from repa_scale.files import write_atomically
from repa_scale.health import StopRequest
from repa_scale.latents import Latents, build_latents
from repa_scale.pictures import save_sheet
from repa_scale.ranks import Ranks
from repa_scale.sample_blocks import Blocks, Output, finished, merge
from repa_scale.sample_draw import Drawer, draw_missing
from repa_scale.sample_recipe import CLASSES, COMPILE_FROM, PRECISIONS, ROUNDING, Recipe, device_of, differing, versions
from repa_scale.sampling import SAMPLERS
from repa_scale.trained import KINDS, Trained, load_trained

EXAMPLE = (
    "repa-scale sample runs/first --n 50000 --sampler sde --steps 250 --guidance 1.8 --interval 0 0.7 --out samples.npz"
)
SHEET_LIMIT = 100  # images on grid.png
DECODE = 16  # images that a VAE decodes at a time: its maps are a thousand times a latent's size


def main(argv: list[str]) -> int:
    """Writes samples.npz (arr_0: (N, H, W, 3) uint8, labels: (N,) int64), its sidecar samples.json and, where --out is
    a folder, grid.png."""
    args = _parse(argv)
    ranks = Ranks.from_environment(args.device)
    with ranks.telling():
        _check(args)
        trained = load_trained(args.source, args.weights)
        settings = _settings(args, trained)
    with ranks.joined():
        return _run(args, trained, settings, ranks)


def _run(args: argparse.Namespace, trained: Trained, settings: SampleConfig, ranks: Ranks) -> ExitCode:
    stop = StopRequest(None)
    latents = build_latents(trained.config, ranks.device, torch.float32)
    recipe = agreed(ranks.gather_objects(make_recipe(args, trained, settings, latents, ranks.device)))
    out = Output.at(args.out)
    blocks = Blocks(out.blocks, recipe)
    there = ranks.broadcast_object(finished(out, recipe) if ranks.is_main else None)
    if there is None:
        _together(ranks, blocks.open if ranks.is_main else None)
        _together(ranks, lambda: _see(blocks))
        drawer = Drawer(trained, recipe, latents, ranks.device)
        if ranks.is_main:
            _tell_labels(recipe)
        if draw_missing(blocks, drawer, ranks, stop):
            _say(
                ranks,
                f"stopped: {blocks.finished()} of {recipe.count} samples are drawn; start the same command "
                "again to go on",
            )
            return ExitCode.PREEMPTED
        _together(ranks, (lambda: _complete(blocks, out, trained)) if ranks.is_main else None)
    if ranks.is_main:
        blocks.remove()
        source, step = trained.facts["source"], trained.facts["step"]
        print(f"{recipe.count} samples of {source} at step {step}: {out.grid or out.npz}", flush=True)
        if there:
            _say(ranks, "they were there already, whole and by the same recipe")
    ranks.barrier()
    return ExitCode.COMPLETED


def agreed(recipes: list[Recipe]) -> Recipe:
    """The recipe of all ranks.

    Raises:
        ConfigError: a rank would draw other samples.
    """
    for rank, recipe in enumerate(recipes):
        if difference := differing(recipes[0].as_json(), recipe.as_json()):
            raise ConfigError(
                f"rank {rank} would draw other samples than rank 0 ({difference}); start all processes with the same "
                "words, versions and kind of device"
            )
    return recipes[0]


def make_recipe(
    args: argparse.Namespace, trained: Trained, settings: SampleConfig, latents: Latents, device: torch.device
) -> Recipe:
    """What determines the samples that `args` ask for."""
    config, facts = trained.config, trained.facts
    precision = args.precision
    if precision == "auto":  # tf32 on a GPU is what the public sampler uses
        precision = "tf32" if device.type == "cuda" else "fp32"
    worth = device.type == "cuda" and settings.count * settings.steps >= COMPILE_FROM
    return Recipe(
        checkpoint=facts["checkpoint"],
        identity_hash=facts["identity_hash"],
        step=facts["step"],
        weights=facts["weights"],
        sampler=settings.sampler,
        steps=settings.steps,
        guidance=float(settings.guidance),
        interval=(float(settings.interval[0]), float(settings.interval[1])),
        seed=config.seed if args.seed is None else args.seed,
        count=settings.count,
        block=settings.batch if args.batch else min(settings.batch, settings.count),
        decode=DECODE,
        classes=args.labels or args.classes,
        num_classes=config.model.num_classes,
        image_size=config.data.image_size,
        path=config.interpolant.path,
        latents=(config.latents.name, config.latents.weights, weights_sha256(latents.vae)),
        precision=precision,
        compile=args.compile == "on" or (args.compile == "auto" and worth),
        rounding=ROUNDING,
        device=device_of(device),
        versions=versions(() if latents.vae is None else ("diffusers",)) | arithmetic.libraries(device),
    )


def _complete(blocks: Blocks, out: Output, trained: Trained) -> None:
    """The archive, then its sheet and sidecar, which says that all is there."""
    facts = merge(blocks, out.npz)
    recipe = blocks.recipe
    try:
        if out.grid is not None:
            labels = recipe.labels(torch.arange(min(recipe.count, SHEET_LIMIT))).tolist()
            save_sheet(blocks.first(SHEET_LIMIT), out.grid, captions=[str(label) for label in labels])
        described = {**trained.facts, **recipe.as_json(), **facts, "recipe": recipe.as_json()}
        write_atomically(out.sidecar, json.dumps(described, indent=1) + "\n")
    except OSError as error:
        raise ConfigError(f"--out {out.npz.parent} cannot be written ({error.strerror}); make room") from None


def _see(blocks: Blocks) -> None:
    if blocks.stored_recipe() != blocks.recipe.as_json():
        raise ConfigError(
            f"{blocks.folder} is not seen by every process; give an --out in a folder that all nodes share"
        )


def _together(ranks: Ranks, act: Callable[[], None] | None) -> None:
    """What some ranks do; a mistake of the user that one finds, all raise."""
    problem = None
    try:
        if act is not None:
            act()
    except UserError as error:
        problem = error
    for found in ranks.gather_objects(problem):
        if found is not None:
            raise found


def _say(ranks: Ranks, text: str) -> None:
    if ranks.is_main:
        print(text, file=sys.stderr, flush=True)


def _tell_labels(recipe: Recipe) -> None:
    """Where balanced labels cannot be balanced."""
    classes = recipe.num_classes
    if recipe.classes != "balanced" or not classes or recipe.count % classes == 0:
        return
    if recipe.count < classes:
        what = f"only the first {recipe.count} of {classes} classes are drawn, one sample each"
    else:
        each, more = divmod(recipe.count, classes)
        what = f"the first {more} of {classes} classes have {each + 1} samples, the others {each}"
    print(f"{recipe.count} samples do not divide by {classes} classes: {what}", file=sys.stderr, flush=True)


def _settings(args: argparse.Namespace, trained: Trained) -> SampleConfig:
    """The run's settings under those of the command line, checked."""
    settings = trained.config.sample
    for key in ("sampler", "steps", "guidance", "interval", "count", "batch"):
        if getattr(args, key) is not None:
            setattr(settings, key, getattr(args, key))
    classes = trained.config.model.num_classes
    if bad := [label for label in args.labels or () if not 0 <= label <= classes]:
        raise ConfigError(f"--labels {bad[0]}: this model has labels 0 to {classes - 1}, and {classes} for none")
    return settings


def _check(args: argparse.Namespace) -> None:
    for name, value in (("--n", args.count), ("--steps", args.steps), ("--batch", args.batch)):
        if value is not None and value < 1:
            raise ConfigError(f"{name} {value} must be at least 1; give another value")
    if args.guidance is not None and not (math.isfinite(args.guidance) and args.guidance >= 0):
        raise ConfigError(f"--guidance {args.guidance} must be a number of 0 or more; 1 is no guidance")
    if args.interval is not None and not 0.0 <= args.interval[0] < args.interval[1] <= 1.0:
        low, high = args.interval
        raise ConfigError(f"--interval {low:g} {high:g} must be two rising times in [0, 1]; give 0 0.7, say")
    if args.labels and args.classes != "balanced":
        raise ConfigError(f"--labels and --classes {args.classes} both choose the labels; give one of them")


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="repa-scale sample", description=__doc__, epilog=f"example: {EXAMPLE}")
    parser.add_argument("source", help="a run folder, a checkpoint folder or an export")
    parser.add_argument("--out", default="samples", help="a FILE.npz, or a folder for samples.npz (default: samples)")
    parser.add_argument("--weights", choices=sorted(KINDS), default="ema", help="default: ema")
    # torchrun and deepspeed take --n for the beginning of one of their own options, so they are given -n or --count.
    parser.add_argument("-n", "--n", "--count", dest="count", type=int, help="how many images")
    parser.add_argument("--classes", choices=CLASSES, default="balanced", help="n / classes of each, or at random")
    parser.add_argument("--labels", type=int, nargs="+", help="classes to draw in turn (default: all)")
    parser.add_argument("--sampler", choices=sorted(SAMPLERS))
    parser.add_argument("--steps", type=int, help="steps of the sampler")
    parser.add_argument("--guidance", type=float, help="classifier-free guidance; 1: none")
    parser.add_argument("--interval", type=float, nargs=2, metavar=("LOW", "HIGH"), help="times at which it acts")
    parser.add_argument("--seed", type=int, help="default: the run's")
    parser.add_argument("--batch", type=int, help="images of a block, which are computed together: part of the result")
    parser.add_argument("--precision", choices=("auto", *PRECISIONS), default="auto", help="auto: tf32 on a GPU")
    parser.add_argument("--compile", choices=("auto", "on", "off"), default="auto", help="auto: for many on a GPU")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    return parser.parse_args(argv)
