"""Which checkpoints of a run stay. Room is made before a save, and never by deleting the only verified one."""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Collection
from pathlib import Path

from repa_scale.checkpoint import CheckpointReader, list_checkpoints
from repa_scale.config import CheckpointConfig
from repa_scale.errors import DataError
from repa_scale.files import sync_folder

log = logging.getLogger("repa_scale")


def prune(
    folder: Path,
    policy: CheckpointConfig,
    verified: Collection[str],
    coming: int = 0,
    only: Collection[str] | None = None,
) -> list[str]:
    """Deletes the checkpoints that `policy` does not keep; returns their names.

    Args:
        verified: names whose files are known to have their checksums. While none of those that stay is among them,
            nothing is deleted.
        only: the names that the policy counts and may delete; None: all.
        coming: how many are about to be written, for which room is made now.
    """
    if not policy.keep_last:
        return []
    names = [path.name for path in list_checkpoints(folder) if only is None or path.name in only]
    newest = max(1, policy.keep_last - coming)
    keep = set(names[-newest:])
    if policy.keep_every:
        keep |= {name for name in names if int(name[5:]) % policy.keep_every == 0}
    if policy.best and (best := _best(folder, names, policy.best)):
        keep.add(best)
    if not keep & set(verified):
        if names:
            log.warning("no checkpoint in %s is known to be whole, so none is deleted", folder)
        return []
    gone = [name for name in names if name not in keep]
    for name in gone:
        # Without its name it counts no more, so that no moment shows a checkpoint with half of its files.
        doomed = folder / f"{name}.tmp-pruned"
        (folder / name).rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)
    if gone:
        sync_folder(folder)
        log.info("deleted %s: checkpoint.keep_last=%d", ", ".join(gone), policy.keep_last)
    return gone


def _best(folder: Path, names: list[str], metric: str) -> str | None:
    """The checkpoint with the least `metric`, of those that recorded it."""
    values = {}
    for name in names:
        try:
            value = CheckpointReader(folder / name).manifest.get("metrics", {}).get(metric)
        except DataError:
            continue
        if isinstance(value, (int, float)) and math.isfinite(value):
            values[name] = value
    return min(values, key=values.__getitem__) if values else None
