"""From a source of images to a prepared set: decode, crop, encode, write MDS shards; interrupted, it goes on.

The set grows in parts under OUT/.prepare, of so many source images as fill about one shard. A part counts once its
done.json is written; the parts become the set when all are there, and dataset.json is written last. What a part holds
depends on its images alone, so neither workers, ranks nor interruptions change a byte.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
import shutil
import time
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures import TimeoutError as PoolTimeout
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image, UnidentifiedImageError

from repa_scale import __version__, torchvision_fix
from repa_scale.data.crop import center_crop
from repa_scale.data.decode import rgb
from repa_scale.data.features import why_another
from repa_scale.data.manifest import FORMAT_VERSION, MANIFEST, data_fingerprint
from repa_scale.data.mds import read_index, verify_shard
from repa_scale.data.recipe import SHARD_BYTES, Recipe
from repa_scale.data.sources import Item, Source
from repa_scale.errors import DataError, UserError, require
from repa_scale.files import link, write_durably
from repa_scale.processes import depend_on

WORK = ".prepare"
FEATURE_BATCH = 32  # images that go through the networks together
IN_FLIGHT = 8  # images a worker has ahead
LARGEST_FILE = 1 << 28  # bytes; an archive's member could unpack to any size
PATIENCE = 600.0  # seconds for one picture
LOCK_PATIENCE = 3.0  # seconds: the workers of a process that was killed hold its lock until they notice

# (N, S, S, 3) uint8 crops -> of each image its feature columns, or the reason why there are none.
FeatureMaker = Callable[[np.ndarray], "list[dict[str, bytes] | str]"]


class Group(Protocol):
    """The processes that prepare one set together (ranks.Ranks is one)."""

    rank: int
    world_size: int

    def broadcast_object(self, value: object) -> object: ...

    def gather_objects(self, value: object) -> list: ...


class Alone:
    """A group of one."""

    rank, world_size = 0, 1

    def broadcast_object(self, value: object) -> object:
        return value

    def gather_objects(self, value: object) -> list:
        return [value]


class Store(Protocol):
    """A place other than a folder that finished parts go to (bucket.py)."""

    def finished(self, number: int) -> dict[str, Any] | None: ...

    def put_part(self, number: int, folder: Path, done: dict[str, Any]) -> dict[str, Any]: ...

    def put_files(self, folder: Path, names: list[str]) -> None: ...


def ingest(
    source: Source,
    out: Path,
    recipe: Recipe,
    workers: int,
    progress: Callable[[int], None],
    *,
    features: FeatureMaker | None = None,
    group: Group | None = None,
    store: Store | None = None,
) -> dict[str, Any] | None:
    """Writes the set to `out` and returns its manifest, on rank 0.

    Args:
        workers: processes that decode.
        progress: called with the number of source images done since the last call.
        features: makes what `recipe.features` says.
        group: this process's rank among those that share the work: parts r, r + n, ... are rank r's.
        store: where finished parts are moved to; `out` then holds only what is in work.

    Raises:
        DataError: another preparation stands in `out`, or not one image could be read.
        UserError: the disk is full or cannot be written; a process died.
    """
    torchvision_fix.ensure()
    require("streaming", "data")
    group = group or Alone()
    job = {"source": source.fingerprint, "recipe": recipe.as_dict()}
    claim = _claimed(out, job) if group.rank == 0 else nullcontext()
    problem, done = None, []
    with _told(out, workers), _shared(group, claim, out, workers):
        try:
            with _told(out, workers):
                done = _make_parts(source, out, recipe, workers, progress, features, group, store)
        except UserError as error:
            problem = error
        for found in group.gather_objects(problem):
            if found is not None:
                raise found
        gathered = {number: part for mine in group.gather_objects(done) for number, part in mine}
        if group.rank:
            return None
        return _assemble(source, out, recipe, [gathered[number] for number in sorted(gathered)], store)


@contextmanager
def _shared(group: Group, claim, out: Path, workers: int) -> Iterator[None]:
    """Rank 0's claim on the folder; where it is refused, every rank raises the same."""
    refusal = None
    try:
        with _told(out, workers):
            claim.__enter__()
    except UserError as error:
        refusal = error
    refusal = group.broadcast_object(refusal)
    if refusal is not None:
        raise refusal
    try:
        yield
    finally:
        claim.__exit__(None, None, None)


@contextmanager
def _told(out: Path, workers: int) -> Iterator[None]:
    """What goes wrong around the folder, in one line."""
    try:
        yield
    except (BrokenProcessPool, PoolTimeout) as error:
        raise UserError(
            f"a decoding process died or stood still ({type(error).__name__}); the same command goes on, "
            f"with --workers less than {workers} if memory is short"
        ) from None
    except OSError as error:
        raise UserError(
            f"--out {out} cannot be written ({error.strerror}); make room or choose another folder"
        ) from None


def _make_parts(
    source: Source,
    out: Path,
    recipe: Recipe,
    workers: int,
    progress: Callable[[int], None],
    features: FeatureMaker | None,
    group: Group,
    store: Store | None,
) -> list[tuple[int, dict[str, Any]]]:
    """Makes this rank's parts that are not there yet; returns number and done.json of each."""
    made = []
    with ProcessPoolExecutor(workers, get_context("fork"), initializer=depend_on, initargs=(os.getpid(),)) as pool:
        writer = _PartWriter(source, recipe, pool, IN_FLIGHT * workers, progress, features)
        for number, items in parts_of(source, recipe, group):
            folder = out / WORK / f"part_{number:05d}"
            done = store.finished(number) if store else None
            if done is None:
                done = _finished(folder)
                if done is None:
                    done = writer.write(folder, items)
                else:
                    progress(len(items))
                if store:
                    done = store.put_part(number, folder, done)
            else:
                progress(len(items))
            made.append((number, done))
    return made


def parts_of(source: Source, recipe: Recipe, group: Group) -> list[tuple[int, list[Item]]]:
    """Numbers and images of the parts that this rank makes.

    The images are mixed, by their ids: training shuffles within some neighbouring shards at a time (order.py), and
    shards of one class each would give it batches of few classes.
    """
    size = recipe.part_items
    items = source.items if source.in_order else sorted(source.items, key=lambda item: item.id)
    starts = range(0, len(items), size)
    return [(i // size, items[i : i + size]) for i in starts[group.rank :: group.world_size]]


@contextmanager
def _claimed(out: Path, job: dict[str, Any]) -> Iterator[None]:
    """Holds `out` for this process and this job alone; a process that dies lets go of it."""
    _claim(out, job)
    with (out / WORK / "lock").open("w") as lock:
        deadline = time.monotonic() + LOCK_PATIENCE
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise DataError(f"--out {out} is being written by another prepare; wait for it to end") from None
                time.sleep(0.05)
        yield


def _claim(out: Path, job: dict[str, Any]) -> None:
    """Takes the folder for this job, or finds that it is the one to go on with."""
    state = out / WORK / "job.json"
    if out.exists() and not out.is_dir():
        raise DataError(f"--out {out} is not a folder; choose another name")
    if state.exists():
        if reason := why_another(json.loads(state.read_text()), job):
            raise DataError(
                f"--out {out} holds the beginning of another preparation ({reason}); choose another folder, or remove "
                f"{out / WORK}"
            )
        return
    if out.exists() and any(entry.name != WORK for entry in out.iterdir()):
        raise DataError(f"--out {out} is not empty; choose another folder")
    (out / WORK).mkdir(parents=True, exist_ok=True)
    write_durably(state, json.dumps(job).encode())


def _finished(folder: Path) -> dict[str, Any] | None:
    """What done.json says of a part whose shards are whole; None: it has to be made again."""
    try:
        done = json.loads((folder / "done.json").read_text())
        for shard in read_index(folder) if done["shards"] else []:
            verify_shard(folder, shard)
        return done
    except (OSError, ValueError, KeyError, TypeError, DataError):
        return None


class _PartWriter:
    """Writes parts, one after the other."""

    def __init__(
        self,
        source: Source,
        recipe: Recipe,
        pool: ProcessPoolExecutor,
        ahead: int,
        progress: Callable[[int], None],
        features: FeatureMaker | None,
    ) -> None:
        self.source, self.recipe, self.pool, self.ahead = source, recipe, pool, ahead
        self.progress, self.features = progress, features

    def write(self, folder: Path, items: list[Item]) -> dict[str, Any]:
        """The shards of some items; returns what stands in done.json: counts, what was left out, rows of the index."""
        from streaming import MDSWriter

        shutil.rmtree(folder, ignore_errors=True)
        labels: Counter[int] = Counter()
        quarantined = []
        with MDSWriter(
            out=str(folder), columns=self.recipe.columns, hashes=["sha256"], size_limit=SHARD_BYTES
        ) as writer:
            for item, sample in self._samples(items):
                if isinstance(sample, str):
                    quarantined.append({"id": item.id, "name": item.name, "reason": sample})
                else:
                    writer.write({**sample, "label": item.label, "id": item.id, "name": item.name})
                    labels[item.label] += 1
                self.progress(1)
        rows = json.loads((folder / "index.json").read_text())["shards"] if labels else []
        done = {
            "labels": {str(label): count for label, count in labels.items()},
            "quarantined": quarantined,
            "shards": rows,
        }
        write_durably(folder / "done.json", json.dumps(done).encode())
        return done

    def _samples(self, items: list[Item]) -> Iterator[tuple[Item, dict[str, bytes] | str]]:
        """The items in order, each with picture and features, or with the reason why it is left out."""
        if self.features is None:
            for item, encoded in self._encoded(items):
                yield item, encoded if isinstance(encoded, str) else {"image": encoded.data}
            return
        stream = self._encoded(items)
        while batch := [pair for _, pair in zip(range(FEATURE_BATCH), stream, strict=False)]:
            good = [encoded for _, encoded in batch if not isinstance(encoded, str)]
            made = iter(self.features(np.stack([encoded.pixels for encoded in good])) if good else ())
            for item, encoded in batch:
                if isinstance(encoded, str):
                    yield item, encoded
                else:
                    columns = next(made)
                    yield item, columns if isinstance(columns, str) else {"image": encoded.data, **columns}

    def _encoded(self, items: list[Item]) -> Iterator[tuple[Item, Encoded | str]]:
        """The items in order with their pictures, or the reason why there is none; at most `ahead` at once."""
        waiting: deque[tuple[Item, Future, bytes | None]] = deque()
        for item in items:
            try:
                if item.size > LARGEST_FILE:
                    raise ValueError(f"its file has {item.size} bytes, more than {LARGEST_FILE}")
                data = self.source.read(item.key)
                if len(data) > LARGEST_FILE:
                    raise ValueError(f"it has {len(data)} bytes, more than {LARGEST_FILE}")
            except Exception as error:  # a damaged member of an archive: zipfile and tarfile raise many kinds
                failed: Future = Future()
                failed.set_result(f"cannot be read: {error}")
                waiting.append((item, failed, None))
            else:
                kept = data if self.recipe.layout == "keep" else None
                waiting.append((item, self.pool.submit(encode, data, self.recipe), kept))
            while len(waiting) > self.ahead:
                yield _result(*waiting.popleft())
        for entry in waiting:
            yield _result(*entry)


@dataclass(frozen=True)
class Encoded:
    """A sample's picture as a file, and its cropped pixels, (S, S, 3) uint8, where features are made of them."""

    data: bytes
    pixels: np.ndarray | None


def _result(item: Item, future: Future, kept: bytes | None) -> tuple[Item, Encoded | str]:
    result = future.result(PATIENCE)
    if isinstance(result, Encoded) and kept is not None:
        return item, Encoded(kept, result.pixels)
    return item, result


def encode(data: bytes, recipe: Recipe) -> Encoded | str:
    """A picture's file -> the sample's picture (empty for layout `keep`), or the reason why it cannot be one."""
    wants_pixels = bool(recipe.features)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data)) as picture:
                if recipe.layout == "keep" and not wants_pixels:
                    picture.load()  # damage is found now, not in training
                    return Encoded(b"", None)
                cropped = center_crop(rgb(picture), recipe.size)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        return f"more than {Image.MAX_IMAGE_PIXELS} pixels (a decompression bomb?)"
    except UnidentifiedImageError:
        return "not an image that Pillow knows"
    except Exception as error:  # damaged files make Pillow raise many kinds
        return f"damaged: {error}"
    pixels = np.asarray(cropped) if wants_pixels else None
    if recipe.layout == "keep":
        return Encoded(b"", pixels)
    cropped.info.clear()  # or colour profiles and comments would be written along
    buffer = io.BytesIO()
    if recipe.format == "jpeg":
        cropped.save(buffer, format="JPEG", quality=recipe.quality, subsampling=0)
    else:
        cropped.save(buffer, format="PNG", compress_level=6)
    return Encoded(buffer.getvalue(), pixels)


def _assemble(
    source: Source, out: Path, recipe: Recipe, parts: list[dict[str, Any]], store: Store | None
) -> dict[str, Any]:
    """Joins the parts under one index, and writes the manifest."""
    counts: Counter[int] = Counter()
    quarantined, rows = [], []
    for number, done in enumerate(parts):
        quarantined += done["quarantined"]
        counts.update({int(label): count for label, count in done["labels"].items()})
        for row in done["shards"]:
            if store is None:
                name = f"shard.{len(rows):05d}.mds"
                # Not a rename: until dataset.json stands, the parts stay whole and the same command goes on from them.
                link(out / WORK / f"part_{number:05d}" / row["raw_data"]["basename"], out / name)
                row["raw_data"]["basename"] = name
            rows.append(row)
    if not rows:
        first = quarantined[0]
        raise DataError(f"not one image of {source.name} could be read: {first['name']}: {first['reason']}")
    write_durably(out / "index.json", json.dumps({"version": 2, "shards": rows}).encode())
    shards = read_index(out)
    manifest = {
        "format_version": FORMAT_VERSION,
        "name": source.name,
        "image_size": recipe.size,
        "count": sum(counts.values()),
        "class_names": source.class_names,
        "class_counts": [counts[label] for label in range(len(source.class_names))],
        "fingerprint": data_fingerprint(recipe.as_dict(), source.class_names, shards),
        "index_sha256": hashlib.sha256((out / "index.json").read_bytes()).hexdigest(),
        "recipe": recipe.as_dict(),
        "source": {"name": source.name, "fingerprint": source.fingerprint, "images": len(source.items)},
        "quarantined": quarantined,
        "versions": {"repa_scale": __version__, "pillow": Image.__version__, **_versions(recipe)},
    }
    write_durably(out / MANIFEST, json.dumps(manifest, indent=1).encode())
    if store is not None:
        store.put_files(out, ["index.json", MANIFEST])
    shutil.rmtree(out / WORK)
    return manifest


def _versions(recipe: Recipe) -> dict[str, str]:
    """Of what else made the samples."""
    from importlib.metadata import version

    names = ("mosaicml-streaming", *(("torch", "timm", "diffusers") if recipe.features else ()))
    return {name: version(name) for name in names}
