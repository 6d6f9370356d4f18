"""A trained backbone from a run, one of its checkpoints or an export, without DeepSpeed or the trainer."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from repa_scale.checkpoint import MANIFEST, CheckpointReader, list_checkpoints
from repa_scale.checksums import checksum_file
from repa_scale.config import Config, from_dict
from repa_scale.errors import DataError
from repa_scale.models import build_sit
from repa_scale.models.sit import SiT
from repa_scale.models.weights import EXPORT_FILE, check_names, load_public

EXPORT_CONFIG = "config.json"
KINDS = {"ema": "ema", "raw": "master"}  # what a user calls the weights -> what the checkpoint calls them


@dataclass(frozen=True)
class Trained:
    """Weights and what is needed to use them.

    Attributes:
        weights: the backbone under public names, with the position table; float32, or as exported.
        config: of the run.
        facts: step, samples, identity_hash, pair_id, weights (`ema` or `raw`), where they came from (`source`) and a
            checksum that stands for their values (`checkpoint`).
    """

    weights: dict[str, Tensor]
    config: Config
    facts: dict[str, Any]

    def build(self, device: torch.device | str = "cpu") -> SiT:
        """The backbone with its weights, for inference."""
        model = build_sit(self.config)
        want = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        check_names({name: tuple(t.shape) for name, t in self.weights.items()}, want, str(self.facts["source"]))
        model.load_state_dict({name: tensor.float() for name, tensor in self.weights.items()})
        return model.eval().requires_grad_(False).to(device)


def load_trained(source: str | Path, weights: str = "ema") -> Trained:
    """Reads a run folder (its newest whole checkpoint), a checkpoint folder, or a folder made by `repa-scale export`.

    Args:
        weights: `ema`, or `raw` for the weights as the optimiser left them.

    Raises:
        DataError: nothing of the kind lies there, or it is damaged.
    """
    source = Path(source)
    if (source / EXPORT_CONFIG).is_file():
        return _from_export(source, weights)
    if (source / MANIFEST).is_file():
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


def _from_checkpoint(folder: Path, weights: str) -> Trained:
    reader = CheckpointReader(folder)
    reader.verify()
    config = from_dict(reader.manifest["config"])
    tensors = {
        name.removeprefix("model."): reader.tensor(KINDS[weights], name)
        for name in reader.names
        if name.startswith("model.")
    }
    # The position table is computed, not trained, so checkpoints leave it out.
    tensors["pos_embed"] = build_sit(config).pos_embed
    facts = {key: reader.manifest[key] for key in ("step", "samples", "identity_hash", "pair_id")}
    sealed = reader.manifest.get("checksum") or checksum_file(folder / MANIFEST, "sha256")  # version 1 had no seal
    return Trained(tensors, config, {**facts, "weights": weights, "source": str(folder), "checkpoint": sealed})


def _from_export(folder: Path, weights: str) -> Trained:
    try:
        described = json.loads((folder / EXPORT_CONFIG).read_text())
        config, facts = from_dict(described["config"]), described["trained"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder / EXPORT_CONFIG} is damaged ({error}); export the run again") from None
    if facts["weights"] != weights:
        raise DataError(f"{folder} holds the {facts['weights']} weights, not the {weights} ones; export those")
    file = folder / EXPORT_FILE
    weights_of = load_public(file)
    return Trained(weights_of, config, {**facts, "source": str(folder), "checkpoint": checksum_file(file, "sha256")})
