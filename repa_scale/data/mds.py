"""Reading MDS shards (the format of mosaicml-streaming) at random, without importing streaming.

`index.json` is checked before any name in it is used. A shard file is opened once and read by `os.pread`, so that
forked processes and threads can share it. Hashes are checked by `verify_shard`, which dataset.py calls before use.
"""

from __future__ import annotations

import bisect
import hashlib
import json
import os
import resource
import struct
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from repa_scale.errors import DataError

# How the bytes of a column become a value; images stay bytes, for batches.py to decode.
DECODERS = {
    "bytes": bytes,
    "png": bytes,
    "jpeg": bytes,
    "str": lambda data: data.decode("utf-8"),
    "int": lambda data: int.from_bytes(data, "little", signed=True),
}
FIXED_SIZES = {"int": 8}
HASH_CHUNK = 1 << 20


@dataclass(frozen=True)
class Shard:
    """One row of index.json.

    Attributes:
        columns: (name, encoding, bytes or None where the size varies), in the order of the file.
        hashes: hex digest by algorithm.
    """

    basename: str
    bytes: int
    hashes: dict[str, str]
    samples: int
    columns: tuple[tuple[str, str, int | None], ...]


def read_index(folder: Path) -> list[Shard]:
    """The shards that `folder/index.json` lists.

    Raises:
        DataError: the index is missing or damaged, or a row in it cannot be used safely.
    """
    path = folder / "index.json"
    try:
        index = json.loads(path.read_bytes())
        rows = index["shards"]
        if index["version"] != 2:
            raise DataError(f"{path}: version {index['version']!r} is not known, only 2; prepare the set again")
        shards = [_parse_row(path, row) for row in rows]
    except FileNotFoundError:
        raise DataError(f"{path} is missing; prepare the set again") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged ({type(error).__name__}: {error}); prepare the set again") from None
    names = [shard.basename for shard in shards]
    if len(set(names)) != len(names):
        raise DataError(f"{path} names a shard twice; prepare the set again")
    return shards


def _parse_row(path: Path, row: dict[str, Any]) -> Shard:
    name = row["raw_data"]["basename"]
    # A name is joined to the folder: one that could lead out of it must not get that far.
    if not isinstance(name, str) or name in ("", ".", "..") or any(c in name for c in "/\\\0:"):
        raise DataError(f"{path}: {name!r} is not a plain file name; this index is not to be trusted")
    if row["format"] != "mds" or row["compression"]:
        raise DataError(f"{path}: {name} is {row['format']!r} with compression {row['compression']!r}; only plain MDS")
    columns = tuple(zip(row["column_names"], row["column_encodings"], row["column_sizes"], strict=True))
    for column, encoding, size in columns:
        if encoding not in DECODERS:
            raise DataError(
                f"{path}: column {column!r} of {name} has encoding {encoding!r}; known: {', '.join(DECODERS)}"
            )
        if size != FIXED_SIZES.get(encoding):
            raise DataError(f"{path}: column {column!r} of {name} cannot have size {size!r}")
    samples, size = row["samples"], row["raw_data"]["bytes"]
    if not (isinstance(samples, int) and isinstance(size, int) and 0 < samples <= size // 4 < 2**31):
        raise DataError(f"{path}: {name} cannot hold {samples!r} samples in {size!r} bytes")
    return Shard(name, size, dict(row["raw_data"]["hashes"]), samples, columns)


class MdsReader:
    """Random access to the samples of some shards, numbered through in the order of the index.

    Copies for other processes are cheap: open files stay behind.
    """

    def __init__(self, folder: Path, shards: list[Shard]) -> None:
        self.folder = Path(folder)
        self.shards = shards
        self.bad: dict[int, str] = {}  # shards that must not be touched again, and why
        self._starts = np.cumsum([0, *(shard.samples for shard in shards)]).tolist()
        self._open: OrderedDict[int, OpenShard] = OrderedDict()
        self._limit = 0

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, number: int) -> dict[str, Any]:
        """`read` of everything."""
        return self.read(number, {})

    def read(self, number: int, into: Mapping[str, memoryview]) -> dict[str, Any]:
        """The columns of sample `number`, in [0, len).

        Args:
            into: columns whose bytes are read to where they are wanted, without a copy; they are not returned.

        Raises:
            DataError: the shard is missing or does not hold what the index promises.
        """
        which, row = self.locate(number)
        return self._shard(which).sample(row, into)

    def will_need(self, numbers: Iterable[int]) -> None:
        """Has the disk begin with all of these samples, which are read one after the other next."""
        if not hasattr(os, "posix_fadvise"):
            return
        for number in numbers:
            which, row = self.locate(number)
            with suppress(DataError):  # it is told when the sample is read
                shard = self._shard(which)
                begin, end = int(shard.offsets[row]), int(shard.offsets[row + 1])
                os.posix_fadvise(shard.file, begin, end - begin, os.POSIX_FADV_WILLNEED)

    def locate(self, number: int) -> tuple[int, int]:
        """Number of the shard that holds sample `number`, and the sample's row in it."""
        if not 0 <= number < len(self):
            raise IndexError(f"sample {number} of {len(self)}")
        which = bisect.bisect_right(self._starts, number) - 1
        return which, number - self._starts[which]

    def expect(self, shards: Callable[[], list[int]]) -> None:
        """Told which shards will be read next; remote.py fetches them ahead."""

    def verify(self, which: int) -> None:
        """Compares a shard's file with the index. Raises `DataError` where it differs."""
        verify_shard(self.folder, self.shards[which])

    def close(self) -> None:
        while self._open:
            os.close(self._open.popitem()[1].file)

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "shards": self.shards, "bad": self.bad}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["folder"], state["shards"])
        self.bad = state["bad"]

    def __del__(self) -> None:
        if hasattr(self, "_open"):
            self.close()

    def _shard(self, which: int) -> OpenShard:
        shard = self._open.get(which)
        if shard is not None:
            self._open.move_to_end(which)
            return shard
        if which in self.bad:
            raise DataError(self.bad[which])
        self._limit = self._limit or _open_file_limit()
        if len(self._open) >= self._limit:
            os.close(self._open.popitem(last=False)[1].file)
        try:
            shard = self._open[which] = self.opened(which)
        except DataError as error:
            self.bad[which] = str(error)
            raise
        return shard

    def opened(self, which: int) -> OpenShard:
        """Opens a shard file; remote.py fetches it first."""
        return OpenShard(self.folder, self.shards[which])


class OpenShard:
    """An open shard file and where its samples lie.

    The layout of a file: number of samples, samples + 1 offsets (all uint32), a copy of the configuration, the samples.
    A sample: the sizes of its columns of varying size (uint32), then the columns.
    """

    def __init__(self, folder: Path, shard: Shard) -> None:
        self.shard = shard
        self.path = folder / shard.basename
        self.file = open_shard(folder, shard)
        try:
            head = os.pread(self.file, 4 * (shard.samples + 2), 0)
            table = np.frombuffer(head, "<u4")
            if len(table) != shard.samples + 2 or table[0] != shard.samples:
                raise self._damaged("its head does not fit the index")
            self.offsets = table[1:].astype(np.int64)
            if self.offsets[-1] != shard.bytes or (np.diff(self.offsets) < 0).any() or self.offsets[0] < len(head):
                raise self._damaged("its table of offsets is broken")
        except BaseException:
            os.close(self.file)
            raise
        self.head_length = 4 * sum(size is None for _, _, size in shard.columns)
        self.read_sizes = struct.Struct(f"<{self.head_length // 4}I").unpack_from
        self.decoders = [(name, DECODERS[encoding], size) for name, encoding, size in shard.columns]

    def sample(self, row: int, into: Mapping[str, memoryview]) -> dict[str, Any]:
        """See MdsReader.read."""
        begin, end = int(self.offsets[row]), int(self.offsets[row + 1])
        if into:
            return self._sample_into(row, begin, end, into)
        data = os.pread(self.file, end - begin, begin)
        if len(data) < max(end - begin, self.head_length):
            raise self._damaged(f"it ends inside row {row}")
        sizes = iter(self.read_sizes(data))
        at, values = self.head_length, {}
        try:
            for name, decode, size in self.decoders:
                stop = at + (next(sizes) if size is None else size)
                values[name] = decode(data[at:stop])
                at = stop
        except ValueError as error:
            raise self._damaged(f"column {name!r} of row {row}: {error}") from None
        if at != len(data):
            raise self._damaged(f"the columns of row {row} do not add up")
        return values

    def _sample_into(self, row: int, begin: int, end: int, into: Mapping[str, memoryview]) -> dict[str, Any]:
        head = os.pread(self.file, self.head_length, begin)
        if len(head) < self.head_length:
            raise self._damaged(f"it ends inside row {row}")
        sizes = iter(self.read_sizes(head))
        lengths = [next(sizes) if size is None else size for _, _, size in self.decoders]
        if self.head_length + sum(lengths) != end - begin:
            raise self._damaged(f"the columns of row {row} do not add up")
        buffers = []
        for (name, _, _), length in zip(self.decoders, lengths, strict=True):
            buffers.append(into[name] if name in into else bytearray(length))
            if len(buffers[-1]) != length:
                raise DataError(
                    f"{self.path}: row {row}: {name} has {length} bytes instead of {len(buffers[-1])}; prepare it again"
                )
        if os.preadv(self.file, buffers, begin + self.head_length) != sum(lengths):
            raise self._damaged(f"it ends inside row {row}")
        values = {}
        for (name, decode, _), data in zip(self.decoders, buffers, strict=True):
            if name not in into:
                try:
                    values[name] = decode(bytes(data))
                except ValueError as error:
                    raise self._damaged(f"column {name!r} of row {row}: {error}") from None
        return values

    def _damaged(self, what: str) -> DataError:
        return DataError(
            f"{self.path} is damaged: {what}; check the set with: repa-scale prepare --check {self.path.parent}"
        )


def open_shard(folder: Path, shard: Shard) -> int:
    """An open file descriptor of a shard whose size is as promised.

    Raises:
        DataError: missing, unreadable or of another size.
    """
    path = folder / shard.basename
    try:
        file = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); prepare the set again") from None
    if (size := os.fstat(file).st_size) != shard.bytes:
        os.close(file)
        raise DataError(f"{path} has {size} bytes instead of {shard.bytes}; copy or prepare the set again")
    return file


def verify_shard(folder: Path, shard: Shard) -> None:
    """Compares a shard file's size and hashes with the index.

    Raises:
        DataError: it differs, or the index gives no hash that Python knows.
    """
    known = [name for name in shard.hashes if name in hashlib.algorithms_available]
    if not known:
        raise DataError(
            f"{folder / shard.basename} has no hash in the index that can be checked; prepare the set again"
        )
    file = open_shard(folder, shard)
    try:
        digests = {name: hashlib.new(name) for name in known}
        position = 0
        while chunk := os.pread(file, HASH_CHUNK, position):
            position += len(chunk)
            for digest in digests.values():
                digest.update(chunk)
    finally:
        os.close(file)
    for name, digest in digests.items():
        if digest.hexdigest() != shard.hashes[name]:
            raise DataError(
                f"{folder / shard.basename} is damaged: its {name} is not the one in index.json; "
                "copy or prepare the set again"
            )


def _open_file_limit() -> int:
    """How many shards may be open at once: half of what the process may have, after raising its soft limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = min(hard, 65536) if hard != resource.RLIM_INFINITY else 65536
    if soft != resource.RLIM_INFINITY and soft < wanted:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            soft = wanted
        except (OSError, ValueError):
            pass
    return max(16, (65536 if soft == resource.RLIM_INFINITY else soft) // 2)
