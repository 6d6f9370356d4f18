"""The state of a live run: set at its start, saved to a checkpoint, taken up from one on any number of ranks."""

from __future__ import annotations

import logging
import platform
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from repa_scale import __version__
from repa_scale.checkpoint import (
    CheckpointReader,
    Piece,
    list_checkpoints,
    publish,
    step_folder,
    write_manifest,
    write_pieces,
)
from repa_scale.config import Config
from repa_scale.ema import ShardEma
from repa_scale.engine import MOMENTS, Engine
from repa_scale.errors import DataError, UserError
from repa_scale.models import build_sit
from repa_scale.models.initial import initial_values
from repa_scale.models.weights import check_names, load_public, public_shapes
from repa_scale.ranks import Ranks

log = logging.getLogger("repa_scale")


def set_initial(engine: Engine, ema: ShardEma, config: Config) -> None:
    """Initial weights: from the counter-based generator, or the backbone from public weights (`train.init_from`)."""
    public: dict[str, Tensor] = {}
    if config.train.init_from:
        public = {f"model.{name}": value for name, value in load_public(config.train.init_from).items()}

    def source(name: str, shape: tuple[int, ...], start: int, stop: int) -> Tensor:
        if name in public:
            return public[name].flatten()[start:stop].float()
        return initial_values(name, shape, start, stop, config.seed)

    engine.write(source)
    ema.restart()


def check_initial(config: Config) -> None:
    """Compares the file of `train.init_from` with the model, by names and shapes, before anything is built."""
    if config.train.init_from:
        with torch.device("meta"):
            wanted = {name: tuple(value.shape) for name, value in build_sit(config).state_dict().items()}
        check_names(public_shapes(config.train.init_from), wanted, config.train.init_from)


def save_state(
    engine: Engine, ema: ShardEma, ranks: Ranks, folder: Path, step: int, config: Config, identity: dict, attempt: int
) -> Path:
    """Writes the checkpoint of `step`: every rank its shards, rank 0 the manifest; then gives it its name."""
    final = folder / step_folder(step)
    temporary = folder / f"{final.name}.tmp-{attempt}"
    if ranks.is_main:
        temporary.mkdir(parents=True, exist_ok=True)
    ranks.barrier()
    pieces = [
        Piece(s.name, s.shape, s.start, s.stop, {"master": s.master, **s.moments, "ema": average})
        for s, average in zip(engine.shards, ema.values, strict=True)
    ]
    entries = ranks.gather_objects(write_pieces(temporary, ranks.rank, ranks.world_size, pieces))
    if ranks.is_main:
        facts = {
            "step": step,
            "samples": step * config.train.global_batch,
            "identity": identity["keys"],
            "identity_hash": identity["identity_hash"],
            "pair_id": identity["pair_id"],
            "config": _portable(config),
            "world_size": ranks.world_size,
            "zero_stage": engine.stage,
            "versions": {"repa_scale": __version__, "torch": torch.__version__, "python": platform.python_version()},
            "scalars": engine.scalars(),
        }
        write_manifest(temporary, entries, facts)
        publish(temporary, final)
    ranks.barrier()
    return final


def _portable(config: Config) -> dict:
    """What another machine needs to use the weights: not where the run lay, nor whom it reported to."""
    whole = asdict(config)
    whole["data"].pop("path")
    return {key: value for key, value in whole.items() if key not in ("run", "tracking", "deepspeed")}


def load_state(engine: Engine, ema: ShardEma, reader: CheckpointReader) -> None:
    """Takes up a checkpoint, whatever number of ranks or ZeRO stage wrote it: each rank reads its own ranges."""
    have = {name: reader.shape(name) for name in reader.names}
    want = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in engine.names.items()}
    check_names(have, want, str(reader.folder))
    with torch.no_grad():
        for shard, average in zip(engine.shards, ema.values, strict=True):
            for moment in MOMENTS:
                shard.moments[moment].copy_(reader.read(moment, shard.name, shard.start, shard.stop))
            average.copy_(reader.read("ema", shard.name, shard.start, shard.stop))
    engine.write(lambda name, _shape, start, stop: reader.read("master", name, start, stop))
    engine.set_scalars(reader.manifest["scalars"])


def newest_verified(folder: Path, ranks: Ranks) -> CheckpointReader | None:
    """The newest checkpoint whose files have the manifest's checksums; chosen by rank 0, the same on all ranks.

    Raises:
        UserError: there are checkpoints, and none is whole.
    """
    name, problems = ranks.broadcast_object(_newest(folder) if ranks.is_main else None)
    if name is not None:
        return CheckpointReader(folder / name)
    if problems:
        raise UserError(f"no checkpoint in {folder} is whole ({problems[0]}); choose another run.dir to start anew")
    return None


def _newest(folder: Path) -> tuple[str | None, list[str]]:
    problems: list[str] = []
    for path in reversed(list_checkpoints(folder)):
        try:
            CheckpointReader(path).verify()
            return path.name, problems
        except DataError as error:
            log.warning("%s; trying the one before", error)
            problems.append(str(error))
    return None, problems
