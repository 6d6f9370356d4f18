"""The form `safetensors`: weights under public names, config.json, and model_card.md."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from repa_scale import __version__
from repa_scale.export import HASHES, Options
from repa_scale.export.card import CARD, model_card
from repa_scale.models.weights import EXPORT_CONFIG, EXPORT_FILE, EXPORT_INDEX
from repa_scale.tensor_file import write_tensors
from repa_scale.trained import Source

USE = """
```bash
repa-scale sample DIR --out samples --count 64
```

`config.json` names the model; `model.safetensors` holds its weights under the names of public SiT checkpoints;
`manifest.json` has the sha256 of every file, which `repa-scale` compares before it uses one.
"""
FILE_BYTES = 5 * 10**9  # of weights in one file


def write(source: Source, folder: Path, options: Options) -> dict[str, Any]:
    """Fills `folder`; the weights go from file to file, a piece at a time."""
    hashes = write_weights(source, folder, options)
    write_config(source, folder, options)
    (folder / CARD).write_text(model_card(source, options, USE))
    return {HASHES: hashes, "projectors": options.projectors, "vae": options.vae or None}


def write_weights(source: Source, folder: Path, options: Options, file_bytes: int = FILE_BYTES) -> dict[str, str]:
    """model.safetensors, or several and their index where they take more than `file_bytes`; returns their sha256."""
    names = source.names(options.projectors)
    groups = _groups(
        {name: options.torch_dtype.itemsize * math.prod(source.shapes[name]) for name in names}, file_bytes
    )
    if len(groups) == 1:
        files = {EXPORT_FILE: groups[0]}
    else:
        stem, end = EXPORT_FILE.split(".")
        files = {f"{stem}-{i:05d}-of-{len(groups):05d}.{end}": group for i, group in enumerate(groups, start=1)}
        total = sum(options.torch_dtype.itemsize * math.prod(source.shapes[name]) for name in names)
        index = {
            "metadata": {"total_size": total},
            "weight_map": {name: file for file, group in files.items() for name in group},
        }
        (folder / EXPORT_INDEX).write_text(json.dumps(index, indent=1) + "\n")
    return {
        file: write_tensors(
            folder / file, {name: source.shapes[name] for name in group}, source.read, options.torch_dtype
        )
        for file, group in files.items()
    }


def write_config(source: Source, folder: Path, options: Options) -> None:
    """config.json: all that `repa_scale` needs to build the model and to sample from it."""
    described = {
        "made_by": f"repa_scale {__version__}",
        "dtype": options.dtype,
        "trained": source.facts,
        "config": asdict(source.config),
        "class_names": list(source.class_names),
    }
    (folder / EXPORT_CONFIG).write_text(json.dumps(described, indent=1) + "\n")


def _groups(sizes: dict[str, int], limit: int) -> list[list[str]]:
    """Names in order, so many to a group that their bytes stay within `limit`; a larger one is alone."""
    groups: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if groups[-1] and filled + size > limit:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    return groups
