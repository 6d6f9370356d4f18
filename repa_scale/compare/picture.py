"""The chart of the headline as a picture, drawn with Pillow: for a README, a slide, a chat. No browser is needed."""

from __future__ import annotations

import math
import textwrap
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from repa_scale.compare.charts import colours, short, smoothed, ticks

WIDTH, HEIGHT = 1200, 720  # pixels
SCALE = 2  # it is drawn larger and then reduced: smooth lines
LEFT, RIGHT, BOTTOM = 110, 40, 90
INK, SOFT, GRID = "#1c1e21", "#5b6068", "#e2e5e9"


def headline_picture(result: dict[str, Any]) -> Image.Image:
    """Quality against steps with bands over the seeds; without an evaluation, the smoothed denoising losses."""
    series, title, log = _series(result)
    page = Image.new("RGB", (WIDTH * SCALE, HEIGHT * SCALE), "white")
    draw = ImageDraw.Draw(page, "RGBA")
    big, small = (ImageFont.load_default(size * SCALE) for size in (24, 17))
    lines = textwrap.wrap(result["headline"], 88)[:4]
    for i, line in enumerate(lines):
        draw.text((LEFT // 2 * SCALE, (20 + 32 * i) * SCALE), line, fill=INK, font=big)
    top = 40 + 32 * len(lines) + 30
    names = [(one["label"], one["colour"]) for one in series]
    x = LEFT
    for label, colour in names:
        draw.ellipse([v * SCALE for v in (x, top - 27, x + 14, top - 13)], fill=colour)
        draw.text(((x + 22) * SCALE, (top - 30) * SCALE), label, fill=INK, font=small)
        x += 50 + draw.textlength(label, font=small) / SCALE
    box = (LEFT, top, WIDTH - RIGHT, HEIGHT - BOTTOM)
    if series:
        _plot(draw, box, series, log, small)
    draw.text((LEFT * SCALE, (HEIGHT - 38) * SCALE), f"{title}, against optimiser steps", fill=SOFT, font=small)
    return page.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS)


def _series(result: dict[str, Any]) -> tuple[list[dict[str, Any]], str, bool]:
    palette = colours(result)
    name = result["verdict"]["metric"] or next(iter(result["metrics"]), None)
    if name and result["metrics"][name]["curves"]:
        metric = result["metrics"][name]
        series = [
            {"x": one["steps"], "y": one["mean"], "low": one["low"], "high": one["high"], "colour": palette[key],
             "label": result["variants"][key]["label"]}
            for key, one in metric["curves"].items()
        ]  # fmt: skip
        return series, f"{metric['title']}, {metric['better']} is better", True
    series = []
    for run, points in result["curves"]["denoising_loss"].items():
        y = smoothed([point[2] for point in points])
        colour, label = palette[result["runs"][run]["variant"]], result["runs"][run]["label"]
        series.append(
            {"x": [point[0] for point in points], "y": y, "low": y, "high": y, "colour": colour, "label": label}
        )
    return series, "Denoising loss, smoothed", False


def _plot(draw: ImageDraw.ImageDraw, box: tuple, series: list[dict[str, Any]], log: bool, font: Any) -> None:
    left, top, right, bottom = box
    xs = [x for one in series for x in one["x"]]
    ys = [y for one in series for end in ("low", "high") for y in one[end]]
    at = math.log if log else float
    x0, x1 = at(min(xs)), at(max(xs))
    x0, x1 = (x0, x1) if x1 > x0 else (x0 - 1, x1 + 1)
    y0, y1 = min(ys), max(ys)
    pad = 0.06 * (y1 - y0) or abs(y0) * 0.1 or 1.0
    y0, y1 = y0 - pad, y1 + pad

    def point(x: float, y: float) -> tuple[float, float]:
        across = left + (at(x) - x0) / (x1 - x0) * (right - left)
        return across * SCALE, (bottom - (y - y0) / (y1 - y0) * (bottom - top)) * SCALE

    for y in _ticks(y0, y1):
        _, height = point(min(xs), y)
        draw.line((left * SCALE, height, right * SCALE, height), fill=GRID, width=SCALE)
        draw.text(((left - 12) * SCALE, height), f"{y:g}", fill=SOFT, font=font, anchor="rm")
    for x in ticks(sorted(set(xs))) if log else _ticks(min(xs), max(xs)):
        across, _ = point(x, y0)
        draw.line((across, top * SCALE, across, bottom * SCALE), fill=GRID, width=SCALE)
        draw.text((across, (bottom + 10) * SCALE), short(x), fill=SOFT, font=font, anchor="mt")
    for one in series:
        colour = one["colour"]
        if one["low"] != one["high"]:
            low = [point(x, y) for x, y in zip(one["x"], one["low"], strict=True)]
            high = [point(x, y) for x, y in zip(one["x"], one["high"], strict=True)]
            if len(low) > 1:
                draw.polygon([*high, *reversed(low)], fill=colour + "30")
        line = [point(x, y) for x, y in zip(one["x"], one["y"], strict=True)]
        if len(line) > 1:
            draw.line(line, fill=colour, width=4 * SCALE, joint="curve")
        for x, y in line if len(line) <= 50 else []:
            draw.ellipse((x - 6 * SCALE, y - 6 * SCALE, x + 6 * SCALE, y + 6 * SCALE), fill=colour)


def _ticks(low: float, high: float) -> list[float]:
    """About six round values."""
    rough = (high - low) / 6 or 1.0
    unit = 10 ** math.floor(math.log10(rough))
    step = next(unit * k for k in (1, 2, 5, 10) if unit * k >= rough)
    return [round(step * i, 12) for i in range(math.ceil(low / step), math.floor(high / step) + 1)]
