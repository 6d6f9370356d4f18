"""Sets of 8-bit images to be measured: in an .npz, a folder or archive, or a prepared data set; read block by block.

Every set is checked as it is read: 8-bit, colour, one size. None is ever held whole.
"""

from __future__ import annotations

import hashlib
import io
import os
import zipfile
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.lib import format as npy
from PIL import Image

from repa_scale.checksums import checksum_file, default_algorithm
from repa_scale.data.batches import open_dataset
from repa_scale.data.decode import decode
from repa_scale.data.sources import ARCHIVES, open_source
from repa_scale.errors import DataError

IMAGES = "arr_0"  # the array of an .npz that holds the images
MODES = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"}  # of Pillow, with 8 bits a channel
AHEAD = 3  # blocks


@dataclass(frozen=True)
class ImageSet:
    """Images of one size.

    Attributes:
        name: as a report calls it.
        size: (height, width).
        blocks: (start, stop, rows a block) -> (b, H, W, 3) uint8, in order.
        fingerprint: of the contents; may read all of them.
    """

    name: str
    count: int
    size: tuple[int, int]
    blocks: Callable[[int, int, int], Iterator[np.ndarray]]
    fingerprint: Callable[[], str]

    def read(self, start: int, stop: int, rows: int) -> Iterator[np.ndarray]:
        """The blocks, read by a thread of their own a few blocks ahead.

        Raises:
            DataError: an image is damaged, or not like the others.
        """
        return _ahead(self.blocks(start, stop, rows))


def open_images(path: str | Path) -> ImageSet:
    """Opens an .npz, a folder with samples.npz, a prepared data set, or a folder or archive of images.

    Raises:
        DataError: none of these, or its images are not 8-bit colour images of one size.
    """
    path = Path(path)
    if not path.exists():
        raise DataError(f"{path} does not exist; give an .npz, a folder of images or a prepared data set")
    if path.is_dir() and (path / "samples.npz").is_file():
        path = path / "samples.npz"
    if path.suffix == ".npz":
        return _open_npz(path)
    if (path / "dataset.json").is_file():
        return _open_prepared(path)
    if path.is_dir() or path.name.lower().endswith(ARCHIVES) or path.suffix == ".parquet":
        return _open_pictures(path)
    raise DataError(f"{path} is no .npz, folder of images or prepared data set; give one of these")


def npz_arrays(path: Path) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Shapes and types of the arrays of an .npz, from their heads alone.

    Raises:
        DataError: not an .npz, cut off, or with pickled objects, which could run code and are never read.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return {
                member.removesuffix(".npy"): _head(archive, member, path)[:2]
                for member in archive.namelist()
                if member.endswith(".npy")
            }
    except FileNotFoundError:
        raise DataError(f"{path} does not exist; draw samples with: repa-scale sample RUN --out {path}") from None
    except (zipfile.BadZipFile, ValueError, OSError, EOFError) as error:
        raise DataError(f"{path} is no whole .npz ({error}); write or fetch it again") from None


def npz_array(path: Path, name: str) -> np.ndarray:
    """One array, whole. Its kind is what `npz_arrays` found."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            return archive[name]
    except (zipfile.BadZipFile, ValueError, OSError, EOFError, KeyError) as error:
        raise DataError(f"{path}: {name} cannot be read ({error}); write or fetch it again") from None


def _head(archive: zipfile.ZipFile, member: str, path: Path) -> tuple[tuple[int, ...], np.dtype, int]:
    """Shape, type and offset of the data of a member."""
    with archive.open(member) as file:
        version = npy.read_magic(file)
        read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, fortran, dtype = read(file)
        if dtype.hasobject:
            raise DataError(f"{path}: {member} holds pickled objects, which are never read; save plain arrays")
        if fortran and len(shape) > 1 and member == f"{IMAGES}.npy":
            raise DataError(f"{path}: {member} is stored by columns; save np.ascontiguousarray of it")
        return shape, dtype, file.tell()


def _open_npz(path: Path) -> ImageSet:
    arrays = npz_arrays(path)
    if IMAGES not in arrays:
        raise DataError(
            f"{path} holds {', '.join(sorted(arrays)) or 'nothing'} but no {IMAGES}, the (N, H, W, 3) images"
        )
    shape, dtype = arrays[IMAGES]
    if dtype != np.uint8:
        raise DataError(
            f"{path}: {IMAGES} is {dtype}; metrics are of 8-bit images: round to uint8 in [0, 255], and say how"
        )
    if len(shape) != 4 or shape[3] != 3 or not shape[0]:
        raise DataError(f"{path}: {IMAGES} has the shape {shape}; it must be (N, H, W, 3), channels last")

    def blocks(start: int, stop: int, rows: int) -> Iterator[np.ndarray]:
        each = int(np.prod(shape[1:]))
        brightest = 0
        try:
            with zipfile.ZipFile(path) as archive, archive.open(f"{IMAGES}.npy") as file:
                file.seek(_head(archive, f"{IMAGES}.npy", path)[2] + start * each)
                for first in range(start, stop, rows):
                    wanted = (min(first + rows, stop) - first) * each
                    block = np.frombuffer(file.read(wanted), np.uint8).reshape(-1, *shape[1:])
                    if block.size < wanted:
                        raise DataError(f"{path} ends at image {first + len(block)} of {shape[0]}; write it again")
                    brightest = max(brightest, int(block.max()))
                    yield block
                    if first + rows >= stop and stop == shape[0]:
                        file.read(1)  # at its end the member's checksum is compared
        except (zipfile.BadZipFile, OSError, EOFError, ValueError) as error:
            raise DataError(f"{path} cannot be read ({error}); write or fetch it again") from None
        _check_range(brightest, str(path))

    return ImageSet(path.name, shape[0], shape[1:3], blocks, lambda: checksum_file(path, default_algorithm()))


def _check_range(brightest: int, name: str) -> None:
    if brightest <= 1:
        raise DataError(
            f"{name}: no value exceeds {brightest}: images in [0, 1] were cut to whole numbers; scale them to [0, 255]"
        )


def _open_prepared(path: Path) -> ImageSet:
    dataset = open_dataset(path)

    def blocks(start: int, stop: int, rows: int) -> Iterator[np.ndarray]:
        def load(numbers: range) -> list[bytes]:
            return [dataset.reader[number]["image"] for number in numbers]

        yield from _decoded(load, start, stop, rows, lambda data, number: decode(data, f"{path}, image {number}"), path)

    side = dataset.image_size
    return ImageSet(dataset.name, dataset.count, (side, side), blocks, lambda: f"set:{dataset.fingerprint}")


def _open_pictures(path: Path) -> ImageSet:
    source = open_source(str(path))
    first = _decode(source.read(source.items[0].key), source.items[0].name)

    def blocks(start: int, stop: int, rows: int) -> Iterator[np.ndarray]:
        def load(numbers: range) -> list[bytes]:
            return [source.read(source.items[number].key) for number in numbers]

        def picture(data: bytes, number: int) -> np.ndarray:
            image = _decode(data, source.items[number].name)
            if image.shape != first.shape:
                raise DataError(
                    f"{path}: {source.items[number].name} is {_size(image)} and {source.items[0].name} {_size(first)}; "
                    f"make one size of all: repa-scale prepare {path} --out DATA --size {min(first.shape[:2])}"
                )
            return image

        yield from _decoded(load, start, stop, rows, picture, path)

    def fingerprint() -> str:
        digest = hashlib.sha256()
        for item in source.items:
            digest.update(item.name.encode() + b"\0" + hashlib.sha256(source.read(item.key)).digest())
        return f"sha256:{digest.hexdigest()}"

    return ImageSet(path.name, len(source.items), first.shape[:2], blocks, fingerprint)


def _decode(data: bytes, name: str) -> np.ndarray:
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.mode not in MODES:
                raise DataError(
                    f"{name} has pixels of the kind {image.mode}; metrics are of images with 8 bits a channel"
                )
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{name} is no image ({error}); remove or mend it") from None
    return decode(data, name)


def _decoded(
    load: Callable[[range], list[bytes]],
    start: int,
    stop: int,
    rows: int,
    picture: Callable[[bytes, int], np.ndarray],
    path: Path,
) -> Iterator[np.ndarray]:
    """Blocks of pictures; files are read here, one after the other, and decoded in threads."""
    with ThreadPoolExecutor(min(8, len(os.sched_getaffinity(0)))) as threads:
        for first in range(start, stop, rows):
            numbers = range(first, min(first + rows, stop))
            try:
                data = load(numbers)
            except OSError as error:
                raise DataError(
                    f"{path} cannot be read ({error.strerror or error}); is its disk still there?"
                ) from None
            yield np.stack(list(threads.map(picture, data, numbers)))


def _size(image: np.ndarray) -> str:
    return f"{image.shape[0]} x {image.shape[1]}"


def _ahead(blocks: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    """The same blocks, made by one thread while earlier ones are in use."""
    end = object()
    with ThreadPoolExecutor(1, thread_name_prefix="reading") as thread:
        coming = deque(thread.submit(next, blocks, end) for _ in range(AHEAD))
        while (block := coming.popleft().result()) is not end:
            coming.append(thread.submit(next, blocks, end))
            yield block
