"""Online evaluation: a small Fréchet distance of the EMA model while it trains. Not a FID: few samples, any extractor.

The values go to RUN/evaluations.jsonl (evaluations.py); whole evaluations of a checkpoint are `repa-scale evaluate`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from repa_scale import arithmetic
from repa_scale.config import Config
from repa_scale.data.batches import DataSet, decode
from repa_scale.ema import ShardEma
from repa_scale.engine import Engine
from repa_scale.errors import ConfigError, DataError
from repa_scale.evaluations import Evaluation
from repa_scale.extractors import Extractor, build_extractor
from repa_scale.latents import Latents
from repa_scale.metrics.bootstrap import Estimate, by_resampling
from repa_scale.metrics.frechet import Moments, frechet_with_slope, influence
from repa_scale.ranks import Ranks
from repa_scale.rng import permutation
from repa_scale.sample_grid import Stopped, draw_blocks, in_order
from repa_scale.statistics_file import read_statistics, statistics_name, write_statistics

SEED = 0  # of the samples' noise and of the choice of real images: the same for all runs, whatever their own seed
FOLDER = "statistics"  # of the real images, in the data set's folder, or in the run's where that can't be written
PART = "pool"  # of the features: what an extractor gives when it is called
IMAGES_AT_ONCE = 32  # of the real images

log = logging.getLogger("repa_scale")


class OnlineEvaluation:
    """Draws `evaluate.count` samples with the run's `sample` settings and compares their features with real ones.

    Args:
        latents, shape: of the run: how samples are decoded, and (C, H, W) of a latent.
    """

    def __init__(
        self, config: Config, ranks: Ranks, dataset: DataSet, latents: Latents, shape: tuple[int, int, int]
    ) -> None:
        self.config, self.ranks, self.dataset, self.latents, self.shape = config, ranks, dataset, latents, shape
        if ranks.local_rank > 0:  # a node fetches weights once
            ranks.barrier()
        self.extractors = [build_extractor(*text.partition("=")[::2]) for text in config.evaluate.extractors]
        if ranks.local_rank == 0:
            ranks.barrier()
        self._references: dict[str, Moments] = {}  # on rank 0

    def due(self, step: int) -> bool:
        return step > 0 and (step == self.config.train.steps or step % self.config.evaluate.every == 0)

    def names(self) -> set[str]:
        """Of the metrics that an evaluation gives."""
        return {self._evaluation(extractor, 0, 0, Estimate(0.0), 0).name for extractor in self.extractors}

    def measure(
        self, engine: Engine, ema: ShardEma, step: int, attempt: int, stopping: Callable[[str], bool]
    ) -> list[Evaluation] | None:
        """The evaluations of this step, on rank 0; none elsewhere. None: someone asks to stop.

        Args:
            stopping: asked by all ranks together before each batch of images, with what comes now.
        """
        for extractor in self.extractors:
            extractor.to(self.ranks.device)
        try:
            for extractor in self.extractors:
                self._prepare_reference(extractor, lambda: stopping("reference"))
            with engine.weights_replaced(ema.values):
                features = self._of_samples(engine, lambda: stopping("evaluate"))
            stopping("metrics")  # rank 0 alone computes; the others wait for longer than for a batch of images
        except Stopped:
            return None
        finally:
            for extractor in self.extractors:  # training needs the device's memory
                extractor.to("cpu")
        if not self.ranks.is_main:
            return []
        found = []
        for extractor, sampled in zip(self.extractors, features, strict=True):
            reference = self._references[extractor.name]
            try:
                estimate = _distance(sampled, reference)
            except DataError as error:  # no reason to end a run
                log.warning("step %d could not be evaluated: %s", step, error)
                continue
            found.append(self._evaluation(extractor, step, attempt, estimate, reference.count))
        return found

    def _of_samples(self, engine: Engine, stopping: Callable[[], bool]) -> list[Tensor]:
        """Features of all samples in their order, (count, d) float32 for each extractor, on every rank."""
        settings = self.config.evaluate
        pieces: list[list[tuple[Tensor, Tensor]]] = [[] for _ in self.extractors]
        for index, images in draw_blocks(
            engine, self.config, self.latents, self.shape, self.ranks, settings.count, SEED, stopping
        ):
            for extractor, found in zip(self.extractors, pieces, strict=True):
                found.append((index, extractor(images).cpu()))
        everywhere = self.ranks.gather_objects(pieces)
        return [in_order([piece for theirs in everywhere for piece in theirs[i]]) for i in range(len(self.extractors))]

    def _evaluation(
        self, extractor: Extractor, step: int, attempt: int, found: Estimate, reference_count: int
    ) -> Evaluation:
        sample, settings = self.config.sample, self.config.evaluate
        return Evaluation(
            step=step,
            attempt=attempt,
            time=time.time(),
            metric=extractor.metric("fd"),
            value=found.value,
            low=found.low,
            high=found.high,
            count=settings.count,
            protocol={
                "extractor": extractor.name,
                "extractor_fingerprint": extractor.fingerprint,
                "resize": extractor.spec.resize,
                "reference": settings.reference or self.dataset.name,
                "reference_fingerprint": None if settings.reference else self.dataset.fingerprint,
                "reference_count": None if settings.reference else reference_count,
                "weights": "ema",
                "sampler": sample.sampler,
                "steps": sample.steps,
                "guidance": sample.guidance,
                "interval": list(sample.interval),
                "labels": "balanced",
                "seed": SEED,
                "latents": self.config.latents.name,
            },
        )

    # The real images.

    def _prepare_reference(self, extractor: Extractor, stopping: Callable[[], bool]) -> None:
        """Statistics of the real images onto rank 0: from `evaluate.reference`, from a file of an earlier run, or made
        now by all ranks together."""
        ranks, settings = self.ranks, self.config.evaluate
        known, problem = False, None
        if ranks.is_main:
            try:
                if extractor.name not in self._references:
                    found = self._known(extractor)
                    if found is not None:
                        self._references[extractor.name] = found
                known = extractor.name in self._references
            except ConfigError as error:
                problem = error
        known, problem = ranks.broadcast_object((known, problem))
        if problem is not None:
            raise problem
        if known:
            return
        count = min(settings.reference_count or self.dataset.count, self.dataset.count)
        log.info("evaluation: %s of %d real images, once for this data set", extractor.name, count)
        moments = self._of_real(extractor, count, stopping).merge_ranks()
        if ranks.is_main:
            self._references[extractor.name] = moments = _onto_cpu(moments)
            self._store(extractor, moments)

    def _of_real(self, extractor: Extractor, count: int, stopping: Callable[[], bool]) -> Moments:
        """This rank's share of the real images' statistics. Which images: a fixed random choice, in stored order."""
        ranks, size = self.ranks, self.dataset.image_size
        chosen = permutation(SEED, "reference images", 0, self.dataset.count)[:count].sort().values.tolist()
        width = extractor(torch.zeros(1, 3, size, size, dtype=torch.uint8, device=ranks.device)).shape[1]
        moments = Moments.empty(width, ranks.device)
        for start in range(0, count, IMAGES_AT_ONCE * ranks.world_size):
            if stopping():
                raise Stopped
            first = start + ranks.rank * IMAGES_AT_ONCE
            images = [image for i in chosen[first : first + IMAGES_AT_ONCE] if (image := self._read(i)) is not None]
            if images:
                batch = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
                moments = moments.add(extractor(batch.to(ranks.device)))
        return moments

    def _read(self, number: int) -> np.ndarray | None:
        """(S, S, 3) uint8; None for one that cannot be read, which training leaves out as well."""
        try:
            return decode(self.dataset.reader[number]["image"])
        except DataError as error:
            log.warning("evaluation: sample %d is left out: %s", number, error)
            return None

    def _files(self, extractor: Extractor) -> list[Path]:
        """Where the statistics may lie, the best place first."""
        essence = (self.dataset.fingerprint, extractor.fingerprint, self.config.evaluate.reference_count)
        name = statistics_name(extractor.name, *essence, arithmetic=arithmetic.name(self.ranks.device, "fp32"))
        return [home / FOLDER / name for home in (self.dataset.path, Path(self.config.run.dir))]

    def _known(self, extractor: Extractor) -> Moments | None:
        if own := self.config.evaluate.reference:
            return _read_reference(own)
        found = (read_statistics(file) for file in self._files(extractor))
        return next((moments[PART] for moments, _ in filter(None, found)), None)

    def _store(self, extractor: Extractor, moments: Moments) -> None:
        for path in self._files(extractor):
            try:
                path.parent.mkdir(exist_ok=True)
                write_statistics(path, {PART: moments}, {})
                return
            except OSError as error:
                log.info("evaluation: %s cannot be written (%s)", path, error)


def _read_reference(path: str) -> Moments:
    """Of `evaluate.reference`: mu and sigma, and `count` where the file says it."""
    try:
        with np.load(path, allow_pickle=False) as file:
            mean, covariance = torch.from_numpy(file["mu"]), torch.from_numpy(file["sigma"])
            if covariance.shape != (len(mean), len(mean)):
                raise ValueError("sigma is no square of mu's length")
            count = int(file["count"]) if "count" in file else 10 * len(mean)
            return Moments.from_covariance(count, mean, covariance)
    except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
        raise ConfigError(
            f"evaluate.reference={path} cannot be read ({error}); give an .npz with mu and sigma, or leave it out for "
            "the run's own data"
        ) from None


def _distance(sampled: Tensor, reference: Moments) -> Estimate:
    """The Fréchet distance of (n, d) features, with its interval over the choice of samples."""
    moments = Moments.of(sampled)
    distance = frechet_with_slope(moments, reference)
    return by_resampling(distance.value, influence(sampled, moments, distance))


def _onto_cpu(moments: Moments) -> Moments:
    return Moments(moments.count, moments.mean.cpu(), moments.scatter.cpu())
