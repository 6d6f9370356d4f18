"""Images a second of our loader and of its peers, on the same bytes: a second of the clock, and a second of a core.

Every way gives batches of RGB pixels (N, 3, S, S) uint8 with labels, shuffled, from one worker process:

    ours        Batches over MDS shards, Pillow in the worker
    ours, DALI  the same with DALI's CPU decoder in a thread of the reading process
    streaming   MosaicML StreamingDataset and StreamingDataLoader over the same shards
    torchvision ImageFolder and DataLoader over the same bytes as files
    webdataset  WebDataset and WebLoader over the same bytes in tar shards
    limit       the same bytes decoded with Pillow out of memory, nothing else
    limit, DALI the same with DALI

Then stored features, as `data.source=moments+tokens` reads them (random ones, of the sizes of 256 pixels and
DINOv2-B, 0.4 MB an image), against plain reads of files with the same bytes.

Goals: ours at least 0.9 of its decoder's limit, and no slower than the fastest peer; resident memory grows by less than
1 MB per 1,000 samples over 20,000; features at least 0.8 of plain reads.

    python -m benchmarks.data            needs `pip install webdataset`; photographs and CIFAR-10 in REPA_SCALE_DATA
"""

from __future__ import annotations

import argparse
import io
import os
import statistics
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import psutil
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks.rows import write_row
from repa_scale import torchvision_fix
from repa_scale.data.batches import Batches, DataSet, open_dataset
from repa_scale.data.dali import DaliDecoder
from repa_scale.data.features import Cached, Stored
from repa_scale.data.ingest import ingest
from repa_scale.data.recipe import Recipe
from repa_scale.data.sources import open_source
from repa_scale.prepare import main as prepare

GOAL = 0.9
BATCH = 32
PREFETCH = 4  # batches that a worker makes ahead, for every way
CASES = (  # name, archive, copies of each picture, size, format
    ("photographs, 256 px JPEG", "imagenet_samples.zip", 25, 256, "jpeg"),
    ("CIFAR-10, 32 px PNG", "cifar10_train.zip", 1, 32, "png"),
)
FEATURE_IMAGES, FEATURES_GOAL = 1024, 0.8
MEMORY_SAMPLES, MEMORY_GOAL = 20_000, 1.0  # MB a thousand samples
Way = Callable[[int], Iterator[int]]  # samples to give -> the sizes of the batches as they come


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--images", type=int, default=5000, help="of a round, and at least of the set")
    parser.add_argument("--workers", type=int, default=1, help="loader processes of every way but the limit")
    args = parser.parse_args()
    data = Path(os.environ.get("REPA_SCALE_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
    for case, archive, copies, size, kind in CASES:
        with tempfile.TemporaryDirectory() as folder:
            source = repeated(data / archive, copies, Path(folder) / "source.zip", args.images)
            words = ["--size", str(size), "--format", kind]
            prepare([str(source), "--out", f"{folder}/set", *words])
            dataset = open_dataset(f"{folder}/set")
            row = measure(dataset, Path(folder), args.images, args.rounds, args.workers)
            row |= {"case": case, "slope": memory_slope(dataset, args.workers)}
        show(row)
        write_row("data", {**row, "workers": args.workers, "batch": BATCH, "goal": GOAL})
    row = measure_features(data, args.rounds, args.workers)
    print(
        f"stored features, {row['bytes'] / 1e6:.2f} MB an image: {row['images_per_second']:,.0f} images/s, plain reads "
        f"{row['plain_images_per_second']:,.0f}: {row['of_plain_reads']:.2f} (goal {FEATURES_GOAL})"
    )
    write_row("data", {**row, "workers": args.workers, "batch": BATCH, "goal": FEATURES_GOAL})


def repeated(archive: Path, copies: int, out: Path, at_least: int) -> Path:
    """The archive's pictures `copies` times, under other names; a large archive is thinned out to `at_least`."""
    with zipfile.ZipFile(archive) as source, zipfile.ZipFile(out, "w") as sink:
        names = [name for name in source.namelist() if not name.endswith("/")]
        for name in names[:: max(1, len(names) * copies // at_least)]:
            path, pixels = Path(name), source.read(name)
            for copy in range(copies):
                sink.writestr(f"{path.parent.name}/{path.stem}_{copy}{path.suffix}", pixels)
    return out


def measure(dataset: DataSet, folder: Path, images: int, rounds: int, workers: int) -> dict:
    """Medians over rounds that take the ways in turn: images a second, and images a second of one core."""
    dataset.verify()
    write_peers(dataset, folder)
    ways: dict[str, Way] = {
        "ours": lambda n: ours(dataset, workers),
        "streaming": lambda n: streaming(dataset.path, workers),
        "torchvision": lambda n: torchvision_folder(folder / "files", workers),
        "webdataset": lambda n: webdataset(folder / "tars", workers),
        "limit": lambda n: limit(dataset, n),
    }
    if find_spec("nvidia") and find_spec("nvidia.dali"):
        ways["ours, DALI"] = lambda n: ours(dataset, workers, "dali")
        ways["limit, DALI"] = lambda n: limit_of_dali(dataset, n)
    rates: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for number in range(rounds):
        for name in sorted(ways, reverse=bool(number % 2)):
            rates[name].append(timed(ways[name], images))
    wall = {name: statistics.median(rate for rate, _ in values) for name, values in rates.items()}
    core = {name: statistics.median(rate for _, rate in values) for name, values in rates.items()}
    fastest = max((name for name in wall if not name.startswith(("ours", "limit"))), key=lambda name: wall[name])
    return {
        "images": images,
        "images_per_second": wall,
        "images_per_core_second": core,
        "of_limit": {way: wall[way] / wall[way.replace("ours", "limit")] for way in wall if way.startswith("ours")},
        "fastest_peer": fastest,
        "of_fastest_peer": wall["ours"] / wall[fastest],
    }


def timed(way: Way, images: int) -> tuple[float, float]:
    """Images a second, from the first batch on, by the clock and by the CPU time of all processes."""
    stream = way(images)
    next(stream)  # made before the clock starts
    began, used = time.perf_counter(), cpu_seconds()
    done = 0
    for size in stream:
        done += size
        if done >= images - BATCH:
            break
    seconds, cpu = time.perf_counter() - began, cpu_seconds() - used
    stream.close()
    return done / seconds, done / cpu


def cpu_seconds() -> float:
    """Of this process and its living children."""
    own = psutil.Process()
    times = [process.cpu_times() for process in (own, *own.children(recursive=True))]
    return sum(t.user + t.system for t in times)


def ours(dataset: DataSet, workers: int, decoder: str = "pillow") -> Iterator[int]:
    words = {"seed": 0, "global_batch": BATCH, "rank": 0, "world": 1, "start_step": 0}
    source = Batches(dataset, workers=workers, decoder=decoder, **words)
    try:
        for batch in source:
            yield len(batch)
    finally:
        source.close()


def streaming(folder: Path, workers: int) -> Iterator[int]:
    """As its documentation shows: a subclass that decodes, its own loader, its own shuffle."""
    torchvision_fix.ensure()
    from streaming import StreamingDataLoader, StreamingDataset

    class Pictures(StreamingDataset):
        def __getitem__(self, number: int) -> tuple[Tensor, int]:
            row = super().__getitem__(number)
            return as_tensor(row["image"]), row["label"]  # streaming has opened it with Pillow

    dataset = Pictures(local=str(folder), shuffle=True, batch_size=BATCH)
    yield from forever(StreamingDataLoader(dataset, batch_size=BATCH, **loader_words(workers)))


def torchvision_folder(folder: Path, workers: int) -> Iterator[int]:
    torchvision_fix.ensure()
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import PILToTensor

    dataset = ImageFolder(str(folder), transform=PILToTensor())
    yield from forever(DataLoader(dataset, BATCH, shuffle=True, **loader_words(workers)))


def webdataset(folder: Path, workers: int) -> Iterator[int]:
    import webdataset as wds

    tars = sorted(map(str, folder.glob("*.tar")))
    dataset = (
        wds.WebDataset(tars, shardshuffle=len(tars), empty_check=False)
        .shuffle(1000)
        .map(lambda sample: (pixels(sample["img"]), int(sample["cls"])))
        .batched(BATCH)
    )
    yield from forever(wds.WebLoader(dataset, batch_size=None, **loader_words(workers)))


def encoded_pictures(dataset: DataSet, images: int) -> list[bytes]:
    random = np.random.default_rng(0)
    return [dataset.reader[int(number)]["image"] for number in random.permutation(dataset.count)[:images]]


def limit_of_dali(dataset: DataSet, images: int) -> Iterator[int]:
    """As `limit`, in batches, with one thread."""
    rows, decoder = encoded_pictures(dataset, images), DaliDecoder(BATCH, 1, torch.device("cpu"))
    while True:
        for first in range(0, len(rows) - BATCH + 1, BATCH):
            yield len(decoder(rows[first : first + BATCH], [""] * BATCH))


def limit(dataset: DataSet, images: int) -> Iterator[int]:
    """Nothing but decoding, in this process: bytes that are in memory already."""
    rows = encoded_pictures(dataset, images)
    while True:
        for row in rows:
            with Image.open(io.BytesIO(row)) as image:
                image.convert("RGB").tobytes()
            yield 1


def pixels(data: bytes) -> Tensor:
    with Image.open(io.BytesIO(data)) as image:
        return as_tensor(image)


def as_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def forever(loader) -> Iterator[int]:
    while True:
        for images, *_ in loader:
            yield len(images)


def loader_words(workers: int) -> dict:
    return {"num_workers": workers, "prefetch_factor": PREFETCH if workers else None}


def write_peers(dataset: DataSet, folder: Path) -> None:
    """The same bytes as files in class folders, and in tars of 1,000."""
    (folder / "tars").mkdir()
    for first in range(0, dataset.count, 1000):
        with tarfile.open(folder / "tars" / f"{first // 1000:05}.tar", "w") as tar:
            for number in range(first, min(first + 1000, dataset.count)):
                row = dataset.reader[number]
                kind = "png" if row["image"][:4] == b"\x89PNG" else "jpg"
                place = folder / "files" / f"{row['label']:04}"
                place.mkdir(parents=True, exist_ok=True)
                (place / f"{number:08}.{kind}").write_bytes(row["image"])
                for suffix, content in (("img", row["image"]), ("cls", str(row["label"]).encode())):
                    member = tarfile.TarInfo(f"{number:08}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))


def memory_slope(dataset: DataSet, workers: int) -> float:
    """Growth of the resident memory of all processes of our loader: MB per 1,000 samples, by least squares."""
    stream = ours(dataset, workers)
    seen, points = 0, []
    for size in stream:
        seen += size
        if seen % (BATCH * 16) == 0 and seen > MEMORY_SAMPLES // 10:  # after the first buffers are made
            own = psutil.Process()
            points.append((seen, sum(p.memory_info().rss for p in (own, *own.children(recursive=True)))))
        if seen >= MEMORY_SAMPLES:
            break
    stream.close()
    samples, resident = np.array(points, dtype=float).T
    return float(np.polyfit(samples / 1000, resident / 1e6, 1)[0])


def measure_features(data: Path, rounds: int, workers: int) -> dict:
    """Images a second of stored features, and of plain reads of as many bytes as files, in turn."""
    stored = (
        Stored("moments", "sd-vae-ft-ema", "random", "", "fp16", (8, 32, 32)),
        Stored("tokens", "dinov2-vit-b", "random", "", "bf16", (256, 768)),
    )
    generator = torch.Generator().manual_seed(0)

    def random_features(pictures: np.ndarray) -> list[dict[str, bytes]]:
        columns = [{} for _ in pictures]
        for one in stored:
            values = torch.randn(len(pictures), *one.shape, generator=generator)
            for column, packed in zip(columns, one.pack(values), strict=True):
                column[one.column] = packed
        return columns

    rates: dict[str, list[float]] = {"ours": [], "plain": []}
    with tempfile.TemporaryDirectory() as folder:
        source = open_source(str(repeated(data / "cifar10_train.zip", 1, Path(folder) / "source.zip", FEATURE_IMAGES)))
        out = Path(folder) / "set"
        ingest(source, out, Recipe(32, "png", features=stored), 1, lambda count: None, features=random_features)
        dataset = open_dataset(out)
        dataset.verify()
        dataset.cached = Cached(stored[0], stored[1:], pictures=False)
        files = Path(folder) / "plain"
        files.mkdir()
        for number in range(dataset.count):
            row = dataset.reader[number]
            (files / str(number)).write_bytes(b"".join(row[one.column] for one in stored))
        for _ in range(rounds):
            rates["ours"].append(timed(lambda n: ours(dataset, workers), dataset.count)[0])
            rates["plain"].append(timed(lambda n: plain_reads(files, dataset.count), dataset.count)[0])
        size = (files / "0").stat().st_size
    fast, plain = statistics.median(rates["ours"]), statistics.median(rates["plain"])
    found = {"images_per_second": fast, "plain_images_per_second": plain, "of_plain_reads": fast / plain}
    return {"case": "stored features", "images": FEATURE_IMAGES, "bytes": size, **found}


def plain_reads(folder: Path, count: int) -> Iterator[int]:
    random = np.random.default_rng(0)
    while True:
        for number in random.permutation(count):
            (folder / str(number)).read_bytes()
            yield 1


def show(row: dict) -> None:
    print(row["case"])
    for name, rate in row["images_per_second"].items():
        print(f"  {name:12} {rate:8,.0f} images/s  {row['images_per_core_second'][name]:8,.0f} per core")
    for way, share in row["of_limit"].items():
        print(f"  {way}: {share:.2f} of its limit (goal {GOAL})")
    print(f"  ours: {row['of_fastest_peer']:.2f} of the fastest peer")
    print(f"  memory: {row['slope']:+.2f} MB per 1,000 samples (goal below {MEMORY_GOAL})")


if __name__ == "__main__":
    main()
