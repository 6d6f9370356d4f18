"""A run on the `meta` device: the real trainer, run folder, data, networks and objective, as on one GPU."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass

import meta_deepspeed
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from meta_allowed import ANSWERS
from meta_cuda import as_cuda
from meta_device import META, Factories, Watched
from torch.utils._python_dispatch import _disable_current_modes

from repa_scale import engine, frozen, online, trainer
from repa_scale.clock import Clock
from repa_scale.compose import compose
from repa_scale.config import Config
from repa_scale.data.dataset import DataSet, open_configured
from repa_scale.data.steps import Batch
from repa_scale.deepspeed_config import deepspeed_dict
from repa_scale.ranks import Ranks
from repa_scale.run_folder import open_run
from repa_scale.tracking import open_tracker
from repa_scale.train import run_identity, stored_features_of
from repa_scale.trainer import Trainer


class MetaRanks(Ranks):
    def store(self) -> dist.Store:
        return dist.HashStore()


@dataclass
class MetaRun:
    trainer: Trainer
    watched: Watched

    def batch(self, count: int) -> Batch:
        """`count` samples on the device, such as the loader gives, without going through files."""
        data = self.trainer.config.data

        def numbers() -> torch.Tensor:
            return torch.zeros(count, dtype=torch.int64, device=META)

        images = torch.zeros(count, 3, data.image_size, data.image_size, dtype=torch.uint8, device=META)
        return Batch(images, numbers(), numbers(), numbers())

    def step(self, batch: Batch, number: int = 1) -> None:
        """One step and its record, noted."""
        self.trainer._began = self.trainer._waited = 0.0
        losses, outcome = self.trainer.step(number, batch)
        self.trainer.record(number, losses, outcome, batch)


@contextmanager
def meta_run(folder, dataset, words: list[str], kernel: str = "torch", start: bool = False):
    """A trainer that is ready for its first step.

    Args:
        folder: of the run.
        dataset: a prepared set.
        words: of the command line, behind `repa-scale train`.
        kernel: what `alignment.kernel` comes to.
        start: set the initial weights too, and note what happens meanwhile.
    """
    config: Config = compose(
        [f"data.path={dataset}", f"run.dir={folder}", "tracking.uri=none", "health.hang_seconds=0",
         f"alignment.kernel={kernel}", "train.log_every=1", *words]
    )  # fmt: skip
    watched = Watched(ANSWERS)
    ranks = MetaRanks(0, 0, 1, META)
    with pytest.MonkeyPatch.context() as patch, as_cuda(watched, kernel), watched, Factories(watched):
        patch.setattr(F, "linear", torch._C._nn.linear)  # ZeRO-3 of an earlier test may have left its own there
        patch.setattr(engine, "_import_deepspeed", lambda ranks: meta_deepspeed.stand_in())
        patch.setattr(frozen, "build_encoder", unwatched(frozen.build_encoder))
        patch.setattr(frozen, "build_latents", unwatched(frozen.build_latents))
        patch.setattr(trainer, "draw", _in_phase(watched, "draws", trainer.draw))
        patch.setattr(Clock, "phase", _marking(watched, Clock.phase))
        data = open_configured(config.data)
        data.cached = stored_features_of(config, data) if config.data.image_size == data.image_size else data.cached
        patch.setattr(online, "build_extractor", unwatched(online.build_extractor, "cpu"))
        run = Trainer(config, ranks, data, *_folder_of(config, data), _ds_config(config))
        run.watchdog.enter = lambda phase, step: setattr(watched, "phase", phase)
        watched.forget()
        if start:
            run.resume()
        try:
            yield MetaRun(run, watched)
        finally:
            run.run.close("completed", 0)


def unwatched(build, device=META):
    """The networks of others, built before anyone looks, once for all tests that want the same.

    Args:
        device: `cpu` where their values are read.
    """

    def built(*args):
        key = (build.__module__, repr(args))
        if key not in _networks:
            with _disable_current_modes(), torch.device(device):
                _networks[key] = build(*args)
        return _networks[key]

    return built


_networks: dict[tuple, object] = {}


def _folder_of(config: Config, dataset: DataSet):
    identity = run_identity(config, dataset.fingerprint)
    folder = open_run(trainer.Path(config.run.dir), identity, "", "auto")
    folder.start()
    return folder, open_tracker(config, folder.path, {}, dataset), identity


def _ds_config(config: Config) -> dict:
    return deepspeed_dict(config, 1, 10**6, "cuda")


def _in_phase(watched: Watched, phase: str, function):
    def inside(*args, **kwargs):
        with watched.within(phase):
            return function(*args, **kwargs)

    return inside


def _marking(watched: Watched, phase):
    @contextmanager
    def inside(clock: Clock, name: str):
        with watched.within(name), phase(clock, name):
            yield

    return inside
