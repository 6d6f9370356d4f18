"""The form `public`: one .pt file as the public REPA code saves it, for its generate.py (`--ckpt`).

The file holds `ema` (the weights that were asked for), `model` (the raw ones, where the source has them), `args` and
`steps`, but no optimiser. `args` is a plain dict: their scripts do not read it, and torch.load refuses more by default.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from repa_scale.export import Options
from repa_scale.export.card import CARD, model_card
from repa_scale.tensor_file import pieces, rounded
from repa_scale.trained import Source

FILE = "checkpoint.pt"
WIDTH = 2048  # inside their projectors: generate.py builds no other
LAYERS = ("0", "2", "4")  # the Linears of a projector
NO_TARGET = 8  # width of the target of the projector that stands in where the run has none of their kind

USE = """
With the public REPA code:
```
torchrun generate.py --ckpt checkpoint.pt --model {model} --num-classes {num_classes} --resolution {resolution} \\
  --encoder-depth {encoder_depth} --projector-embed-dims {projector_embed_dims} --path-type {path_type} {qk_norm}
```
{projectors}
"""
TRAINED = "Its projectors are those of the training."
STAND_IN = "Its projector is a stand-in of zeros: their code builds one, and the velocity does not depend on it."


def write(source: Source, folder: Path, options: Options) -> dict[str, Any]:
    """Fills `folder` with checkpoint.pt and model_card.md. torch.save wants whole tensors: they are mapped files."""
    depth, projectors = _projectors(source)
    args = _args(source, depth, projectors)
    kinds = {"ema": source} | ({"model": source.live} if source.live else {})
    with tempfile.TemporaryDirectory(prefix="parts-", dir=folder) as parts:
        checkpoint: dict[str, Any] = {
            key: _state_dict(kind, projectors, options.torch_dtype, Path(parts) / key) for key, kind in kinds.items()
        }
        torch.save({**checkpoint, "args": args, "steps": source.facts["step"] or 0}, folder / FILE)
    told = STAND_IN if None in projectors.values() else TRAINED
    use = USE.format(**{**args, "qk_norm": "--qk-norm" if args["qk_norm"] else ""}, projectors=told)
    (folder / CARD).write_text(model_card(source, options, use))
    return {"args": args, "projectors": "stand-in" if told == STAND_IN else "trained", "weights": list(kinds)}


def _args(source: Source, depth: int, projectors: Mapping[str, str | None]) -> dict[str, Any]:
    """Under the names of their train.py."""
    config = source.config
    widths = [
        source.shapes[ours][0] if ours else NO_TARGET for name, ours in projectors.items() if name.endswith("4.weight")
    ]
    return {
        "model": config.model.name,
        "num_classes": config.model.num_classes,
        "resolution": config.data.image_size,
        "qk_norm": any(".q_norm." in name for name in source.shapes),
        "encoder_depth": depth,
        "projector_embed_dims": ",".join(map(str, widths)),
        "path_type": config.interpolant.path,
        "prediction": "v",
        "weighting": config.interpolant.time,
        "cfg_prob": config.model.class_dropout,
        "seed": config.seed,
    }


def _projectors(source: Source) -> tuple[int, dict[str, str | None]]:
    """The depth of the alignment, and the projectors as {their name: ours, or None for zeros}.

    Their code has one depth and projectors of three Linears, 2048 wide, and it loads them strictly.
    """
    terms = {} if source.config.method == "baseline" else source.config.alignment
    ours = [f"projectors.{term}" for term in terms]
    fit = all(source.shapes.get(f"{name}.2.weight") == (WIDTH, WIDTH) for name in ours)
    depths = {term.depth for term in terms.values()}
    if not ours or not fit or len(depths) != 1:
        ours = [None]
    names = {
        f"projectors.{k}.{layer}.{part}": name and f"{name}.{layer}.{part}"
        for k, name in enumerate(ours)
        for layer in LAYERS
        for part in ("weight", "bias")
    }
    return (min(depths) if depths else 1), names


def _state_dict(
    source: Source, projectors: Mapping[str, str | None], dtype: torch.dtype, folder: Path
) -> dict[str, Tensor]:
    """All weights under their names; each lies in a mapped file of `folder`."""
    folder.mkdir()
    width = source.shapes["x_embedder.proj.weight"][0]
    state = {}
    for theirs, ours in [*((name, name) for name in source.names()), *projectors.items()]:
        if ours is None:
            state[theirs] = torch.zeros(_stand_in(theirs, width), dtype=dtype)
        else:
            state[theirs] = _mapped(source.read, ours, source.shapes[ours], dtype, folder / theirs)
    return state


def _stand_in(name: str, width: int) -> tuple[int, ...]:
    """The shape of a parameter of their projector."""
    _, _, layer, part = name.split(".")
    rows, columns = {"0": (WIDTH, width), "2": (WIDTH, WIDTH), "4": (NO_TARGET, WIDTH)}[layer]
    return (rows, columns) if part == "weight" else (rows,)


def _mapped(
    read: Callable[[str, int, int], Tensor], name: str, shape: tuple[int, ...], dtype: torch.dtype, path: Path
) -> Tensor:
    with path.open("wb") as file:
        for piece in pieces(read, name, shape):
            file.write(rounded(piece, dtype, name).view(torch.uint8).numpy())
    return torch.from_numpy(np.memmap(path, np.uint8, mode="c")).view(dtype).view(shape)
