"""The checkpoint format: one safetensors file a rank with its slices, and a manifest that says where everything lies.

No pickle, no DeepSpeed: any number of ranks, and any program with safetensors, reads it by range arithmetic.
`docs/run_folder.md` describes the format.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from repa_scale.checksums import ALGORITHMS, BLOCK, algorithm_of, checksum_bytes, checksum_file, default_algorithm
from repa_scale.errors import DataError
from repa_scale.files import sync_folder, write_atomically
from repa_scale.tensor_file import TensorFile, header

FORMAT_VERSION = 2  # 1 had no checksum of the manifest itself
KINDS = ("master", "exp_avg", "exp_avg_sq", "ema")
MANIFEST = "manifest.json"
QUARANTINE = "quarantine"
READERS = 4  # files that one process verifies at a time
REASON = "reason.json"  # in a folder in quarantine
SEAL = re.compile(rb'"checksum": "([\w-]+:\w+)"')  # the first one in a manifest is the manifest's own


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
    """Writes this rank's safetensors file, durably, and returns its entry for the manifest.

    The file is written and hashed in one pass over the tensors, so it needs no memory of its own.

    Raises:
        OSError: the disk is full or gone.
    """
    path = folder / rank_file(rank, world_size)
    tensors = {f"{kind}/{p.name}": value for p in pieces if p.stop > p.start for kind, value in p.tensors.items()}
    head = header({name: tuple(value.shape) for name, value in tensors.items()}, torch.float32)
    algorithm = default_algorithm()
    digest = ALGORITHMS[algorithm]()
    with path.open("wb", buffering=0) as file:
        for data in (head, *map(_bytes_of, tensors.values())):
            view = memoryview(data)
            for start in range(0, len(view), BLOCK):
                block = view[start : start + BLOCK]
                digest.update(block)
                while block:
                    block = block[file.write(block) :]
        os.fsync(file.fileno())
    return {
        "file": path.name,
        "bytes": len(head) + sum(4 * value.numel() for value in tensors.values()),
        "checksum": f"{algorithm}:{digest.hexdigest()}",
        "pieces": [(p.name, list(p.shape), p.start, p.stop) for p in pieces],
    }


def _bytes_of(tensor: Tensor) -> memoryview:
    return memoryview(tensor.detach().to("cpu", torch.float32).contiguous().numpy()).cast("B")


def write_manifest(folder: Path, entries: Iterable[dict], facts: dict) -> None:
    """Writes the manifest from the ranks' entries, sealed with a checksum of its own.

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
    manifest = {
        "format_version": FORMAT_VERSION,
        "checksum": "",
        **facts,
        "kinds": list(KINDS),
        "files": files,
        "tensors": tensors,
    }
    text = json.dumps(manifest, indent=1)
    seal = checksum_bytes(text.encode(), default_algorithm())
    write_atomically(folder / MANIFEST, text.replace('"checksum": ""', f'"checksum": "{seal}"', 1))
    sync_folder(folder)


def publish(temporary: Path, final: Path) -> None:
    """Gives a complete checkpoint its name and makes it the newest: `latest` is replaced in one step."""
    if final.exists():  # one that a rolled-back attempt wrote: aside first, so that no moment sees half of it
        aside = final.with_name(f"{final.name}.tmp-replaced")
        shutil.rmtree(aside, ignore_errors=True)
        final.rename(aside)
        temporary.rename(final)
        shutil.rmtree(aside, ignore_errors=True)
    else:
        temporary.rename(final)
    sync_folder(final.parent)
    write_atomically(final.parent / "latest", final.name + "\n")


def quarantine(folder: Path, reason: str) -> Path:
    """Moves a checkpoint to `quarantine/` beside it, with the reason; returns where it lies now."""
    home = folder.parent / QUARANTINE
    home.mkdir(exist_ok=True)
    target = home / folder.name
    number = 1
    while target.exists():
        number += 1
        target = home / f"{folder.name}-{number}"
    folder.rename(target)
    sync_folder(folder.parent)
    write_atomically(target / REASON, json.dumps({"reason": reason, "time": time.time()}))
    return target


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints that have a manifest, oldest first."""
    return [path for path in list_folders(folder) if (path / MANIFEST).is_file()]


def list_folders(folder: Path) -> list[Path]:
    """Folders with a checkpoint's name, whole or not, oldest first."""
    return sorted(p for p in folder.glob("step_*") if p.name[5:].isdigit() and p.is_dir())


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
            text = path.read_bytes()
            self.manifest: dict = json.loads(text)
            version = self.manifest["format_version"]
        except FileNotFoundError:
            raise DataError(
                f"{self.folder} has no {MANIFEST}, so it is not a complete checkpoint; name RUN/checkpoints/step_N"
            ) from None
        except OSError as error:
            raise DataError(f"{path} cannot be read ({error.strerror}); use an older checkpoint") from None
        except (ValueError, KeyError, TypeError):
            raise DataError(f"{path} is damaged; use an older checkpoint") from None
        if version not in (1, FORMAT_VERSION):
            raise DataError(f"{path} has format_version {version}; this version of repa_scale reads {FORMAT_VERSION}")
        if (version != 1 or "checksum" in self.manifest) and not _seal_holds(text):
            raise DataError(f"{path} does not have its own checksum, so it is damaged; use an older checkpoint")

    @property
    def step(self) -> int:
        return self.manifest["step"]

    @property
    def names(self) -> list[str]:
        """Parameter names, `model.*` and `projectors.*`."""
        return list(self.manifest["tensors"])

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.manifest["tensors"][name]["shape"])

    def problems(self, contents: bool = True, share: int = 0, of: int = 1) -> list[str]:
        """What is wrong with the files: missing, of another size, of another checksum. Empty: nothing.

        Args:
            contents: read the files and compare checksums; False: sizes alone.
            share, of: look at part `share` of `of` parts of the files.
        """
        files = list(self.manifest["files"].items())[share::of]
        with ThreadPoolExecutor(READERS) as readers:
            found = readers.map(lambda item: self._problem(*item, contents), files)
            return [problem for problem in found if problem]

    def _problem(self, name: str, entry: dict, contents: bool) -> str:
        path = self.folder / name
        try:
            if Path(name).name != name or not path.is_file():
                return f"{path} is missing"
            if path.stat().st_size != entry["bytes"]:
                return f"{path} has {path.stat().st_size} bytes instead of {entry['bytes']}"
            if contents and checksum_file(path, algorithm_of(entry["checksum"])) != entry["checksum"]:
                return f"{path} does not have the checksum of the manifest"
        except (OSError, DataError) as error:
            return f"{path} cannot be read ({error})"
        return ""

    def verify(self) -> None:
        """Raises `DataError` naming the first broken file."""
        if problems := self.problems():
            raise DataError(f"{problems[0]}; the checkpoint is broken, use an older one")

    def read(self, kind: str, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """The elements [start, stop) of a flattened parameter, whichever ranks wrote them. (stop - start,) fp32."""
        tensor = self.manifest["tensors"][name]
        total = math.prod(tensor["shape"])
        stop = total if stop is None else stop
        out = torch.empty(stop - start)
        filled = 0
        for part in tensor["parts"]:
            begin, end = max(start, part["start"]), min(stop, part["stop"])
            if begin >= end:
                continue
            source = self._file(part["file"])
            if f"{kind}/{name}" not in source.shapes:
                raise DataError(f"{source.path} lacks {kind}/{name}; use an older checkpoint")
            piece = source.read(f"{kind}/{name}", begin - part["start"], end - part["start"])
            out[begin - start : end - start] = piece
            filled += end - begin
        if filled != stop - start:
            raise DataError(f"{self.folder}: {kind}/{name} is not whole in this checkpoint; use an older one")
        return out

    def tensor(self, kind: str, name: str) -> Tensor:
        """A whole parameter in its shape, fp32."""
        return self.read(kind, name).view(self.shape(name))

    @cached_property
    def _open_files(self) -> dict[str, TensorFile]:
        return {}

    def _file(self, name: str) -> TensorFile:
        if name not in self._open_files:
            self._open_files[name] = TensorFile(self.folder / name)
        return self._open_files[name]


def _seal_holds(text: bytes) -> bool:
    """Whether the bytes of a manifest have the checksum that they name, taken with an empty one in its place."""
    found = SEAL.search(text)
    if found is None:
        return False
    wanted = found[1].decode()
    bare = text[: found.start()] + b'"checksum": ""' + text[found.end() :]
    return checksum_bytes(bare, algorithm_of(wanted)) == wanted
