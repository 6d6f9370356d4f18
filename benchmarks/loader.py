"""Images/s of the loader alone, against reading the same bytes as plain files and decoding them with Pillow.

Both read the same encoded samples in the same order, in this process and then in as many processes on each side; they
take turns, round by round, in one call, and the median round counts. The plain readers keep what they decode to
themselves; the loader also puts it together to batches, and hands those of its workers to this process.

    python -m benchmarks.loader SOURCE --size 256 --format jpeg --workers 0 2
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.rows import write_row
from repa_scale.data.batches import Batches, DataSet, open_dataset
from repa_scale.data.order import sample_at
from repa_scale.prepare import main as prepare

GOAL = 0.9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", nargs="?", default="digits", help="what `repa-scale prepare` takes (default: digits)")
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--format", choices=("png", "jpeg"), default="jpeg")
    parser.add_argument("--limit", type=int, default=1000, help="images of the source (default: 1000)")
    parser.add_argument("--images", type=int, default=1024, help="read by each side in a round (default: 1024)")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        words = ["--size", str(args.size), "--format", args.format, "--limit", str(args.limit)]
        prepare([args.source, "--out", f"{folder}/set", *words])
        dataset = open_dataset(f"{folder}/set")
        files = write_files(dataset, Path(folder) / "files")
        steps = args.images // args.batch
        order = sample_at(torch.arange(steps * args.batch), dataset.count, 0, dataset.fingerprint).tolist()
        paths = [files[number] for number in order]
        row = {}
        for workers in args.workers:
            rates: dict[str, list[float]] = {"plain": [], "loader": []}
            for round_number in range(args.rounds + 1):
                for side in sorted(rates, reverse=bool(round_number % 2)):
                    if side == "plain":
                        rate = plain(paths, workers)
                    else:
                        rate = loader(dataset, steps, args.batch, workers)
                    if round_number:  # the first round warms the page cache
                        rates[side].append(rate)
            medians = {side: statistics.median(values) for side, values in rates.items()}
            ratio = medians["loader"] / medians["plain"]
            row[f"workers_{workers}"] = {**medians, "ratio": ratio}
            print(
                f"{workers} workers: loader {medians['loader']:,.0f} images/s, "
                f"plain files and Pillow {medians['plain']:,.0f}, ratio {ratio:.3f} (goal {GOAL})"
            )
    settings = {key: getattr(args, key) for key in ("size", "format", "images", "batch", "rounds")}
    sample_bytes = sum(shard.bytes for shard in dataset.reader.shards) // dataset.count
    write_row("loader", {**row, **settings, "source": dataset.name, "bytes_per_sample": sample_bytes, "goal": GOAL})


def write_files(dataset: DataSet, folder: Path) -> list[str]:
    """The samples' files, as they stand in the shards, one by one."""
    folder.mkdir()
    paths = []
    for number in range(dataset.count):
        paths.append(str(folder / f"{number:06d}"))
        Path(paths[-1]).write_bytes(dataset.reader[number]["image"])
    return paths


def plain(paths: list[str], workers: int) -> float:
    """Images/s of reading and decoding `paths`, by this process or shared by `workers` others."""
    if workers == 0:
        began = time.perf_counter()
        read(paths)
        return len(paths) / (time.perf_counter() - began)
    context = multiprocessing.get_context("fork")
    start, end = context.Barrier(workers + 1), context.Barrier(workers + 1)
    shares = [paths[i::workers] for i in range(workers)]
    pool = [context.Process(target=_read_between, args=(share, start, end), daemon=True) for share in shares]
    for process in pool:
        process.start()
    start.wait(60)
    began = time.perf_counter()
    end.wait(600)
    seconds = time.perf_counter() - began
    for process in pool:
        process.join(60)
    return len(paths) / seconds


def _read_between(paths: list[str], start, end) -> None:
    start.wait(60)
    read(paths)
    end.wait(600)


def read(paths: list[str]) -> None:
    for path in paths:
        with open(path, "rb") as file, Image.open(file) as image:
            np.asarray(image.convert("RGB"))


def loader(dataset: DataSet, steps: int, batch: int, workers: int) -> float:
    """Images/s of `steps` batches; with workers, after the first one each has come (their start is not counted)."""
    skipped = workers and 4 * workers
    source = Batches(dataset, seed=0, global_batch=batch, rank=0, world=1, workers=workers, start_step=0)
    stream = iter(source)
    for _ in range(skipped):
        next(stream)
    began = time.perf_counter()
    for _ in range(steps):
        next(stream)
    seconds = time.perf_counter() - began
    source.close()
    return steps * batch / seconds


if __name__ == "__main__":
    main()
