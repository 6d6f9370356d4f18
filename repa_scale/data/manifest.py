"""`dataset.json`: what a prepared set holds, how it was made, and its fingerprint."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from repa_scale.data.mds import Shard
from repa_scale.errors import DataError

FORMAT_VERSION = 1
MANIFEST = "dataset.json"


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a finished set.

    Raises:
        DataError: no such folder, an unfinished set, or a damaged manifest.
    """
    path = folder / MANIFEST
    if not folder.is_dir():
        raise DataError(f"data.path={folder} is not a folder; make one with: repa-scale prepare SOURCE --out {folder}")
    if not path.exists():
        state = "is unfinished" if (folder / ".prepare").exists() else "is not a prepared set"
        raise DataError(f"data.path={folder} {state} (no {MANIFEST}); run: repa-scale prepare SOURCE --out {folder}")
    try:
        manifest = json.loads(path.read_bytes())
        if manifest["format_version"] != FORMAT_VERSION:
            raise DataError(
                f"{path} has format version {manifest['format_version']!r}, this program reads {FORMAT_VERSION}; "
                "prepare the set again, or use the program's version that made it"
            )
        lengths = (len(manifest["class_names"]), len(manifest["class_counts"]))
        if lengths[0] != lengths[1] or (lengths[0] and sum(manifest["class_counts"]) != manifest["count"]):
            raise ValueError("the class counts do not add up")
        for key in ("name", "image_size", "fingerprint", "index_sha256", "quarantined", "recipe", "source"):
            manifest[key]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged ({type(error).__name__}: {error}); prepare the set again") from None
    return manifest


def data_fingerprint(recipe: dict[str, Any], class_names: list[str], shards: list[Shard]) -> str:
    """32 hex digits that stand for the samples of a set: their pixels, labels, ids and order.

    Independent of where the set lies, of when it was made and of the versions that made it.
    """
    essence = {
        "recipe": recipe,
        "class_names": class_names,
        "shards": [[shard.samples, shard.bytes, shard.hashes] for shard in shards],
    }
    return digest_of(essence)[:32]


def digest_of(value: Any) -> str:
    """SHA-256 of a JSON value, independent of the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
