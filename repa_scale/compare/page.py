"""The report as one HTML file that needs no network: plotly inside, pictures inside."""

from __future__ import annotations

import base64
import html
from typing import Any

from repa_scale.compare.read import RunData
from repa_scale.errors import require

COLOURS = {"repa": "#0b6e99", "baseline": "#c2571a"}
NAMES = {"repa": "REPA", "baseline": "baseline"}
TITLES = {
    "denoising_loss": "Denoising loss",
    "alignment_loss": "Alignment loss (minus the mean cosine)",
    "grad_norm": "Gradient norm",
    "images_per_second": "Images per second",
}
HEIGHT = 320  # pixels of a chart


def page(result: dict[str, Any], runs: dict[str, RunData]) -> str:
    """The whole page. result: numbers.comparison."""
    require("plotly", "eval")
    from plotly.offline import get_plotlyjs

    body = "\n".join(
        [
            f"<h1>REPA against baseline</h1>\n<p class=lead>{html.escape(sentence(result))}</p>",
            _warnings(result["warnings"]),
            _summary(result),
            "<h2>Curves</h2>",
            *(_charts(result["curves"], metric) for metric in TITLES if result["curves"].get(metric)),
            "<h2>Samples of the EMA weights</h2>",
            _grids(runs),
            "<h2>Settings</h2>",
            _settings(result["settings"]),
        ]
    )
    return TEMPLATE.replace("{{plotly}}", get_plotlyjs()).replace("{{body}}", body)


def sentence(result: dict[str, Any]) -> str:
    """What the page shows, without a verdict: one run each says nothing of chance."""
    losses = result["losses"]
    if losses["step"] is None:
        return "The two runs have no logged step in common, so their losses cannot be compared."
    ours, theirs = losses["repa_mean"], losses["baseline_mean"]
    word = "lower" if ours < theirs else "higher"
    rows = "row" if losses["rows"] == 1 else f"{losses['rows']} rows"
    return (
        f"Over the last logged {rows} up to step {losses['step']}, the denoising loss is {ours:.5g} with REPA and "
        f"{theirs:.5g} without: {abs(ours / theirs - 1):.2%} {word} with REPA. One run of each is no verdict."
    )


def _warnings(warnings: list[str]) -> str:
    return "".join(f"<p class=warn>{html.escape(text)}</p>" for text in warnings)


def _summary(result: dict[str, Any]) -> str:
    rows = (
        ("Last logged step", "last_step", "{:d}"),
        ("Seconds of training", "seconds", "{:.1f}"),
        ("Images per second", "images_per_second", "{:.1f}"),
        ("Seconds a step", "step_seconds", "{:.4f}"),
        ("of it encoder", "encoder_share", "{:.1%}"),
        ("of it alignment, forward and backward", "alignment_share", "{:.1%}"),
        ("of it waiting for data", "data_wait_share", "{:.1%}"),
        ("of it latents", "latent_share", "{:.1%}"),
        ("Peak memory of rank 0, GB", "peak_memory_bytes", "gb"),
    )
    lines = []
    for title, key, form in rows:
        cells = "".join(f"<td>{_number(result['summary'][run][key], form)}</td>" for run in NAMES)
        lines.append(f"<tr><th>{title}</th>{cells}</tr>")
    losses = result["losses"]
    if losses["step"] is not None:
        cells = "".join(f"<td>{losses[run]:.6f}</td>" for run in NAMES)
        lines.append(f"<tr><th>Denoising loss at step {losses['step']}</th>{cells}</tr>")
    heads = "".join(f'<th style="color:{COLOURS[run]}">{name}</th>' for run, name in NAMES.items())
    return f"<table><tr><th></th>{heads}</tr>{''.join(lines)}</table>"


def _number(value: float | None, form: str) -> str:
    if value is None:
        return "-"
    return f"{value / 1e9:.2f}" if form == "gb" else form.format(value)


def _charts(curves: dict[str, dict], metric: str) -> str:
    """One metric over steps and over time."""
    charts = "".join(_chart(curves[metric], metric, axis, label) for axis, label in ((0, "step"), (1, "seconds")))
    return f"<div class=pair>{charts}</div>"


def _chart(curves: dict[str, list], metric: str, axis: int, label: str) -> str:
    import plotly.graph_objects as graph

    figure = graph.Figure()
    for run, points in curves.items():
        x, y = [point[axis] for point in points], [point[2] for point in points]
        colour = COLOURS[run]
        figure.add_scatter(x=x, y=y, name=NAMES[run], line={"color": colour, "width": 1}, opacity=0.45, legendgroup=run)
        smooth = smoothed(y)
        figure.add_scatter(
            x=x, y=smooth, name=f"{NAMES[run]}, smoothed", line={"color": colour, "width": 2.5}, legendgroup=run
        )
    figure.update_layout(
        title=f"{TITLES[metric]} over {'steps' if axis == 0 else 'time'}",
        height=HEIGHT,
        margin={"l": 55, "r": 10, "t": 45, "b": 40},
        xaxis_title=label,
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"color": "#808080"},
        legend={"orientation": "h", "y": -0.25},
    )
    figure.update_xaxes(gridcolor="rgba(128,128,128,.25)")
    figure.update_yaxes(gridcolor="rgba(128,128,128,.25)")
    return f"<div>{figure.to_html(full_html=False, include_plotlyjs=False, config={'displaylogo': False})}</div>"


def smoothed(values: list[float], window: float = 0.1) -> list[float]:
    """An exponential average over about `window` of the rows, corrected for its start."""
    decay = 1 - 1 / max(1.0, window * len(values))
    total = weight = 0.0
    result = []
    for value in values:
        total, weight = decay * total + (1 - decay) * value, decay * weight + (1 - decay)
        result.append(total / weight)
    return result


def _grids(runs: dict[str, RunData]) -> str:
    """The newest grid of each run, at the newest step that both have if there is one."""
    steps = [dict(run.grids) for run in runs.values()]
    common = set.intersection(*(set(s) for s in steps)) if steps else set()
    figures = []
    for key, run in runs.items():
        if not run.grids:
            figures.append(
                f"<figure><figcaption>{NAMES[key]}: no sample grid (train.sample_every)</figcaption></figure>"
            )
            continue
        step = max(common) if common else run.grids[-1][0]
        data = base64.b64encode(dict(run.grids)[step]).decode()
        figures.append(
            f"<figure><figcaption>{NAMES[key]}, step {step}</figcaption>"
            f'<img alt="{NAMES[key]} samples at step {step}" src="data:image/png;base64,{data}"></figure>'
        )
    return f"<div class=pair>{''.join(figures)}</div>"


def _settings(rows: list[dict[str, Any]]) -> str:
    lines = []
    for row in sorted(rows, key=lambda row: not row["differs"]):
        kind = " class=differs" if row["differs"] else ""
        cells = "".join(f"<td>{html.escape(row[run])}</td>" for run in NAMES)
        lines.append(f"<tr{kind}><th>{html.escape(row['key'])}</th>{cells}</tr>")
    count = sum(row["differs"] for row in rows)
    return (
        f"<p>{count} of {len(rows)} settings differ; they stand first.</p>"
        f"<table><tr><th>key</th><th>REPA</th><th>baseline</th></tr>{''.join(lines)}</table>"
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
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 1rem; }
@media (max-width: 800px) { .pair { grid-template-columns: 1fr; } }
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
