"""Images per second of the loader alone, against reading the same bytes from plain files and decoding them with Pillow.

Both decode every image to RGB pixels in one process, in the same random order, in turns. Goal: at least 0.9.

    python -m benchmarks.loader            photographs if there are any (REPA_SCALE_DATA), else pictures made here
"""

from __future__ import annotations

import argparse
import io
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.rows import write_row
from repa_scale.data.batches import Batches, DataSet, open_dataset
from repa_scale.data.order import Order
from repa_scale.prepare import main as prepare

GOAL = 0.9
BATCH = 32
CASES = (  # name, archive, size, format, images a round
    ("CIFAR-10, 32 px PNG", "cifar10_train.zip", 32, "png", 8000),
    ("photographs, 256 px JPEG", "imagenet_samples.zip", 256, "jpeg", 800),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    data = Path(os.environ.get("REPA_SCALE_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
    rows = []
    for name, archive, size, kind, images in CASES:
        with tempfile.TemporaryDirectory() as folder:
            source = data / archive if (data / archive).exists() else made_here(Path(folder) / "made", size)
            prepare([str(source), "--out", f"{folder}/set", "--size", str(size), "--format", kind])
            rows.append(
                {"case": name, "source": source.name, **compare(open_dataset(f"{folder}/set"), images, args.rounds)}
            )
        row = rows[-1]
        print(
            f"{name}: loader {row['loader']:.0f} images/s, plain files and Pillow {row['plain']:.0f}, "
            f"ratio {row['ratio']:.3f} (goal {GOAL})"
        )
    write_row("loader", {"rows": rows, "goal": GOAL, "batch": BATCH})


def compare(dataset: DataSet, images: int, rounds: int) -> dict[str, float]:
    """Images per second of both ways: medians of rounds taken in turn."""
    dataset.verify()
    with tempfile.TemporaryDirectory() as folder:
        files = []
        for number in range(dataset.count):
            path = Path(folder) / str(number)
            path.write_bytes(dataset.reader[number]["image"])
            files.append(path)
        steps = images // BATCH
        ways: dict[str, Callable[[int], None]] = {
            "loader": lambda r: with_loader(dataset, r * steps, steps),
            "plain": lambda r: with_files(dataset, files, r * steps, steps),
        }
        rates: dict[str, list[float]] = {name: [] for name in ways}
        for number in range(rounds + 1):  # the first warms the page cache
            for name in sorted(ways, reverse=bool(number % 2)):
                began = time.perf_counter()
                ways[name](number)
                if number:
                    rates[name].append(steps * BATCH / (time.perf_counter() - began))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    return {**medians, "ratio": medians["loader"] / medians["plain"]}


def with_loader(dataset: DataSet, start: int, steps: int) -> None:
    source = Batches(dataset, seed=0, global_batch=BATCH, rank=0, world=1, workers=0, start_step=start)
    stream = iter(source)
    for _ in range(steps):
        next(stream)
    source.close()


def with_files(dataset: DataSet, files: list[Path], start: int, steps: int) -> None:
    """The least that one could write: open, read, decode, stack."""
    import torch

    order = Order([shard.samples for shard in dataset.reader.shards], 0, dataset.fingerprint)
    for step in range(start, start + steps):
        positions = torch.arange(step * BATCH, (step + 1) * BATCH)
        numbers = order.at(positions).tolist()
        pictures = [np.asarray(Image.open(io.BytesIO(files[i].read_bytes())).convert("RGB")) for i in numbers]
        torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)


def made_here(folder: Path, size: int) -> Path:
    """Smooth random pictures in one class folder, where no real ones are at hand."""
    (folder / "made").mkdir(parents=True)
    random = np.random.default_rng(0)
    for i in range(400):
        coarse = Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        coarse.resize((size, size), Image.Resampling.BICUBIC).save(folder / "made" / f"{i}.png")
    return folder


if __name__ == "__main__":
    main()
