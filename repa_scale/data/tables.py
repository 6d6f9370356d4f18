"""Images in tables: parquet files as the Hugging Face hub keeps them, and MDS sets, ours and others."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from repa_scale.data.labels import Labels
from repa_scale.data.manifest import MANIFEST, read_manifest
from repa_scale.data.mds import MdsReader, read_index, verify_shard
from repa_scale.data.sources import Found, clean_name
from repa_scale.errors import DataError, UserError, reason, require

LARGEST_GROUP = 1 << 32  # bytes of images in a row group, unpacked
ROWS = 16  # read at once: a dictionary page can make many large rows of a small file
IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png")


def open_parquet(path: Path, labels: Labels) -> Found:
    """One parquet file with a column of images, {bytes, path} or plain bytes, and perhaps one of labels.

    Raises:
        DataError: damaged, or without such a column.
    """
    parquet = require("pyarrow.parquet", "data")
    try:
        file = parquet.ParquetFile(path)
        schema = file.schema_arrow
        image = _image_column(schema)
        if image is None:
            raise DataError(f"{path} has no column of images among {', '.join(schema.names)[:200]}")
        column, struct = image
        label_column = next((name for name in labels.columns if name in schema.names), None)
        if labels.column and label_column is None:
            raise DataError(f"{path} has no column {labels.column}; it has {', '.join(schema.names)[:200]}")
        leaf = f"{column}.bytes" if struct else column
        _check_groups(file, path, leaf)
        rows = file.metadata.num_rows
        said = _strings(file, label_column, rows) if label_column else [None] * rows
        names = _row_names(path, _strings(file, f"{column}.path", rows) if struct == "path" else None, rows)
    except (DataError, UserError):
        raise
    except Exception as error:  # pyarrow raises many kinds for a damaged file
        raise DataError(f"{path} cannot be read as parquet ({reason(error)}); fetch it again") from None
    reader = _Rows(path, leaf)
    files = {name: (row, -1, label) for row, (name, label) in enumerate(zip(names, said, strict=True))}
    with path.open("rb") as raw:  # the footer holds places, sizes and statistics of all columns
        raw.seek(-8, 2)
        length = int.from_bytes(raw.read(4), "little")
        raw.seek(-8 - length, 2)
        essence = hashlib.sha256(raw.read(length)).hexdigest()
    return Found(
        path.parent.name if path.parent.name not in ("", "data") else path.resolve().parent.parent.name,
        files, reader, _class_names(schema, label_column), named=True, in_order=True, essence=essence,
    )  # fmt: skip


def _image_column(schema) -> tuple[str, str] | None:
    """Name of the column of images, and what it is: `path` {bytes, path}, `bytes` {bytes}, or empty for plain bytes."""
    import pyarrow

    for field in schema:
        if pyarrow.types.is_struct(field.type) and field.type.get_field_index("bytes") >= 0:
            return field.name, "path" if field.type.get_field_index("path") >= 0 else "bytes"
    for field in schema:
        kind = field.type
        if field.name in IMAGE_COLUMNS and (pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind)):
            return field.name, ""
    return None


def _check_groups(file, path: Path, leaf: str) -> None:
    metadata = file.metadata
    for group in range(metadata.num_row_groups):
        row_group = metadata.row_group(group)
        for i in range(row_group.num_columns):
            column = row_group.column(i)
            if column.path_in_schema == leaf and column.total_uncompressed_size > LARGEST_GROUP:
                raise DataError(
                    f"{path}: row group {group} unpacks to {column.total_uncompressed_size} bytes, more than "
                    f"{LARGEST_GROUP}; write it with smaller row groups"
                )


def _strings(file, column: str, rows: int) -> list[Any]:
    """A small column, whole."""
    table = file.read(columns=[column])
    values = table.column(0).combine_chunks()
    if "." in column and hasattr(values, "field"):
        values = values.field(0)
    found = values.to_pylist()
    if len(found) != rows:
        raise ValueError(f"column {column} has {len(found)} rows of {rows}")
    return found


def _row_names(path: Path, paths: list | None, rows: int) -> list[str]:
    """The paths that the rows name, where all are there, clean and different; else file and row."""
    if paths is not None and len(set(paths)) == rows and all(isinstance(p, str) and clean_name(p) for p in paths):
        return paths
    return [f"{path.stem}/{row:07d}" for row in range(rows)]


def _class_names(schema, label_column: str | None) -> list[str]:
    """The names that the hub's `datasets` library writes beside the schema, if it does."""
    try:
        features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
        names = features[label_column]["names"]
        return [str(name) for name in names] if isinstance(names, list) else []
    except (KeyError, TypeError, ValueError):
        return []


class _Rows:
    """Row number -> the bytes of its image. Quick when the rows are asked for in their order."""

    def __init__(self, path: Path, leaf: str) -> None:
        self.path, self.leaf = path, leaf
        self._stream: Iterator | None = None
        self._at = 0  # the row that the stream gives next

    def __call__(self, row: int) -> bytes:
        if self._stream is None or row < self._at:
            self._stream, self._at = self._from(row), row
        try:
            value = None
            while self._at <= row:
                value = next(self._stream)
                self._at += 1
        except BaseException:
            self._stream = None
            raise
        if value is None:
            raise ValueError("its row holds no bytes")  # a path alone is not followed
        return value

    def _from(self, row: int) -> Iterator[bytes | None]:
        """The images from the row group on that holds `row`, and from `row` on."""
        import pyarrow.parquet

        with pyarrow.parquet.ParquetFile(self.path) as file:
            starts, first = 0, 0
            while starts + file.metadata.row_group(first).num_rows <= row:
                starts += file.metadata.row_group(first).num_rows
                first += 1
            groups = range(first, file.metadata.num_row_groups)
            for batch in file.iter_batches(ROWS, row_groups=groups, columns=[self.leaf], use_threads=False):
                values = batch.column(0)
                if "." in self.leaf:
                    values = values.field(0)
                for value in values:
                    if starts >= row:
                        yield value.as_py()
                    starts += 1


def open_mds(folder: Path, labels: Labels) -> Found:
    """An MDS set whose images are files (columns `image`, `jpg`, ...), with or without labels and names.

    Raises:
        DataError: a damaged index, names in it that lead out of the folder, or columns that are not known.
    """
    reader = MdsReader(folder, read_index(folder))
    if not len(reader):
        raise DataError(f"{folder} is empty")
    columns = {name: encoding for name, encoding, _ in reader.shards[0].columns}
    image = next((name for name in IMAGE_COLUMNS if name in columns), None)
    if image is None:
        raise DataError(f"{folder} has no column of images among {', '.join(columns)}")
    if labels.column and labels.column not in columns:
        raise DataError(f"{folder} has no column {labels.column}; it has {', '.join(columns)}")
    label = next((name for name in labels.columns if name in columns), None)
    manifest = read_manifest(folder) if (folder / MANIFEST).exists() else {"class_names": [], "name": folder.name}
    for shard in reader.shards:
        if shard.hashes:  # MDSWriter writes them only where it is asked to
            verify_shard(folder, shard)
    labelled = label is not None and (not (folder / MANIFEST).exists() or bool(manifest["class_names"]))
    files = {}
    for number in range(len(reader)):
        row = reader[number]
        name = row["name"] if columns.get("name") == "str" else f"{number:08d}"
        files[name if name not in files else f"{name}#{number}"] = (
            number, len(row[image]), row[label] if labelled else None
        )  # fmt: skip
    essence = hashlib.sha256((folder / "index.json").read_bytes()).hexdigest()
    return Found(
        manifest["name"], files, lambda number: reader[number][image], manifest["class_names"],
        named=True, in_order=True, essence=essence,
    )  # fmt: skip
