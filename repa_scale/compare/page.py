"""The report as one HTML file that needs no network: plotly and pictures inside. All values come from the result."""

from __future__ import annotations

import base64
import html
from typing import Any

from repa_scale.compare import charts
from repa_scale.compare.template import TEMPLATE
from repa_scale.compare.validity import show
from repa_scale.compare.verdict import NOT_COMPARABLE, digits
from repa_scale.errors import require

# Tags of a run that say how to repeat it, and what the page calls them.
FACTS = {
    "command": "command", "git_commit": "commit", "versions": "versions", "device": "device",
    "world_size": "processes", "data_fingerprint": "data", "identity_hash": "identity", "pair_id": "pair",
}  # fmt: skip
SHORT_AXES = {
    "steps": "steps", "samples": "images", "device_hours": "device-hours", "wall_seconds": "wall time", "flops": "FLOPs"
}  # fmt: skip


def page(result: dict[str, Any], grids: dict[str, tuple[int, bytes]]) -> str:
    """The whole page.

    Args:
        result: numbers.comparison.
        grids: (step, PNG) of the runs that have sample grids.
    """
    require("plotly", "eval")
    from plotly.offline import get_plotlyjs

    names = {key: run["label"] for key, run in result["runs"].items()}
    body = "\n".join(
        [
            f"<h1>{_title(result)}</h1>",
            f"<p class=runs>{_header(result)}</p>",
            _verdict(result),
            _warnings(result["warnings"]),
            _quality(result),
            "<h2>Cost and overhead</h2>",
            charts.step_time(result),
            _summary(result, names),
            _alignment(result),
            "<h2>Samples of the EMA weights</h2>",
            "<p>The same noise and the same classes in every grid.</p>",
            _grids(grids, names),
            "<h2>Training curves</h2>",
            "<p>Thin: as logged. Thick: smoothed. Time counts training alone, not what passed between attempts.</p>",
            *(_pair(result, metric) for metric in charts.TITLES if result["curves"].get(metric)),
            _published(result),
            "<h2>Incidents</h2>",
            _incidents(result, names),
            "<h2>What is equal and what differs</h2>",
            _validity(result, names),
            "<h2>To repeat it</h2>",
            _repeat(result, names),
            "<details><summary>All settings</summary>",
            _settings(result["settings"], names, "settings"),
            "</details><details><summary>All tags</summary>",
            _settings(result["tags"], names, "tags"),
            "</details>",
        ]
    )
    parts = {"title": _title(result), "plotly": get_plotlyjs(), "body": body}
    text = TEMPLATE
    for name, value in parts.items():
        text = text.replace("{{" + name + "}}", value)
    return text


def _title(result: dict[str, Any]) -> str:
    labels = [one["label"] for one in result["variants"].values()]
    return html.escape(" against ".join(labels) if len(labels) == 2 else ", ".join(labels))


def _header(result: dict[str, Any]) -> str:
    """Which runs these are."""
    palette = charts.colours(result)
    parts = []
    for run in result["runs"].values():
        text = html.escape(f"{run['name']} ({run['tags'].get('model', '?')}, seed {run['seed']}, {run['status']})")
        dot = f'<span class=dot style="background:{palette[run["variant"]]}"></span>'
        parts.append(f"{dot}<b>{html.escape(run['label'])}</b> {text}")
    return "<br>".join(parts)


def _verdict(result: dict[str, Any]) -> str:
    found, text = result["verdict"], html.escape(result["headline"])
    if not found["comparable"] and not result["alike"]:
        return f"<div class=refused><strong>{NOT_COMPARABLE}</strong><p>{text}</p></div>"
    metric = result["metrics"].get(found["metric"] or "")
    note = ""
    if metric:
        note = (
            f"<p class=small>Measured on {html.escape(metric['title'])}; a sample count other than 50,000 or another "
        )
        note += "extractor than Inception is not FID-50K. In brackets the 95 % interval over the seeds. "
        note += "Time is wall time from start-up to the step, waits in a queue excluded.</p>"
        if not result["validity"]["times_comparable"]:
            note += "<p class=warn>Times are not compared: the runs differ in what decides them (below).</p>"
    return f"<p class=lead>{text}</p>{note}"


def _warnings(warnings: list[str]) -> str:
    return "".join(f"<p class=warn>{html.escape(text)}</p>" for text in warnings)


def _quality(result: dict[str, Any]) -> str:
    if not result["metrics"]:
        return ""
    parts = ["<h2>Quality</h2>", "<p>Mean over the seeds; band: from the lowest to the highest seed (of one seed: the "]
    parts[-1] += (
        "interval of its samples). Dotted: the falling curve that levels are read off. Dashed: the baseline's end.</p>"
    )
    first = result["verdict"]["metric"] or next(iter(result["metrics"]))
    order = [first, *(name for name in result["metrics"] if name != first)]
    for name in order:
        metric = result["metrics"][name]
        if not metric["curves"]:
            continue
        parts.append(f"<h3>{html.escape(metric['title'])}, {metric['better']} is better</h3>")
        if metric["circular"]:
            targets = html.escape(", ".join(metric["circular"]))
            extractor = html.escape(metric["extractor"])
            parts.append(
                f"<p class=warn><b>Circular.</b> Its extractor ({extractor}) is of the family of {targets}, which a "
                "run was aligned with: it is shown, and no speed-up is computed from it.</p>"
            )
        elif metric["refused"]:
            parts.append(f"<p class=warn>No speed-up from it: {html.escape('; '.join(metric['refused']))}.</p>")
        parts.append(charts.quality(result, name, "steps"))
        if name == first:
            comparable = result["validity"]["times_comparable"]
            axes = [axis for axis in result["axes"] if axis != "steps" and (comparable or "hours" not in axis)]
            axes = [axis for axis in axes if comparable or axis != "wall_seconds"]
            parts.append(f"<div class=grid>{''.join(charts.quality(result, name, axis) for axis in axes)}</div>")
        if metric["targets"]:
            parts.append(_targets(result, metric))
            if name == first:
                parts.append(charts.speed_up_by_level(result, name))
    return "".join(parts)


def _targets(result: dict[str, Any], metric: dict[str, Any]) -> str:
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


def _summary(result: dict[str, Any], names: dict[str, str]) -> str:
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
    lines = []
    for title, key, form in rows:
        cells = "".join(f"<td>{_number(result['summary'][run].get(key), form)}</td>" for run in names)
        lines.append(f"<tr><th>{title}</th>{cells}</tr>")
    losses = result["losses"]
    if losses["step"] is not None:
        cells = "".join(f"<td>{losses[run]:.6f}</td>" for run in names)
        lines.append(f"<tr><th>Denoising loss at step {losses['step']:,}</th>{cells}</tr>")
    return _table(["", *names.values()], lines, "numbers")


def _number(value: float | None, form: str) -> str:
    if value is None:
        return "-"
    return f"{value / 1e9:.2f}" if form == "gb" else form.format(int(value) if "d}" in form else value)


def _pair(result: dict[str, Any], metric: str) -> str:
    return f"<div class=grid>{charts.curve(result, metric, 0)}{charts.curve(result, metric, 1)}</div>"


def _alignment(result: dict[str, Any]) -> str:
    pieces = [
        charts.by_depth(result, "cknna", "CKNNA with the target encoder by depth, the best t"),
        charts.by_time(result, "cknna", "CKNNA by t (0: data), the best depth"),
        charts.by_depth(result, "cosine", "Cosine of projected and target tokens by depth, the best t"),
        charts.by_time(result, "cosine", "Cosine by t (0: data), the best depth"),
        charts.by_depth(result, "probe_accuracy", "Accuracy of a linear probe by depth, the best t"),
        charts.by_time(result, "denoising_loss", "Denoising loss on held-out images by t (0: data)"),
    ]
    if not any(pieces):
        return ""
    return f"<h2>What the hidden tokens hold</h2><div class=grid>{''.join(pieces)}</div>"


def _grids(grids: dict[str, tuple[int, bytes]], names: dict[str, str]) -> str:
    figures = []
    for key, label in names.items():
        name = html.escape(label)
        if key not in grids:
            figures.append(f"<figure><figcaption>{name}: no sample grid (train.sample_every)</figcaption></figure>")
            continue
        step, png = grids[key]
        data = base64.b64encode(png).decode()
        figures.append(
            f"<figure><figcaption>{name}, step {step}</figcaption>"
            f'<img alt="{name} samples at step {step}" src="data:image/png;base64,{data}"></figure>'
        )
    return f"<div class=grid>{''.join(figures)}</div>"


def _published(result: dict[str, Any]) -> str:
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


def _incidents(result: dict[str, Any], names: dict[str, str]) -> str:
    kinds = sorted({kind for one in result["incidents"].values() for kind in one["counts"]})
    lines = []
    rows = [
        ("Starts and rollbacks (attempts)", "attempts", "{:d}"),
        ("Steps not applied, for a gradient was not finite", "skipped_steps", "{:d}"),
        ("Goodput, the productive share of all its time", "goodput", "{:.1%}"),
        ("Seconds lost between a failure and the next start", "lost_restart_seconds", "{:.1f}"),
        ("Seconds of steps trained again", "lost_repeated_seconds", "{:.1f}"),
    ]
    for title, key, form in rows:
        cells = "".join(f"<td>{_number(result['summary'][run].get(key), form)}</td>" for run in names)
        lines.append(f"<tr><th>{title}</th>{cells}</tr>")
    for kind in kinds:
        counts = [result["incidents"][run] for run in names]
        cells = "".join(f"<td>{one['counts'].get(kind, 0) if one['known'] else '-'}</td>" for one in counts)
        lines.append(f"<tr><th>{html.escape(kind)}</th>{cells}</tr>")
    unknown = [names[run] for run, one in result["incidents"].items() if not one["known"]]
    note = ""
    if unknown:
        note = f"<p class=small>incidents.jsonl of {html.escape(', '.join(unknown))} is not on this machine.</p>"
    return _table(["", *names.values()], lines, "numbers") + note


def _validity(result: dict[str, Any], names: dict[str, str]) -> str:
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


def _repeat(result: dict[str, Any], names: dict[str, str]) -> str:
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


def _settings(rows: list[dict[str, Any]], names: dict[str, str], what: str) -> str:
    lines = []
    for row in sorted(rows, key=lambda row: not row["differs"]):
        kind = " class=differs" if row["differs"] else ""
        cells = "".join(f"<td>{html.escape(row[run])}</td>" for run in names)
        lines.append(f"<tr{kind}><th>{html.escape(row['key'])}</th>{cells}</tr>")
    count = sum(row["differs"] for row in rows)
    return f"<p>{count} of {len(rows)} {what} differ; they stand first.</p>{_table(['key', *names.values()], lines)}"


def _table(heads: list[str], lines: list[str], kind: str = "") -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in heads)
    opening = f'<div class=scroll><table class="{kind}">'
    return f"{opening}<tr>{head}</tr>{''.join(lines)}</table></div>"
