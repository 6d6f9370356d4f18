"""A trained backbone from a run, one of its checkpoints or an export, without DeepSpeed or the trainer.

`Source` gives the weights piece by piece, so that copying needs little memory; `load_trained` gives them all at once.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from repa_scale.checkpoint import MANIFEST, CheckpointReader, list_checkpoints
from repa_scale.checksums import checksum_file
from repa_scale.config import Config, from_dict
from repa_scale.errors import ConfigError, DataError, UserError
from repa_scale.models import build_sit, position_table_of
from repa_scale.models.sit import SiT
from repa_scale.models.weights import EXPORT_CONFIG, backbone_names, check_names, open_weights
from repa_scale.run_folder import run_of, training_set
from repa_scale.sealed import form_of, read_sealed
from repa_scale.sizes import backbone, token_grid
from repa_scale.tensor_file import Read

KINDS = {"ema": "ema", "raw": "master"}  # what a user calls the weights -> what the checkpoint calls them
POSITIONS = "pos_embed"  # computed, not trained, so checkpoints leave it out
FACTS = ("step", "samples", "identity_hash", "pair_id")


@dataclass(frozen=True)
class Source:
    """Weights under public names that are read piece by piece, and what is needed to use them.

    Attributes:
        shapes: of the backbone with its position table, and of the projectors (`projectors.*`) where the source has
            them.
        read: elements [start, stop) of a flattened tensor, (stop - start,) float32.
        config: of the run, without paths of its machine.
        facts: step, samples, identity_hash, pair_id, weights (`ema` or `raw`), data_fingerprint, git_commit,
            mlflow_run_id, and a checksum that stands for the weights' values (`checkpoint`): plain JSON; what is not
            known is None.
        origin: the folder that was read.
        run: the run folder that the checkpoint lies in; None: an export, or a checkpoint alone.
        class_names: in the order of the labels; empty: not known.
        live: the raw weights beside the EMA; None: not there.
    """

    shapes: dict[str, tuple[int, ...]]
    read: Read
    config: Config
    facts: dict[str, Any]
    origin: Path
    run: Path | None = None
    class_names: tuple[str, ...] = ()
    live: Source | None = None

    def names(self, projectors: bool = False) -> list[str]:
        """The backbone's names, and behind them the projectors' if they are asked for."""
        backbone = backbone_names(self.shapes)
        return backbone + [name for name in self.shapes if name not in set(backbone)] if projectors else backbone

    def tensor(self, name: str) -> Tensor:
        """A whole tensor in its shape, float32."""
        shape = self.shapes[name]
        return self.read(name, 0, math.prod(shape)).view(shape)

    def build(self, device: torch.device | str = "cpu") -> SiT:
        """The backbone with its weights, for inference; it is filled one tensor at a time."""
        shapes = {name: self.shapes[name] for name in self.names()}
        return _filled(self.config, shapes, self.tensor, str(self.origin), device)


@dataclass(frozen=True)
class Trained:
    """All weights in memory, and what is needed to use them.

    Attributes:
        weights: the backbone under public names, with the position table; float32.
        config: of the run.
        facts: those of `Source`, and `source`, the folder that was read.
    """

    weights: dict[str, Tensor]
    config: Config
    facts: dict[str, Any]

    def build(self, device: torch.device | str = "cpu") -> SiT:
        """The backbone with its weights, for inference."""
        shapes = {name: tuple(tensor.shape) for name, tensor in self.weights.items()}
        return _filled(self.config, shapes, self.weights.__getitem__, str(self.facts["source"]), device)


def _filled(
    config: Config,
    shapes: Mapping[str, tuple[int, ...]],
    tensor: Callable[[str], Tensor],
    where: str,
    device: torch.device | str,
) -> SiT:
    """The backbone of `config` with the weights that `tensor` gives, compared before memory is taken for any."""
    with torch.device("meta"):
        model = build_sit(config)
    check_names(shapes, {name: tuple(value.shape) for name, value in model.state_dict().items()}, where)
    model.to_empty(device=device)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            value.copy_(tensor(name))
    return model.eval().requires_grad_(False)


def load_trained(source: str | Path, weights: str = "ema") -> Trained:
    """All of what `open_source` gives."""
    opened = open_source(source, weights)
    tensors = {name: opened.tensor(name) for name in opened.names()}
    return Trained(tensors, opened.config, {**opened.facts, "source": str(opened.origin)})


def open_source(source: str | Path, weights: str = "ema") -> Source:
    """Verifies a run folder (its newest whole checkpoint), a checkpoint folder, or a folder of `repa-scale export`.

    Args:
        weights: `ema`, or `raw` for the weights as the optimiser left them.

    Raises:
        DataError: nothing of the kind lies there, or it is damaged.
    """
    source = Path(source)
    if source.is_file():
        raise DataError(
            f"{source} is a file; give a run folder, or make a folder of it with: repa-scale import {source}"
        )
    if (source / EXPORT_CONFIG).is_file() or form_of(source):
        return _from_export(source, weights)
    if (source / MANIFEST).is_file() or any(source.glob("rank_*_of_*.safetensors")):
        return _from_checkpoint(source, weights)
    problems = []
    for checkpoint in reversed(list_checkpoints(source / "checkpoints")):
        try:
            return _from_checkpoint(checkpoint, weights)
        except DataError as error:
            problems.append(str(error))
    if ".tmp-" in source.name:
        raise DataError(f"{source} is the checkpoint of a save that was not finished; use {source.parent / 'latest'}")
    if problems:
        raise DataError(f"no checkpoint of {source} is whole ({problems[0]})")
    raise DataError(
        f"{source} is not a run folder with a checkpoint, not a checkpoint and not an export; "
        "give the run.dir of a training run"
    )


def _from_checkpoint(folder: Path, weights: str) -> Source:
    reader = CheckpointReader(folder)
    reader.verify()
    try:
        config = from_dict(reader.manifest["config"])
        facts = {key: reader.manifest[key] for key in FACTS}
    except (KeyError, TypeError) as error:
        raise DataError(f"{folder / MANIFEST} lacks {error}; it was made by another version of repa_scale") from None
    run = run_of(folder)
    facts |= {
        "checkpoint": reader.manifest.get("checksum") or checksum_file(folder / MANIFEST, "sha256"),  # 1 had no seal
        "data_fingerprint": reader.manifest.get("identity", {}).get("data.fingerprint"),
        "git_commit": reader.manifest.get("versions", {}).get("git_commit"),
        "mlflow_run_id": _mlflow_run(run),
    }
    positions = position_table_of(config)
    shapes = {name.removeprefix("model."): reader.shape(name) for name in reader.names}
    shapes[POSITIONS] = tuple(positions.shape)

    def read(kind: str, name: str, start: int, stop: int) -> Tensor:
        if name == POSITIONS:
            return positions.flatten()[start:stop].clone()
        return reader.read(KINDS[kind], name if name.startswith("projectors.") else f"model.{name}", start, stop)

    def of(kind: str, live: Source | None) -> Source:
        described = {**facts, "weights": kind}
        return Source(shapes, partial(read, kind), config, described, folder, run, _class_names(run), live)

    return of(weights, of("raw", None) if weights == "ema" else None)


def _from_export(folder: Path, weights: str) -> Source:
    sealed = read_sealed(folder)
    form = sealed.get("form")
    if form != "safetensors":
        raise DataError(f"{folder} holds the form {form}; export the run with --to safetensors, and give that folder")
    try:
        described = json.loads((folder / EXPORT_CONFIG).read_text())
        config = from_dict(described["config"])
        facts = {**described["trained"], "checkpoint": f"sha256:{sealed['sha256']}"}
        names = tuple(map(str, described.get("class_names") or ()))
        kind = facts["weights"]
        across, down = token_grid(config.data.image_size, config.latents.name, config.model.name)
        positions = (1, across * down, backbone(config.model.name)[0].width)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, ConfigError) as error:
        raise DataError(f"{folder / EXPORT_CONFIG} is damaged ({error}); export the run again") from None
    if kind != weights:
        raise DataError(f"{folder} holds the {kind} weights, not the {weights} ones; export those")
    shapes, read = open_weights(folder)
    if shapes.get(POSITIONS) != positions:
        raise DataError(f"{folder}: {EXPORT_CONFIG} and the weights are of two models; export the run again")
    return Source(shapes, lambda name, start, stop: read(name, start, stop).float(), config, facts, folder, None, names)


def _mlflow_run(run: Path | None) -> str | None:
    """The id of the MLflow run that RUN/mlflow.json names."""
    return _told(run, lambda folder: str(json.loads((folder / "mlflow.json").read_text())["run_id"]))


def _class_names(run: Path | None) -> tuple[str, ...]:
    """Those of the data set that RUN/config.yaml names, if it is still there."""

    def names(folder: Path) -> tuple[str, ...]:
        from repa_scale.data.manifest import read_manifest

        path = training_set(folder)
        return tuple(read_manifest(Path(path))["class_names"]) if path else ()

    return _told(run, names) or ()


def _told(run: Path | None, ask: Callable[[Path], Any]) -> Any:
    """What a file of the run folder says; None: there is no such file, or it does not say."""
    try:
        return None if run is None else ask(run)
    except (OSError, ValueError, KeyError, TypeError, UserError):
        return None
