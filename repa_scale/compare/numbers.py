"""From two runs to the numbers of the report: settings side by side, curves, and a summary. Pure functions."""

from __future__ import annotations

import math
from typing import Any

from repa_scale.compare.read import RunData

CURVES = ("denoising_loss", "alignment_loss", "loss", "grad_norm", "images_per_second", "peak_memory_bytes")
PHASES = ("encoder_seconds", "alignment_seconds", "latent_seconds", "data_wait_seconds")
TAIL = 0.1  # share of the common rows over which the last losses are averaged
# What two runs may not differ in if their losses are to be compared, and what their speeds depend on.
SAME_FOR_LOSSES = ("data_fingerprint", "pair_id", "seed", "model", "train.global_batch")
SAME_FOR_SPEED = ("world_size", "device", "precision", "zero_stage")


def comparison(repa: RunData, baseline: RunData) -> dict[str, Any]:
    """Everything that the page shows, as plain JSON; every value as MLflow gave it or computed from those here."""
    runs = {"repa": repa, "baseline": baseline}
    return {
        "runs": {
            key: {"run_id": run.run_id, "name": run.name, "status": run.status, "label": label, "tags": run.tags}
            for (key, run), label in zip(runs.items(), labels(repa, baseline), strict=True)
        },
        "settings": side_by_side(repa.params, baseline.params),
        "tags": side_by_side(repa.tags, baseline.tags),
        "warnings": warnings(repa, baseline),
        "summary": {key: summary(run) for key, run in runs.items()},
        "losses": last_losses(repa, baseline),
        "curves": {
            metric: {key: curve(run, metric) for key, run in runs.items() if metric in run.history}
            for metric in (*CURVES, *PHASES, "step_seconds")
        },
    }


def labels(repa: RunData, baseline: RunData) -> tuple[str, str]:
    """What the page calls the two: their methods, or their names where both have one method."""
    names = {"repa": "REPA", "baseline": "baseline"}
    if repa.method != baseline.method:
        return names.get(repa.method, repa.method), names.get(baseline.method, baseline.method)
    if repa.name != baseline.name:
        return repa.name, baseline.name
    return f"{repa.name} ({repa.run_id[:6]})", f"{baseline.name} ({baseline.run_id[:6]})"


def side_by_side(repa: dict[str, str], baseline: dict[str, str]) -> list[dict[str, Any]]:
    """Each key of either run with both values; what a run does not have is an empty string."""
    rows = []
    for key in sorted({*repa, *baseline}):
        ours, theirs = repa.get(key, ""), baseline.get(key, "")
        rows.append({"key": key, "repa": ours, "baseline": theirs, "differs": ours != theirs})
    return rows


def warnings(repa: RunData, baseline: RunData) -> list[str]:
    """What makes the comparison unfair."""
    found = []
    for tags, what in ((SAME_FOR_LOSSES, "losses"), (SAME_FOR_SPEED, "times")):
        for tag in tags:
            ours, theirs = (run.tags.get(tag) or run.params.get(tag, "unknown") for run in (repa, baseline))
            if ours != theirs:
                found.append(f"{tag} differs ({ours} against {theirs}): do not compare the {what}")
    steps = [run.history["denoising_loss"][-1].step for run in (repa, baseline)]
    if steps[0] != steps[1]:
        found.append(f"last logged steps differ ({steps[0]} against {steps[1]}): losses are compared at common steps")
    for run, label in zip((repa, baseline), labels(repa, baseline), strict=True):
        if run.status != "FINISHED":
            found.append(f"{label} is {run.status}, not FINISHED")
        found += [f"{label}: {problem}" for problem in run.problems]
    if repa.method == baseline.method:
        found.append(f"both runs have method={repa.method}")
    return found


def summary(run: RunData) -> dict[str, float | int | None]:
    """How far the run came and what a step costs; means over all logged rows but the first, which warms up."""
    rows = run.history["denoising_loss"]
    seconds = mean(run, "step_seconds")
    result: dict[str, float | int | None] = {
        "last_step": rows[-1].step,
        "attempts": run.rows[-1].attempt,
        "seconds": seconds_by_step(run)[rows[-1].step],
        "images_per_second": mean(run, "images_per_second"),
        "step_seconds": seconds,
        "peak_memory_bytes": max((p.value for p in run.history.get("peak_memory_bytes", [])), default=None),
    }
    for key in ("goodput", "lost_restart_seconds", "lost_repeated_seconds"):
        result[key] = run.history[key][-1].value if run.history.get(key) else None
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


def seconds_by_step(run: RunData) -> dict[int, float]:
    """Seconds of training since the first logged row, by step: without what passed between two attempts.

    Across a resume the time of the steps between the two rows counts (step_seconds), not the wait for the new start.
    """
    paces = {point.step: point.value for point in run.history.get("step_seconds", [])}
    result, total = {}, 0.0
    for before, row in zip([None, *run.rows[:-1]], run.rows, strict=True):
        if before is not None and before.attempt == row.attempt:
            total += max(0.0, row.time - before.time)
        elif before is not None:
            total += paces.get(row.step, 0.0) * (row.step - before.step)
        result[row.step] = total
    return result


def curve(run: RunData, metric: str) -> list[tuple[int, float, float]]:
    """(step, seconds of training since the first logged row, value)."""
    seconds = seconds_by_step(run)
    return [(point.step, seconds[point.step], point.value) for point in run.history[metric]]
