"""Where images come from: a tree of class folders, a zip or tar archive of one, or the digits of scikit-learn.

A name inside an archive is never used as a path on the disk.
"""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from PIL import Image

from repa_scale.data.manifest import digest_of
from repa_scale.errors import DataError, require

IMAGES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
DIGITS = "digits"  # the word that stands for the embedded data set


@dataclass(frozen=True)
class Item:
    """One image of a source.

    Attributes:
        name: `class/file` below the root, or `file` where there are no classes.
        label: number of its class, from 0 in the sorted order of the class names.
        key: what `Source.read` takes.
        size: bytes of its file, as the folder or archive says; -1 where it does not.
    """

    name: str
    label: int
    key: object
    size: int

    @property
    def id(self) -> int:
        """63 bits that depend on the name alone, so that a sample keeps them in another set."""
        return int.from_bytes(hashlib.sha256(self.name.encode()).digest()[:8], "little") >> 1


@dataclass(frozen=True)
class Source:
    """Images and their classes, in a fixed order.

    Attributes:
        class_names: sorted; empty for a flat folder, whose images all have label 0.
        read: an item's key -> the bytes of its file.
        others: files passed over: no images by their names, or hidden.
        fingerprint: 16 hex digits of names and sizes.
    """

    name: str
    class_names: list[str]
    items: list[Item]
    read: Callable[[object], bytes]
    others: int
    fingerprint: str


def open_source(source: str) -> Source:
    """Opens a folder, a .zip, a .tar (also compressed), or `digits`.

    Raises:
        DataError: missing, unreadable, or without images.
    """
    if source == DIGITS:
        return _digits()
    path = Path(source)
    if not path.exists():
        raise DataError(f"{source} does not exist; give a folder of class folders, a .zip or .tar of it, or {DIGITS}")
    if path.is_dir():
        return _folder(path)
    if zipfile.is_zipfile(path):
        return _zip(path)
    try:
        if tarfile.is_tarfile(path):
            return _tar(path)
    except (OSError, EOFError) as error:
        raise DataError(f"{source} cannot be read ({error}); fetch it again") from None
    raise DataError(f"{source} is neither a folder nor a zip or tar archive; unpack it and give the folder")


def _folder(root: Path) -> Source:
    files = {}
    for path in _walk(root):
        try:
            size = path.stat().st_size
        except OSError:  # a link to nothing: reading it will fail and be listed
            size = -1
        files[path.relative_to(root).as_posix()] = (path, size)
    return _arrange(root.resolve().name, files, lambda path: path.read_bytes(), root_folder=False)


def _walk(folder: Path, above: frozenset[str] = frozenset()) -> Iterator[Path]:
    """All files below `folder`; links to folders are followed, unless they lead back to one that was passed through."""
    above = above | {os.path.realpath(folder)}
    for entry in os.scandir(folder):
        if not entry.is_dir():
            yield Path(entry.path)
        elif not entry.is_symlink() or os.path.realpath(entry.path) not in above:
            yield from _walk(Path(entry.path), above)


def _zip(path: Path) -> Source:
    try:
        archive = zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} is not a whole zip archive ({error}); fetch it again") from None
    files = {info.filename: (info, info.file_size) for info in archive.infolist() if not info.is_dir()}
    if any(info.flag_bits & 1 for info, _ in files.values()):
        raise DataError(f"{path} is encrypted; unpack it and give the folder")
    return _arrange(path.stem, files, lambda info: archive.read(info), root_folder=True)


def _tar(path: Path) -> Source:
    try:
        archive = tarfile.open(path)  # noqa: SIM115  (it stays open as long as the source)
        members = [member for member in archive.getmembers() if member.isfile()]
    except (OSError, EOFError, tarfile.TarError) as error:
        raise DataError(f"{path} is not a whole tar archive ({error}); fetch it again") from None
    lock = threading.Lock()

    def read(member: tarfile.TarInfo) -> bytes:
        with lock:
            return archive.extractfile(member).read()

    name = path.name.split(".tar")[0].removesuffix(".tgz")
    source = _arrange(name, {m.name: (m, m.size) for m in members}, read, root_folder=True)
    with path.open("rb") as file:
        compressed = file.read(263)[257:262] != b"ustar"
    if compressed:  # it can only be read forwards at a bearable speed
        source.items.sort(key=lambda item: item.key.offset_data)
    return source


def _digits() -> Source:
    """1,797 scans of 8 x 8 pixels with values 0 to 16 (UCI, Optical Recognition of Handwritten Digits)."""
    data = require("sklearn.datasets", "data").load_digits()

    def read(number: int) -> bytes:
        buffer = io.BytesIO()
        pixels = (data.images[number] * (255 / 16)).round().astype("uint8")
        Image.fromarray(pixels).save(buffer, format="PNG")
        return buffer.getvalue()

    files = {f"{label}/{number:04d}.png": (number, 0) for number, label in enumerate(data.target.tolist())}
    return _arrange(DIGITS, files, read, root_folder=False)


def _arrange(name: str, files: dict[str, tuple[object, int]], read: Callable, root_folder: bool) -> Source:
    """Names to classes. root_folder: an archive may hold everything in one folder, which is no class."""
    images, others = {}, 0
    for file, entry in files.items():
        # Names that are no UTF-8 become such; what would lead upwards or to the root counts as hidden.
        parts = PurePosixPath(os.fsencode(file).decode("utf-8", "backslashreplace")).parts
        hidden = any(part.startswith((".", "/")) or part == "__MACOSX" for part in parts)
        if not hidden and PurePosixPath(file).suffix.lower() in IMAGES:
            images[parts] = entry
        else:
            others += 1
    if not images:
        raise DataError(
            f"{name} holds no images ({', '.join(sorted(IMAGES))}); give a folder of class folders of images"
        )
    while root_folder and len({parts[0] for parts in images}) == 1 and all(len(parts) > 2 for parts in images):
        images = {parts[1:]: entry for parts, entry in images.items()}
    flat = [parts for parts in images if len(parts) == 1]
    if flat and len(flat) < len(images):
        raise DataError(
            f"{name} holds images beside class folders, such as {flat[0][0]}; "
            "put each image into a folder of its class, or all into one folder"
        )
    class_names = [] if flat else sorted({parts[0] for parts in images})
    labels = {class_name: label for label, class_name in enumerate(class_names)}
    items = [Item("/".join(parts), labels.get(parts[0], 0), *images[parts]) for parts in sorted(images)]
    if len({item.id for item in items}) < len(items):
        raise DataError(f"{name}: two images have the same id; rename one of them")
    return Source(name, class_names, items, read, others, _fingerprint(items))


def take(source: Source, limit: int) -> Source:
    """The same source with at most `limit` images, spread evenly over it, so that all classes keep their share."""
    if limit >= len(source.items):
        return source
    items = [source.items[i * len(source.items) // limit] for i in range(limit)]
    return replace(source, items=items, fingerprint=_fingerprint(items))


def _fingerprint(items: list[Item]) -> str:
    return digest_of([[item.name, item.size] for item in items])[:16]
