"""Where images come from: any mix of folders, archives, WebDataset tars, parquet files, MDS sets, or the digits.

This file decides what a source is and gives every image its name and label. Reading a kind of file is the business of
archives.py and tables.py. A name that a source gives is a name only: it is never used as a path on the disk.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

from PIL import Image

from repa_scale.data.labels import Labels, Wanted, number_classes
from repa_scale.data.manifest import digest_of
from repa_scale.errors import DataError, require

IMAGES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
DIGITS = "digits"  # the word that stands for the embedded data set
SPLIT = re.compile(r"(\w+)-\d+-of-\d+\.parquet")  # how the Hugging Face hub names the files of a split
KINDS = f"a folder, a .zip or .tar, a .parquet file, an MDS set, or {DIGITS}"


@dataclass(frozen=True)
class Item:
    """One image of a source.

    Attributes:
        name: `class/file` below the root, or `file` where there are no classes.
        label: number of its class.
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
        class_names: in the order of the labels; empty for unlabelled images, which all have label 0.
        read: an item's key -> the bytes of its file. Raises whatever a damaged file makes its library raise.
        others: files passed over: no images by their names, or hidden.
        fingerprint: 16 hex digits of names and sizes, and of `essence`.
        essence: labels where they are not in the names, hashes where sizes are not known.
        in_order: reading in another order than that of `items` would be slow.
    """

    name: str
    class_names: list[str]
    items: list[Item]
    read: Callable[[object], bytes]
    others: int
    fingerprint: str
    essence: tuple = ()
    in_order: bool = False


@dataclass(frozen=True)
class Found:
    """What one file or folder holds, before names and labels are settled.

    Attributes:
        files: name -> (key, bytes or -1, label or None where the source gives none).
        class_names: where the source names its classes by number.
        archive: it may hold everything in one folder, which is no class.
        named: the names may be without an image's suffix, and their folders are no classes.
        in_order: reading in another order than that of `files` would be slow.
        essence: what stands for the contents where sizes are not known.
    """

    name: str
    files: dict[str, tuple[object, int, int | str | None]]
    read: Callable[[object], bytes]
    class_names: list[str] = field(default_factory=list)
    archive: bool = False
    named: bool = False
    in_order: bool = False
    essence: str = ""


def open_source(sources: str | list[str], labels: Labels | None = None) -> Source:
    """Opens a source, or several that make one set.

    Args:
        sources: folders, archives, WebDataset tars, parquet files, MDS sets; a folder of archives or of parquet
            files stands for these; `digits`.
        labels: where the labels come from, if not from what the source itself says.

    Raises:
        DataError: missing, unreadable, without images, or labels that cannot be used.
    """
    labels = labels or Labels()
    paths = [sources] if isinstance(sources, str) else list(sources)
    found = [one for path in paths for one in _open(path, labels)]
    return _settle(found, labels)


def _open(source: str, labels: Labels) -> list[Found]:
    from repa_scale.data.archives import open_tar, open_zip
    from repa_scale.data.tables import open_mds, open_parquet

    if source == DIGITS:
        return [_digits()]
    path = Path(source)
    if not path.exists():
        raise DataError(f"{source} does not exist; give {KINDS}")
    if path.is_dir():
        if (path / "index.json").is_file():
            return [open_mds(path, labels)]
        return _folder(path, labels)
    if path.suffix == ".parquet":
        return [open_parquet(path, labels)]
    if zipfile.is_zipfile(path):
        return [open_zip(path)]
    try:
        if tarfile.is_tarfile(path):
            return [open_tar(path, labels)]
    except (OSError, EOFError) as error:
        raise DataError(f"{source} cannot be read ({error}); fetch it again") from None
    raise DataError(f"{source} is none of {KINDS}; unpack it and give the folder")


def _folder(root: Path, labels: Labels) -> list[Found]:
    """A tree of images; or, where most of its files are such, parquet files or archives."""
    paths = list(_walk(root))
    kinds = Counter(_kind(path) for path in paths)
    most = max(("image", "parquet", "archive"), key=lambda kind: kinds[kind])
    if most != "image" and kinds[most]:
        chosen = sorted(path for path in paths if _kind(path) == most)
        splits = {match[1] for path in chosen if (match := SPLIT.fullmatch(path.name))}
        if len(splits) > 1:
            raise DataError(
                f"{root} holds the splits {', '.join(sorted(splits))}; give the files of one, such as "
                f"{chosen[-1].parent}/train-*.parquet"
            )
        return [one for path in chosen for one in _open(str(path), labels)]
    files = {}
    for path in paths:
        try:
            size = path.stat().st_size
        except OSError:  # a link to nothing: reading it will fail and be listed
            size = -1
        files[path.relative_to(root).as_posix()] = (path, size, None)
    return [Found(root.resolve().name, files, lambda path: path.read_bytes())]


def _kind(path: Path) -> str:
    if path.name.startswith("."):
        return "other"
    if path.suffix.lower() in IMAGES:
        return "image"
    if path.suffix == ".parquet":
        return "parquet"
    return "archive" if path.name.lower().endswith(ARCHIVES) else "other"


def _walk(folder: Path, above: frozenset[str] = frozenset()) -> Iterator[Path]:
    """All files below `folder`; links to folders are followed, unless they lead back to one that was passed through."""
    above = above | {os.path.realpath(folder)}
    for entry in os.scandir(folder):
        if not entry.is_dir():
            yield Path(entry.path)
        elif not entry.is_symlink() or os.path.realpath(entry.path) not in above:
            yield from _walk(Path(entry.path), above)


def _digits() -> Found:
    """1,797 scans of 8 x 8 pixels with values 0 to 16 (UCI, Optical Recognition of Handwritten Digits)."""
    data = require("sklearn.datasets", "data").load_digits()

    def read(number: int) -> bytes:
        buffer = io.BytesIO()
        pixels = (data.images[number] * (255 / 16)).round().astype("uint8")
        Image.fromarray(pixels).save(buffer, format="PNG")
        return buffer.getvalue()

    files = {f"{label}/{number:04d}.png": (number, 0, None) for number, label in enumerate(data.target.tolist())}
    return Found(DIGITS, files, read)


@dataclass(frozen=True)
class _Picture:
    """An image with its cleaned name, before labels are numbers."""

    parts: tuple[str, ...]
    key: object
    size: int
    label: int | str | None


def _settle(found: list[Found], labels: Labels) -> Source:
    """One set of all that was found: clean names, numbered labels, one way to read."""
    name = found[0].name
    pictures, others = [], 0
    for number, one in enumerate(found):
        chosen, passed_over = _pictures(one, number, several=len(found) > 1)
        pictures += chosen
        others += passed_over
    if not pictures:
        raise DataError(
            f"{name} holds no images ({', '.join(sorted(IMAGES))}); give a folder of class folders of images"
        )
    in_order = any(one.in_order for one in found)
    if not in_order:
        pictures.sort(key=lambda picture: picture.parts)
    spoken = labels.file is not None or any(picture.label is not None for picture in pictures)
    if spoken or labels.unlabelled:
        class_names = next((one.class_names for one in found if one.class_names), [])
        wanted = [Wanted("/".join(picture.parts), picture.label) for picture in pictures]
        class_names, numbers = number_classes(wanted, labels, class_names, name)
    else:
        class_names, numbers = _classes_of_folders(name, pictures, named=all(one.named for one in found))
    items = [
        Item("/".join(picture.parts), label, picture.key, picture.size)
        for picture, label in zip(pictures, numbers, strict=True)
    ]
    if len({item.id for item in items}) < len(items):
        twice = Counter(item.name for item in items).most_common(1)[0][0]
        raise DataError(f"{name}: two images have the same id, such as {twice}; rename one of them")
    read = found[0].read if len(found) == 1 else lambda key: found[key[0]].read(key[1])
    essence = tuple(one.essence for one in found if one.essence)
    if spoken or labels.unlabelled:
        essence = (*essence, digest_of([class_names, numbers]))
    return Source(name, class_names, items, read, others, _fingerprint(items, essence), essence, in_order)


def _pictures(found: Found, number: int, several: bool) -> tuple[list[_Picture], int]:
    """The images of one source under clean names, and how many files were passed over."""
    chosen: list[_Picture] = []
    for file, (key, size, label) in found.files.items():
        parts = clean_name(file)
        if parts is not None and (found.named or PurePosixPath(file).suffix.lower() in IMAGES):
            chosen.append(_Picture(parts, (number, key) if several else key, size, label))
    others = len(found.files) - len(chosen)
    while (
        found.archive
        and chosen
        and len({picture.parts[0] for picture in chosen}) == 1
        and all(len(picture.parts) > 2 for picture in chosen)
    ):
        chosen = [replace(picture, parts=picture.parts[1:]) for picture in chosen]
    if found.archive and several and all(len(picture.parts) == 1 for picture in chosen):
        # Of several archives each without folders, each is a class, as in ImageNet's own tar of tars.
        chosen = [replace(picture, parts=(found.name, *picture.parts)) for picture in chosen]
    return chosen, others


def clean_name(name: str) -> tuple[str, ...] | None:
    """The parts of a name; None: it is hidden, or leads upwards or to the root. What is no UTF-8 becomes such."""
    parts = PurePosixPath(os.fsencode(name).decode("utf-8", "backslashreplace").replace("\0", "\\0")).parts
    hidden = not parts or any(part.startswith((".", "/")) or part == "__MACOSX" for part in parts)
    return None if hidden else parts


def _classes_of_folders(name: str, pictures: list[_Picture], named: bool) -> tuple[list[str], list[int]]:
    """Class names and each image's label by the first folder of its name."""
    flat = [picture.parts for picture in pictures if len(picture.parts) == 1]
    if named:
        return [], [0] * len(pictures)
    if flat and len(flat) < len(pictures):
        raise DataError(
            f"{name} holds images beside class folders, such as {flat[0][0]}; "
            "put each image into a folder of its class, or all into one folder, or give --labels"
        )
    class_names = [] if flat else sorted({picture.parts[0] for picture in pictures})
    labels = {class_name: label for label, class_name in enumerate(class_names)}
    return class_names, [labels.get(picture.parts[0], 0) for picture in pictures]


def take(source: Source, limit: int) -> Source:
    """The same source with at most `limit` images, spread evenly over it, so that all classes keep their share."""
    if limit >= len(source.items):
        return source
    items = [source.items[i * len(source.items) // limit] for i in range(limit)]
    return replace(source, items=items, fingerprint=_fingerprint(items, source.essence))


def _fingerprint(items: list[Item], essence: tuple) -> str:
    named = [[item.name, item.size] for item in items]
    return digest_of([named, *essence] if essence else named)[:16]
