"""What a run had spent at a step: images, device-hours, wall time, floating-point operations. Pure functions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from repa_scale.compare.run_data import RunData
from repa_scale.compare.targets import Cost
from repa_scale.config import Config
from repa_scale.flops import backbone_flops, encoder_flops, projector_flops
from repa_scale.plan.times import vae_flops
from repa_scale.sizes import backbone, encoder_spec, latent_spec, token_grid

STEPS = "steps"
# Axis -> what the page calls it.
AXES = {
    STEPS: "Optimiser steps",
    "samples": "Training images",
    "device_hours": "Device-hours of training",
    "wall_seconds": "Wall time, seconds",
    "flops": "Floating-point operations, encoder included",
}
OF_TIME = ("device_hours", "wall_seconds")
LOST = "lost_"  # keys of metrics.jsonl


@dataclass(frozen=True)
class Spent:
    """steps, totals: (R,) float64, rising, the first of them 0: what was spent from the start to a step."""

    steps: np.ndarray
    totals: np.ndarray

    def at(self, step: float) -> float:
        """Linear between the rows; a step after the last row at the mean pace."""
        last = float(self.steps[-1])
        if step <= last or last == 0:
            return float(np.interp(step, self.steps, self.totals))
        return float(self.totals[-1]) * step / last


def spent(run: RunData) -> dict[str, Spent]:
    """By axis. Those of which the run has no record are left out."""
    ends = np.array([0.0, float(run.rows.steps[-1])])
    found = {
        STEPS: Spent(ends, ends),
        "samples": Spent(ends, ends * run.config.train.global_batch),
    }
    if (seconds := _training_seconds(run)) is not None:
        devices = int(run.tags.get("world_size") or 1)
        found["device_hours"] = Spent(seconds.steps, seconds.totals * devices / 3600)
    if (wall := _wall_seconds(run)) is not None:
        found["wall_seconds"] = wall
    steps, images = _flops_by_step(run)
    found["flops"] = Spent(steps, images * run.config.train.global_batch)
    return found


def mean_cost(runs: list[dict[str, Spent]], axis: str) -> Cost | None:
    """(rows of the seeds, step) -> the mean cost over these seeds; None where a run has no record of it."""
    if any(axis not in one for one in runs):
        return None
    return lambda rows, step: float(np.mean([runs[row][axis].at(step) for row in rows]))


def flops_of_an_image(config: Config, aligned: bool = True) -> float:
    """Of training on one image: three times the forward pass of backbone and projectors, one of the frozen networks.

    A recomputed forward pass (activation checkpointing) is no part of it: it is a way to save memory.

    Args:
        aligned: whether the alignment terms are on; encoders of a stored set cost nothing.
    """
    rows, columns = token_grid(config.data.image_size, config.latents.name, config.model.name)
    tokens = rows * columns
    total = 3 * backbone_flops(config.model.name, tokens)
    if config.data.source == "image":
        total += vae_flops(latent_spec(config.latents.name).kind, config.data.image_size**2)
    if not aligned or config.method == "baseline":
        return total
    width = backbone(config.model.name)[0].width
    for term in config.alignment.values():
        target = encoder_spec(term.encoder).width
        if term.projector == "mlp":
            total += 3 * projector_flops(width, target, tokens, term.projector_dim)
        else:
            total += 3 * 2 * tokens * width * target * (9 if term.projector == "conv" else 1)
    if config.data.source != "moments+tokens":
        total += sum(encoder_flops(name, tokens) for name in {term.encoder for term in config.alignment.values()})
    return total


def _training_seconds(run: RunData) -> Spent | None:
    """Of the steps alone: their mean since the row before, times how many they were."""
    history = run.history.get("step_seconds")
    if not history:
        return None
    passed = np.diff(history.steps, prepend=0)
    return _from_zero(history.steps, np.cumsum(passed * history.values))


def _wall_seconds(run: RunData) -> Spent | None:
    """Everything that the run's starts accounted for: steps, start-up, saves, samples, evaluation, restarts and steps
    trained again; not the waits of a preempted job in a queue (docs/durability.md, "Goodput")."""
    total = run.history.get("productive_seconds")
    if not total:
        return _training_seconds(run)
    sums = dict(zip(total.steps.tolist(), total.values.tolist(), strict=True))
    for lost in (history for key, history in run.history.items() if key.startswith(LOST)):
        for step, value in zip(lost.steps.tolist(), lost.values.tolist(), strict=True):
            if step in sums:
                sums[step] += value
    values = np.array([sums[step] for step in sorted(sums)])
    return _from_zero(np.array(sorted(sums)), np.maximum.accumulate(values))


def _flops_by_step(run: RunData) -> tuple[np.ndarray, np.ndarray]:
    """(steps, operations of all images so far for a batch of one): with a kink where the alignment stops."""
    last = float(run.rows.steps[-1])
    stops = [term.stop_step for term in run.terms.values()]
    stop = min(float(max(stops)), last) if stops and None not in stops else last
    on, off = (flops_of_an_image(run.config, aligned) for aligned in (True, False))
    steps = np.array([0.0, stop, max(last, stop)])
    return steps, np.array([0.0, on * stop, on * stop + off * (steps[2] - stop)])


def _from_zero(steps: np.ndarray, totals: np.ndarray) -> Spent:
    return Spent(np.concatenate([[0.0], steps.astype(np.float64)]), np.concatenate([[0.0], totals]))
