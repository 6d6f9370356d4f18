"""The training loop: data -> encoder -> latent -> objective -> engine -> EMA -> log, sample, save, stop."""

from __future__ import annotations

import logging
import math
import platform
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from repa_scale import arithmetic, devices, evaluations, timeouts
from repa_scale.checkpoint import MANIFEST, step_folder
from repa_scale.clock import Clock
from repa_scale.config import Config
from repa_scale.data.bad import Quarantine
from repa_scale.data.batches import Batch, Batches, DataSet
from repa_scale.divergence import Judge
from repa_scale.draws import draw, drop_labels
from repa_scale.ema import ShardEma
from repa_scale.engine import Engine, Outcome
from repa_scale.errors import ExitCode
from repa_scale.frozen import Frozen
from repa_scale.goodput import Goodput
from repa_scale.health import StopRequest, reduce_step
from repa_scale.interpolant import Interpolant
from repa_scale.left_out import LeftOut
from repa_scale.objective import build_objective, total
from repa_scale.online import OnlineEvaluation
from repa_scale.pictures import save_sheet
from repa_scale.ranks import Ranks
from repa_scale.rng import fingerprint
from repa_scale.run_folder import RunFolder
from repa_scale.sample_grid import draw_grid
from repa_scale.saving import Saver
from repa_scale.schedules import learning_rate
from repa_scale.state import describe_state, load_state, newest_verified, set_initial
from repa_scale.stragglers import LOCAL_PHASES, Stragglers
from repa_scale.tracking import Tracker
from repa_scale.uploads import Uploads
from repa_scale.watchdog import Watchdog
from repa_scale.windows import Window, batch_number

WAIT_SHARE = 0.02  # of a step, waiting for data, above which a warning is due
log = logging.getLogger("repa_scale")


class Trainer:
    """One attempt at a run, from `resume` to `finish`.

    Args:
        config: completed and validated.
        run: the run folder; None on ranks other than 0.
        tracker: where rank 0 reports to.
        identity: `keys`, `identity_hash`, `pair_id`, `pixels`.
        ds_config: of deepspeed_config.deepspeed_dict.
        decoder: `pillow` or `dali`, as all ranks decided (data/decoder_choice.py).
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
        decoder: str = "pillow",
    ) -> None:
        arithmetic.use(arithmetic.of_training(config.train.precision))
        self.config, self.ranks, self.dataset = config, ranks, dataset
        self.run, self.tracker, self.identity = run, tracker, identity
        self.decoder = decoder
        self.checkpoints = Path(config.run.dir) / "checkpoints"
        self.clock = Clock(ranks.device)
        self.stop = StopRequest(run.path if run else None)
        self.watchdog = Watchdog(ranks, Path(config.run.dir), run, config.health, lambda: self.stop.seconds)
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
        self.evaluation = (
            OnlineEvaluation(config, ranks, dataset, self.frozen.latents, self.frozen.latent_shape)
            if config.evaluate.every
            else None
        )
        self.interpolant = Interpolant(config.interpolant.path)
        self.quarantine = Quarantine(dataset.count, config.data.max_bad)
        self._waits_told = False
        self.uploads = Uploads(run.path, config.checkpoint.upload, self._incident) if run else None
        self.saver = Saver(
            self.engine,
            self.ema,
            ranks,
            self.checkpoints,
            config.checkpoint,
            self._incident,
            self.uploads.published if run else lambda: None,
        )
        self.judge = Judge(config.health, config.train.precision)
        self.left_out = LeftOut(Path(config.run.dir), config.health.leave_out)
        self.stragglers = Stragglers(ranks.gather_objects(platform.node()))
        self.goodput = Goodput(run.path, run.before) if run else None
        self.attempt: int = ranks.broadcast_object(run.attempt if run else None)
        self.skipped = 0
        self.fallbacks = 0  # pictures that DALI could not decode and Pillow did, since this start
        self._means: dict[str, list[float]] = {}  # of the steps since the last checkpoint
        self._seconds: dict[str, float] = {}  # of the last step, by phase
        self._since_log: list[dict[str, float]] = []

    def train(self) -> ExitCode:
        """Goes on from the newest good checkpoint to the last step, or until someone asks to stop."""
        done = self.resume()
        if self.evaluation is not None and self.evaluation.due(done) and not self._evaluated(done):
            self.evaluate(done)  # a stop kept the start before from it, or it was not asked for then
        while True:
            ended = self.train_from(done)
            if isinstance(ended, ExitCode):
                return ended
            done = self.roll_back(ended)
            if done is None:
                return self.finish("diverged", ended.step, ExitCode.DIVERGED)

    def train_from(self, done: int) -> ExitCode | Window:
        """The loop. Returns how the run ended, or the window of data to go back behind."""
        train = self.config.train
        for step, batch in self.batches(done):
            losses, outcome = self.step(step, batch)
            stop, window = self.record(step, losses, outcome, batch)
            if window:
                return window
            last = step == train.steps
            if train.sample_every and (last or step % train.sample_every == 0):
                stop = self.sample(step) or stop
            if self.evaluation is not None and self.evaluation.due(step) and not stop:
                stop = self.evaluate(step)
            ruined = self.quarantine.problem
            if stop or last or ruined or step % train.checkpoint_every == 0:
                self.save(step, wait=bool(stop or last or ruined))
            if ruined:
                return self.finish("failed", step, ExitCode.BAD_INPUT, ruined)
            if stop and not last:
                return self.finish("preempted", step, ExitCode.PREEMPTED)
        return self.finish("completed", max(done, train.steps), ExitCode.COMPLETED)

    def resume(self, before: int | None = None) -> int:
        """Takes up the newest whole checkpoint (older than step `before`), or sets the initial weights. Returns the
        steps already done."""
        known = self.run.quarantined() if self.run else None
        self.quarantine.numbers |= self.ranks.broadcast_object(known)
        reader = newest_verified(self.checkpoints, self.ranks, before)
        if reader is None:
            set_initial(self.engine, self.ema, self.config)
            self.judge.restart()
            self.skipped = 0
            return 0
        load_state(self.engine, self.ema, reader)
        scalars = reader.manifest["scalars"]
        self.skipped = scalars["skipped_steps"]
        self.judge.set_state(scalars.get("judge", {}))
        self.saver.verified.add(reader.folder.name)
        log.info("resumed from %s (%d samples seen)", reader.folder, reader.manifest["samples"])
        return reader.step

    def roll_back(self, window: Window) -> int | None:
        """Goes back to before the window, which is never trained on again. Returns the steps done, or None: it
        happened too often."""
        self.watchdog.enter("rollback", window.step)
        self.saver.give_up()
        if len(self.left_out.noted) >= self.config.health.max_rollbacks:
            self._incident("diverged", step=window.step, rollbacks=len(self.left_out.noted))
            return None
        began = time.perf_counter()
        if self.run is not None:
            self.run.next_attempt()
        self.attempt += 1
        # In this order: a start that dies in between meets the window once more, and nothing is left out twice.
        done = self.resume(before=window.step)
        if self.uploads is not None:
            self.uploads.published()
        self.left_out.add(window, "not finite or a spike", write=self.ranks.is_main)
        self._incident("rollback", step=window.step, to_step=done, left_out=[window.first, window.last])
        self._means, self._since_log = {}, []
        if self.goodput is not None:
            self.goodput.add("restart", time.perf_counter() - began)
        return done

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
            start_step=batch_number(done, self.left_out.windows),
            decoder=self.decoder,
            flip=config.data.flip,
            device=device,
        )
        try:
            stream = iter(source)
            for step in range(done + 1, config.train.steps + 1):
                self.watchdog.enter("data", step)
                if self.goodput is not None and step == done + 1:
                    self.goodput.first_step_begins()
                self._began = time.perf_counter()
                batch = next(stream)
                while self._number(batch) in self.left_out:
                    batch = next(stream)
                self._waited = time.perf_counter() - self._began
                yield step, batch
        finally:
            source.close()

    def _number(self, batch: Batch) -> int:
        """The batch's place in the endless order, from 1."""
        return int(batch.index[0]) // self.config.train.global_batch + 1

    def step(self, step: int, batch: Batch) -> tuple[dict[str, Tensor], Outcome]:
        """One optimiser step over this rank's part of the global batch. Returns its mean losses, by name."""
        config = self.config
        weights = {name: term.weight_at(step) for name, term in self.terms.items() if term.active(step)}
        parts = batch.to(self.ranks.device).split(config.train.micro_batch)
        sums: dict[str, Tensor] = {}
        for number, part in enumerate(parts, 1):
            self.watchdog.enter("forward", step)
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
            means = {name: value.detach().mean() for name, value in losses.items()} | {"loss": loss.detach()}
            sums = {name: sums.get(name, 0.0) + value / len(parts) for name, value in means.items()}
            if config.health.on_spike == "skip" and number == len(parts) and self._spikes(sums["loss"]):
                loss = loss * math.nan  # DeepSpeed then leaves the step out in its own way, whatever the ZeRO stage
            self.watchdog.enter("backward", step)
            self.engine.module.backward_begins()
            self.engine.backward(loss)
        self.watchdog.enter("optimizer", step)
        outcome = self.engine.step(learning_rate(config.optimizer, step))
        if outcome.applied:
            self.ema.update()
        else:
            self.skipped += 1
        return sums, outcome

    def _spikes(self, loss: Tensor) -> bool:
        """Whether the loss over all ranks is a spike; waits for them."""
        return self.judge.is_spike("loss", reduce_step(self.ranks, [loss], 0, ()).means[0])

    def record(
        self, step: int, losses: dict[str, Tensor], outcome: Outcome, batch: Batch
    ) -> tuple[bool, Window | None]:
        """Reduces the step's numbers over the ranks, judges them, writes its row when due.

        Returns:
            Whether anyone asks to stop, and the window of data to go back behind, if any.
        """
        self.watchdog.enter("record", step)
        names = sorted(losses)
        shared = reduce_step(
            self.ranks,
            [losses[name] for name in names],
            fingerprint(batch.ids),
            [self.stop.asked, self.saver.failed],
            [self._seconds.get(phase, 0.0) for phase in LOCAL_PHASES],  # of the step before: no wait for the device
            [len(batch.bad), len(batch.faults)],
        )
        stop, save_failed = shared.flags
        bad, faulty = shared.counts
        if bad:
            self.set_aside(step, batch)
        if faulty:
            self.note_faults(step, batch)
        values = dict(zip(names, shared.means, strict=True))
        if save_failed:
            self.watchdog.enter("save", step)
            self.saver.retry()
            self.watchdog.enter("record", step)
        for name, mean in values.items():
            self._means.setdefault(name, []).append(mean)
        window = self._judge(step, values["loss"], outcome, batch)
        self._seconds = {**self.clock.read(), "data_wait": self._waited}
        seconds = {f"{phase}_seconds": value for phase, value in self._seconds.items()}
        seconds["step_seconds"] = time.perf_counter() - self._began
        self._since_log.append(seconds)
        if self.run is None:
            return stop, window
        self.stragglers.add(shared.seconds)
        self.goodput.step(step, seconds["step_seconds"], self._waited)
        self.run.progress(step)
        if step % self.config.train.log_every and step != self.config.train.steps and not stop:
            return stop, window
        means = self._mean_seconds()
        row = {
            "step": step,
            "attempt": self.run.attempt,
            "time": time.time(),
            "samples": step * self.config.train.global_batch,
            **_loss_row(values),
            "grad_norm": outcome.grad_norm,
            "learning_rate": learning_rate(self.config.optimizer, step),
            **means,
            **self._straggler(means["step_seconds"]),
            **self.goodput.row(),
            "peak_memory_bytes": _peak_memory(self.ranks.device),
            "loss_scale": outcome.loss_scale,
            "skipped_steps": self.skipped,
            **({"decode_fallbacks": self.fallbacks} if self.decoder == "dali" else {}),
            "batch_fingerprint": f"{shared.fingerprint:016x}",
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
        return stop, window

    def set_aside(self, step: int, batch: Batch) -> None:
        """Takes the bad samples of all ranks into the quarantine, and rank 0 writes those that are new."""
        found = [sample for samples in self.ranks.gather_objects(batch.bad) for sample in samples]
        for sample in self.quarantine.add(found):
            log.warning("step %d: sample %d was left out and replaced: %s", step, sample.number, sample.reason)
            if self.run is not None:
                self.run.quarantine({"step": step, "attempt": self.run.attempt, **sample.as_dict()})

    def note_faults(self, step: int, batch: Batch) -> None:
        """Counts the pictures that DALI failed on, over all ranks; tells of the first, and of every lost pipeline."""
        for rank, faults in enumerate(self.ranks.gather_objects(batch.faults)):
            for fault in faults:
                if fault.kind == "pipeline":
                    self._incident("decoder_rebuilt", step=step, rank=rank, reason=fault.reason)
                    continue
                self.fallbacks += 1
                if self.fallbacks == 1:
                    self._incident("decode_fallback", step=step, rank=rank, reason=fault.reason)

    def _judge(self, step: int, loss: float, outcome: Outcome, batch: Batch) -> Window | None:
        """Notes a step that was not applied, or a spike, with its samples. All ranks come to the same."""
        number = self._number(batch)
        what, window = self.judge.judge(step, number, loss, outcome.grad_norm, outcome.applied)
        if what:
            ids = [i for theirs in self.ranks.gather_objects(batch.ids.tolist()) for i in theirs]
            self._incident(
                what,
                step=step,
                batch=number,
                applied=outcome.applied,
                loss=loss,
                grad_norm=outcome.grad_norm,
                loss_scale=outcome.loss_scale,
                sample_ids=ids,
            )
        return window

    def _incident(self, kind: str, **facts: object) -> None:
        """To the log and RUN/incidents.jsonl, on rank 0."""
        log.warning("%s: %s", kind, ", ".join(f"{key} {value}" for key, value in facts.items()))
        if self.run is not None:
            self.run.incident(kind, **facts)

    def _straggler(self, step_seconds: float) -> dict:
        """The rank that the others waited for since the last row, for the row and the log; {}: none stands out."""
        found = self.stragglers.report(step_seconds) or {}
        if found:
            log.warning(
                "rank %d on %s is slow: %s takes it %.3f s a step longer than the others",
                *(found[f"straggler_{key}"] for key in ("rank", "host", "phase", "seconds")),
            )
        return found

    def save(self, step: int, wait: bool) -> None:
        """Saves this step; with `wait` it is on disk afterwards, otherwise soon."""
        self.watchdog.enter("save", step)
        began = time.perf_counter()
        facts = describe_state(self.engine, self.ranks, step, self.config, self.identity, self.judge.state())
        means = {name: math.fsum(values) / len(values) for name, values in self._means.items()}
        row = _loss_row(means) if means else {}
        facts["metrics"] = {name: mean for name, mean in row.items() if math.isfinite(mean)}
        self._means = {}
        self.saver.save(step, self.attempt, facts, wait, lambda: self.watchdog.enter("waiting save", step))
        if self.goodput is not None:
            self.goodput.add("save", time.perf_counter() - began)

    def sample(self, step: int) -> bool:
        """Draws the sample grid of the EMA weights into RUN/samples and the tracker. Returns whether it was left
        unfinished, because someone asks to stop."""
        self.watchdog.enter("sample", step)
        began = time.perf_counter()
        drawn = draw_grid(
            self.engine,
            self.ema,
            self.config,
            self.frozen.latents,
            self.frozen.latent_shape,
            self.ranks,
            lambda: self.stop.anywhere(self.ranks),
        )
        if drawn is not None and self.run is not None:
            path = self.run.path / "samples" / f"{step_folder(step)}.png"
            save_sheet(drawn[0], path)
            self.tracker.log_artifact(path, "samples")
        if self.goodput is not None:
            self.goodput.add("sample", time.perf_counter() - began)
        return self.stop.anywhere(self.ranks)

    def evaluate(self, step: int) -> bool:
        """Measures samples of the EMA weights (online.py) into RUN/evaluations.jsonl and the tracker. Returns whether
        someone asks to stop; what that left unfinished, the next start does."""
        began = time.perf_counter()

        def stopping(phase: str) -> bool:
            self.watchdog.enter(phase, step)
            return self.stop.anywhere(self.ranks)

        found = self.evaluation.measure(self.engine, self.ema, step, self.attempt, stopping)
        for evaluation in found or ():
            evaluations.append(self.run.path, evaluation)
            self.tracker.log(step, evaluation.points(), evaluation.time)
            log.info("step %d: %s %.4g, %.0f s", step, evaluation.name, evaluation.value, time.perf_counter() - began)
        if self.goodput is not None:
            self.goodput.add("evaluate", time.perf_counter() - began)
        return self.stop.anywhere(self.ranks)

    def _evaluated(self, step: int) -> bool:
        """Whether RUN/evaluations.jsonl has this step already."""
        known = None
        if self.run is not None:
            known = {found.name for found in evaluations.read(self.run.path) if found.step == step}
            known = self.evaluation.names() <= known
        return self.ranks.broadcast_object(known)

    def finish(self, state: str, step: int, code: ExitCode, reason: str = "") -> ExitCode:
        """Writes the final state; all ranks leave after rank 0's last write."""
        self.watchdog.enter("finish", step)
        if self.run is not None:
            self.tracker.log_artifact(self.checkpoints / step_folder(step) / MANIFEST, "checkpoint")
            self.tracker.finish(state)
            self.uploads.finish(self._patience(state))
            self.run.close(state, step, reason)
            log.info("%s at step %d of %d: %s", state, step, self.config.train.steps, reason or self.run.path)
        self.ranks.barrier()
        self.watchdog.close()
        return code

    def _patience(self, state: str) -> float:
        """Seconds that the end of the run may wait for an upload: not beyond the grace of a run that has to stop."""
        return timeouts.UPLOAD if state != "preempted" else self.config.health.grace_seconds / 2 - self.stop.seconds

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


def _loss_row(values: dict[str, float]) -> dict[str, float]:
    """Losses under the names of metrics.jsonl."""
    terms = {name: value for name, value in values.items() if name.startswith("alignment/")}
    return {"loss": values["loss"], "denoising_loss": values["denoising"], **_alignment_row(terms)}


def _alignment_row(values: dict[str, float]) -> dict[str, float]:
    """`alignment_loss`: the mean of the terms' losses, unweighted; and each term's own where there are several."""
    if not values:
        return {}
    each = {name.replace("alignment/", "alignment_loss/"): value for name, value in values.items()}
    mean = {"alignment_loss": math.fsum(each.values()) / len(each)}
    return mean if len(each) == 1 else {**mean, **each}


def _peak_memory(device: torch.device) -> int:
    """Bytes: the device's allocations on CUDA, the process's resident memory on a CPU."""
    if devices.on_gpu(device):
        return torch.cuda.max_memory_allocated(device)
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes if sys.platform == "darwin" else kilobytes * 1024
