"""The report as one HTML file that needs no network: plotly inside, pictures inside."""

from __future__ import annotations

import base64
import html
from typing import Any

from repa_scale.compare.read import RunData
from repa_scale.errors import require

COLOURS = {"repa": "#0b6e99", "baseline": "#c2571a"}
RUNS = ("repa", "baseline")  # the keys of both runs in every part of the result
SHARES = {
    "encoder_share": ("encoder", "#0b6e99"),
    "alignment_share": ("alignment", "#5aa9c9"),
    "latent_share": ("latents", "#8a6bbf"),
    "data_wait_share": ("waiting for data", "#c2571a"),
}
TITLES = {
    "denoising_loss": "Denoising loss",
    "loss": "Training loss (denoising and weighted alignment)",
    "alignment_loss": "Alignment loss (minus the mean cosine)",
    "grad_norm": "Gradient norm",
    "images_per_second": "Images per second",
}
HEIGHT = 320  # pixels of a chart


def page(result: dict[str, Any], runs: dict[str, RunData]) -> str:
    """The whole page. result: numbers.comparison."""
    require("plotly", "eval")
    from plotly.offline import get_plotlyjs

    names = {key: result["runs"][key]["label"] for key in RUNS}
    body = "\n".join(
        [
            f"<h1>{html.escape(' against '.join(names.values()))}</h1>",
            f"<p>{_header(result)}</p>",
            f"<p class=lead>{html.escape(sentence(result))}</p>",
            _warnings(result["warnings"]),
            _summary(result, names),
            "<h2>Samples of the EMA weights</h2>",
            _grids(runs, names),
            "<h2>Curves</h2>",
            "<p>Thin: as logged. Thick: smoothed. Time counts training alone, not what passed between attempts.</p>",
            *(_charts(result["curves"], metric, names) for metric in TITLES if result["curves"].get(metric)),
            "<h2>Where the time of a step goes</h2>",
            _shares(result["summary"], names),
            "<h2>Settings</h2>",
            _settings(result["settings"], names, "settings"),
            "<h2>Tags</h2>",
            _settings(result["tags"], names, "tags"),
        ]
    )
    return TEMPLATE.replace("{{plotly}}", get_plotlyjs()).replace("{{body}}", body)


def sentence(result: dict[str, Any]) -> str:
    """What the page shows, without a verdict: one run each says nothing of chance."""
    losses = result["losses"]
    if losses["step"] is None:
        return "The two runs have no logged step in common, so their losses cannot be compared."
    ours, theirs = losses["repa_mean"], losses["baseline_mean"]
    first, second = (result["runs"][key]["label"] for key in RUNS)
    rows = "row" if losses["rows"] == 1 else f"{losses['rows']} rows"
    text = f"Over the last logged {rows} up to step {losses['step']}, the denoising loss is {ours:.5g} ({first}) and "
    text += f"{theirs:.5g} ({second}): "
    if ours == theirs:
        return text + "equal."
    share = f"{abs(ours / theirs - 1):.2%} " if theirs else ""
    return text + f"{share}{'lower' if ours < theirs else 'higher'} with {first}. One run of each is no verdict."


def _header(result: dict[str, Any]) -> str:
    """Which runs these are."""
    parts = []
    for key in RUNS:
        run = result["runs"][key]
        model, seed = run["tags"].get("model", "model unknown"), run["tags"].get("seed", "unknown")
        text = html.escape(f"{run['name']} ({model}, seed {seed}, {run['status']})")
        parts.append(f'<b style="color:{COLOURS[key]}">{html.escape(run["label"])}</b>: {text}')
    return "<br>".join(parts)


def _warnings(warnings: list[str]) -> str:
    return "".join(f"<p class=warn>{html.escape(text)}</p>" for text in warnings)


def _summary(result: dict[str, Any], names: dict[str, str]) -> str:
    rows = (
        ("Last logged step", "last_step", "{:d}"),
        ("Attempts (starts of the run)", "attempts", "{:d}"),
        ("Seconds of training", "seconds", "{:.1f}"),
        ("Images per second", "images_per_second", "{:.1f}"),
        ("Seconds a step", "step_seconds", "{:.4f}"),
        ("of it encoder", "encoder_share", "{:.1%}"),
        ("of it alignment, forward and backward", "alignment_share", "{:.1%}"),
        ("of it waiting for data", "data_wait_share", "{:.1%}"),
        ("of it latents", "latent_share", "{:.1%}"),
        ("Goodput, the productive share of all its time", "goodput", "{:.1%}"),
        ("Seconds lost between a failure and the next start", "lost_restart_seconds", "{:.1f}"),
        ("Seconds of steps trained again", "lost_repeated_seconds", "{:.1f}"),
        ("Peak memory of rank 0, GB", "peak_memory_bytes", "gb"),
    )
    lines = []
    for title, key, form in rows:
        cells = "".join(f"<td>{_number(result['summary'][run][key], form)}</td>" for run in RUNS)
        lines.append(f"<tr><th>{title}</th>{cells}</tr>")
    losses = result["losses"]
    if losses["step"] is not None:
        cells = "".join(f"<td>{losses[run]:.6f}</td>" for run in RUNS)
        lines.append(f"<tr><th>Denoising loss at step {losses['step']}</th>{cells}</tr>")
    heads = "".join(f'<th style="color:{COLOURS[run]}">{html.escape(name)}</th>' for run, name in names.items())
    return f"<table><tr><th></th>{heads}</tr>{''.join(lines)}</table>"


def _number(value: float | None, form: str) -> str:
    if value is None:
        return "-"
    return f"{value / 1e9:.2f}" if form == "gb" else form.format(value)


def _charts(curves: dict[str, dict], metric: str, names: dict[str, str]) -> str:
    """One metric over steps and over time."""
    charts = "".join(_chart(curves[metric], metric, names, *axis) for axis in ((0, "step"), (1, "seconds")))
    return f"<div class=pair>{charts}</div>"


def _chart(curves: dict[str, list], metric: str, names: dict[str, str], axis: int, label: str) -> str:
    import plotly.graph_objects as graph

    figure = graph.Figure()
    for run, points in curves.items():
        x, y = [point[axis] for point in points], [point[2] for point in points]
        common = {"x": x, "legendgroup": run}
        colour = COLOURS[run]
        figure.add_scatter(
            y=y,
            name=f"{names[run]}, as logged",
            line={"color": colour, "width": 1},
            opacity=0.4,
            showlegend=False,
            **common,
        )
        figure.add_scatter(y=smoothed(y), name=names[run], line={"color": colour, "width": 2.5}, **common)
    figure.update_layout(
        title=f"{TITLES[metric]} over {'steps' if axis == 0 else 'time'}",
        xaxis_title=label,
        legend={"orientation": "h", "y": -0.25},
        showlegend=True,
    )
    return _drawn(figure, HEIGHT)


def _shares(summary: dict[str, dict], names: dict[str, str]) -> str:
    """A bar a run: the measured phases, and the rest of the step (the backbone's forward and backward, the update)."""
    import plotly.graph_objects as graph

    figure = graph.Figure()
    runs = list(reversed(RUNS))  # plotly draws from below
    for share, (name, colour) in SHARES.items():
        values = [summary[run][share] for run in runs]
        figure.add_bar(x=values, y=[names[run] for run in runs], name=name, orientation="h", marker={"color": colour})
    rest = [max(0.0, 1 - sum(summary[run][share] for share in SHARES)) for run in runs]
    figure.add_bar(
        x=rest, y=[names[run] for run in runs], name="rest of the step", orientation="h", marker={"color": "#9a9a9a"}
    )
    figure.update_layout(
        barmode="stack", xaxis_tickformat=".0%", legend={"orientation": "h", "y": -0.3, "traceorder": "normal"}
    )
    return _drawn(figure, 220)


def _drawn(figure: Any, height: int) -> str:
    """A chart without a colour of its own behind it, readable on a light and on a dark page."""
    figure.update_layout(
        height=height,
        margin={"l": 60, "r": 34, "t": 45, "b": 40},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"color": "#808080"},
        modebar={"orientation": "v", "bgcolor": "rgba(0,0,0,0)"},  # beside the plot, not over the title
    )
    grid = {"gridcolor": "rgba(128,128,128,.25)", "zerolinecolor": "rgba(128,128,128,.4)"}
    figure.update_xaxes(**grid)
    figure.update_yaxes(**grid)
    options = {"displaylogo": False, "responsive": True}
    return f"<div>{figure.to_html(full_html=False, include_plotlyjs=False, config=options)}</div>"


def smoothed(values: list[float], window: float = 0.1) -> list[float]:
    """An exponential average over about `window` of the rows, corrected for its start."""
    decay = 1 - 1 / max(1.0, window * len(values))
    total = weight = 0.0
    result = []
    for value in values:
        total, weight = decay * total + (1 - decay) * value, decay * weight + (1 - decay)
        result.append(total / weight)
    return result


def newest_grids(runs: dict[str, RunData]) -> dict[str, tuple[int, bytes]]:
    """(step, PNG) of each run that has a sample grid: at the newest step that both have, else each its newest."""
    grids = {key: dict(run.grids) for key, run in runs.items() if run.grids}
    common = set.intersection(*map(set, grids.values())) if grids else set()
    return {
        key: max((step, png) for step, png in by_step.items() if step in (common or by_step))
        for key, by_step in grids.items()
    }


def _grids(runs: dict[str, RunData], names: dict[str, str]) -> str:
    grids = newest_grids(runs)
    figures = []
    for key in runs:
        name = html.escape(names[key])
        if key not in grids:
            figures.append(f"<figure><figcaption>{name}: no sample grid (train.sample_every)</figcaption></figure>")
            continue
        step, png = grids[key]
        data = base64.b64encode(png).decode()
        figures.append(
            f"<figure><figcaption>{name}, step {step}</figcaption>"
            f'<img alt="{name} samples at step {step}" src="data:image/png;base64,{data}"></figure>'
        )
    return f"<div class=pair>{''.join(figures)}</div>"


def _settings(rows: list[dict[str, Any]], names: dict[str, str], what: str) -> str:
    lines = []
    for row in sorted(rows, key=lambda row: not row["differs"]):
        kind = " class=differs" if row["differs"] else ""
        cells = "".join(f"<td>{html.escape(row[run])}</td>" for run in RUNS)
        lines.append(f"<tr{kind}><th>{html.escape(row['key'])}</th>{cells}</tr>")
    count = sum(row["differs"] for row in rows)
    heads = "".join(f"<th>{html.escape(name)}</th>" for name in names.values())
    return (
        f"<p>{count} of {len(rows)} {what} differ; they stand first.</p>"
        f"<table><tr><th>key</th>{heads}</tr>{''.join(lines)}</table>"
    )


TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>REPA against baseline</title>
<style>
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 1200px; margin: 2rem auto; padding: 0 1rem; }
h1 { margin-bottom: .2rem; }
.lead { font-size: 1.15rem; }
.warn { border-left: 4px solid #c2571a; padding: .3rem .8rem; background: rgba(194, 87, 26, .12); }
.pair { display: grid; grid-template-columns: minmax(0, 1fr) minmax(0, 1fr); gap: 1rem; }
@media (max-width: 800px) { .pair { grid-template-columns: minmax(0, 1fr); } }
figure { margin: 0; }
img { width: 100%; image-rendering: pixelated; }
table { border-collapse: collapse; }
th, td { text-align: left; padding: .15rem .9rem .15rem 0; border-bottom: 1px solid rgba(128, 128, 128, .3);
  font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
th { font-weight: 500; }
.differs th, .differs td { background: rgba(255, 196, 0, .22); font-weight: 600; }
</style>
<script>{{plotly}}</script>
</head>
<body>
{{body}}
</body>
</html>
"""
