"""`repa-scale prepare`: images become a data set of MDS shards (docs/data.md)."""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from repa_scale.data.batches import decode, open_dataset
from repa_scale.data.bucket import Bucket, remove_scratch, scratch_for
from repa_scale.data.check import balance, check_set
from repa_scale.data.dataset import DataSet
from repa_scale.data.features import other_arithmetic, without_arithmetic
from repa_scale.data.ingest import Encoded, encode, ingest, parts_of
from repa_scale.data.labels import parse_labels
from repa_scale.data.manifest import MANIFEST
from repa_scale.data.recipe import Recipe
from repa_scale.data.sources import Source, open_source, take
from repa_scale.errors import ConfigError, DataError, ExitCode, UserError
from repa_scale.features import FeatureNetworks, parse_network, plan_features
from repa_scale.object_store import is_url
from repa_scale.pictures import save_sheet
from repa_scale.progress import counter, progress_bar
from repa_scale.ranks import Ranks

EXAMPLE = "repa-scale prepare path/to/imagenet/train --out data/imagenet256 --size 256"
SIZES = (4, 4096)  # pixels an axis
SHOWN = 40  # samples on the picture
LISTED = 5  # quarantined images named on the screen; the manifest lists all
PROBLEMS = 50  # of a check, named on the screen


def main(argv: list[str]) -> int:
    """Prepares a set, or checks one. What is finished is not made again."""
    args = _parse(argv)
    if args.check:
        return _check(Path(args.check), args.sample)
    if args.bench:
        return _bench(args)
    _check_words(args)
    ranks = Ranks.from_environment(args.device if args.moments or args.tokens else "cpu")
    if ranks.world_size == 1:
        return _prepare(args, ranks)
    with ranks.joined(words_only=True):  # they only exchange words
        return _prepare(args, ranks)


def _prepare(args: argparse.Namespace, ranks: Ranks) -> int:
    say: Callable[..., None] = print if ranks.is_main else _nothing
    source = open_source(args.source, parse_labels(args.labels, args.label_column))
    if args.limit is not None:
        source = take(source, args.limit)
    moments = parse_network(args.moments) if args.moments else None
    tokens = [parse_network(text) for text in args.tokens]
    planned = plan_features(args.size, moments, tokens, args.moments_dtype, args.tokens_dtype, args.token_grid)
    keep = args.layout == "keep"
    recipe = Recipe(
        args.size,
        "original" if keep else args.format,
        args.quality if args.format == "jpeg" and not keep else 0,
        layout=args.layout,
        features=tuple(planned),
        flip=args.flip and bool(planned),
    )
    url = is_url(args.out)
    out = scratch_for(args.out, Path(args.scratch)) if url else Path(args.out)
    bucket = Bucket(args.out, out) if url else None
    manifest = bucket.manifest() if bucket else _manifest_of(out)
    if manifest is not None:
        if manifest["source"]["fingerprint"] != source.fingerprint or not _same_recipe(manifest["recipe"], recipe):
            raise DataError(f"--out {args.out} holds a set of other images or another recipe; choose another folder")
        say(f"already prepared: {_summary(manifest, args.out)}")
        return ExitCode.COMPLETED
    _say_sizes(say, source, recipe)
    networks = None
    if planned:
        _require_space(out, recipe.feature_bytes * len(source.items), url)
        networks = FeatureNetworks(
            args.size, moments, tokens, moments_dtype=args.moments_dtype, tokens_dtype=args.tokens_dtype,
            grid=args.token_grid, flip=args.flip, device=ranks.device,
        )  # fmt: skip
        recipe = replace(recipe, features=tuple(networks.stored))
        _check_ranks(recipe, ranks)
    if bucket:
        _claim(bucket, {"source": source.fingerprint, "recipe": recipe.as_dict()}, ranks)
    manifest = _ingest(args, source, out, recipe, networks, ranks, bucket)
    if not ranks.is_main:
        return ExitCode.COMPLETED
    if bucket:
        remove_scratch(out)
    else:
        _picture(open_dataset(out), out / "samples.png")
    say(_summary(manifest, args.out))
    say(balance(manifest["class_counts"], manifest["class_names"]))
    if source.others:
        say(f"passed over {source.others} files that are hidden or no images by their names")
    _report_quarantined(manifest, args.out)
    return ExitCode.COMPLETED


def _ingest(args, source: Source, out: Path, recipe: Recipe, networks, ranks: Ranks, bucket) -> dict[str, Any] | None:
    if not ranks.is_main:
        return ingest(source, out, recipe, args.workers, _nothing, features=networks, group=ranks, store=bucket)
    with progress_bar() as bar:
        total = sum(len(items) for _, items in parts_of(source, recipe, ranks))
        done = counter(bar, f"preparing {source.name}", total)
        return ingest(source, out, recipe, args.workers, done, features=networks, group=ranks, store=bucket)


def _check_ranks(recipe: Recipe, ranks: Ranks) -> None:
    """Refuses ranks that would compute the features of one set in different ways."""
    recipes = ranks.gather_objects(recipe.as_dict())
    for rank, theirs in enumerate(recipes):
        if theirs != recipes[0]:
            how = other_arithmetic(recipes[0], theirs, ("on rank 0", f"on rank {rank}"))
            raise ConfigError(
                f"the ranks would make different features ({how or f'rank {rank} has other weights than rank 0'}); "
                "start all with the same arguments on the same kind of device, or give --device cpu"
            )


def _claim(bucket: Bucket, job: dict[str, Any], ranks: Ranks) -> None:
    """Rank 0 takes the URL for this job; where it is refused, every rank raises the same."""
    refusal = None
    if ranks.is_main:
        try:
            bucket.claim(job)
        except UserError as error:
            refusal = error
    refusal = ranks.broadcast_object(refusal)
    if refusal is not None:
        raise refusal


def _check_words(args: argparse.Namespace) -> None:
    if not args.source or not args.out or args.size is None:
        raise ConfigError(f"SOURCE, --out and --size are needed, as in: {EXAMPLE}")
    if not SIZES[0] <= args.size <= SIZES[1]:
        raise ConfigError(f"--size {args.size} must lie between {SIZES[0]} and {SIZES[1]} pixels")
    if not 95 <= args.quality <= 100:
        raise ConfigError(f"--quality {args.quality} must lie between 95 and 100: lower ones show in the samples")
    if args.workers < 1:
        raise ConfigError(f"--workers {args.workers} must be at least 1")
    if args.limit is not None and args.limit < 1:
        raise ConfigError(f"--limit {args.limit} must be at least 1")
    if args.flip and not (args.moments or args.tokens):
        raise ConfigError("--flip stores features of mirrored pictures; give --moments or --tokens, or leave it out")


def _manifest_of(folder: Path) -> dict[str, Any] | None:
    return open_dataset(folder).manifest if (folder / MANIFEST).exists() else None


def _same_recipe(made: dict[str, Any], wanted: Recipe) -> bool:
    """Whether a set was made like this, on whatever device; weights count by their name here, so that no network must
    be loaded."""
    blank = [{**feature, "weights_sha256": ""} for feature in made.get("features", ())]
    return without_arithmetic({**made, "features": blank} if blank else made) == wanted.as_dict()


def _say_sizes(say: Callable[..., None], source: Source, recipe: Recipe) -> None:
    """Bytes an image and of the whole set, before anything is written."""
    count = len(source.items)
    picture = recipe.picture_bytes
    known = [item.size for item in source.items if item.size > 0]
    if recipe.layout == "keep" and known:
        picture = sum(known) / len(known)
    total = count * (picture + recipe.feature_bytes)
    parts = [f"{stored.kind} of {stored.network} {_size(stored.bytes)} ({stored.dtype})" for stored in recipe.features]
    twice = " each, and the same of the mirrored picture" if recipe.flip else ""
    pictures = f"picture about {_size(picture)}"
    say(f"an image: {', '.join([pictures, *parts])}{twice}; {count} images: about {_size(total)}")


def _size(count: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def _require_space(out: Path, needed: int, url: bool) -> None:
    """Refuses what cannot fit. To an object store only parts lie here."""
    existing = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    held = sum(path.stat().st_size for path in out.rglob("*.mds")) if out.is_dir() else 0
    if not url and needed - held > free:
        raise ConfigError(
            f"--out {out} has {_size(free)} free, but the features alone take {_size(needed)}; "
            "use another disk, --tokens-dtype int8, or fewer features"
        )


def _check(folder: Path, sample: int | None) -> int:
    """Every hash, and every sample or some: all problems are listed."""
    if sample is not None and sample < 1:
        raise ConfigError(f"--sample {sample} must be at least 1")
    with progress_bar() as bar:
        task = bar.add_task("checking", total=None)
        dataset, found = check_set(folder, sample, lambda done, total: bar.update(task, completed=done, total=total))
    if len(found.problems) == 1:
        raise DataError(found.problems[0])
    for problem in found.problems[:PROBLEMS]:
        print(problem)
    if found.problems:
        more = len(found.problems) - PROBLEMS
        raise DataError(
            f"{folder}: {len(found.problems)} problems{f', {more} of them not shown' if more > 0 else ''}; "
            "copy or prepare the set again"
        )
    part = "" if found.decoded == dataset.count else f" ({found.decoded} of them read)"
    print(f"whole: {_summary(dataset.manifest, dataset.path)}{part}")
    print(balance(dataset.class_counts, dataset.class_names))
    return ExitCode.COMPLETED


def _bench(args: argparse.Namespace) -> int:
    from repa_scale.prepare_bench import bench

    dataset = open_dataset(args.bench)
    for line in bench(dataset, args.workers, args.model, args.encoder, args.gpu):
        print(line)
    return ExitCode.COMPLETED


def _summary(manifest: dict[str, Any], where: object) -> str:
    classes = f"{len(manifest['class_names'])} classes" if manifest["class_names"] else "no classes"
    return (
        f"{manifest['count']} images of {manifest['image_size']} px, {classes}, "
        f"{len(manifest['quarantined'])} left out, fingerprint {manifest['fingerprint']}, in {where}"
    )


def _report_quarantined(manifest: dict[str, Any], where: object) -> None:
    left_out = manifest["quarantined"]
    for one in left_out[:LISTED]:
        print(f"left out {one['name']}: {one['reason']}")
    if len(left_out) > LISTED:
        print(f"... and {len(left_out) - LISTED} more: see quarantined in {where}/{MANIFEST}")


def _picture(dataset: DataSet, path: Path) -> None:
    """Some samples with their class names, evenly spread over the set."""
    chosen = np.linspace(0, dataset.count - 1, min(SHOWN, dataset.count)).astype(int)
    rows = [dataset.reader[int(number)] for number in chosen]
    captions = [dataset.class_names[row["label"]] for row in rows] if dataset.class_names else ()
    shown = Recipe(dataset.image_size)
    kept = dataset.manifest["recipe"].get("layout") == "keep"
    pictures = [encode(row["image"], shown) if kept else Encoded(row["image"], None) for row in rows]
    save_sheet(np.stack([decode(picture.data) for picture in pictures]), path, columns=10, captions=captions)


def _nothing(*_: object) -> None:
    pass


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="repa-scale prepare", description=__doc__, epilog=f"example: {EXAMPLE}")
    parser.add_argument(
        "source", nargs="*", help="class folders, .zip, .tar, WebDataset tars, .parquet, an MDS set, or digits"
    )
    parser.add_argument("--out", help="folder to write, or a bucket's URL, such as s3://bucket/folder")
    parser.add_argument("--size", type=int, help="pixels an axis")
    parser.add_argument("--layout", choices=("crop", "keep"), default="crop", help="keep: the files as they are")
    parser.add_argument("--format", choices=("png", "jpeg"), default="png", help="default: png, without loss")
    parser.add_argument("--quality", type=int, default=95, help="of jpeg, written 4:4:4 (default: 95)")
    parser.add_argument("--labels", metavar="FILE", help="a CSV or JSON map from names to classes; none: unlabelled")
    parser.add_argument("--label-column", metavar="NAME", help="of parquet, MDS, or WebDataset's JSON (default: label)")
    parser.add_argument("--moments", metavar="VAE", help="store its moments: NAME or NAME=WEIGHTS")
    parser.add_argument("--moments-dtype", default="fp32", metavar="TYPE", help="fp32 (default) or fp16")
    parser.add_argument("--tokens", metavar="ENCODER", action="append", default=[], help="store its tokens, likewise")
    parser.add_argument("--tokens-dtype", default="bf16", metavar="TYPE", help="bf16 (default), fp16 or int8")
    parser.add_argument("--token-grid", type=int, metavar="N", help="tokens an axis (default: size / 16)")
    parser.add_argument("--flip", action="store_true", help="features of the mirrored pictures too")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto", help="that computes the features")
    workers = max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    parser.add_argument("--workers", type=int, default=workers, help="processes that decode")
    parser.add_argument("--limit", type=int, help="take at most that many images, evenly spread over the source")
    parser.add_argument("--scratch", default=".", metavar="FOLDER", help="for parts on their way to a bucket")
    parser.add_argument("--check", metavar="FOLDER", help="verify a prepared set instead")
    parser.add_argument("--sample", type=int, metavar="N", help="of --check: read N samples instead of all")
    parser.add_argument("--bench", metavar="FOLDER", help="measure the data path from a prepared set on this machine")
    parser.add_argument("--model", default="SiT-XL/2", help="with --bench: the backbone to feed (default: SiT-XL/2)")
    parser.add_argument("--encoder", default="dinov2-vit-b", help="with --bench (default: dinov2-vit-b)")
    parser.add_argument("--gpu", help="with --bench: the GPU to feed, A100, H100, H200 or B200 (default: this one's)")
    return parser.parse_args(argv)
