"""Files that are there whole or not at all, whatever dies."""

from __future__ import annotations

import os
import shutil
from pathlib import Path


def write_atomically(path: Path, data: str | bytes) -> None:
    """The file holds the old bytes or the new ones, never a part, and the new ones are on disk when this returns.

    Raises:
        OSError: the disk is full or gone; the old file is as it was.
    """
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_durably(path: Path, data: str | bytes) -> None:
    """`write_atomically`, and a power cut does not undo it."""
    write_atomically(path, data)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Makes renames in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def link(source: Path, target: Path) -> None:
    """The file under a second name, which is replaced; a copy where the file system has no links."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
