"""`repa-scale evaluate RUN --data SET --alignment --linear-probe --denoising`: what a model's hidden tokens hold, and
how well it denoises images that it was not trained on. docs/representation.md describes measures and files.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from repa_scale.alignment import build_terms
from repa_scale.checkpoint import step_folder
from repa_scale.errors import ConfigError, DataError, ExitCode, UserError
from repa_scale.evaluate.hidden import Asked, Measured, Subject
from repa_scale.evaluate.pictures import Pictures, Seen, blocks, choose, open_pictures, seen
from repa_scale.evaluate.representation_page import FORMAT, print_tables, write
from repa_scale.evaluate.results import find_run
from repa_scale.evaluate.sections import Gathered, sections
from repa_scale.progress import counter, progress_bar
from repa_scale.ranks import Ranks
from repa_scale.rng import fingerprint
from repa_scale.run_folder import training_set
from repa_scale.sizes import backbone, encoder_spec
from repa_scale.trained import KINDS, Trained, load_trained

ALWAYS_THERE = ("effnet-lite0", "package")  # the encoder whose weights need no download
ALL_DEPTHS = 12  # up to which every depth is measured by default; of deeper models as many as SPACED
SPACED = 8
TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)
MEMORY = 8 << 30  # bytes of mean tokens that a process may hold


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this half of `repa-scale evaluate`; `source`, --data, --device, --batch and --run are shared."""
    group = parser.add_argument_group("of a model, on the real images of --data (none of the first three: all of them)")
    group.add_argument("--alignment", action="store_true", help="CKNNA, cosine and spatial measures by depth and t")
    group.add_argument("--linear-probe", action="store_true", help="classes read off the hidden tokens by depth and t")
    group.add_argument("--denoising", action="store_true", help="denoising loss by t, with the same noise for all runs")
    group.add_argument("--depths", type=int, nargs="+", metavar="D", help="blocks from 1 (default: all, or 8 of many)")
    group.add_argument("--times", type=float, nargs="+", metavar="T", default=TIMES, help="default: 0.1 0.3 ... 0.9")
    group.add_argument("--images", type=int, default=10_000, help="at most that many (default: 10000, as REPA)")
    group.add_argument("--unseen", action="store_true", help="leave out the images that the run was trained on")
    group.add_argument(
        "--trained-on", metavar="SET", help="the run's training set (default: where RUN/config.yaml says)"
    )
    group.add_argument("--encoder", help="to align with (default: the run's; effnet-lite0 where it has none)")
    group.add_argument("--encoder-weights", metavar="W", help="hub, package, random or a file (default: package, hub)")
    group.add_argument("--neighbours", type=int, default=10, metavar="K", help="of CKNNA (default: 10, as REPA)")
    group.add_argument("--bins", type=int, default=10, help="of t, for the denoising loss (default: 10)")
    group.add_argument("--noise-seed", type=int, default=0, help="default: 0; the same for all that is compared")
    group.add_argument("--model-weights", choices=sorted(KINDS), default="ema", help="default: ema")
    group.add_argument("--out", metavar="FILE.json", help="default: RUN/representation/step_N.json")


def run(args: argparse.Namespace) -> int:
    """Measures, prints tables, and writes OUT.json, OUT.png and lines of RUN/evaluations.jsonl."""
    if not args.data:
        raise ConfigError("--data is missing: the real images to measure on, a prepared set or a folder")
    if weights := getattr(args, "weights", ""):
        raise ConfigError(f"--weights {weights} is of samples; give --model-weights ema or raw, or --encoder-weights")
    trained = load_trained(args.source, args.model_weights)
    home = find_run(args.run, trained.facts["source"])
    out = _out(args.out, home, trained)
    pictures = open_pictures(args.data, trained.config.data.image_size)
    asked = _asked(args, trained, pictures)
    sources = _sources(args, trained) if asked.alignment else []
    ranks = Ranks.from_environment(args.device)
    with ranks.joined():
        folder = args.trained_on or (training_set(home) if home else "")
        known = seen(pictures, trained.config, trained.facts["identity_hash"], folder, bool(args.trained_on))
        chosen = choose(pictures, args.images, known if args.unseen else None)
        _check_sizes(args, asked, trained, len(chosen), ranks.world_size)
        measured = _measure(Subject(trained, sources, ranks), pictures, chosen, asked, args.batch, ranks)
        gathered = Gathered(measured, ranks)
        made = {"data": _describe(pictures, gathered("ids"), known), "noise_seed": asked.seed, "batch": args.batch}
        found = sections(gathered, asked, sources, build_terms(trained.config), args.neighbours, made)
        problem = ""
        if ranks.is_main:
            result = {"format": FORMAT, "checkpoint": trained.facts, **found}
            print_tables(result)
            try:
                write(result, out, home)
            except UserError as error:
                problem = str(error)
        if text := ranks.broadcast_object(problem):
            raise ConfigError(str(text))
    return ExitCode.COMPLETED


def _measure(
    subject: Subject, pictures: Pictures, chosen: list[int], asked: Asked, batch: int, ranks: Ranks
) -> dict[int, Measured]:
    """Whatever goes wrong on one rank is said by all: none waits for another that has left."""
    measured, problem = {}, None
    mine = len(range(0, len(chosen), batch)[ranks.rank :: ranks.world_size])
    with progress_bar(ranks.is_main) as bar:
        done = counter(bar, "measuring", mine * asked.passes)
        try:
            for block in blocks(pictures, chosen, batch, ranks.rank, ranks.world_size):
                measured[block.number] = subject.measure(block, asked, lambda: done(1))
        except UserError as error:
            problem = str(error)
    if problems := [text for text in ranks.gather_objects(problem) if text]:
        raise DataError(problems[0])
    return measured


def _asked(args: argparse.Namespace, trained: Trained, pictures: Pictures) -> Asked:
    """Checked against the model and the images; none of the three: all that the images allow."""
    config, labelled = trained.config, len(pictures.class_names) > 1
    everything = not (args.alignment or args.linear_probe or args.denoising)
    if args.linear_probe and not labelled:
        raise DataError(
            f"--linear-probe: {args.data} has no classes to read off; give labelled images, or leave it out"
        )
    depth = backbone(config.model.name)[0].depth
    depths = sorted(set(args.depths or default_depths(depth, [term.depth for term in build_terms(config).values()])))
    if bad := [number for number in depths if not 1 <= number <= depth]:
        raise ConfigError(f"--depths {bad[0]}: {config.model.name} has blocks 1 to {depth}")
    if bad := [time for time in args.times if not 0 <= time <= 1]:
        raise ConfigError(f"--times {bad[0]:g} must lie between 0 (data) and 1 (noise)")
    for name in ("images", "bins", "batch"):
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name} {getattr(args, name)} must be at least 1")
    denoising = args.denoising or everything
    if denoising and len(pictures.class_names) != config.model.num_classes:
        raise DataError(
            f"--denoising: the model was trained on {config.model.num_classes} classes, {args.data} has "
            f"{len(pictures.class_names)}: their labels do not mean the same; give images of the run's classes, or "
            "choose --alignment and --linear-probe alone"
        )
    return Asked(
        depths=tuple(depths),
        times=tuple(sorted(set(args.times))),
        bins=args.bins,
        seed=args.noise_seed,
        alignment=args.alignment or everything,
        probe=args.linear_probe or (everything and labelled),
        denoising=denoising,
    )


def default_depths(depth: int, of_terms: list[int]) -> list[int]:
    """Every block of a model with few; else evenly spaced ones with the last, and those that the terms align."""
    if depth <= ALL_DEPTHS:
        return list(range(1, depth + 1))
    return sorted({*(round((i + 1) * depth / SPACED) for i in range(SPACED)), *of_terms})


def _sources(args: argparse.Namespace, trained: Trained) -> list[tuple[str, str]]:
    """Name and weights of the encoders: the one that is named, those of the run, or the one that is always there."""
    if not args.encoder:
        if args.encoder_weights:
            raise ConfigError(f"--encoder-weights {args.encoder_weights} needs --encoder, whose weights they are")
        return list(dict.fromkeys(term.source for term in build_terms(trained.config).values())) or [ALWAYS_THERE]
    default = "package" if encoder_spec(args.encoder).package else "hub"
    return [(args.encoder, args.encoder_weights or default)]


def _check_sizes(args: argparse.Namespace, asked: Asked, trained: Trained, count: int, world: int) -> None:
    """Before hours of work: too few images, or features that do not fit into memory."""
    if asked.alignment and count <= args.neighbours:
        raise DataError(
            f"--data {args.data} gives {count} images, CKNNA with {args.neighbours} neighbours needs more; "
            "give more images, or fewer --neighbours"
        )
    width = backbone(trained.config.model.name)[0].width
    needed = 4 * count * len(asked.depths) * len(asked.times) * width // world
    if (asked.alignment or asked.probe) and needed > MEMORY:
        raise ConfigError(
            f"the mean tokens of {count} images at {len(asked.depths)} depths and {len(asked.times)} times take "
            f"{needed / 2**30:.0f} GiB a process, more than {MEMORY >> 30}; name fewer --depths, --times or --images"
        )


def _describe(pictures: Pictures, ids: torch.Tensor, known: Seen) -> dict[str, Any]:
    return {
        "path": pictures.path,
        "fingerprint": pictures.fingerprint,
        "images": len(ids),
        "of": pictures.count,
        "classes": len(pictures.class_names),
        "images_fingerprint": f"{fingerprint(ids):016x}",
        "trained_on": known.of(ids),
    }


def _out(given: str | None, home: Path | None, trained: Trained) -> Path:
    """Where the result goes, checked before the work."""
    if given:
        out = Path(given)
        if out.suffix != ".json":
            raise ConfigError(f"--out {given} must end with .json; the picture goes beside it as .png")
    elif home is None:
        raise ConfigError(f"{trained.facts['source']} is in no run folder; name the result: --out FILE.json")
    else:
        raw = "" if trained.facts["weights"] == "ema" else "_raw"
        out = home / "representation" / f"{step_folder(trained.facts['step'])}{raw}.json"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {out} cannot be written ({error.strerror}); choose another place") from None
    return out
