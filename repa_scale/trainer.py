"""The training loop: data -> encoder -> latent -> objective -> engine -> EMA -> log, sample, save, stop."""

from __future__ import annotations

import logging
import math
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from repa_scale.checkpoint import MANIFEST, step_folder
from repa_scale.clock import Clock
from repa_scale.config import Config
from repa_scale.data.bad import Quarantine
from repa_scale.data.batches import Batch, Batches, DataSet
from repa_scale.data.decode import choose_decoder
from repa_scale.draws import draw, drop_labels
from repa_scale.ema import ShardEma
from repa_scale.engine import Engine, Outcome
from repa_scale.errors import ExitCode
from repa_scale.frozen import Frozen
from repa_scale.health import StopRequest, reduce_step
from repa_scale.interpolant import Interpolant
from repa_scale.objective import build_objective, total
from repa_scale.pictures import save_sheet
from repa_scale.ranks import Ranks
from repa_scale.rng import fingerprint
from repa_scale.run_folder import RunFolder
from repa_scale.sample_grid import draw_grid
from repa_scale.schedules import learning_rate
from repa_scale.state import load_state, newest_verified, save_state, set_initial
from repa_scale.tracking import Tracker

WAIT_SHARE = 0.02  # of a step, waiting for data, above which a warning is due
log = logging.getLogger("repa_scale")


class Trainer:
    """One attempt at a run, from `resume` to `finish`.

    Args:
        config: completed and validated.
        run: the run folder; None on ranks other than 0.
        tracker: where rank 0 reports to.
        identity: `keys`, `identity_hash`, `pair_id`.
        ds_config: of deepspeed_config.deepspeed_dict.
    """

    def __init__(
        self,
        config: Config,
        ranks: Ranks,
        dataset: DataSet,
        run: RunFolder | None,
        tracker: Tracker | None,
        identity: dict,
        ds_config: dict,
    ) -> None:
        self.config, self.ranks, self.dataset = config, ranks, dataset
        self.run, self.tracker, self.identity = run, tracker, identity
        self.checkpoints = Path(config.run.dir) / "checkpoints"
        self.clock = Clock(ranks.device)
        self.stop = StopRequest(run.path if run else None)
        optimizer = config.optimizer
        self.engine = Engine(
            lambda: build_objective(config),
            ds_config,
            ranks,
            learning_rate=optimizer.learning_rate,
            betas=tuple(optimizer.betas),
            eps=optimizer.eps,
            weight_decay=optimizer.weight_decay,
            compile=config.train.compile,
            checkpointing=config.train.activation_checkpointing,
        )
        log.info(
            "%s: %.1f M parameters under ZeRO stage %d on %d ranks, %.1f %% of the weights in shards, %s on %s",
            config.model.name,
            self.engine.parameters / 1e6,
            self.engine.stage,
            ranks.world_size,
            100 * self.engine.partitioned_share(),
            config.train.precision,
            ranks.device.type,
        )
        self.engine.module.clock = self.clock
        self.ema = ShardEma([shard.master for shard in self.engine.shards], config.ema.decay)
        self.terms = self.engine.module.terms
        self.frozen = Frozen(config, self.terms, ranks, self.clock, dataset.cached)
        self.interpolant = Interpolant(config.interpolant.path)
        self.quarantine = Quarantine(dataset.count, config.data.max_bad)
        self.skipped = 0
        self._waits_told = False
        self._since_log: list[dict[str, float]] = []

    def train(self) -> ExitCode:
        """Goes on from the newest good checkpoint to the last step, or until someone asks to stop."""
        train = self.config.train
        done = self.resume()
        for step, batch in self.batches(done):
            losses, outcome = self.step(step, batch)
            stop = self.record(step, losses, outcome, batch)
            last = step == train.steps
            if train.sample_every and (last or step % train.sample_every == 0):
                self.sample(step)
            if stop or last or self.quarantine.problem or step % train.checkpoint_every == 0:
                self.save(step)
            if self.quarantine.problem:
                return self.finish("failed", step, ExitCode.BAD_INPUT, self.quarantine.problem)
            if stop and not last:
                return self.finish("preempted", step, ExitCode.PREEMPTED)
        return self.finish("completed", max(done, train.steps), ExitCode.COMPLETED)

    def resume(self) -> int:
        """Takes up the newest whole checkpoint, or sets the initial weights. Returns the steps already done."""
        known = self.run.quarantined() if self.run else None
        self.quarantine.numbers |= self.ranks.broadcast_object(known)
        reader = newest_verified(self.checkpoints, self.ranks)
        if reader is None:
            set_initial(self.engine, self.ema, self.config)
            return 0
        load_state(self.engine, self.ema, reader)
        self.skipped = reader.manifest["scalars"]["skipped_steps"]
        log.info("resumed from %s (%d samples seen)", reader.folder, reader.manifest["samples"])
        return reader.step

    def batches(self, done: int) -> Iterator[tuple[int, Batch]]:
        """(step, batch) for the steps still to do; the time that a step waits for its batch is `data_wait`."""
        config = self.config
        if done >= config.train.steps:
            return
        device = self.ranks.device
        source = Batches(
            self.dataset,
            seed=config.seed,
            global_batch=config.train.global_batch,
            rank=self.ranks.rank,
            world=self.ranks.world_size,
            workers=config.data.workers,
            start_step=done,
            decoder=choose_decoder(config.data.decoder, device),
            flip=config.data.flip,
            device=device,
        )
        try:
            stream = iter(source)
            for step in range(done + 1, config.train.steps + 1):
                self._began = time.perf_counter()
                batch = next(stream)
                self._waited = time.perf_counter() - self._began
                yield step, batch
        finally:
            source.close()

    def step(self, step: int, batch: Batch) -> tuple[dict[str, Tensor], Outcome]:
        """One optimiser step over this rank's part of the global batch. Returns its mean losses, by name."""
        config = self.config
        weights = {name: term.weight_at(step) for name, term in self.terms.items() if term.active(step)}
        parts = batch.to(self.ranks.device).split(config.train.micro_batch)
        sums: dict[str, Tensor] = {}
        for part in parts:
            noise = draw(
                config.seed,
                step,
                part.index,
                self.frozen.latent_shape,
                time=config.interpolant.time,
                path=config.interpolant.path,
                class_dropout=config.model.class_dropout,
            )
            targets = self.frozen.targets(part.images, step, part.features)
            x0 = self.frozen.clean(part.images, noise.posterior, part.features)
            x_t, velocity = self.interpolant(x0, noise.noise, noise.t)
            labels = drop_labels(part.labels, noise.drop, config.model.num_classes)
            losses = self.engine(x_t, noise.t, labels, velocity, targets)
            loss = total(losses, weights)
            self.engine.module.backward_begins()
            self.engine.backward(loss)
            means = {name: value.detach().mean() for name, value in losses.items()} | {"loss": loss.detach()}
            sums = {name: sums.get(name, 0.0) + value / len(parts) for name, value in means.items()}
        outcome = self.engine.step(learning_rate(config.optimizer, step))
        if outcome.applied:
            self.ema.update()
        else:
            self.skipped += 1
            log.warning("step %d was skipped: its gradients are not finite (loss scale %g)", step, outcome.loss_scale)
        return sums, outcome

    def record(self, step: int, losses: dict[str, Tensor], outcome: Outcome, batch: Batch) -> bool:
        """Reduces the step's numbers over the ranks, writes its row when due. Returns whether anyone asks to stop."""
        names = sorted(losses)
        left_out = torch.tensor(float(len(batch.bad)))
        (bad, *means), batch_fingerprint, stop = reduce_step(
            self.ranks, [left_out, *(losses[name] for name in names)], fingerprint(batch.ids), self.stop.asked
        )
        if bad:
            self.set_aside(step, batch)
        seconds = {f"{phase}_seconds": value for phase, value in self.clock.read().items()}
        self._since_log.append(
            {**seconds, "step_seconds": time.perf_counter() - self._began, "data_wait_seconds": self._waited}
        )
        if self.run is None:
            return stop
        self.run.progress(step)
        if step % self.config.train.log_every and step != self.config.train.steps and not stop:
            return stop
        values = dict(zip(names, means, strict=True))
        row = {
            "step": step,
            "attempt": self.run.attempt,
            "time": time.time(),
            "samples": step * self.config.train.global_batch,
            "loss": values.pop("loss"),
            "denoising_loss": values.pop("denoising"),
            **_alignment_row(values),
            "grad_norm": outcome.grad_norm,
            "learning_rate": learning_rate(self.config.optimizer, step),
            **self._mean_seconds(),
            "peak_memory_bytes": _peak_memory(self.ranks.device),
            "loss_scale": outcome.loss_scale,
            "skipped_steps": self.skipped,
            "batch_fingerprint": f"{batch_fingerprint:016x}",
        }
        self.run.record(row)
        self.tracker.log(
            step, {k: v for k, v in row.items() if isinstance(v, (int, float)) and k != "step"}, row["time"]
        )
        log.info(
            "step %d/%d  loss %.4f  denoising %.4f  grad norm %.3f  %.1f images/s",
            step,
            self.config.train.steps,
            *(row[key] for key in ("loss", "denoising_loss", "grad_norm", "images_per_second")),
        )
        return stop

    def set_aside(self, step: int, batch: Batch) -> None:
        """Takes the bad samples of all ranks into the quarantine, and rank 0 writes those that are new."""
        found = [sample for samples in self.ranks.gather_objects(batch.bad) for sample in samples]
        for sample in self.quarantine.add(found):
            log.warning("step %d: sample %d was left out and replaced: %s", step, sample.number, sample.reason)
            if self.run is not None:
                self.run.quarantine({"step": step, "attempt": self.run.attempt, **sample.as_dict()})

    def save(self, step: int) -> None:
        """Writes the checkpoint of this step."""
        folder = self.checkpoints
        attempt = self.ranks.broadcast_object(self.run.attempt if self.run else None)
        final = save_state(self.engine, self.ema, self.ranks, folder, step, self.config, self.identity, attempt)
        log.info("saved %s", final)

    def sample(self, step: int) -> None:
        """Draws the sample grid of the EMA weights into RUN/samples and the tracker."""
        drawn = draw_grid(self.engine, self.ema, self.config, self.frozen.latents, self.frozen.latent_shape, self.ranks)
        if drawn is not None and self.run is not None:
            path = self.run.path / "samples" / f"{step_folder(step)}.png"
            save_sheet(drawn[0], path)
            self.tracker.log_artifact(path, "samples")

    def finish(self, state: str, step: int, code: ExitCode, reason: str = "") -> ExitCode:
        """Writes the final state; all ranks leave after rank 0's last write."""
        if self.run is not None:
            self.tracker.log_artifact(self.checkpoints / step_folder(step) / MANIFEST, "checkpoint")
            self.tracker.finish(state)
            self.run.close(state, step, reason)
            log.info("%s at step %d of %d: %s", state, step, self.config.train.steps, reason or self.run.path)
        self.ranks.barrier()
        return code

    def _mean_seconds(self) -> dict[str, float]:
        """Seconds of each phase, averaged over the steps since the last row, and the rate that follows from them."""
        steps, self._since_log = self._since_log, []
        names = sorted({name for step in steps for name in step})
        means = {name: math.fsum(step.get(name, 0.0) for step in steps) / len(steps) for name in names}
        if means["data_wait_seconds"] > WAIT_SHARE * means["step_seconds"] and not self._waits_told and len(steps) > 1:
            self._waits_told = True  # once a start: it will not get better by itself
            log.warning(
                "steps wait for data %.0f %% of their time; raise data.workers (now %d), "
                "or see what limits it: repa-scale prepare --bench %s",
                100 * means["data_wait_seconds"] / means["step_seconds"],
                self.config.data.workers,
                self.config.data.path,
            )
        return {"images_per_second": self.config.train.global_batch / means["step_seconds"], **means}


def _alignment_row(values: dict[str, float]) -> dict[str, float]:
    """`alignment_loss`: the mean of the terms' losses, unweighted; and each term's own where there are several."""
    if not values:
        return {}
    each = {name.replace("alignment/", "alignment_loss/"): value for name, value in values.items()}
    mean = {"alignment_loss": math.fsum(each.values()) / len(each)}
    return mean if len(each) == 1 else {**mean, **each}


def _peak_memory(device: torch.device) -> int:
    """Bytes: the device's allocations on CUDA, the process's resident memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes if sys.platform == "darwin" else kilobytes * 1024
