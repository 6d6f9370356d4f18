"""`repa-scale evaluate samples.npz --reference ...`: samples and a reference -> metrics with intervals, as table, JSON
and lines of RUN/evaluations.jsonl. The metrics themselves: repa_scale/metrics/."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import torch

from repa_scale.errors import ConfigError, DataError, ExitCode, did_you_mean
from repa_scale.evaluate.features import Features, collect
from repa_scale.evaluate.image_sets import ImageSet, open_images
from repa_scale.evaluate.reference import Wanted, cache_folder, load_reference, locate
from repa_scale.evaluate.results import (
    append,
    find_run,
    print_table,
    protocol_of,
    read_sidecar,
    result_file,
    step_of,
    write_results,
)
from repa_scale.evaluations import FILE
from repa_scale.extractors import Extractor, build_extractor
from repa_scale.metrics.bootstrap import Estimate, by_resampling
from repa_scale.metrics.frechet import frechet_with_slope, influence
from repa_scale.metrics.inception_score import inception_score
from repa_scale.metrics.kid import kernel_distance
from repa_scale.metrics.precision_recall import NEIGHBOURS, precision_recall
from repa_scale.progress import counter, progress_bar
from repa_scale.ranks import Ranks

ROWS = 4096  # features at a time in float64
CLASSES = 1008  # of Inception's logits
# kind -> (its name, parts of the samples' features that it needs, whether reference features are needed)
KINDS: dict[str, tuple[str, tuple[str, ...], bool]] = {
    "fd": ("fd", ("pool",), False),
    "sfid": ("sfid", ("spatial",), False),
    "is": ("inception_score", ("logits",), False),
    "kid": ("kid", ("pool",), True),
    "precision": ("precision", ("pool",), True),
    "recall": ("recall", ("pool",), True),
}
INCEPTION_ONLY = ("fid", "sfid", "is")


def run(args: argparse.Namespace) -> int:
    """Measures, prints a table and writes SAMPLES.evaluation.json; with a run, adds lines to its evaluations.jsonl."""
    if args.batch < 1:
        raise ConfigError(f"--batch {args.batch} must be at least 1")
    images = open_images(args.source)
    kinds = enough_images(choose(args.metrics, args.extractor), images, asked=bool(args.metrics))
    cache = cache_folder(args.cache)
    path = locate(args.reference, cache)
    ranks = Ranks.from_environment(args.device)
    if ranks.world_size > 1:
        ranks.start()
    sidecar = read_sidecar(Path(args.source)) if ranks.is_main else {}
    run_folder = find_run(args.run, str(sidecar.get("source") or ""))
    step = step_of(args.step, sidecar) if run_folder is not None and ranks.is_main else 0
    extractor = _build(args, ranks)

    with progress_bar(ranks.is_main) as bar:
        wanted = Wanted(images.size, any(KINDS[kind][2] for kind in kinds), args.batch, cache)
        reference = load_reference(path, extractor, ranks, wanted, partial(counter, bar))
        kinds = _possible(kinds, reference, ranks, asked=bool(args.metrics))
        parts = {part: None for kind in kinds for part in KINDS[kind][1]}
        done = counter(bar, f"features of {images.name}", images.count)
        samples = collect(images, extractor, ranks, args.batch, parts, done)
        estimates = measure(kinds, samples, reference, ranks.device) if ranks.is_main else {}

    if ranks.is_main:
        results = {extractor.metric(KINDS[kind][0]): estimate for kind, estimate in estimates.items()}
        protocol = protocol_of(extractor, reference, sidecar)
        file = result_file(Path(args.source))
        write_results(file, images, results, protocol, sidecar)
        print_table(results, images, extractor, reference)
        print(file)
        if run_folder is not None:
            append(run_folder, results, images.count, protocol, step)
            print(f"added to {run_folder / FILE}")
    ranks.barrier()
    ranks.leave()
    return ExitCode.COMPLETED


def choose(asked: list[str] | None, extractor: str) -> list[str]:
    """The kinds of metrics to compute, in the order of the table.

    Raises:
        ConfigError: unknown, or defined for Inception alone.
    """
    words = [word.lower() for word in asked or KINDS]
    for word in words:
        if word != "fid" and word not in KINDS:
            raise ConfigError(f"--metrics {word} is not a metric{did_you_mean(word, ['fid', *KINDS])}")
        if asked and extractor != "inception" and word in INCEPTION_ONLY:
            instead = "fd is the same distance by any extractor" if word == "fid" else "leave it out"
            raise ConfigError(f"--metrics {word} is of --extractor inception alone, here it is {extractor}; {instead}")
    words = ["fd" if word == "fid" else word for word in words]
    return [kind for kind in KINDS if kind in words and (extractor == "inception" or kind not in INCEPTION_ONLY)]


def measure(kinds: list[str], samples: Features, reference: Features, device: torch.device) -> dict[str, Estimate]:
    """The metrics of two sets of features, with 95 % intervals over the choice of samples; uses up all but `pool`.

    Raises:
        DataError: too few images for a metric, or statistics that cannot be.
    """
    found: dict[str, Estimate] = {}
    for kind, part in (("fd", "pool"), ("sfid", "spatial")):
        if kind in kinds:
            ours, theirs = (side.moments[part].to(device) for side in (samples, reference))
            distance = frechet_with_slope(ours, theirs)
            rows = [influence(block, ours, distance).cpu() for block in samples.kept[part].split(ROWS)]
            found[kind] = by_resampling(distance.value, torch.cat(rows))
    samples.kept.pop("spatial", None)  # a third of the memory, used up
    if "is" in kinds:
        found["is"] = inception_score(samples.kept.pop("logits"))
    if any(KINDS[kind][2] for kind in kinds):
        ours, theirs = samples.kept["pool"].to(device), reference.kept["pool"].to(device)
        if "kid" in kinds:
            found["kid"] = kernel_distance(ours, theirs)
        if "precision" in kinds or "recall" in kinds:
            found |= zip(("precision", "recall"), precision_recall(ours, theirs), strict=True)
    return {kind: found[kind] for kind in kinds}


def enough_images(kinds: list[str], images: ImageSet, asked: bool) -> list[str]:
    """The kinds that so many images have a value of.

    Raises:
        DataError: too few for one that was asked for by name, or for any.
    """
    least = {
        kind: {"is": CLASSES, "precision": NEIGHBOURS + 1, "recall": NEIGHBOURS + 1}.get(kind, 2) for kind in kinds
    }
    short = [kind for kind in kinds if images.count < least[kind]]
    if short and (asked or "fd" in short):
        classes = ", one for each of Inception's classes" if short[0] == "is" else ""
        raise DataError(
            f"{images.name} has {images.count} images, {short[0]} needs at least {least[short[0]]}{classes}; "
            "draw more: repa-scale sample RUN --n 50000"
        )
    return [kind for kind in kinds if kind not in short]


def _possible(kinds: list[str], reference: Features, ranks: Ranks, asked: bool) -> list[str]:
    """The kinds that the reference has what they need for; the same on all ranks."""
    lacks = {}
    for kind in kinds:
        name, parts, rows = KINDS[kind]
        if kind in ("fd", "sfid") and parts[0] not in reference.moments:
            lacks[kind] = f"{reference.name} has no {name} statistics (mu_s, sigma_s); give the reference's images"
        elif rows and "pool" not in reference.kept:
            lacks[kind] = f"{reference.name} has statistics alone; {kind} needs its images too (arr_0)"
    lacks = ranks.broadcast_object(lacks)
    if asked and lacks:
        kind, lack = next(iter(lacks.items()))
        raise ConfigError(f"--metrics {kind}: {lack}")
    return [kind for kind in kinds if kind not in lacks]


def _build(args: argparse.Namespace, ranks: Ranks) -> Extractor:
    """The extractor on this rank's device; a node's first rank fetches its weights."""
    if args.inception_weights and args.extractor != "inception":
        raise ConfigError(f"--inception-weights with --extractor {args.extractor}: use --weights, or inception")
    if ranks.local_rank > 0:
        ranks.barrier()
    extractor = build_extractor(args.extractor, args.inception_weights or args.weights, ranks.device)
    if ranks.local_rank == 0:
        ranks.barrier()
    return extractor
