"""From two runs to the numbers of the report: settings side by side, curves, and a summary. Pure functions."""

from __future__ import annotations

import math
from typing import Any

from repa_scale.compare.read import Point, RunData

CURVES = ("denoising_loss", "alignment_loss", "loss", "grad_norm", "images_per_second", "peak_memory_bytes")
PHASES = ("encoder_seconds", "alignment_seconds", "latent_seconds", "data_wait_seconds")
TAIL = 0.1  # share of the common rows over which the last losses are averaged
# What two runs may not differ in if their losses are to be compared, and what their speeds depend on.
SAME_FOR_LOSSES = ("data_fingerprint", "pair_id", "seed", "model")
SAME_FOR_SPEED = ("world_size", "device", "precision", "zero_stage")


def comparison(repa: RunData, baseline: RunData) -> dict[str, Any]:
    """Everything that the page shows, as plain JSON; every value as MLflow gave it or computed from those here."""
    runs = {"repa": repa, "baseline": baseline}
    return {
        "runs": {
            key: {"run_id": run.run_id, "name": run.name, "status": run.status, "tags": run.tags}
            for key, run in runs.items()
        },
        "settings": settings(repa, baseline),
        "warnings": warnings(repa, baseline),
        "summary": {key: summary(run) for key, run in runs.items()},
        "losses": last_losses(repa, baseline),
        "curves": {
            metric: {key: curve(run, metric) for key, run in runs.items() if metric in run.history}
            for metric in (*CURVES, *PHASES, "step_seconds")
        },
    }


def settings(repa: RunData, baseline: RunData) -> list[dict[str, Any]]:
    """Each key of either configuration with both values; a key that a run does not have is an empty string."""
    keys = sorted({*repa.params, *baseline.params})
    rows = []
    for key in keys:
        ours, theirs = repa.params.get(key, ""), baseline.params.get(key, "")
        rows.append({"key": key, "repa": ours, "baseline": theirs, "differs": ours != theirs})
    return rows


def warnings(repa: RunData, baseline: RunData) -> list[str]:
    """What makes the comparison unfair."""
    found = []
    for tags, what in ((SAME_FOR_LOSSES, "losses"), (SAME_FOR_SPEED, "times")):
        for tag in tags:
            ours, theirs = repa.tags.get(tag, "unknown"), baseline.tags.get(tag, "unknown")
            if ours != theirs:
                found.append(f"{tag} differs ({ours} against {theirs}): do not compare the {what}")
    if repa.method == baseline.method:
        found.append(f"both runs have method={repa.method}")
    return found


def summary(run: RunData) -> dict[str, float | int | None]:
    """How far the run came and what a step costs; means over all logged rows but the first, which warms up."""
    rows = run.history["denoising_loss"]
    seconds = mean(run, "step_seconds")
    result: dict[str, float | int | None] = {
        "last_step": rows[-1].step,
        "seconds": rows[-1].time - rows[0].time,
        "images_per_second": mean(run, "images_per_second"),
        "step_seconds": seconds,
        "peak_memory_bytes": max((p.value for p in run.history.get("peak_memory_bytes", [])), default=None),
    }
    for phase in PHASES:
        value = mean(run, phase)
        result[phase.replace("_seconds", "_share")] = value / seconds if value is not None and seconds else 0.0
    return result


def mean(run: RunData, metric: str) -> float | None:
    points = run.history.get(metric, [])
    values = [point.value for point in (points[1:] or points)]
    return math.fsum(values) / len(values) if values else None


def last_losses(repa: RunData, baseline: RunData) -> dict[str, Any]:
    """The denoising losses at the last step that both logged, and their means over the last TAIL of the common rows."""
    ours, theirs = ({p.step: p.value for p in run.history["denoising_loss"]} for run in (repa, baseline))
    common = sorted(set(ours) & set(theirs))
    if not common:
        return {"step": None, "rows": 0}
    tail = common[-max(1, round(TAIL * len(common))) :]
    return {
        "step": common[-1],
        "repa": ours[common[-1]],
        "baseline": theirs[common[-1]],
        "rows": len(tail),
        "repa_mean": math.fsum(ours[step] for step in tail) / len(tail),
        "baseline_mean": math.fsum(theirs[step] for step in tail) / len(tail),
    }


def curve(run: RunData, metric: str) -> list[tuple[int, float, float]]:
    """(step, seconds since the first logged row, value)."""
    points: list[Point] = run.history[metric]
    began = run.history["denoising_loss"][0].time
    return [(point.step, point.time - began, point.value) for point in points]
