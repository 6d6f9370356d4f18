"""Speed and memory of the metrics of images: ours against torch-fidelity's, same images, same network, by turns.

python -m benchmarks.evaluate_metrics [--images 64] [--size 256] [--rounds 3]
python -m benchmarks.evaluate_metrics --memory 2000 4000 8000     peak memory of the whole command by number of images
python -m benchmarks.evaluate_metrics --rows 50000                peak memory of all metrics of so many images' features

Goals: features and metrics not slower than torch-fidelity; 50,000 images of 256 pixels within 4 GB. Inception has
random weights: speed and memory do not depend on them.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.rows import write_row
from repa_scale import torchvision_fix
from repa_scale.evaluate.features import CHUNK, collect
from repa_scale.evaluate.image_sets import open_images
from repa_scale.evaluate.images import measure
from repa_scale.extractors import build_extractor
from repa_scale.metrics.frechet import Moments
from repa_scale.ranks import Ranks

Row = dict[str, Any]
BATCH = 32
LIMIT_GB = 4.0
KINDS = ["fd", "is", "kid", "precision", "recall"]


def rows(images: int = 64, size: int = 256, rounds: int = 3, count: int = 10_000) -> Iterator[Row]:
    """A row for the features of image files, one for the metrics of given features."""
    torchvision_fix.ensure()
    yield features_row(images, size, rounds)
    yield metrics_row(count, rounds)


def features_row(images: int, size: int, rounds: int) -> Row:
    """PNG files to pooled features and logits: reading, decoding, resizing, network."""
    from torch_fidelity.utils import extract_featuresdict_from_input_id

    ranks = Ranks.from_environment("auto")
    extractor = build_extractor("inception", "random", ranks.device)
    with tempfile.TemporaryDirectory() as folder:
        for number in range(images):
            coarse = np.random.default_rng(number).integers(0, 256, (size // 8, size // 8, 3), dtype=np.uint8)
            Image.fromarray(coarse).resize((size, size)).save(Path(folder) / f"{number:05d}.png")
        theirs = _torch_fidelity(ranks.device)
        keep = {"pool": None, "logits": None}

        def ours() -> None:
            collect(open_images(folder), extractor, ranks, BATCH, keep, lambda done: None)

        def public() -> None:
            cuda = ranks.device.type == "cuda"
            options = {"input1": folder, "cuda": cuda, "batch_size": BATCH, "verbose": False}
            extract_featuresdict_from_input_id(1, theirs, **options)

        seconds = by_turns({"ours": ours, "torch-fidelity": public}, rounds)
    return {
        "case": f"features of {images} PNG files of {size} pixels (ours with moments and sFID's layer)",
        "images_per_second": images / seconds["ours"],
        "public_images_per_second": images / seconds["torch-fidelity"],
        "ratio": seconds["torch-fidelity"] / seconds["ours"],
    }


def metrics_row(count: int, rounds: int) -> Row:
    """Features to FID, IS and KID as torch-fidelity computes them; ours adds intervals, precision and recall apart."""
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric

    from repa_scale.evaluate.features import Features

    generator = torch.Generator().manual_seed(0)
    samples, reference = (torch.rand(count, 2048, generator=generator) ** 2 for _ in range(2))
    logits = torch.randn(count, 1008, generator=generator) * 3
    device = Ranks.from_environment("auto").device

    def ours(kinds: list[str]) -> Callable[[], None]:
        def work() -> None:
            sides = [
                Features("", "", count, {"pool": Moments.of(rows)}, {"pool": rows, "logits": logits})
                for rows in (samples, reference)
            ]
            measure(kinds, *sides, device)

        return work

    def public() -> None:
        with contextlib.redirect_stderr(io.StringIO()):
            fid_statistics_to_metric(*(fid_features_to_statistics(x) for x in (samples, reference)), verbose=False)
        isc_features_to_metric(logits)
        kid_features_to_metric(samples, reference, verbose=False)

    seconds = by_turns({"ours": ours(KINDS[:3]), "torch-fidelity": public, "all": ours(KINDS)}, rounds)
    return {
        "case": f"FID, IS and KID of {count} features, ours with intervals",
        "seconds": seconds["ours"],
        "public_seconds": seconds["torch-fidelity"],
        "ratio": seconds["torch-fidelity"] / seconds["ours"],
        "seconds_with_precision_and_recall": seconds["all"],
    }


def by_turns(ways: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Median seconds of each, run one after the other, after one round that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, work in ways.items():
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            began = time.perf_counter()
            work()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if number:
                seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in seconds.items()}


def memory_row(count: int, size: int, extractor: str) -> Row:
    """Peak memory of `repa-scale evaluate` on that many images against themselves, in a process of its own."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_images(folder / "samples.npz", count, size)
        weights = ["--weights", "random"] if extractor == "inception" else []
        words = ["evaluate", str(folder), "--reference", str(folder), "--extractor", extractor, *weights]
        command = [sys.executable, "-m", "repa_scale", *words, "--cache", name]
        began = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6
    return {"case": f"memory, {extractor}", "images": count, "size": size, "peak_gb": peak, "seconds": seconds}


def rows_memory_row(count: int) -> Row:
    """Peak memory of a process that holds the features of `count` images, and of as many of the reference, as
    `repa-scale evaluate` does, and computes all metrics of them."""
    began = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "benchmarks.evaluate_metrics", "--part", "rows", "--rows", str(count)], check=True
    )
    seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6
    return {"case": "memory of all metrics, inception's features", "images": count, "peak_gb": peak, "seconds": seconds}


def measure_rows(count: int) -> None:
    from repa_scale.evaluate.features import Features

    torchvision_fix.ensure()
    extractor = build_extractor("inception", "random", torch.device("cpu"))  # evaluate holds it until its end
    generator = torch.Generator().manual_seed(0)

    def features(widths: dict[str, int]) -> dict[str, torch.Tensor]:
        return {part: torch.rand(count, width, generator=generator).square_() for part, width in widths.items()}

    sides = []
    for kept in ({"pool": 2048, "spatial": 2023, "logits": 1008}, {"pool": 2048}):
        rows = features(kept)
        moments = {part: _moments(rows.get(part)) for part in ("pool", "spatial") if part in rows}
        sides.append(Features("", "", count, moments, rows))
    sides[1].moments["spatial"] = _moments(features({"spatial": 2023})["spatial"])
    measure(["fd", "sfid", *KINDS[1:]], *sides, torch.device("cpu"))
    del extractor


def _moments(rows: torch.Tensor) -> Moments:
    whole = Moments.empty(rows.shape[1])
    for block in rows.split(CHUNK):
        whole = whole.add(block)
    return whole


def write_images(file: Path, count: int, size: int) -> None:
    """An .npz of synthetic images, written one by one."""
    with zipfile.ZipFile(file, "w") as archive, archive.open("arr_0.npy", "w", force_zip64=True) as stream:
        head = {"descr": "|u1", "fortran_order": False, "shape": (count, size, size, 3)}
        np.lib.format.write_array_header_2_0(stream, head)
        for number in range(count):
            coarse = np.random.default_rng(number).integers(0, 256, (size // 8, size // 8, 3), dtype=np.uint8)
            stream.write(np.asarray(Image.fromarray(coarse).resize((size, size))).tobytes())


def _torch_fidelity(device: torch.device) -> torch.nn.Module:
    """Its extractor with random weights, which it takes from a file alone."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Untrained(FeatureExtractorInceptionV3):
        def load_state_dict(self, tensors: Any, *args: Any, **keywords: Any) -> None:
            return None

    nothing = io.BytesIO()
    torch.save({}, nothing)
    nothing.seek(0)
    network = Untrained("inception-v3-compat", ["2048", "logits_unbiased"], nothing)
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    return network.eval().to(device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--count", type=int, default=10_000, help="features of each set")
    parser.add_argument("--memory", type=int, nargs="+", metavar="N", help="measure this instead")
    parser.add_argument("--extractor", default="inception", help="of --memory")
    parser.add_argument("--rows", type=int, metavar="N", help="measure this instead")
    parser.add_argument("--part", choices=("rows",), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        measure_rows(args.rows)
        return
    if args.rows:
        found = [rows_memory_row(args.rows)]
    elif args.memory:  # ascending: a process's peak is the largest child's
        found = (memory_row(count, args.size, args.extractor) for count in sorted(args.memory))
    else:
        found = rows(args.images, args.size, args.rounds, args.count)
    for row in found:
        print(", ".join(f"{key} {value}" for key, value in row.items()), flush=True)
        write_row("evaluate", {"part": "metrics", **row})


if __name__ == "__main__":
    main()
