"""Our training step for the benchmarks: the real `Trainer`, with one batch that lies on the device in place of data.

Encoder and weights are random, latents are drawn from stored moments; everything else is what `experiment=repa_sit_xl`
runs by default. Nothing is written and no network is needed: Hydra, MLflow, diffusers and streaming may be absent.
"""

from __future__ import annotations

import functools
import signal
import tempfile
import time
from types import SimpleNamespace
from unittest import mock

import torch

from repa_scale.compose import complete
from repa_scale.config import Config
from repa_scale.data.features import Cached
from repa_scale.data.steps import Batch
from repa_scale.deepspeed_config import deepspeed_dict
from repa_scale.errors import ConfigError, did_you_mean
from repa_scale.latents import Latents
from repa_scale.objective import count_parameters
from repa_scale.ranks import Ranks
from repa_scale.sizes import encoder_spec, latent_grid, latent_spec

# Alignment depth of the paper by model (configs/experiment); SiT-Nano is for rehearsals.
DEPTHS = {"SiT-B/2": 4, "SiT-L/2": 8, "SiT-XL/2": 8, "SiT-Nano/2": 1}
IMAGES = 1_281_167  # of ImageNet's training set
WEIGHT_STD = 0.02  # of every weight: adaLN-Zero's zeros would make the matrix products cheaper than training's


def run_config(model: str, encoder: str, batch: int, image_size: int = 256, compile: bool = False) -> Config:
    """The defaults of `experiment=repa_sit_xl` for another size of model and batch.

    Raises:
        ConfigError: a model without a preset, or an unknown encoder.
    """
    if model not in DEPTHS:
        raise ConfigError(f"--model {model} has no preset{did_you_mean(model, DEPTHS)}")
    encoder_spec(encoder)
    config = Config()
    config.model.name = model
    config.data.image_size, config.data.source = image_size, "moments"
    config.alignment["repa"].encoder, config.alignment["repa"].weights = encoder, "random"
    config.alignment["repa"].depth = DEPTHS[model]
    config.train.global_batch, config.train.compile = batch, compile
    config.run.dir = tempfile.gettempdir() + "/repa_scale_benchmark"  # named, never created
    return complete(config)


def fixed_batch(config: Config, device: torch.device) -> Batch:
    """Random images, labels and moments of a VAE's posterior on `device`, the same in every call."""
    count, size = config.train.global_batch, config.data.image_size
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)
    shape = (count, *latent_grid(size, config.latents.name))
    moments = torch.cat([torch.randn(shape, generator=generator) * 5, torch.full(shape, 0.1)], dim=1)
    labels = torch.randint(0, config.model.num_classes, (count,), generator=generator)
    index = torch.arange(count)
    return Batch(images, labels, index, index, {"moments": moments}).to(device)


class OurStep:
    """Calls `Trainer.step` and `Trainer.record` on one batch.

    Args:
        stage: ZeRO stage; None: that of ds_config.json.
        overflow_check: DeepSpeed's `bf16.check_grad_overflow`, which stage 2 alone reads in bf16 with fp32 gradients.
        backend: of torch.compile, where the configuration compiles.

    Attributes:
        parameters: trained ones.
        phases: seconds by phase of the last step, from the run's own clock.
    """

    def __init__(
        self,
        config: Config,
        ranks: Ranks,
        stage: int | None = None,
        overflow_check: bool = True,
        backend: str = "inductor",
    ) -> None:
        from repa_scale.engine import import_deepspeed
        from repa_scale.trainer import Trainer

        import_deepspeed(ranks.device.type)
        self.parameters = count_parameters(config)
        settings = deepspeed_dict(config, ranks.world_size, self.parameters, ranks.device.type)
        settings["zero_optimization"]["stage"] = stage or settings["zero_optimization"]["stage"]
        if not overflow_check:
            settings["bf16"]["check_grad_overflow"] = False
        dataset = SimpleNamespace(cached=Cached(), count=IMAGES)
        handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
        compiler = functools.partial(torch.compile, backend=backend)
        with mock.patch("repa_scale.frozen.build_latents", _without_vae), mock.patch("torch.compile", compiler):
            self.trainer = Trainer(config, ranks, dataset, None, None, {}, settings)
        for number, handler in handlers.items():  # a run saves when it is asked to stop; a benchmark just ends
            signal.signal(number, handler)
        self.trainer.engine.write(
            lambda _name, _shape, start, stop: torch.randn(stop - start, device=ranks.device) * WEIGHT_STD
        )
        self.trainer.ema.restart()
        self.stage = self.trainer.engine.stage
        self.batch = fixed_batch(config, ranks.device)
        self.phases: dict[str, float] = {}
        self._number = 0
        read = self.trainer.clock.read

        def keep() -> dict[str, float]:
            self.phases = read()
            return self.phases

        self.trainer.clock.read = keep

    def __call__(self) -> None:
        """One step. It ends with the run's own synchronization (`Clock.read`)."""
        self._number += 1
        trainer = self.trainer
        trainer._began, trainer._waited = time.perf_counter(), 0.0  # as Trainer.batches sets them
        losses, outcome = trainer.step(self._number, self.batch)
        trainer.record(self._number, losses, outcome, self.batch)

    @property
    def skipped(self) -> int:
        """Steps that were not applied."""
        return self.trainer.skipped

    def close(self) -> None:
        self.trainer.watchdog.close()


def _without_vae(config: Config, device: torch.device, _dtype: torch.dtype) -> Latents:
    """Latents that can draw from stored moments and not encode."""
    return Latents(latent_spec(config.latents.name), None, device)
