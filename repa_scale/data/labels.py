"""Labels that do not come from class folders: a CSV or JSON map, a column, a side file, or none at all."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from repa_scale.errors import DataError

MAX_CLASSES = 100_000  # a label beyond is a mistake, and would make a list of that many names
LARGEST_MAP = 1 << 30  # bytes
HEADS = {"name", "file", "filename", "file_name", "image", "image_id", "imageid", "path", "id", "key"}
COLUMNS = ("label", "labels", "cls", "class")  # what a label's column or field is called, where nobody says it
NONE = "none"


@dataclass(frozen=True)
class Labels:
    """Where labels come from; by default what the source says: a column, a side file, else its folders.

    Attributes:
        file: a map from image names to classes.
        column: name of the column (parquet, MDS) or of the field (JSON side files of WebDataset).
        unlabelled: the set gets no labels, whatever the source says.
    """

    file: Path | None = None
    column: str = ""
    unlabelled: bool = False

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.column,) if self.column else COLUMNS


@dataclass(frozen=True)
class Wanted:
    """An image that needs a label, and what its source says."""

    name: str
    said: int | str | None


def parse_labels(labels: str | None, column: str | None) -> Labels:
    """Of the command line: `--labels FILE`, `--labels none`, `--label-column NAME`."""
    if labels == NONE:
        return Labels(unlabelled=True)
    return Labels(Path(labels) if labels else None, column or "")


def number_classes(
    images: list[Wanted], labels: Labels, class_names: list[str], source: str
) -> tuple[list[str], list[int]]:
    """Class names, and the number of each image's class.

    Args:
        class_names: what the source calls its classes, by number; may be empty.

    Raises:
        DataError: an image without a label, or one that cannot be a class.
    """
    if labels.unlabelled:
        return [], [0] * len(images)
    if labels.file is not None:
        table = read_map(labels.file)
        given = [_look_up(table, image.name) for image in images]
        values, class_names, where = list(table.values()), [], str(labels.file)
    else:
        given = [image.said for image in images]
        values, where = given, source
        if all(value in (None, -1) for value in given):  # as the hub marks the images of a test split
            return [], [0] * len(images)
    missing = [image.name for image, value in zip(images, given, strict=True) if value in (None, -1)]
    if missing:
        raise DataError(
            f"{len(missing)} images have no label in {where}, such as {missing[0]}; add them, "
            f"or prepare without labels (--labels {NONE})"
        )
    if any(isinstance(value, str) for value in given):
        names = sorted({str(value) for value in values})
        number = {name: i for i, name in enumerate(names)}
        return names, [number[str(value)] for value in given]
    highest = max(int(value) for value in values)
    lowest = min(int(value) for value in values)
    if lowest < 0 or highest >= max(MAX_CLASSES, len(class_names)):
        wrong = lowest if lowest < 0 else highest
        raise DataError(f"{where} has the label {wrong}; labels are numbers from 0 to {MAX_CLASSES - 1}, or names")
    names = class_names[:] + [str(i) for i in range(len(class_names), highest + 1)]
    return names, [int(value) for value in given]


def read_map(path: Path) -> dict[str, int | str]:
    """Image name -> class, from CSV (`name,label`) or JSON ({name: label}, [[name, label], ...], or that as "labels").

    Raises:
        DataError: missing, damaged, or of another form.
    """
    try:
        if path.stat().st_size > LARGEST_MAP:
            raise DataError(f"--labels {path} has {path.stat().st_size} bytes; a map of names has less")
        pairs = _json_pairs(path) if path.suffix.lower() == ".json" else _csv_pairs(path)
        table = {PurePosixPath(name).as_posix(): _label(value) for name, value in pairs}
    except OSError as error:
        raise DataError(f"--labels {path} cannot be read ({error.strerror}); give a CSV or JSON file") from None
    except (ValueError, TypeError, RecursionError, csv.Error) as error:
        raise DataError(
            f'--labels {path} is no map ({error}); give CSV lines "name,label" or JSON {{"name": label}}'
        ) from None
    if not table:
        raise DataError(f"--labels {path} is empty; give a line for each image")
    kinds = {type(value) for value in table.values()}
    return table if len(kinds) == 1 else {name: str(value) for name, value in table.items()}


def _json_pairs(path: Path) -> list:
    value = json.loads(path.read_bytes())
    if isinstance(value, dict) and isinstance(value.get("labels"), (list, dict)):
        value = value["labels"]  # the dataset.json of StyleGAN and EDM
    return list(value.items()) if isinstance(value, dict) else list(value)


def _csv_pairs(path: Path) -> list:
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = [row for row in csv.reader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",") if row]
    if rows and rows[0][0].strip().lower() in HEADS:
        rows = rows[1:]
    for number, row in enumerate(rows, 1):
        if len(row) < 2:
            raise ValueError(f"row {number} has one column")
    return [row[:2] for row in rows]


def _label(value: object) -> int | str:
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise TypeError(f"{value!r} is no label")
    text = str(value).strip()
    return int(text) if text.lstrip("-").isdecimal() and len(text) < 19 else text


def _look_up(table: dict[str, int | str], name: str) -> int | str | None:
    """By the whole name, by the file's name, and by both without their suffix."""
    path = PurePosixPath(name)
    for key in (name, path.name, path.with_suffix("").as_posix(), path.stem):
        if key in table:
            return table[key]
    return None
