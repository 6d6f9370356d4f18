"""Finished blocks of samples beside the output, one file each, and how they become one `.npz`. None is drawn here."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from repa_scale.checksums import checksum_file
from repa_scale.errors import ConfigError, UserError
from repa_scale.files import sync_folder, write_atomically
from repa_scale.sample_recipe import Recipe, differing

RECIPE = "recipe.json"
EPOCH = (1980, 1, 1, 0, 0, 0)  # the time of every member of the archive, so that its bytes depend on the images alone
LABELS_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class Output:
    """Where samples go: FOLDER/samples.npz with its sheet, or a FILE.npz; sidecar and blocks stand beside it."""

    npz: Path
    grid: Path | None

    @classmethod
    def at(cls, out: str) -> Output:
        path = Path(out)
        return cls(path, None) if path.suffix == ".npz" else cls(path / "samples.npz", path / "grid.png")

    @property
    def sidecar(self) -> Path:
        return self.npz.with_suffix(".json")

    @property
    def blocks(self) -> Path:
        return self.npz.with_name(f"{self.npz.name}.blocks")


class Blocks:
    """The folder of a recipe's finished blocks: (n, H, W, 3) uint8 each, whole or not there."""

    def __init__(self, folder: Path, recipe: Recipe) -> None:
        self.folder, self.recipe = folder, recipe

    def open(self) -> None:
        """Makes the folder, or takes up the one of a start that was ended.

        Raises:
            ConfigError: it can't be written, or holds blocks of another recipe.
        """
        ours = self.recipe.as_json()
        theirs = self.stored_recipe()
        if theirs is not None and theirs != ours:
            raise ConfigError(
                f"{self.folder} holds blocks of other samples (there -> here: {differing(theirs, ours)}); go on with "
                "those settings, choose another --out, or remove that folder"
            )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(self.folder / RECIPE, json.dumps(ours, indent=1))
            for left in (*self.folder.glob("*.tmp-*"), *self.folder.parent.glob(f"{self.folder.stem}.tmp-*")):
                left.unlink(missing_ok=True)
        except OSError as error:
            raise ConfigError(
                f"--out: {self.folder.parent} cannot be written ({error.strerror}); choose another place"
            ) from None
        needed = 2 * self.recipe.count * self.recipe.image_size**2 * 3 - sum(self._sizes().values())
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise ConfigError(
                f"--out: {self.recipe.count} samples take {needed / 1e9:.3g} GB with their blocks, but the disk of "
                f"{self.folder.parent} has {free / 1e9:.3g} GB free; make room or choose another place"
            )

    def stored_recipe(self) -> dict[str, Any] | None:
        try:
            return json.loads((self.folder / RECIPE).read_text())
        except (OSError, ValueError):
            return None

    def missing(self) -> list[int]:
        """Numbers of the blocks that are still to be drawn."""
        sizes, last = self._sizes(), self.recipe.blocks - 1
        whole = [self._bytes(0)] * last + [self._bytes(last)]
        return [block for block, size in enumerate(whole) if sizes.get(_name(block)) != size]

    def finished(self) -> int:
        """Samples of the finished blocks, of whichever process."""
        return self.recipe.count - sum(map(self.recipe.size_of, self.missing()))

    def write(self, block: int, images: np.ndarray) -> None:
        """Raises `UserError` where the disk takes no more."""
        try:
            write_atomically(self._path(block), self._header(block) + images.tobytes())
        except OSError as error:
            raise UserError(
                f"{self._path(block)} cannot be written ({error.strerror}); make room, and start the same command "
                "again to go on"
            ) from None

    def read(self, block: int) -> np.ndarray:
        return np.load(self._path(block), allow_pickle=False)

    def first(self, count: int) -> np.ndarray:
        """The first samples, at most `count`."""
        blocks = range(min(self.recipe.blocks, -(-count // self.recipe.block)))
        return np.concatenate([self.read(block) for block in blocks])[:count]

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, block: int) -> Path:
        return self.folder / _name(block)

    def _sizes(self) -> dict[str, int]:
        with os.scandir(self.folder) as entries:
            return {entry.name: entry.stat().st_size for entry in entries if entry.name.endswith(".npy")}

    def _header(self, block: int) -> bytes:
        return npy_header((self.recipe.size_of(block), *self._shape), np.uint8)

    def _bytes(self, block: int) -> int:
        pixels = self.recipe.size_of(block) * self._shape[0] * self._shape[1] * 3
        return len(self._header(block)) + pixels

    @property
    def _shape(self) -> tuple[int, int, int]:
        return self.recipe.image_size, self.recipe.image_size, 3


def _name(block: int) -> str:
    return f"block_{block:08d}.npy"


def merge(blocks: Blocks, path: Path) -> dict[str, Any]:
    """Writes the archive, block by block: `arr_0` (N, H, W, 3) uint8 and `labels` (N,) int64. Equal images give equal
    bytes.

    Returns:
        `bytes` and `sha256` of the file, and `arr_0_sha256` of the images alone.

    Raises:
        UserError: the disk is full.
    """
    recipe = blocks.recipe
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    digest = hashlib.sha256()
    try:
        with temporary.open("wb") as file:
            with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
                with _member(archive, "arr_0.npy") as stream:
                    stream.write(npy_header((recipe.count, recipe.image_size, recipe.image_size, 3), np.uint8))
                    for block in range(recipe.blocks):
                        data = blocks.read(block).tobytes()
                        digest.update(data)
                        stream.write(data)
                with _member(archive, "labels.npy") as stream:
                    stream.write(npy_header((recipe.count,), np.int64))
                    for labels in all_labels(recipe):
                        stream.write(labels.astype("<i8").tobytes())
            file.flush()
            os.fsync(file.fileno())
        facts = {
            "bytes": temporary.stat().st_size,
            "sha256": checksum_file(temporary, "sha256").partition(":")[2],
            "arr_0_sha256": digest.hexdigest(),
        }
        temporary.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror}); make room, and start the same command again: the blocks are "
            "there"
        ) from None
    finally:
        temporary.unlink(missing_ok=True)
    return facts


def finished(out: Output, recipe: Recipe) -> dict[str, Any] | None:
    """The sidecar of an archive of this very recipe that is there and whole; else None."""
    try:
        sidecar = json.loads(out.sidecar.read_text())
        same = sidecar["recipe"] == recipe.as_json() and sidecar["bytes"] == out.npz.stat().st_size
        whole = same and checksum_file(out.npz, "sha256") == f"sha256:{sidecar['sha256']}"
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return sidecar if whole else None


def all_labels(recipe: Recipe) -> Iterator[np.ndarray]:
    """Labels of all samples in their order, many at a time: (n,) int64."""
    for start in range(0, recipe.count, LABELS_AT_ONCE):
        yield recipe.labels(torch.arange(start, min(recipe.count, start + LABELS_AT_ONCE))).numpy()


def npy_header(shape: tuple[int, ...], dtype: type) -> bytes:
    """What stands before an array's bytes in a `.npy` file."""
    buffer = io.BytesIO()
    described = {"descr": np.dtype(dtype).newbyteorder("<").str, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(buffer, described)
    return buffer.getvalue()


def _member(archive: zipfile.ZipFile, name: str) -> BinaryIO:
    member = zipfile.ZipInfo(name, EPOCH)
    member.create_system, member.external_attr = 3, 0o644 << 16  # of Unix, wherever this runs
    return archive.open(member, "w", force_zip64=True)
