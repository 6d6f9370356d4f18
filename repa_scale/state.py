"""The state of a live run: set at its start, saved to a checkpoint, taken up from one on any number of ranks."""

from __future__ import annotations

import logging
import platform
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from repa_scale import __version__
from repa_scale.checkpoint import CheckpointReader, list_folders, quarantine
from repa_scale.config import Config
from repa_scale.ema import ShardEma
from repa_scale.engine import MOMENTS, Engine
from repa_scale.errors import DataError, UserError
from repa_scale.models import build_sit
from repa_scale.models.initial import initial_values
from repa_scale.models.weights import check_names, open_weights, public_shapes, verify_weights
from repa_scale.provenance import git_commit
from repa_scale.ranks import Ranks

LABELS = "y_embedder.embedding_table.weight"
NOT_PORTABLE = ("run", "tracking", "deepspeed", "checkpoint", "health")

log = logging.getLogger("repa_scale")


def set_initial(engine: Engine, ema: ShardEma, config: Config) -> None:
    """Initial weights: from the counter-based generator, or the backbone from public weights (`train.init_from`)."""
    shapes, read = open_weights(config.train.init_from) if config.train.init_from else ({}, None)

    def source(name: str, shape: tuple[int, ...], start: int, stop: int) -> Tensor:
        public = name.removeprefix("model.")
        # A label table of other classes begins anew, and so do the projectors.
        if read is not None and name.startswith("model.") and shapes.get(public) == shape:
            return read(public, start, stop).float()
        return initial_values(name, shape, start, stop, config.seed)

    engine.restart()
    engine.write(source)
    ema.restart()


def check_initial(config: Config) -> None:
    """Compares the file of `train.init_from` with the model, by names and shapes, before anything is built."""
    if config.train.init_from:
        verify_weights(config.train.init_from)
        with torch.device("meta"):
            wanted = {name: tuple(value.shape) for name, value in build_sit(config).state_dict().items()}
        have = public_shapes(config.train.init_from)
        table, ours = have.get(LABELS, ()), wanted[LABELS]
        anew = len(table) == 2 and table != ours and table[1] == ours[1]
        check_names(have | {LABELS: ours} if anew else have, wanted, config.train.init_from)
        if anew:
            log.info(
                "train.init_from=%s has %d classes, the data %d: the label table begins anew, all else is taken over",
                config.train.init_from, table[0] - 1, ours[0] - 1,
            )  # fmt: skip


def describe_state(engine: Engine, ranks: Ranks, step: int, config: Config, identity: dict, judge: dict) -> dict:
    """What the manifest of a checkpoint says besides its tensors: plain JSON.

    Args:
        judge: the state of divergence.Judge.
    """
    return {
        "step": step,
        "samples": step * config.train.global_batch,
        "identity": identity["keys"],
        "identity_hash": identity["identity_hash"],
        "pair_id": identity["pair_id"],
        **({"pixels": identity["pixels"]} if "pixels" in identity else {}),
        "config": _portable(config),
        "world_size": ranks.world_size,
        "zero_stage": engine.stage,
        "versions": {
            "repa_scale": __version__,
            "git_commit": git_commit(),
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "scalars": {**engine.scalars(), "judge": judge},
    }


def _portable(config: Config) -> dict:
    """What another machine needs to use the weights: not where the run lay, nor whom it reported to."""
    whole = asdict(config)
    whole["data"].pop("path")
    return {key: value for key, value in whole.items() if key not in NOT_PORTABLE}


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


def newest_verified(folder: Path, ranks: Ranks, before: int | None = None) -> CheckpointReader | None:
    """The newest checkpoint whose files have the manifest's checksums, of those before step `before` if it is given.

    The ranks check a share of the files each, and all take the same one; nothing is read before. A broken one is moved
    to `quarantine/` and the one before is tried. So are those of step `before` and later, when a run is rolled back.

    Raises:
        UserError: there were checkpoints, and none is whole.
    """
    names = ranks.broadcast_object([path.name for path in list_folders(folder)] if ranks.is_main else None)
    broken: dict[str, str] = {}
    if before is not None:
        broken = {name: f"rolled back behind step {before}" for name in names if int(name[5:]) >= before}
        names = [name for name in names if name not in broken]
    for name in reversed(names):
        reader, problems = _checked(folder / name, ranks.rank, ranks.world_size)
        found = [problem for theirs in ranks.gather_objects(problems) for problem in theirs]
        if not found:
            break
        broken[name] = found[0]
    else:  # they stay where they are: nobody should begin anew without having seen this
        if names:
            raise UserError(
                f"no checkpoint in {folder} is whole ({broken[names[-1]]}); choose another run.dir, or delete "
                "them to begin anew"
            )
        reader = None
    if ranks.is_main:
        for name, problem in broken.items():
            log.warning("%s; moved to %s, going on from an older one", problem, quarantine(folder / name, problem))
    ranks.barrier()
    return reader


def _checked(folder: Path, share: int, of: int) -> tuple[CheckpointReader | None, list[str]]:
    try:
        reader = CheckpointReader(folder)
    except DataError as error:
        return None, [str(error)]
    return reader, reader.problems(share=share, of=of)
