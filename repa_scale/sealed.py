"""Folders whose manifest.json names the size and the sha256 of every file: what an export is, and how it is checked."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from repa_scale.checksums import BLOCK
from repa_scale.errors import DataError

MANIFEST = "manifest.json"
FORMAT_VERSION = 1


def seal_folder(folder: Path, facts: Mapping[str, Any], known: Mapping[str, str] | None = None) -> None:
    """Writes manifest.json: `facts`, and size and sha256 of every file below the folder.

    Args:
        facts: plain JSON.
        known: {name: sha256} of files that were hashed while they were written.
    """
    known = known or {}
    files = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name != MANIFEST:
            files[name] = {"bytes": path.stat().st_size, "sha256": known.get(name) or sha256_file(path)}
    manifest = {"format_version": FORMAT_VERSION, "sha256": "", **facts, "files": files}
    manifest["sha256"] = _own(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")


def read_sealed(folder: Path, contents: bool = True) -> dict[str, Any]:
    """The manifest of a folder, after its files were compared with it.

    Args:
        contents: hash the files; False: their sizes alone.

    Raises:
        DataError: no manifest, a damaged one, or a file that is missing or differs.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
        version = manifest["format_version"]
    except FileNotFoundError:
        raise DataError(f"{folder} has no {MANIFEST}, so it is not a whole export; export the run again") from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise DataError(f"{path} is damaged; export the run again") from None
    if version != FORMAT_VERSION:
        raise DataError(f"{path} has format_version {version!r}; this version of repa_scale reads {FORMAT_VERSION}")
    if manifest.get("sha256") != _own(manifest) or not isinstance(manifest.get("files"), dict):
        raise DataError(f"{path} does not have its own sha256, so it was changed; export the run again")
    for name, entry in manifest["files"].items():
        _check(folder, name, entry, contents)
    return manifest


def form_of(folder: Path) -> str | None:
    """The form that a folder's manifest names, unverified; None: it is no export's."""
    try:
        return json.loads((folder / MANIFEST).read_bytes())["form"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _check(folder: Path, name: str, entry: Mapping[str, Any], contents: bool) -> None:
    parts = Path(name).parts
    file = folder / name
    if Path(name).is_absolute() or ".." in parts or not parts or not file.is_file():
        raise DataError(f"{file} is missing; copy or make the export again")
    if (size := file.stat().st_size) != entry["bytes"]:
        raise DataError(f"{file} has {size} bytes instead of {entry['bytes']}; copy or make the export again")
    if contents and sha256_file(file) != entry["sha256"]:
        raise DataError(f"{file} does not have the sha256 of {MANIFEST}, so it was changed; copy or make it again")


def sha256_file(path: Path) -> str:
    """Hexadecimal digest of a file, read block by block."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _own(manifest: Mapping[str, Any]) -> str:
    """Of the manifest's content without its own digest."""
    text = json.dumps({**manifest, "sha256": ""}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
