"""Reading weights under public names, and comparing names and shapes strictly."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from repa_scale.errors import DataError, UserError

EXPORT_FILE = "model.safetensors"
SHOWN = 5  # names listed in a message before "and N more"


def load_public(path: str | Path) -> dict[str, Tensor]:
    """Backbone weights under public names; projectors in the file are left out.

    Args:
        path: a safetensors file, or a folder made by `repa-scale export`.

    Raises:
        DataError: no such file, or not a safetensors file.
    """
    with _opened(path) as file:
        return {name: file.get_tensor(name) for name in _backbone(file)}


def public_shapes(path: str | Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what `load_public` gives, read without the weights."""
    with _opened(path) as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in _backbone(file)}


def _opened(path: str | Path) -> safe_open:
    path = Path(path)
    file = path / EXPORT_FILE if path.is_dir() else path
    if not file.is_file():
        raise DataError(f"{file} does not exist; give a .safetensors file or a folder made by repa-scale export")
    if file.suffix in (".pt", ".pth", ".ckpt", ".bin"):
        raise DataError(f"{file} is a pickle, which can run code when read; convert it to .safetensors first")
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise DataError(f"{file} is not a readable safetensors file ({error}); copy or export it again") from None


def _backbone(file: safe_open) -> list[str]:
    return [name for name in file.keys() if not name.startswith("projectors.")]  # noqa: SIM118  (no mapping)


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
