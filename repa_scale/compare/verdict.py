"""What the report may say: the headline, or why there is none. Its sentences are made here from the numbers alone."""

from __future__ import annotations

from typing import Any

from repa_scale.compare.groups import Groups
from repa_scale.compare.quality import Metric
from repa_scale.compare.run_data import RUNNING
from repa_scale.compare.targets import EXACT, LESS, MORE, ONE_LESS
from repa_scale.compare.validity import QUALITY, Difference

NOT_COMPARABLE = "NOT COMPARABLE"
WORDS = {"steps": ("fewer steps", "more steps"), "wall_seconds": ("less time", "more time")}


def verdict(
    groups: Groups, found: list[Difference], metrics: dict[str, Metric], targets: dict[str, dict[str, list[dict]]]
) -> dict[str, Any]:
    """`comparable`, the `metric` of the headline or None, `reasons` why there is no speed-up, and the sentences.

    Args:
        targets: by metric and variant, the rows of quality.speed_ups; empty where a metric is refused.
    """
    broken = [one for one in found if one.protects == QUALITY and not one.allowed]
    running = [key for key, run in groups.runs.items() if run.status == RUNNING]
    usable = [metric for name, metric in metrics.items() if targets.get(name)]
    evaluators = {
        one.key: one for metric in metrics.values() for one in metric.differences if not one.allowed and not usable
    }
    reasons = [f"{one.key} differs" for one in (*broken, *evaluators.values())]
    comparable = not reasons and not groups.alike
    if groups.alike:
        reasons.append("all runs have the same method and settings")
    if running:
        reasons.append(f"{', '.join(running)} {'is' if len(running) == 1 else 'are'} still running")
    if not metrics:
        reasons.append("no run was evaluated (evaluate.every=..., or repa-scale evaluate SAMPLES --run RUN)")
    elif not usable and not broken:
        reasons += [f"{metric.title}: {'; '.join(metric.refusals)}" for metric in metrics.values() if metric.refusals]
        if not any(metric.refusals for metric in metrics.values()) and not running and not groups.alike:
            reasons.append("the runs of a variant have no evaluated step in common")
    metric = usable[0] if usable and comparable and not running else None
    sentences = []
    if metric:
        for variant in groups.others:
            rows = targets[metric.name].get(variant.key)
            if rows:
                sentences.append(sentence(variant.label, _whose(groups), metric.title, rows[0]))
    return {
        "comparable": comparable,
        "metric": metric.name if sentences else None,
        "reasons": [] if sentences else reasons,
        "sentences": sentences,
    }


def headline(result: dict[str, Any]) -> str:
    """The first sentence of the report. result: numbers.comparison."""
    found = result["verdict"]
    if found["sentences"]:
        return " ".join(found["sentences"])
    text = losses_sentence(result)
    if not found["comparable"] and not result["alike"]:
        return f"{NOT_COMPARABLE}: {'; '.join(found['reasons'])}. No speed-up is given. (--allow KEY if that is meant.)"
    return f"{text} No verdict: {'; '.join(found['reasons'])}."


def sentence(ours: str, whose: str, title: str, row: dict[str, Any]) -> str:
    """`REPA reaches the baseline's final FID of 23.1 at 120,000 steps: 3.3 times fewer steps [2.9, 3.8], ...`."""
    level, reached = f"{row['level']:.4g}", row["ours"]
    quality = f"{whose} final {title} of {level}"
    parts = [times(row["axes"][axis], *WORDS[axis]) for axis in WORDS if axis in row["axes"]]
    parts = [part for part in parts if part]
    at = f"{reached['step']:,.0f} steps"
    if reached["kind"] == MORE:
        text = f"{ours} does not reach {quality} in its {at}"
    elif reached["kind"] == LESS:
        text = f"{ours} has {quality} by {at}, its first evaluation"
    else:
        text = f"{ours} reaches {quality} at {at}"
    text += f": {', '.join(parts)}." if parts else "."
    steps = row["axes"]["steps"]
    if steps["why_no_interval"] == "one seed":
        return f"{text} One seed of a method: no interval, so chance is not ruled out."
    if steps["why_no_interval"] == ONE_LESS:
        return f"{text} No interval: without one of the seeds, that level is not reached, so no difference is shown."
    if steps["low"] is not None and steps["low"] <= 1 <= steps["high"]:
        return f"{text} The interval holds 1: no difference is shown."
    return text


def times(one: dict[str, Any], less: str, more: str) -> str:
    """`3.3 times fewer steps [2.9, 3.8]`; a bound says `more than`; nothing where nothing is known."""
    ratio = one["ratio"]
    if ratio is None:
        return ""
    faster = ratio >= 1
    shown = ratio if faster else 1 / ratio
    if one["kind"] != EXACT and abs(ratio - 1) < 0.005:
        return ""
    # What is known to be above a ratio below 1, or below one above it, decides nothing.
    if one["kind"] != EXACT and (one["kind"] == MORE) != faster:
        return f"at most {digits(shown)} times {less if faster else more}"
    text = f"{'more than ' if one['kind'] != EXACT else ''}{digits(shown)} times {less if faster else more}"
    if one["low"] is not None:
        ends = (one["low"], one["high"]) if faster else (1 / one["high"], 1 / one["low"])
        text += f" [{digits(ends[0])}, {digits(ends[1])}]"
    return text


def digits(ratio: float) -> str:
    """3.07, 30.7, 307: as many digits for a value as for its interval."""
    return f"{ratio:.2f}" if ratio < 10 else f"{ratio:.1f}" if ratio < 100 else f"{ratio:,.0f}"


def losses_sentence(result: dict[str, Any]) -> str:
    """Of runs without a verdict: their denoising losses, side by side."""
    losses = result["losses"]
    runs = list(result["runs"])
    if losses["step"] is None:
        return "The runs have no logged step in common, so their losses cannot be compared."
    rows = "row" if losses["rows"] == 1 else f"{losses['rows']} rows"
    values = [f"{losses[f'{key}_mean']:.5g} ({result['runs'][key]['label']})" for key in runs]
    text = f"Over the last logged {rows} up to step {losses['step']}, the denoising loss is "
    text += f"{', '.join(values[:-1])} and {values[-1]}"
    if len(runs) != 2:
        return text + "."
    ours, theirs = (losses[f"{key}_mean"] for key in runs)
    if ours == theirs:
        return text + ": equal."
    share = f"{abs(ours / theirs - 1):.2%} " if theirs else ""
    first = result["runs"][runs[0]]["label"]
    return f"{text}: {share}{'lower' if ours < theirs else 'higher'} with {first}."


def _whose(groups: Groups) -> str:
    label = groups.variants[groups.baseline].label
    return "the baseline's" if label == "baseline" else f"{label}'s"
