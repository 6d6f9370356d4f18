"""The checkpoint format: one safetensors file a rank with its slices, and a manifest that says where everything lies.

No pickle, no DeepSpeed: any number of ranks, and any program with safetensors, reads it by range arithmetic.
`docs/run_folder.md` describes the format.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from repa_scale.errors import DataError

FORMAT_VERSION = 1
KINDS = ("master", "exp_avg", "exp_avg_sq", "ema")
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Piece:
    """Elements [start, stop) of one flattened parameter on this rank, for each of `KINDS`: (stop - start,) fp32."""

    name: str
    shape: tuple[int, ...]
    start: int
    stop: int
    tensors: dict[str, Tensor]


def step_folder(step: int) -> str:
    return f"step_{step:08d}"


def rank_file(rank: int, world_size: int) -> str:
    return f"rank_{rank:05d}_of_{world_size:05d}.safetensors"


def write_pieces(folder: Path, rank: int, world_size: int, pieces: Sequence[Piece]) -> dict:
    """Writes this rank's file, durably, and returns its entry for the manifest."""
    path = folder / rank_file(rank, world_size)
    tensors = {
        f"{kind}/{piece.name}": value.detach().to("cpu", torch.float32, copy=True)
        for piece in pieces
        for kind, value in piece.tensors.items()
        if piece.stop > piece.start
    }
    save_file(tensors, path)
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return {
        "file": path.name,
        "bytes": path.stat().st_size,
        "checksum": checksum(path),
        "pieces": [(p.name, list(p.shape), p.start, p.stop) for p in pieces],
    }


def write_manifest(folder: Path, entries: Iterable[dict], facts: dict) -> None:
    """Writes the manifest from the ranks' entries; the checkpoint counts from then on.

    Args:
        facts: step, samples, identity, world_size, versions, scalars: plain JSON.
    """
    tensors: dict[str, dict] = {}
    files = {}
    for entry in entries:
        files[entry["file"]] = {"bytes": entry["bytes"], "checksum": entry["checksum"]}
        for name, shape, start, stop in entry["pieces"]:
            tensor = tensors.setdefault(name, {"shape": shape, "dtype": "float32", "parts": []})
            if stop > start:
                tensor["parts"].append({"file": entry["file"], "start": start, "stop": stop})
    manifest = {"format_version": FORMAT_VERSION, **facts, "kinds": list(KINDS), "files": files, "tensors": tensors}
    write_atomically(folder / MANIFEST, json.dumps(manifest, indent=1))
    _sync_folder(folder)


def publish(temporary: Path, final: Path) -> None:
    """Gives a complete checkpoint its name and makes it the newest: `latest` is replaced in one step."""
    if final.exists():  # a broken one of the same step, or one that a rolled-back attempt wrote
        shutil.rmtree(final)
    temporary.rename(final)
    _sync_folder(final.parent)
    write_atomically(final.parent / "latest", final.name + "\n")


def write_atomically(path: Path, text: str) -> None:
    """The file holds the old text or the new one, never a part, whatever dies."""
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def checksum(path: Path) -> str:
    """`"sha256:..."` of a file. The name of the algorithm stands in it, so that a later version may use another."""
    with path.open("rb") as file:
        return "sha256:" + _sha256(file)


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints that have a manifest, oldest first."""
    return sorted(p for p in folder.glob("step_*") if p.name[5:].isdigit() and (p / MANIFEST).is_file())


class CheckpointReader:
    """Reads a checkpoint on any number of ranks, or on none: slices or whole tensors.

    Args:
        folder: `RUN/checkpoints/step_N`.

    Raises:
        DataError: no manifest, a damaged one, or one of a later format.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        path = self.folder / MANIFEST
        try:
            self.manifest: dict = json.loads(path.read_text())
            version = self.manifest["format_version"]
        except FileNotFoundError:
            raise DataError(
                f"{self.folder} has no {MANIFEST}, so it is not a complete checkpoint; name RUN/checkpoints/step_N"
            ) from None
        except (ValueError, KeyError, TypeError):
            raise DataError(f"{path} is damaged; use an older checkpoint") from None
        if version != FORMAT_VERSION:
            raise DataError(f"{path} has format_version {version}; this version of repa_scale reads {FORMAT_VERSION}")

    @property
    def step(self) -> int:
        return self.manifest["step"]

    @property
    def names(self) -> list[str]:
        """Parameter names, `model.*` and `projectors.*`."""
        return list(self.manifest["tensors"])

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.manifest["tensors"][name]["shape"])

    def problems(self) -> list[str]:
        """What is wrong with the files: missing, of another size, of another checksum. Empty: verified."""
        found = []
        for name, entry in self.manifest["files"].items():
            path = self.folder / name
            if Path(name).name != name or not path.is_file():
                found.append(f"{path} is missing")
            elif path.stat().st_size != entry["bytes"]:
                found.append(f"{path} has {path.stat().st_size} bytes instead of {entry['bytes']}")
            elif checksum(path) != entry["checksum"]:
                found.append(f"{path} does not have the checksum of the manifest")
        return found

    def verify(self) -> None:
        """Raises `DataError` naming the first broken file."""
        if problems := self.problems():
            raise DataError(f"{problems[0]}; the checkpoint is broken, use an older one")

    def read(self, kind: str, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """The elements [start, stop) of a flattened parameter, whichever ranks wrote them. (stop - start,) fp32."""
        tensor = self.manifest["tensors"][name]
        total = 1
        for size in tensor["shape"]:
            total *= size
        stop = total if stop is None else stop
        out = torch.empty(stop - start)
        filled = 0
        for part in tensor["parts"]:
            begin, end = max(start, part["start"]), min(stop, part["stop"])
            if begin >= end:
                continue
            source = self._file(part["file"]).get_slice(f"{kind}/{name}")
            out[begin - start : end - start] = source[begin - part["start"] : end - part["start"]]
            filled += end - begin
        if filled != stop - start:
            raise DataError(f"{self.folder}: {kind}/{name} is not whole in this checkpoint; use an older one")
        return out

    def tensor(self, kind: str, name: str) -> Tensor:
        """A whole parameter in its shape, fp32."""
        return self.read(kind, name).view(self.shape(name))

    @cached_property
    def _open_files(self) -> dict:
        return {}

    def _file(self, name: str):
        if name not in self._open_files:
            try:
                self._open_files[name] = safe_open(self.folder / name, framework="pt")
            except (OSError, SafetensorError) as error:
                raise DataError(f"{self.folder / name} cannot be read ({error}); use an older checkpoint") from None
        return self._open_files[name]


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(file) -> str:
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()
