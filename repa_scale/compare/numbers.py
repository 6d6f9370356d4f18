"""From runs to everything that the report shows, as plain JSON (schema.json). Pure functions."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

import numpy as np

from repa_scale.compare.cost import AXES, spent
from repa_scale.compare.groups import Groups
from repa_scale.compare.published import beside_ours
from repa_scale.compare.quality import Metric, bands, choose, metrics_of, speed_ups
from repa_scale.compare.run_data import RUNNING, RunData
from repa_scale.compare.validity import QUALITY, TIMES, differences, protected, warnings
from repa_scale.compare.verdict import headline, verdict

FORMAT_VERSION = 1
CURVES = ("denoising_loss", "alignment_loss", "loss", "grad_norm", "images_per_second", "peak_memory_bytes")
PHASES = ("encoder_seconds", "alignment_seconds", "latent_seconds", "data_wait_seconds")
# The most of a metric's points that the report holds, of one run and of all: every n-th of each run, and the last.
POINTS, ALL_POINTS = 2000, 6000
TAIL = 0.1  # share of the common rows over which the last losses are averaged


def comparison(
    groups: Groups,
    uri: str = "",
    experiment: str | None = None,
    allowed: tuple[str, ...] = (),
    headline_metric: str = "",
    published: bool = False,
) -> dict[str, Any]:
    """Everything that the page shows; every value as the store or the folder has it, or computed from those here.

    Args:
        allowed: protected settings that may differ.
        headline_metric: its name, with or without the number of samples; empty: the best there is.

    Raises:
        DataError: no run has that metric.
    """
    runs = groups.runs
    found = differences(runs, allowed)
    broken = any(one.protects == QUALITY and not one.allowed for one in found)
    times = not any(one.protects == TIMES and not one.allowed for one in found)
    refused = broken or groups.alike or any(run.status == RUNNING for run in runs.values())
    cost = {key: spent(run) for key, run in runs.items()}
    metrics = metrics_of(groups, allowed)
    asked = choose(headline_metric, metrics)
    targets = {
        name: {} if refused or metric.refusals else speed_ups(groups, metric, cost, times)
        for name, metric in metrics.items()
    }
    result = {
        "format_version": FORMAT_VERSION,
        "uri": uri,
        "experiment": experiment,
        "headline": "",
        "verdict": verdict(groups, found, asked, targets),
        "alike": groups.alike,
        "baseline": groups.baseline,
        "variants": {
            key: {"label": one.label, "runs": list(one.runs), "seeds": one.seeds}
            for key, one in groups.variants.items()
        },
        "runs": {key: _described(groups, key, run) for key, run in runs.items()},
        "validity": {
            "protected": protected(runs),
            "allowed": list(allowed),
            "times_comparable": times,
            "differences": [asdict(one) for one in found],
        },
        "axes": dict(AXES),
        "metrics": {name: _metric(groups, metric, cost, targets[name]) for name, metric in metrics.items()},
        "published": beside_ours(groups, metrics) if published else None,
        "settings": side_by_side({key: run.params for key, run in runs.items()}),
        "tags": side_by_side({key: run.tags for key, run in runs.items()}),
        "warnings": warnings(groups, found),
        "summary": {key: summary(run) for key, run in runs.items()},
        "losses": last_losses(runs),
        "curves": {
            metric: {key: curve(run, metric, len(runs)) for key, run in runs.items() if metric in run.history}
            for metric in (*CURVES, *PHASES, "step_seconds")
        },
        "representation": {key: run.representation for key, run in runs.items()},
        "incidents": {key: incidents(run) for key, run in runs.items()},
    }
    result["headline"] = headline(result)
    return result


def side_by_side(values: dict[str, dict[str, str]]) -> list[dict[str, Any]]:
    """Each key of any run with the values of all; what a run does not have is an empty string."""
    rows = []
    for key in sorted({key for one in values.values() for key in one}):
        cells = {run: one.get(key, "") for run, one in values.items()}
        rows.append({"key": key, **cells, "differs": len(set(cells.values())) > 1})
    return rows


def summary(run: RunData) -> dict[str, float | int | None]:
    """How far the run came and what a step costs; means over all logged rows but the first, which warms up."""
    seconds = mean(run, "step_seconds")
    last = int(run.rows.steps[-1])
    peak = run.history.get("peak_memory_bytes")
    result: dict[str, float | int | None] = {
        "last_step": last,
        "attempts": int(run.rows.attempts[-1]),
        "seconds": float(seconds_by_step(run)[-1]),
        "images_per_second": mean(run, "images_per_second"),
        "step_seconds": seconds,
        "peak_memory_bytes": float(peak.values.max()) if peak else None,
        **{axis: one.at(last) for axis, one in spent(run).items() if axis != "steps"},
    }
    for key in ("goodput", "skipped_steps", *sorted(key for key in run.history if key.startswith("lost_"))):
        result[key] = float(run.history[key].values[-1]) if run.history.get(key) else None
    for key in ("lost_restart_seconds", "lost_repeated_seconds"):
        result.setdefault(key, None)
    for phase in PHASES:
        value = mean(run, phase)
        result[phase] = value
        result[phase.replace("_seconds", "_share")] = value / seconds if value is not None and seconds else 0.0
    return result


def incidents(run: RunData) -> dict[str, Any]:
    """Counted by kind; `known` is false where the run's folder is not at hand, for MLflow does not have them."""
    counts: dict[str, int] = {}
    for one in run.incidents or []:
        kind = str(one.get("kind", "unknown"))
        counts[kind] = counts.get(kind, 0) + 1
    return {"known": run.incidents is not None, "counts": counts}


def mean(run: RunData, metric: str) -> float | None:
    history = run.history.get(metric)
    if not history:
        return None
    values = history.values[1:] if len(history) > 1 else history.values
    return math.fsum(values.tolist()) / len(values)


def last_losses(runs: dict[str, RunData]) -> dict[str, Any]:
    """The denoising losses at the last step that all logged, and their means over the last TAIL of the common rows."""
    losses = {key: run.history["denoising_loss"] for key, run in runs.items()}
    by_step = {key: dict(zip(one.steps.tolist(), one.values.tolist(), strict=True)) for key, one in losses.items()}
    common = sorted(set.intersection(*map(set, by_step.values())))
    if not common:
        return {"step": None, "rows": 0}
    tail = common[-max(1, round(TAIL * len(common))) :]
    result: dict[str, Any] = {"step": common[-1], "rows": len(tail)}
    for key, values in by_step.items():
        result[key] = values[common[-1]]
        result[f"{key}_mean"] = math.fsum(values[step] for step in tail) / len(tail)
    return result


def seconds_by_step(run: RunData) -> np.ndarray:
    """(R,) seconds of training since the first logged row, for each row: without what passed between two attempts.

    Across a resume the time of the steps between the two rows counts (step_seconds), not the wait for the new start.
    """
    rows = run.rows
    passed = np.maximum(0.0, np.diff(rows.times))
    resumed = np.diff(rows.attempts) != 0
    if resumed.any():
        history = run.history.get("step_seconds")
        paces = dict(zip(history.steps.tolist(), history.values.tolist(), strict=True)) if history else {}
        pace = np.array([paces.get(step, 0.0) for step in rows.steps[1:].tolist()])
        passed = np.where(resumed, pace * np.diff(rows.steps), passed)
    return np.concatenate([[0.0], np.cumsum(passed)])


def curve(run: RunData, metric: str, runs: int = 1) -> list[tuple[int, float, float]]:
    """(step, seconds of training since the first logged row, value); every n-th row, so that POINTS are not
    passed, nor by all `runs` ALL_POINTS."""
    history = run.history[metric]
    seconds = np.interp(history.steps, run.rows.steps, seconds_by_step(run))
    every = -(-len(history) // min(POINTS, ALL_POINTS // runs)) if runs < ALL_POINTS else len(history)
    keep = sorted({*range(0, len(history), every), len(history) - 1}) if len(history) else []
    return [(int(history.steps[i]), float(seconds[i]), float(history.values[i])) for i in keep]


def _described(groups: Groups, key: str, run: RunData) -> dict[str, Any]:
    variant = groups.variant_of(key)
    label = variant.label if len(variant.runs) == 1 else f"{variant.label}, seed {run.seed}"
    return {
        "run_id": run.run_id,
        "name": run.name,
        "status": run.status,
        "label": label,
        "variant": variant.key,
        "seed": run.seed,
        "source": run.source,
        "encoders": list(run.encoders),
        "tags": run.tags,
    }


def _metric(groups: Groups, metric: Metric, cost: dict, targets: dict[str, list[dict]]) -> dict[str, Any]:
    protocols = [one.protocol for rows in metric.evaluated.values() for one in rows[-1:]]
    return {
        "title": metric.title,
        "better": "lower" if metric.kind.sign > 0 else "higher",
        "extractor": metric.extractor,
        "count": metric.count,
        "circular": metric.circular,
        "refused": metric.refusals,
        "differences": [asdict(one) for one in metric.differences],
        "protocol": protocols[0] if protocols else {},
        "values": {
            run: [{"step": one.step, "value": one.value, "low": one.low, "high": one.high} for one in rows]
            for run, rows in metric.evaluated.items()
        },
        "curves": {
            key: found
            for key, variant in groups.variants.items()
            if all(metric.evaluated[run] for run in variant.runs)
            and (found := bands(variant, metric, cost)) is not None
        },
        "targets": targets,
    }
