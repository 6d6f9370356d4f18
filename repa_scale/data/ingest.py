"""From a source of images to a prepared set: decode, crop, encode, write MDS shards; interrupted, it goes on.

The set grows in parts of PART_ITEMS source images under OUT/.prepare. A part counts once its done.json is written; the
parts become the set when all are there, and dataset.json is written last.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
import shutil
import signal
import threading
import time
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures import TimeoutError as PoolTimeout
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from repa_scale import __version__, torchvision_fix
from repa_scale.data.crop import center_crop
from repa_scale.data.manifest import FORMAT_VERSION, MANIFEST, data_fingerprint, write_file
from repa_scale.data.mds import read_index, verify_shard
from repa_scale.data.sources import Item, Source
from repa_scale.errors import DataError, UserError, require

WORK = ".prepare"
PART_ITEMS = 2048
SHARD_BYTES = 1 << 26
IN_FLIGHT = 8  # images a worker has ahead
LARGEST_FILE = 1 << 28  # bytes; an archive's member could unpack to any size
PATIENCE = 600.0  # seconds for one picture
COLUMNS = {"label": "int", "id": "int", "name": "str"}


@dataclass(frozen=True)
class Recipe:
    """How a picture becomes a sample. It is part of the data fingerprint."""

    size: int  # pixels an axis
    format: str = "png"  # png | jpeg
    quality: int = 95  # of jpeg, which is written 4:4:4
    crop: str = "adm"
    version: int = 1


def ingest(source: Source, out: Path, recipe: Recipe, workers: int, progress: Callable[[int], None]) -> dict[str, Any]:
    """Writes the set to `out` and returns its manifest.

    Args:
        workers: processes that decode.
        progress: called with the number of source images done since the last call.

    Raises:
        DataError: another preparation stands in `out`, or not one image could be read.
        UserError: the disk is full or cannot be written.
    """
    torchvision_fix.ensure()
    require("streaming", "data")
    try:
        with _claimed(out, {"source": source.fingerprint, "recipe": asdict(recipe)}):
            return _ingest(source, out, recipe, workers, progress)
    except (BrokenProcessPool, PoolTimeout) as error:
        raise UserError(
            f"a decoding process died or stood still ({type(error).__name__}); the same command goes on, "
            f"with --workers less than {workers} if memory is short"
        ) from None
    except OSError as error:
        raise UserError(
            f"--out {out} cannot be written ({error.strerror}); make room or choose another folder"
        ) from None


def _ingest(source: Source, out: Path, recipe: Recipe, workers: int, progress: Callable[[int], None]) -> dict[str, Any]:
    work = out / WORK
    parts = [source.items[i : i + PART_ITEMS] for i in range(0, len(source.items), PART_ITEMS)]
    with ProcessPoolExecutor(workers, get_context("fork"), initializer=_depend, initargs=(os.getpid(),)) as pool:
        done = []
        for number, items in enumerate(parts):
            folder = work / f"part_{number:05d}"
            finished = _finished(folder)
            if finished is None:
                finished = _write_part(folder, source, items, recipe, pool, workers, progress)
            else:
                progress(len(items))
            done.append((folder, finished))
    return _assemble(source, out, recipe, done)


@contextmanager
def _claimed(out: Path, job: dict[str, Any]) -> Iterator[None]:
    """Holds `out` for this process and this job alone; a process that dies lets go of it."""
    _claim(out, job)
    with (out / WORK / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"--out {out} is being written by another prepare; wait for it to end") from None
        yield


def _claim(out: Path, job: dict[str, Any]) -> None:
    """Takes the folder for this job, or finds that it is the one to go on with."""
    state = out / WORK / "job.json"
    if out.exists() and not out.is_dir():
        raise DataError(f"--out {out} is not a folder; choose another name")
    if state.exists():
        if json.loads(state.read_text()) != job:
            raise DataError(
                f"--out {out} holds the beginning of another preparation (other images or another recipe); "
                f"choose another folder, or remove {out / WORK}"
            )
        return
    if out.exists() and any(entry.name != WORK for entry in out.iterdir()):
        raise DataError(f"--out {out} is not empty; choose another folder")
    (out / WORK).mkdir(parents=True, exist_ok=True)
    write_file(state, json.dumps(job).encode())


def _finished(folder: Path) -> dict[str, Any] | None:
    """What done.json says of a part whose shards are whole; None: it has to be made again."""
    try:
        done = json.loads((folder / "done.json").read_text())
        for shard in read_index(folder) if done["labels"] else []:
            verify_shard(folder, shard)
        return done
    except (OSError, ValueError, DataError):
        return None


def _write_part(
    folder: Path,
    source: Source,
    items: list[Item],
    recipe: Recipe,
    pool: ProcessPoolExecutor,
    workers: int,
    progress: Callable[[int], None],
) -> dict[str, Any]:
    from streaming import MDSWriter

    shutil.rmtree(folder, ignore_errors=True)
    labels: Counter[int] = Counter()
    quarantined = []
    columns = {"image": recipe.format, **COLUMNS}
    with MDSWriter(out=str(folder), columns=columns, hashes=["sha256"], size_limit=SHARD_BYTES) as writer:
        for item, encoded in _encoded(source, items, recipe, pool, IN_FLIGHT * workers):
            if isinstance(encoded, str):
                quarantined.append([item.name, encoded])
            else:
                writer.write({"image": encoded, "label": item.label, "id": item.id, "name": item.name})
                labels[item.label] += 1
            progress(1)
    done = {"labels": {str(label): count for label, count in labels.items()}, "quarantined": quarantined}
    write_file(folder / "done.json", json.dumps(done).encode())
    return done


def _encoded(
    source: Source, items: list[Item], recipe: Recipe, pool: ProcessPoolExecutor, ahead: int
) -> Iterator[tuple[Item, bytes | str]]:
    """The items in order with their encoded pictures, or the reason why there is none; at most `ahead` at once."""
    waiting: deque[tuple[Item, Future]] = deque()
    for item in items:
        try:
            if item.size > LARGEST_FILE:
                raise ValueError(f"its file has {item.size} bytes, more than {LARGEST_FILE}")
            data = source.read(item.key)
        except Exception as error:  # a damaged member of an archive: zipfile and tarfile raise many kinds
            failed: Future = Future()
            failed.set_result(f"cannot be read: {error}")
            waiting.append((item, failed))
        else:
            waiting.append((item, pool.submit(encode, data, recipe)))
        while len(waiting) > ahead:
            first, result = waiting.popleft()
            yield first, result.result(PATIENCE)
    for item, result in waiting:
        yield item, result.result(PATIENCE)


def encode(data: bytes, recipe: Recipe) -> bytes | str:
    """A picture's file -> the cropped sample's file, or the reason why it cannot be one."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data)) as picture:
                cropped = center_crop(_to_rgb(picture), recipe.size)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        return f"more than {Image.MAX_IMAGE_PIXELS} pixels (a decompression bomb?)"
    except UnidentifiedImageError:
        return "not an image that Pillow knows"
    except Exception as error:  # damaged files make Pillow raise many kinds
        return f"damaged: {error}"
    cropped.info.clear()  # or colour profiles and comments would be written along
    buffer = io.BytesIO()
    if recipe.format == "jpeg":
        cropped.save(buffer, format="JPEG", quality=recipe.quality, subsampling=0)
    else:
        cropped.save(buffer, format="PNG", compress_level=6)
    return buffer.getvalue()


def _to_rgb(picture: Image.Image) -> Image.Image:
    """RGB as Pillow converts it: alpha is dropped, palettes are looked up; 16-bit grey keeps its upper 8 bits."""
    if picture.mode.startswith("I"):
        values = np.asarray(picture).astype(np.int64)
        picture = Image.fromarray((values >> (8 if values.max(initial=0) > 255 else 0)).clip(0, 255).astype(np.uint8))
    return picture.convert("RGB")


def _assemble(source: Source, out: Path, recipe: Recipe, parts: list[tuple[Path, dict]]) -> dict[str, Any]:
    """Moves the parts' shards together under one index, and writes the manifest."""
    counts: Counter[int] = Counter()
    quarantined, rows = [], []
    moves = []
    for folder, done in parts:
        quarantined += done["quarantined"]
        counts.update({int(label): count for label, count in done["labels"].items()})
        if not done["labels"]:
            continue
        for row in json.loads((folder / "index.json").read_text())["shards"]:
            name = f"shard.{len(rows):05d}.mds"
            moves.append((folder / row["raw_data"]["basename"], out / name))
            row["raw_data"]["basename"] = name
            rows.append(row)
    if not rows:
        raise DataError(f"not one image of {source.name} could be read: {quarantined[0][0]}: {quarantined[0][1]}")
    # Links, not renames: until dataset.json stands, the parts stay whole and the same command goes on from them.
    for origin, target in moves:
        target.unlink(missing_ok=True)
        try:
            os.link(origin, target)
        except OSError:  # a file system without links
            shutil.copyfile(origin, target)
    write_file(out / "index.json", json.dumps({"version": 2, "shards": rows}).encode())
    shards = read_index(out)
    manifest = {
        "format_version": FORMAT_VERSION,
        "name": source.name,
        "image_size": recipe.size,
        "count": sum(counts.values()),
        "class_names": source.class_names,
        "class_counts": [counts[label] for label in range(len(source.class_names))],
        "fingerprint": data_fingerprint(asdict(recipe), source.class_names, shards),
        "index_sha256": hashlib.sha256((out / "index.json").read_bytes()).hexdigest(),
        "recipe": asdict(recipe),
        "source": {"name": source.name, "fingerprint": source.fingerprint, "images": len(source.items)},
        "quarantined": quarantined,
        "versions": {"repa_scale": __version__, "pillow": Image.__version__},
    }
    write_file(out / MANIFEST, json.dumps(manifest, indent=1).encode())
    shutil.rmtree(out / WORK)
    return manifest


def _depend(parent: int) -> None:
    """A worker leaves Ctrl-C to the process that asked for it, and ends when that one is gone, however it went."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
