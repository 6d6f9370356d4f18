"""`repa-scale prepare`: images become a data set of MDS shards (docs/data.md)."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import numpy as np

from repa_scale.data.batches import decode, open_dataset
from repa_scale.data.dataset import DataSet
from repa_scale.data.ingest import Recipe, ingest
from repa_scale.data.manifest import MANIFEST
from repa_scale.data.sources import open_source, take
from repa_scale.errors import ConfigError, DataError, ExitCode
from repa_scale.pictures import save_sheet

EXAMPLE = "repa-scale prepare path/to/imagenet/train --out data/imagenet256 --size 256"
SIZES = (4, 4096)  # pixels an axis
SHOWN = 40  # samples on the picture
LISTED = 5  # quarantined images named on the screen; the manifest lists all


def main(argv: list[str]) -> int:
    """Prepares a set, or checks one. What is finished is not made again."""
    args = _parse(argv)
    if args.check:
        return _check(Path(args.check))
    if args.bench:
        return _bench(args)
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
    out = Path(args.out)
    recipe = Recipe(args.size, args.format, args.quality if args.format == "jpeg" else 0)
    source = open_source(args.source)
    if args.limit is not None:
        source = take(source, args.limit)
    if (out / MANIFEST).exists():
        dataset = open_dataset(out)
        same = dataset.manifest["source"]["fingerprint"] == source.fingerprint
        if not same or dataset.manifest["recipe"] != recipe.__dict__:
            raise DataError(f"--out {out} holds a set of other images or another recipe; choose another folder")
        print(f"already prepared: {_summary(dataset)}")
        return ExitCode.COMPLETED
    with _progress() as bar:
        task = bar.add_task(f"preparing {source.name}", total=len(source.items))
        ingest(source, out, recipe, args.workers, lambda count: bar.advance(task, count))
    dataset = open_dataset(out)
    _picture(dataset, out / "samples.png")
    print(_summary(dataset))
    if source.others:
        print(f"passed over {source.others} files that are hidden or no images by their names")
    _report_quarantined(dataset)
    return ExitCode.COMPLETED


def _check(folder: Path) -> int:
    """Every hash, every picture, every label and id."""
    dataset = open_dataset(folder)
    dataset.verify()
    ids, counts = set(), dict.fromkeys(range(max(1, len(dataset.class_names))), 0)
    with _progress() as bar:
        for number in bar.track(range(dataset.count), description="checking"):
            row = dataset.reader[number]
            shape = decode(row["image"], f"{folder}: sample {number} ({row['name']})").shape
            if shape != (dataset.image_size, dataset.image_size, 3):
                raise DataError(f"{folder}: sample {number} ({row['name']}) is {shape}; prepare the set again")
            if row["label"] not in counts or row["id"] in ids:
                raise DataError(
                    f"{folder}: sample {number} ({row['name']}) has a wrong label or id; prepare the set again"
                )
            counts[row["label"]] += 1
            ids.add(row["id"])
    if dataset.class_names and list(counts.values()) != dataset.class_counts:
        raise DataError(f"{folder}: the classes have {list(counts.values())} samples, not {dataset.class_counts}")
    print(f"whole: {_summary(dataset)}")
    return ExitCode.COMPLETED


def _bench(args: argparse.Namespace) -> int:
    from repa_scale.prepare_bench import bench

    dataset = open_dataset(args.bench)
    for line in bench(dataset, args.workers, args.model, args.encoder, args.gpu):
        print(line)
    return ExitCode.COMPLETED


def _summary(dataset: DataSet) -> str:
    classes = f"{len(dataset.class_names)} classes" if dataset.class_names else "no classes"
    return (
        f"{dataset.count} images of {dataset.image_size} px, {classes}, "
        f"{len(dataset.manifest['quarantined'])} left out, fingerprint {dataset.fingerprint}, in {dataset.path}"
    )


def _report_quarantined(dataset: DataSet) -> None:
    left_out = dataset.manifest["quarantined"]
    for name, reason in left_out[:LISTED]:
        print(f"left out {name}: {reason}")
    if len(left_out) > LISTED:
        print(f"... and {len(left_out) - LISTED} more: see quarantined in {dataset.path / MANIFEST}")


def _picture(dataset: DataSet, path: Path) -> None:
    """Some samples with their class names, evenly spread over the set."""
    chosen = np.linspace(0, dataset.count - 1, min(SHOWN, dataset.count)).astype(int)
    rows = [dataset.reader[int(number)] for number in chosen]
    captions = [dataset.class_names[row["label"]] for row in rows] if dataset.class_names else ()
    save_sheet(np.stack([decode(row["image"]) for row in rows]), path, columns=10, captions=captions)


def _progress():
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns)


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="repa-scale prepare", description=__doc__, epilog=f"example: {EXAMPLE}")
    parser.add_argument("source", nargs="?", help="a folder of class folders, a .zip or .tar of it, or digits")
    parser.add_argument("--out", help="folder to write")
    parser.add_argument("--size", type=int, help="pixels an axis")
    parser.add_argument("--format", choices=("png", "jpeg"), default="png", help="default: png, without loss")
    parser.add_argument("--quality", type=int, default=95, help="of jpeg, written 4:4:4 (default: 95)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes that decode")
    parser.add_argument("--limit", type=int, help="take at most that many images, evenly spread over the source")
    parser.add_argument("--check", metavar="FOLDER", help="verify a prepared set instead")
    parser.add_argument("--bench", metavar="FOLDER", help="measure the data path from a prepared set on this machine")
    parser.add_argument("--model", default="SiT-XL/2", help="with --bench: the backbone to feed (default: SiT-XL/2)")
    parser.add_argument("--encoder", default="dinov2-vit-b", help="with --bench (default: dinov2-vit-b)")
    parser.add_argument("--gpu", help="with --bench: the GPU to feed, A100, H100, H200 or B200 (default: this one's)")
    return parser.parse_args(argv)
