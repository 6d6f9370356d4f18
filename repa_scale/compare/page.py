"""The report as one HTML file that needs no network: plotly and pictures inside. All values come from the result.

Its tables: tables.py; its charts: charts.py; its frame: template.py.
"""

from __future__ import annotations

import base64
import html
from typing import Any

from repa_scale.compare import charts, tables
from repa_scale.compare.template import TEMPLATE
from repa_scale.compare.verdict import NOT_COMPARABLE
from repa_scale.errors import require


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
            tables.summary(result, names),
            _alignment(result),
            "<h2>Samples of the EMA weights</h2>",
            "<p>The same noise and the same classes in every grid.</p>",
            _grids(grids, names),
            "<h2>Training curves</h2>",
            "<p>Thin: as logged. Thick: smoothed. Time counts training alone, not what passed between attempts.</p>",
            *(_pair(result, metric) for metric in charts.TITLES if result["curves"].get(metric)),
            tables.published(result),
            "<h2>Incidents</h2>",
            tables.incidents(result, names),
            "<h2>What is equal and what differs</h2>",
            tables.validity(result, names),
            "<h2>To repeat it</h2>",
            tables.repeat(result, names),
            "<details><summary>All settings</summary>",
            tables.settings(result["settings"], names, "settings"),
            "</details><details><summary>All tags</summary>",
            tables.settings(result["tags"], names, "tags"),
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
            parts.append(tables.targets(result, metric))
            if name == first:
                parts.append(charts.speed_up_by_level(result, name))
    return "".join(parts)


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
