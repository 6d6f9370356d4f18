"""From evaluations to curves, speed-ups and the metric that the headline takes. Pure functions."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from repa_scale.compare.cost import AXES, OF_TIME, STEPS, Spent, mean_cost
from repa_scale.compare.groups import Groups, Variant
from repa_scale.compare.targets import Curve, SpeedUp, speed_up
from repa_scale.compare.validity import Difference, circular, evaluator_differences
from repa_scale.errors import DataError
from repa_scale.evaluations import Evaluation
from repa_scale.metrics import NORMAL

HELD_OUT = "denoising_loss_held_out"
LEVELS = 8  # quality levels of the curve of speed-ups, evenly between the first and the last that both reached


@dataclass(frozen=True)
class Kind:
    """Of a metric. sign: 1 where lower is better, -1 where higher is. rank: the headline takes the lowest; None: no
    speed-up is computed from it, for it need not improve as training goes on."""

    title: str
    sign: int
    rank: int | None


# By the beginning of the metric's name; the first that fits counts.
KINDS = {
    "fid": Kind("FID", 1, 0),
    "fd_dinov2": Kind("FD-DINOv2", 1, 1),
    "fd": Kind("Fréchet distance", 1, 2),
    "kid": Kind("KID", 1, 3),
    "sfid": Kind("sFID", 1, 4),
    "inception_score": Kind("Inception score", -1, 5),
    "is": Kind("Inception score", -1, 5),
    HELD_OUT: Kind("denoising loss on held-out images", 1, 6),
    "precision": Kind("precision", -1, None),
    "recall": Kind("recall", -1, None),
    "cknna_best": Kind("CKNNA, best depth and time", -1, None),
    "probe_accuracy_best": Kind("accuracy of a linear probe, best depth and time", -1, None),
    "denoising_loss_trained_on": Kind("denoising loss on training images", 1, None),
}


@dataclass(frozen=True)
class Metric:
    """One metric at one number of samples, over all runs.

    Attributes:
        name: of evaluations.py, without its prefix: `fd_effnet_n2000`.
        evaluated: by run; runs without it have an empty list.
        circular: target encoders of the runs that its extractor is related to.
        differences: of its evaluator between the runs.
    """

    name: str
    title: str
    kind: Kind
    extractor: str
    count: int
    evaluated: dict[str, list[Evaluation]] = field(repr=False)
    circular: list[str]
    differences: list[Difference]

    @property
    def refusals(self) -> list[str]:
        """Why no speed-up may be computed from it."""
        lines = []
        if self.kind.rank is None:
            lines.append("it need not improve as training goes on")
        if self.circular:
            targets = ", ".join(self.circular)
            lines.append(f"circular: its extractor is of the family of {targets}, the alignment's target")
        lines += [f"{one.key} differs" for one in self.differences if not one.allowed]
        if missing := [run for run, rows in self.evaluated.items() if not rows]:
            lines.append(f"not measured for {', '.join(missing)}")
        return lines


def metrics_of(groups: Groups, allowed: tuple[str, ...] = ()) -> dict[str, Metric]:
    """By name, those for the headline first."""
    runs = groups.runs
    found: dict[str, dict[str, list[Evaluation]]] = {}
    for key, run in runs.items():
        for one in run.evaluations:
            if one.step > 0:
                found.setdefault(f"{one.metric}_n{one.count}", {}).setdefault(key, []).append(one)
    metrics = []
    for name, by_run in found.items():
        evaluated = {key: sorted(by_run.get(key, []), key=lambda one: one.step) for key in runs}
        first = next(rows[0] for rows in evaluated.values() if rows)
        kind = kind_of(first.metric)
        extractor = str(first.protocol.get("extractor", ""))
        measured = {run: rows for run, rows in evaluated.items() if rows}
        metrics.append(
            Metric(
                name=name,
                title=title_of(first.metric, kind, first.count),
                kind=kind,
                extractor=extractor,
                count=first.count,
                evaluated=evaluated,
                circular=circular(extractor, runs, first.metric.endswith("_random")),
                differences=evaluator_differences(name, measured, allowed),
            )
        )
    metrics.sort(key=lambda one: (bool(one.refusals), 99 if one.kind.rank is None else one.kind.rank, -one.count))
    return {one.name: one for one in metrics}


def choose(name: str, metrics: dict[str, Metric]) -> dict[str, Metric]:
    """Those that the headline may take: all, or those of a name with or without its number of samples.

    Raises:
        DataError: there is none of that name.
    """
    found = {key: one for key, one in metrics.items() if not name or name in (key, key.rpartition("_n")[0])}
    if name and not found:
        have = f"they have {', '.join(metrics)}" if metrics else "they have none: repa-scale evaluate SAMPLES --run RUN"
        raise DataError(f"--metric {name} is not among the runs' evaluations; {have}")
    return found


def kind_of(metric: str) -> Kind:
    for name, kind in KINDS.items():
        if metric == name or metric.startswith(name + "_"):
            return kind
    return Kind(metric, 1, None)


def title_of(metric: str, kind: Kind, count: int) -> str:
    """It says the samples and what was measured with, so that nobody takes it for FID-50K."""
    if metric == HELD_OUT:
        return kind.title
    name = next((name for name in KINDS if metric.startswith(name + "_")), metric)
    rest = metric.removeprefix(name).strip("_").replace("_", "-")
    return f"{kind.title} ({f'{rest}, ' if rest else ''}{count:,} samples)"


def curve_of(variant: Variant, metric: Metric) -> Curve | None:
    """Of the steps at which all runs of the variant were measured; signs turned so that lower is better."""
    rows = [{one.step: one for one in metric.evaluated[key]} for key in variant.runs]
    steps = sorted(set.intersection(*map(set, rows)))
    if not steps:
        return None
    table = [[one[step] for step in steps] for one in rows]
    values = np.array([[one.value for one in line] for line in table]) * metric.kind.sign
    errors = None
    if all(one.low is not None and one.high is not None for line in table for one in line):
        errors = np.array([[(one.high - one.low) / (2 * NORMAL) for one in line] for line in table])
    return Curve(tuple(variant.seeds), np.array(steps, np.float64), values, errors)


def speed_ups(groups: Groups, metric: Metric, spent: dict[str, dict[str, Spent]], times: bool) -> dict[str, list[dict]]:
    """Of each variant against the baseline: at the baseline's final quality, at its own, and between.

    Args:
        spent: by run and axis.
        times: whether times may be compared.
    """
    baseline = groups.variants[groups.baseline]
    theirs = curve_of(baseline, metric)
    found: dict[str, list[dict]] = {}
    for variant in groups.others:
        ours = curve_of(variant, metric)
        if ours is None or theirs is None:
            continue
        a, b = ours.fit(), theirs.fit()
        top, bottom = float(min(a[0], b[0])), float(max(a[-1], b[-1]))
        levels: list[tuple[str, float | None]] = [("the baseline's final quality", None)]
        levels.append((f"{variant.label}'s final quality", float(a[-1])))
        between = np.linspace(top, bottom, LEVELS + 2)[1:-1] if top > bottom else ()
        levels += [("", float(level)) for level in between]
        costs = {
            axis: tuple(mean_cost([spent[key] for key in one.runs], axis) for one in (variant, baseline))
            for axis in AXES
        }
        found[variant.key] = []
        for name, level in levels:
            row: dict[str, Any] = {"what": name}
            for axis, pair in costs.items():
                if None in pair or (axis in OF_TIME and not times):
                    continue
                one = speed_up(ours, theirs, level, pair if axis != STEPS else None)
                row.setdefault("level", one.level * metric.kind.sign)
                row.setdefault("ours", vars(one.ours))
                row.setdefault("baseline", vars(one.other))
                row.setdefault("axes", {})[axis] = _numbers(one)
            found[variant.key].append(row)
    return found


def bands(variant: Variant, metric: Metric, spent: dict[str, dict[str, Spent]]) -> dict[str, Any] | None:
    """The mean over the seeds, and the band: from the lowest to the highest seed; of one seed, what the samples leave
    open. With it the falling fit, and what had been spent at each step on the mean."""
    curve = curve_of(variant, metric)
    if curve is None:
        return None
    sign = metric.kind.sign
    values = curve.values * sign
    low, high = values.min(axis=0), values.max(axis=0)
    if len(values) == 1 and curve.errors is not None:
        low, high = values[0] - NORMAL * curve.errors[0], values[0] + NORMAL * curve.errors[0]
    runs = [spent[key] for key in variant.runs]
    rows = np.arange(len(runs))
    axes = {axis: cost for axis in AXES if (cost := mean_cost(runs, axis))}
    return {
        "steps": [int(step) for step in curve.steps],
        "mean": values.mean(axis=0).tolist(),
        "low": low.tolist(),
        "high": high.tolist(),
        "fit": (curve.fit() * sign).tolist(),
        "spent": {axis: [cost(rows, float(step)) for step in curve.steps] for axis, cost in axes.items()},
    }


def _numbers(one: SpeedUp) -> dict[str, Any]:
    return {
        "kind": one.kind,
        "ratio": one.ratio,
        "low": one.low,
        "high": one.high,
        "why_no_interval": one.why if one.low is None else "",
    }
