"""Interactive charts as pieces of HTML (plotly). Their text and grid take the page's colours, so light and dark fit."""

from __future__ import annotations

from itertools import cycle
from typing import Any

import numpy as np

from repa_scale.compare.cost import AXES

HEIGHT = 340  # pixels of a chart
BASELINE = "#d9692b"
PALETTE = ("#1f8ab8", "#8a6bbf", "#3a9d5d", "#c2497f", "#a07d2c", "#4fb3a5", "#6c7fd8", "#b0574a")
SHARES = {
    "encoder_seconds": ("encoder", "#1f8ab8"),
    "alignment_seconds": ("alignment, forward and backward", "#6fc0df"),
    "latent_seconds": ("latents", "#8a6bbf"),
    "data_wait_seconds": ("waiting for data", "#d9692b"),
}
TITLES = {
    "denoising_loss": "Denoising loss",
    "loss": "Training loss (denoising and weighted alignment)",
    "alignment_loss": "Alignment loss (minus the mean cosine)",
    "grad_norm": "Gradient norm",
    "images_per_second": "Images per second",
}


def colours(result: dict[str, Any]) -> dict[str, str]:
    """By variant; the baseline's is always the same."""
    others = (key for key in result["variants"] if key != result["baseline"])
    return {**dict(zip(others, cycle(PALETTE), strict=False)), result["baseline"]: BASELINE}


def quality(result: dict[str, Any], name: str, axis: str) -> str:
    """One metric against one axis: mean and band over the seeds, and each variant's falling fit."""
    metric, palette = result["metrics"][name], colours(result)
    figure = _figure()
    for key, curve in metric["curves"].items():
        if axis not in curve["spent"]:
            continue
        x, label = curve["spent"][axis], result["variants"][key]["label"]
        colour = palette[key]
        if curve["low"] != curve["high"]:
            figure.add_scatter(
                x=[*x, *reversed(x)],
                y=[*curve["high"], *reversed(curve["low"])],
                fill="toself",
                fillcolor=_faded(colour),
                line={"width": 0},
                hoverinfo="skip",
                showlegend=False,
                legendgroup=key,
            )
        figure.add_scatter(
            x=x, y=curve["fit"], line={"color": colour, "width": 1, "dash": "dot"}, showlegend=False, legendgroup=key,
            name=f"{label}, fit", hoverinfo="skip",
        )  # fmt: skip
        figure.add_scatter(
            x=x, y=curve["mean"], name=label, mode="lines+markers", line={"color": colour, "width": 2.5},
            marker={"size": 7}, legendgroup=key,
        )  # fmt: skip
    final = metric["curves"].get(result["baseline"])
    if final:
        figure.add_hline(y=final["fit"][-1], line={"color": BASELINE, "width": 1, "dash": "dash"}, opacity=0.7)
    if axis == "steps":
        shown = ticks(sorted({step for curve in metric["curves"].values() for step in curve["steps"]}))
        figure.update_xaxes(type="log", tickvals=shown, ticktext=[short(step) for step in shown])
        return drawn(figure, "Against optimiser steps, logarithmic", 420)
    figure.update_xaxes(exponentformat="power" if axis == "flops" else "SI", rangemode="tozero")
    return drawn(figure, f"Against {AXES[axis][0].lower()}{AXES[axis][1:]}", HEIGHT)


def speed_up_by_level(result: dict[str, Any], name: str) -> str:
    """How many times fewer steps each level took, with its interval; bounds are open triangles."""
    palette, metric = colours(result), result["metrics"][name]
    figure = _figure()
    for key, rows in metric["targets"].items():
        for kind, symbol in (
            ("exact", "circle"),
            ("more than", "triangle-up-open"),
            ("less than", "triangle-down-open"),
        ):
            shown = [row for row in rows if row["axes"]["steps"]["kind"] == kind]
            shown.sort(key=lambda row: row["level"])
            steps = [row["axes"]["steps"] for row in shown]
            if not shown:
                continue
            up = [one["high"] - one["ratio"] if one["high"] is not None else 0 for one in steps]
            down = [one["ratio"] - one["low"] if one["low"] is not None else 0 for one in steps]
            label = result["variants"][key]["label"]
            figure.add_scatter(
                x=[row["level"] for row in shown],
                y=[one["ratio"] for one in steps],
                error_y={"type": "data", "array": up, "arrayminus": down, "symmetric": False},
                mode="markers",
                name=label if kind == "exact" else f"{label}: {kind}",
                marker={"symbol": symbol, "size": 10, "color": palette[key]},
            )
    figure.add_hline(y=1, line={"color": "#808080", "width": 1, "dash": "dash"})
    backwards = "reversed" if metric["better"] == "lower" else None
    figure.update_xaxes(autorange=backwards)
    figure.update_yaxes(type="log", tickformat=".3~g")
    return drawn(figure, "Times fewer steps to reach a level (to the right: better ones)", HEIGHT)


def curve(result: dict[str, Any], metric: str, axis: int) -> str:
    """A logged metric of every run over steps (0) or time (1): thin as logged, thick smoothed."""
    palette = colours(result)
    figure = _figure()
    for run, points in result["curves"][metric].items():
        x, y = (np.array([point[i] for point in points]) for i in (axis, 2))  # arrays are drawn and stored faster
        colour, label = palette[result["runs"][run]["variant"]], result["runs"][run]["label"]
        common = {"x": x, "legendgroup": run}
        figure.add_scatter(
            y=y,
            name=f"{label}, as logged",
            line={"color": colour, "width": 1},
            opacity=0.35,
            showlegend=False,
            **common,
        )
        figure.add_scatter(y=np.array(smoothed(y.tolist())), name=label, line={"color": colour, "width": 2.2}, **common)
    if metric in ("images_per_second", "peak_memory_bytes"):
        figure.update_yaxes(rangemode="tozero")
    return drawn(figure, f"{TITLES[metric]} over {('steps', 'time, seconds')[axis]}", HEIGHT)


def step_time(result: dict[str, Any]) -> str:
    """Seconds of a step by phase, of every run."""
    figure = _figure()
    names = [run["label"] for run in result["runs"].values()]
    summaries = list(result["summary"].values())
    for key, (name, colour) in SHARES.items():
        if any(one[key] for one in summaries):
            values = [one[key] or 0.0 for one in summaries]
            figure.add_bar(x=values, y=names, name=name, orientation="h", marker={"color": colour})
    rest = [max(0.0, (one["step_seconds"] or 0.0) - sum(one[key] or 0.0 for key in SHARES)) for one in summaries]
    figure.add_bar(x=rest, y=names, name="rest of the step", orientation="h", marker={"color": "#9a9a9a"})
    figure.update_layout(barmode="stack")
    figure.update_xaxes(rangemode="tozero")
    figure.update_yaxes(autorange="reversed")
    return drawn(figure, "Where the time of a step goes, seconds", 150 + 34 * len(names), legend=-0.35)


def by_depth(result: dict[str, Any], measure: str, title: str) -> str:
    """`cknna`, `cosine` or `probe_accuracy` of the newest measured step of each run, by depth: the best t of each."""
    palette = colours(result)
    figure = _figure()
    for run, measured in result["representation"].items():
        rows = _triples(measured[-1].get(measure)) if measured else []
        best: dict[float, float] = {}
        for depth, _, value in rows:
            best[depth] = max(value, best.get(depth, value))
        if best:
            label, step = result["runs"][run]["label"], measured[-1].get("step")
            depths = sorted(best)
            figure.add_scatter(
                x=depths, y=[best[depth] for depth in depths], mode="lines+markers", name=f"{label}, step {step}",
                line={"color": palette[result["runs"][run]["variant"]]},
            )  # fmt: skip
    figure.update_xaxes(dtick=1 if len(figure.data) and len(figure.data[0].x) < 16 else None)
    return drawn(figure, title, HEIGHT) if figure.data else ""


def by_time(result: dict[str, Any], measure: str, title: str) -> str:
    """The same by t: the best depth of each; of `denoising_loss`, the loss in each bin of t."""
    palette = colours(result)
    figure = _figure()
    for run, measured in result["representation"].items():
        if not measured:
            continue
        found = measured[-1].get(measure)
        best: dict[float, float] = {}
        if measure == "denoising_loss":
            best = {(low + high) / 2: value for low, high, value, *_ in found or []}
        else:
            for _, t, value in _triples(found):
                best[t] = max(value, best.get(t, value))
        if best:
            times = sorted(best)
            figure.add_scatter(
                x=times, y=[best[t] for t in times], mode="lines+markers",
                name=f"{result['runs'][run]['label']}, step {measured[-1].get('step')}",
                line={"color": palette[result["runs"][run]["variant"]]},
            )  # fmt: skip
    return drawn(figure, title, HEIGHT) if figure.data else ""


def ticks(steps: list[float]) -> list[float]:
    """Of the steps, which are written on a logarithmic axis: each at least a quarter above the one before."""
    shown = steps[-1:]
    for step in reversed(steps[:-1]):
        if step * 1.28 <= shown[0]:
            shown.insert(0, step)
    return shown


def short(step: float) -> str:
    """`25K`."""
    for unit, name in ((1e6, "M"), (1e3, "K")):
        if step >= unit:
            return f"{step / unit:g}{name}"
    return f"{step:g}"


def smoothed(values: list[float], window: float = 0.1) -> list[float]:
    """An exponential average over about `window` of the rows, corrected for its start."""
    decay = 1 - 1 / max(1.0, window * len(values))
    total = weight = 0.0
    result = []
    for value in values:
        total, weight = decay * total + (1 - decay) * value, decay * weight + (1 - decay)
        result.append(total / weight)
    return result


def drawn(figure: Any, title: str, height: int, legend: float = -0.16) -> str:
    """The title stands in the page, where it wraps on a phone; the background is the page's."""
    import html

    figure.update_layout(
        height=height,
        margin={"l": 55, "r": 12, "t": 10, "b": 45},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": "system-ui, sans-serif", "size": 13},
        legend={"orientation": "h", "y": legend, "yanchor": "top", "traceorder": "normal"},
        hovermode="closest",
    )
    figure.update_xaxes(automargin=True)
    figure.update_yaxes(automargin=True)
    options = {"displaylogo": False, "responsive": True, "displayModeBar": False}
    piece = figure.to_html(full_html=False, include_plotlyjs=False, config=options)
    return f"<figure class=chart><figcaption>{html.escape(title)}</figcaption>{piece}</figure>"


def _triples(rows: Any) -> list[tuple[float, float, float]]:
    """[depth, t, value, ...] of each row that has all three."""
    return [(row[0], row[1], row[2]) for row in rows or [] if len(row) >= 3 and None not in row[:3]]


def _figure() -> Any:
    import plotly.graph_objects as graph

    return graph.Figure()


def _faded(colour: str) -> str:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.18)"
