"""Reading weights under public names, and comparing names and shapes strictly."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from repa_scale.errors import DataError, UserError
from repa_scale.sealed import read_sealed
from repa_scale.tensor_file import Read, TensorFile

EXPORT_CONFIG = "config.json"
EXPORT_FILE = "model.safetensors"
EXPORT_INDEX = "model.safetensors.index.json"  # of weights in several files: {"weight_map": {name: file}}
SHOWN = 5  # names listed in a message before "and N more"
PICKLES = (".pt", ".pth", ".ckpt", ".bin", ".pkl")


def verify_weights(path: str | Path) -> None:
    """Compares a folder of `repa-scale export` with its manifest.

    Raises:
        DataError: it does not agree.
    """
    if (Path(path) / EXPORT_CONFIG).is_file():  # else a file, or a folder of someone else's: nothing to compare
        read_sealed(Path(path))


def public_shapes(path: str | Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the backbone in a safetensors file or an export; projectors are left out."""
    shapes, _ = open_weights(path)
    return {name: shapes[name] for name in backbone_names(shapes)}


def open_weights(path: str | Path) -> tuple[dict[str, tuple[int, ...]], Read]:
    """Shapes of all tensors of a safetensors file, or of the one or many of an export, and how they are read.

    Raises:
        DataError: no such file, or not a safetensors file.
    """
    path = Path(path)
    if path.is_dir() and (path / EXPORT_INDEX).is_file():
        files = _several(path)
    else:
        file = path / EXPORT_FILE if path.is_dir() else path
        if not file.is_file():
            raise DataError(f"{file} does not exist; give a .safetensors file or a folder made by repa-scale export")
        if file.suffix in PICKLES:
            raise DataError(
                f"{file} is a pickle, which can run code when read; make a folder of it with: repa-scale import {file}"
            )
        files = [TensorFile(file)]
    owner = {name: file for file in files for name in file.shapes}
    shapes = {name: file.shapes[name] for name, file in owner.items()}
    return shapes, lambda name, start, stop: owner[name].read(name, start, stop)


def _several(folder: Path) -> list[TensorFile]:
    index = folder / EXPORT_INDEX
    try:
        names = list(dict.fromkeys(json.loads(index.read_text())["weight_map"].values()))
        strange = [name for name in names if Path(name).name != name]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise DataError(f"{index} is damaged; copy or export it again") from None
    if strange:
        raise DataError(f"{index} names {strange[0]!r}, which is not a file of its folder; copy or export it again")
    return [TensorFile(folder / name) for name in names]


def backbone_names(names: Iterable[str]) -> list[str]:
    """All but the projectors'."""
    return [name for name in names if not name.startswith("projectors.")]


def check_names(have: Mapping[str, tuple[int, ...]], want: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Compares two sets of tensors, {name: shape}.

    Raises:
        UserError: tensors are missing, extra or of another shape; it names them.
    """
    problems = []
    if missing := [name for name in want if name not in have]:
        problems.append(f"missing: {_listed(missing)}")
    if extra := [name for name in have if name not in want]:
        problems.append(f"not expected: {_listed(extra)}")
    shapes = [
        f"{name} {list(have[name])} instead of {list(want[name])}"
        for name in want
        if name in have and tuple(have[name]) != tuple(want[name])
    ]
    if shapes:
        problems.append(f"other shapes: {_listed(shapes)}")
    if problems:
        raise UserError(f"{where} does not fit this model: {'; '.join(problems)}; choose the model it was made for")


def _listed(names: list[str]) -> str:
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "")
