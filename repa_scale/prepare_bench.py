"""`repa-scale prepare --bench SET`: images a second of each stage of the data path on this machine, and the slowest."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from repa_scale.data.batches import Batches, decode
from repa_scale.data.dataset import DataSet
from repa_scale.encoders import build_encoder
from repa_scale.errors import ConfigError, did_you_mean
from repa_scale.flops import GPU_PEAK, most_images_per_second
from repa_scale.sizes import token_grid

SECONDS = 2.0  # of each stage
BATCH = 32
LATENTS = "sd-vae-ft-mse"  # whose grid the encoder's tokens are counted for


@dataclass(frozen=True)
class Stage:
    """One part of the path: what it does, with how many processes, and images a second."""

    name: str
    where: str
    rate: float


def bench(dataset: DataSet, workers: int, model: str, encoder: str, gpu: str | None) -> list[str]:
    """Measures the stages one after the other, and says in lines what they give.

    Args:
        workers: loader processes, as in `data.workers`.
        model: the backbone to feed, as in `model.name`.
        encoder: a row of sizes.ENCODERS; its weights are random here, which costs the same.
        gpu: a row of flops.GPU_PEAK; None: this machine's, or an H100.

    Raises:
        ConfigError: unknown model, encoder or GPU, or a set that fits no token grid of the model.
    """
    gpu = gpu or _this_gpu() or "H100"
    if gpu not in GPU_PEAK:
        raise ConfigError(f"--gpu {gpu} is not known{did_you_mean(gpu, GPU_PEAK)}")
    grid = token_grid(dataset.image_size, LATENTS, model)
    wanted = most_images_per_second(model, encoder, grid[0] * grid[1], gpu)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    stages = [
        Stage("reading shards, cold", "1 process", reading(dataset)),
        Stage("decoding", "1 process", decoding(dataset)),
        Stage("loader: reading, decoding, batches", f"{max(1, workers)} processes", loading(dataset, workers)),
        Stage("copying to the device", str(device), copying(dataset, device)),
        Stage(f"encoding with {encoder}", str(device), encoding(dataset, encoder, grid, device)),
    ]
    feeding = [stage for stage in stages[2:4] if device.type == "cuda" or stage.name != "copying to the device"]
    slowest = min(feeding, key=lambda stage: stage.rate)
    lines = [f"{stage.name:34} {stage.where:12} {stage.rate:12,.0f} images/s" for stage in stages]
    lines.append(f"bottleneck: {slowest.name} ({slowest.where}), {slowest.rate:,.0f} images/s")
    lines.append(
        f"{model} with {encoder} trains at most {wanted:,.0f} images/s on one {gpu}: this path feeds "
        f"{slowest.rate / wanted:.2g} of them"
    )
    if slowest.rate < wanted:
        lines.append(_remedy(stages, workers))
    return lines


def reading(dataset: DataSet) -> float:
    """Shards as plain bytes from the disk: the page cache is asked to forget them first."""
    files = [dataset.path / shard.basename for shard in dataset.reader.shards]
    for file in files:
        _forget(file)

    def shards() -> Iterable[int]:
        for file, shard in zip(files, dataset.reader.shards, strict=True):
            with file.open("rb", buffering=0) as source:
                while source.read(1 << 22):
                    pass
            yield shard.samples

    return _rate(shards(), dataset.count)


def decoding(dataset: DataSet) -> float:
    """Bytes in memory to pixels."""
    rows = [dataset.reader[number]["image"] for number in range(min(dataset.count, 8 * BATCH))]
    return _rate(_repeated(lambda i: decode(rows[i % len(rows)])))


def loading(dataset: DataSet, workers: int) -> float:
    """What training's own loader gives, after its start."""
    source = Batches(
        dataset, seed=0, global_batch=min(BATCH, dataset.count), rank=0, world=1, workers=workers, start_step=0
    )
    try:
        stream = iter(source)
        next(stream)
        return _rate(len(batch) for batch in stream)
    finally:
        source.close()


def copying(dataset: DataSet, device: torch.device) -> float:
    size = dataset.image_size
    images = torch.zeros(BATCH, size, size, 3, dtype=torch.uint8)
    if device.type == "cuda":
        images = images.pin_memory()

    def copy(_: int) -> None:
        images.to(device, copy=True).permute(0, 3, 1, 2).contiguous()
        _synchronise(device)

    return BATCH * _rate(_repeated(copy))


def encoding(dataset: DataSet, encoder: str, grid: tuple[int, int], device: torch.device) -> float:
    """The frozen encoder's forward pass, in the precision that training has on this device."""
    cuda = device.type == "cuda"
    network = build_encoder(encoder, "random", grid, device, torch.bfloat16 if cuda else torch.float32)
    count = 4 * BATCH if cuda else 4
    images = torch.zeros(count, 3, dataset.image_size, dataset.image_size, dtype=torch.uint8, device=device)

    def run(_: int) -> None:
        with torch.no_grad():
            network(images)
        _synchronise(device)

    run(0)
    return count * _rate(_repeated(run))


def _remedy(stages: list[Stage], workers: int) -> str:
    cores = len(os.sched_getaffinity(0))
    if stages[0].rate < stages[2].rate * 1.1:
        return "the disk is the limit: copy the set to a local NVMe"
    if workers < cores:
        return f"use more loader processes: data.workers={cores} (cores of this machine)"
    return "use --format jpeg for the set, more cores, or a decoder on the GPU"


def _rate(counts: Iterable[int], at_most: int | None = None) -> float:
    """Items a second, over SECONDS or until they end."""
    began, done = time.perf_counter(), 0
    for count in counts:
        done += count
        if time.perf_counter() - began > SECONDS or (at_most and done >= at_most):
            break
    return done / (time.perf_counter() - began)


def _repeated(action: Callable[[int], object]) -> Iterable[int]:
    for number in itertools.count():
        action(number)
        yield 1


def _forget(file) -> None:
    if hasattr(os, "posix_fadvise"):
        with file.open("rb") as source:
            os.posix_fadvise(source.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _this_gpu() -> str | None:
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return next((gpu for gpu in GPU_PEAK if gpu in name), None)
