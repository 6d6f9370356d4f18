"""The tables of the page, as HTML with all text escaped; what stands around them: page.py.

`result` is that of numbers.comparison, `names` the runs' labels by their keys, in the order of the columns.
"""

from __future__ import annotations

import html
from typing import Any

from repa_scale.compare.validity import show
from repa_scale.compare.verdict import digits

# Tags of a run that say how to repeat it, and what the page calls them.
FACTS = {
    "command": "command", "git_commit": "commit", "versions": "versions", "device": "device",
    "world_size": "processes", "data_fingerprint": "data", "identity_hash": "identity", "pair_id": "pair",
}  # fmt: skip
SHORT_AXES = {
    "steps": "steps", "samples": "images", "device_hours": "device-hours", "wall_seconds": "wall time", "flops": "FLOPs"
}  # fmt: skip


def targets(result: dict[str, Any], metric: dict[str, Any]) -> str:
    """The speed-ups at each level: named levels first, then from the first quality that both reached to the last."""
    axes = [
        axis
        for axis in result["axes"]
        if any(axis in row["axes"] for rows in metric["targets"].values() for row in rows)
    ]
    heads = "".join(f"<th>{SHORT_AXES[axis]}</th>" for axis in axes)
    lines = []
    for key, rows in metric["targets"].items():
        label = html.escape(result["variants"][key]["label"])
        lines.append(f"<tr class=group><th colspan={4 + len(axes)}>{label} against the baseline</th></tr>")
        for row in rows:
            cells = "".join(f"<td>{_ratio(row['axes'].get(axis))}</td>" for axis in axes)
            reached = "".join(f"<td>{_reached(row[who])}</td>" for who in ("ours", "baseline"))
            what = html.escape(row["what"])
            lines.append(f"<tr><th>{what}</th><td>{row['level']:.4g}</td>{reached}{cells}</tr>")
    why = {row["axes"]["steps"]["why_no_interval"] for rows in metric["targets"].values() for row in rows}
    note = "<p class=small>Above 1: less is needed than the baseline needs. "
    if "one seed" in why:
        note += "One seed of a method: no intervals. "
    note += "“More than”: the other did not get there in its run, or this one was there before its first evaluation; "
    note += "nothing is extrapolated.</p>"
    first = "<tr><th>level</th><th>quality</th><th>reached at step</th><th>baseline at step</th>"
    opening = '<div class=scroll><table class="wide numbers">'
    return f"{opening}{first}{heads}</tr>{''.join(lines)}</table></div>{note}"


def summary(result: dict[str, Any], names: dict[str, str]) -> str:
    """What each run took: time, images, memory, operations."""
    rows = (
        ("Last logged step", "last_step", "{:,d}"),
        ("Seconds a step", "step_seconds", "{:.4f}"),
        ("of it encoder", "encoder_share", "{:.1%}"),
        ("of it alignment, forward and backward", "alignment_share", "{:.1%}"),
        ("of it latents", "latent_share", "{:.1%}"),
        ("of it waiting for data", "data_wait_share", "{:.1%}"),
        ("Images per second", "images_per_second", "{:.1f}"),
        ("Peak memory of rank 0, GB", "peak_memory_bytes", "gb"),
        ("Training images", "samples", "{:,.0f}"),
        ("Device-hours of training", "device_hours", "{:.4g}"),
        ("Wall time, seconds (queues excluded)", "wall_seconds", "{:,.1f}"),
        ("Floating-point operations, encoder included", "flops", "{:.3g}"),
    )
    lines = _of_summary(result, names, rows)
    losses = result["losses"]
    if losses["step"] is not None:
        cells = "".join(f"<td>{losses[run]:.6f}</td>" for run in names)
        lines.append(f"<tr><th>Denoising loss at step {losses['step']:,}</th>{cells}</tr>")
    return _table(["", *names.values()], lines, "numbers")


def published(result: dict[str, Any]) -> str:
    """Published FIDs and ours at the same steps; empty where none were asked for."""
    found = result["published"]
    if not found:
        return ""
    parts = [f"<h2>Published points</h2><p>{html.escape(found['setting'])}. {html.escape(found['source'])}.</p>"]
    if found["why"]:
        parts.append(f"<p class=warn>Ours cannot stand beside them: {html.escape(found['why'])}.</p>")
    lines = []
    for point in found["points"]:
        ours = "-" if not point["ours"] else f"{point['ours']['fid']:.2f} ({point['ours']['seeds']} seeds)"
        cells = (
            point["method"],
            f"{point['steps']:,}",
            f"{point['sampler']} {point['guided']}",
            f"{point['fid']:g}",
            ours,
        )
        row = "".join(f"<td>{html.escape(str(cell))}</td>" for cell in cells)
        lines.append(f"<tr><th>{html.escape(point['model'])}</th>{row}</tr>")
    return "".join(parts) + _table(["model", "method", "steps", "sampler", "FID", "ours at that step"], lines)


def incidents(result: dict[str, Any], names: dict[str, str]) -> str:
    """What went wrong in each run, and what it cost."""
    kinds = sorted({kind for one in result["incidents"].values() for kind in one["counts"]})
    rows = (
        ("Starts and rollbacks (attempts)", "attempts", "{:d}"),
        ("Steps not applied, for a gradient was not finite", "skipped_steps", "{:d}"),
        ("Goodput, the productive share of all its time", "goodput", "{:.1%}"),
        ("Seconds lost between a failure and the next start", "lost_restart_seconds", "{:.1f}"),
        ("Seconds of steps trained again", "lost_repeated_seconds", "{:.1f}"),
    )
    lines = _of_summary(result, names, rows)
    for kind in kinds:
        counts = [result["incidents"][run] for run in names]
        cells = "".join(f"<td>{one['counts'].get(kind, 0) if one['known'] else '-'}</td>" for one in counts)
        lines.append(f"<tr><th>{html.escape(kind)}</th>{cells}</tr>")
    unknown = [names[run] for run, one in result["incidents"].items() if not one["known"]]
    note = ""
    if unknown:
        note = f"<p class=small>incidents.jsonl of {html.escape(', '.join(unknown))} is not on this machine.</p>"
    return _table(["", *names.values()], lines, "numbers") + note


def validity(result: dict[str, Any], names: dict[str, str]) -> str:
    """How many protected settings are equal, and those that differ."""
    found = result["validity"]
    differing = [
        *found["differences"],
        *(one for metric in result["metrics"].values() for one in metric["differences"]),
    ]
    protected = len(found["protected"]) - sum(one["protects"] == "quality" for one in differing)
    parts = [f"<p>{protected} of {len(found['protected'])} protected settings are equal in all runs: model, data, "]
    parts.append("objective, optimiser, batch, precision and EMA; method, alignment and seed are what is compared. ")
    metric = result["metrics"].get(result["verdict"]["metric"] or "")
    if metric and metric["protocol"]:
        shown = ", ".join(f"{key} {show(value)}" for key, value in metric["protocol"].items())
        parts.append(f"The evaluator of {html.escape(metric['title'])}: {html.escape(shown)}.")
    parts.append("</p>")
    lines = []
    for one in differing:
        cells = "".join(f"<td>{html.escape(show(one['values'].get(run)))}</td>" for run in names)
        allowed = " (allowed)" if one["allowed"] else ""
        head = f"<th>{html.escape(one['key'])}</th><td>{html.escape(one['protects'])}{allowed}</td>"
        lines.append(f"<tr class=differs>{head}{cells}</tr>")
    return "".join(parts) + (_table(["differs", "protects", *names.values()], lines) if lines else "")


def repeat(result: dict[str, Any], names: dict[str, str]) -> str:
    """By run, what it takes to repeat it."""
    parts = []
    for key, label in names.items():
        run = result["runs"][key]
        tags = run["tags"]
        facts = [("run", run["run_id"]), ("read from", run["source"])]
        facts += [(name, tags[tag]) for tag, name in FACTS.items() if tags.get(tag)]
        rows = "".join(f"<tr><th>{name}</th><td><code>{html.escape(value)}</code></td></tr>" for name, value in facts)
        parts.append(f"<h3>{html.escape(label)}</h3><div class=scroll><table>{rows}</table></div>")
    parts.append(
        "<p>RUN/config.yaml repeats a run: <code>repa-scale train --config RUN/config.yaml run.dir=OTHER</code></p>"
    )
    return "".join(parts)


def settings(rows: list[dict[str, Any]], names: dict[str, str], what: str) -> str:
    """Settings or tags (`what`) of all runs, those that differ first."""
    lines = []
    for row in sorted(rows, key=lambda row: not row["differs"]):
        kind = " class=differs" if row["differs"] else ""
        cells = "".join(f"<td>{html.escape(row[run])}</td>" for run in names)
        lines.append(f"<tr{kind}><th>{html.escape(row['key'])}</th>{cells}</tr>")
    count = sum(row["differs"] for row in rows)
    return f"<p>{count} of {len(rows)} {what} differ; they stand first.</p>{_table(['key', *names.values()], lines)}"


def _of_summary(result: dict[str, Any], names: dict[str, str], rows: tuple[tuple[str, str, str], ...]) -> list[str]:
    """Rows of `result["summary"]`, from (title, key, format) each."""
    lines = []
    for title, key, form in rows:
        cells = "".join(f"<td>{_number(result['summary'][run].get(key), form)}</td>" for run in names)
        lines.append(f"<tr><th>{title}</th>{cells}</tr>")
    return lines


def _ratio(one: dict[str, Any] | None) -> str:
    if one is None:
        return "not compared"
    if one["ratio"] is None:
        return "-"
    mark = {"exact": "", "more than": "more than ", "less than": "less than "}[one["kind"]]
    if one["low"] is None:
        return f"{mark}{digits(one['ratio'])}"
    return f"{digits(one['ratio'])} <span class=soft>[{digits(one['low'])}, {digits(one['high'])}]</span>"


def _reached(one: dict[str, Any]) -> str:
    mark = {"exact": "", "more than": "more than ", "less than": "by "}[one["kind"]]
    return f"{mark}{one['step']:,.0f}"


def _number(value: float | None, form: str) -> str:
    if value is None:
        return "-"
    return f"{value / 1e9:.2f}" if form == "gb" else form.format(int(value) if "d}" in form else value)


def _table(heads: list[str], lines: list[str], kind: str = "") -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in heads)
    opening = f'<div class=scroll><table class="{kind}">'
    return f"{opening}<tr>{head}</tr>{''.join(lines)}</table></div>"
