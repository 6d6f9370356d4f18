"""Images inside zip and tar archives, WebDataset tars among them. Members are read into memory, never unpacked."""

from __future__ import annotations

import json
import tarfile
import threading
import zipfile
from pathlib import Path, PurePosixPath

from repa_scale.data.labels import Labels
from repa_scale.data.sources import ARCHIVES, IMAGES, Found, clean_name
from repa_scale.errors import DataError

SIDE_FILES = (".cls", ".json")  # of WebDataset: a sample is the files that share a name up to its first dot
LARGEST_SIDE_FILE = 1 << 20  # bytes


def open_zip(path: Path) -> Found:
    """Raises `DataError` for a damaged or encrypted archive."""
    try:
        archive = zipfile.ZipFile(path)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} is not a whole zip archive ({error}); fetch it again") from None
    members = [info for info in archive.infolist() if not info.is_dir()]
    if any(info.flag_bits & 1 for info in members):
        raise DataError(f"{path} is encrypted; unpack it and give the folder")
    files = {info.filename: (info, info.file_size, None) for info in members}
    return Found(path.stem, files, archive.read, archive=True)


def open_tar(path: Path, labels: Labels) -> Found:
    """Raises `DataError` for a damaged archive."""
    try:
        archive = tarfile.open(path)  # noqa: SIM115  (it stays open as long as the source)
        members = [member for member in archive.getmembers() if member.isfile()]
    except (OSError, EOFError, ValueError, tarfile.TarError) as error:
        raise DataError(f"{path} is not a whole tar archive ({error}); fetch it again") from None
    lock = threading.Lock()

    def read(member: tarfile.TarInfo) -> bytes:
        with lock:
            return archive.extractfile(member).read()

    with path.open("rb") as file:
        compressed = file.read(263)[257:262] != b"ustar"
    name = path.name
    for suffix in sorted(ARCHIVES, key=len, reverse=True):
        name = name.removesuffix(suffix)
    sides = _side_files(members)
    if not sides:
        # A compressed one can only be read forwards at a bearable speed.
        members.sort(key=lambda member: member.offset_data if compressed else 0)
        files = {member.name: (member, member.size, None) for member in members}
        return Found(name, files, read, archive=True, in_order=compressed)
    files = {}
    for member in members:
        if _suffix(member.name) in IMAGES:
            label = _label(sides.get(_sample(member.name), {}), read, labels, path)
            # Samples are numbered anew in every tar of some sets, so the tar's name belongs to theirs.
            full = f"{name}/{member.name}" if clean_name(member.name) else member.name
            files[full] = (member, member.size, label)
    return Found(name, files, read, named=True, in_order=True)


def _suffix(name: str) -> str:
    return PurePosixPath(name).suffix.lower()


def _sample(name: str) -> str:
    """What the files of one WebDataset sample have in common."""
    path = PurePosixPath(name)
    return (path.parent / path.name.split(".")[0]).as_posix()


def _side_files(members: list[tarfile.TarInfo]) -> dict[str, dict[str, tarfile.TarInfo]]:
    """By sample the files beside its image; empty where no image has one, and the tar is no WebDataset."""
    images = {_sample(member.name) for member in members if _suffix(member.name) in IMAGES}
    sides: dict[str, dict[str, tarfile.TarInfo]] = {}
    for member in members:
        if _suffix(member.name) in SIDE_FILES and _sample(member.name) in images:
            sides.setdefault(_sample(member.name), {})[_suffix(member.name)] = member
    return sides


def _label(sides: dict[str, tarfile.TarInfo], read, labels: Labels, path: Path) -> int | str | None:
    """What the side files say: `.cls` holds a number or a name, `.json` a field of one of the usual names."""
    for suffix in SIDE_FILES:
        member = sides.get(suffix)
        if member is None or (labels.column and suffix == ".cls"):
            continue
        try:
            if member.size > LARGEST_SIDE_FILE:
                raise ValueError(f"it has {member.size} bytes")
            text = read(member).decode("utf-8").strip()
            value = text
            if suffix == ".json":
                fields = json.loads(text)
                value = next((fields[key] for key in labels.columns if key in fields), None)
                if value is None:
                    continue
            if isinstance(value, bool) or not isinstance(value, (int, str)):
                raise ValueError(f"{value!r} is no label")
        except (OSError, ValueError, TypeError, RecursionError, tarfile.TarError) as error:
            raise DataError(f"{path}: {member.name} gives no label ({error}); mend it, or give --labels") from None
        return int(value) if str(value).lstrip("-").isdecimal() and len(str(value)) < 19 else str(value)
    return None
