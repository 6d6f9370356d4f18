"""What `representation.py` found, for people and programs: tables, a picture, OUT.json and the run's evaluations."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from repa_scale.errors import ConfigError
from repa_scale.evaluations import Evaluation, append
from repa_scale.files import write_atomically
from repa_scale.metrics import NORMAL
from repa_scale.pictures import save
from repa_scale.run_folder import read_status

FORMAT = "repa_scale representation 1"
SECTIONS = ("alignment", "linear_probe", "denoising")
TRAINED_ON = {
    "all": "the run was trained on these images: nothing here is held out",
    "some": "the run was trained on some of these images; --unseen leaves them out",
    "none": "the run was not trained on these images",
    "not checked": "another set than the run's; whether it shares images with it could not be looked up",
}
COLOURS = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))  # of the viridis map
CELL, MARGIN, TITLE = (64, 26), 64, 44  # pixels
Grid = tuple[str, list[dict[str, Any]], str]  # title, cells with depth and t, key of the value


def write(result: dict[str, Any], out: Path, home: Path | None) -> None:
    """OUT.json and OUT.png, and lines of RUN/evaluations.jsonl where there is a run.

    Sections that an earlier call wrote for the same checkpoint stay.

    Raises:
        ConfigError: a file cannot be written.
    """
    whole = _with_earlier(result, out)
    whole |= short_form(whole)
    try:
        write_atomically(out, json.dumps(whole, indent=1, allow_nan=False) + "\n")
        save(picture(whole), out.with_suffix(".png"))
        if home is not None:
            for evaluation in scalars(result, home):
                append(home, evaluation)
    except OSError as error:
        raise ConfigError(f"{out} cannot be written ({error.strerror}); name another place with --out") from None
    print(f"{out}, {out.with_suffix('.png').name}")


def _with_earlier(result: dict[str, Any], out: Path) -> dict[str, Any]:
    try:
        earlier = json.loads(out.read_text())
        same = earlier["format"] == FORMAT and all(
            earlier["checkpoint"][key] == result["checkpoint"][key] for key in ("identity_hash", "step", "weights")
        )
    except (OSError, ValueError, KeyError, TypeError):
        return result
    kept = {name: earlier[name] for name in SECTIONS if same and name in earlier and name not in result}
    return {**result, **kept}


def short_form(result: dict[str, Any]) -> dict[str, Any]:
    """The figures as rows of numbers, as the comparison reads them: [depth, t, value ...]; of the loss [from, to, ...].

    A loss on images that the run was trained on goes by another name.
    """
    data = next(result[name]["data"] for name in SECTIONS if name in result)
    checkpoint = result["checkpoint"]
    found: dict[str, Any] = {key: checkpoint[key] for key in ("step", "weights")}
    found |= {"data": data["path"], "data_fingerprint": data["images_fingerprint"], "images": data["images"]}
    if section := result.get("alignment"):
        encoder, scores = next(iter(section["encoders"].items()))
        found |= {"encoder": encoder.partition("=")[0], "cknna": _rows(scores["cknna"], "value")}
        found["cosine"] = _rows(section["cosine"], "mean", "standard_error")
        found["lds"] = [[row["depth"], row["t"], row["lds"]["mean"]] for row in section["spatial"]]
    if section := result.get("linear_probe"):
        found["probe_accuracy"] = _rows(section["cells"], "accuracy", "low", "high")
    if section := result.get("denoising"):
        name = _loss_name(section).removesuffix("_held_out")
        found[name] = [[row[key] for key in ("from", "to", "mean", "standard_error")] for row in section["bins"]]
    return found


def _rows(cells: list[dict[str, Any]], *keys: str) -> list[list]:
    return [[cell["depth"], cell["t"], *(cell[key] for key in keys)] for cell in cells]


def _loss_name(section: dict[str, Any]) -> str:
    seen = section["data"]["trained_on"] in ("all", "some")
    return "denoising_loss_trained_on" if seen else "denoising_loss_held_out"


def scalars(result: dict[str, Any], home: Path) -> list[Evaluation]:
    """The figures that a comparison shows by step, with what must be equal for two of them to be compared."""
    checkpoint, found = result["checkpoint"], []

    def add(metric: str, section: dict, value: float, count: int, interval: tuple | None, **protocol: Any) -> None:
        low, high = interval or (None, None)
        protocol |= {key: section[key] for key in ("depths", "times", "condition", "noise_seed") if key in section}
        protocol |= {"weights": checkpoint["weights"], "trained_on": section["data"]["trained_on"]}
        protocol |= {"reference": section["data"]["images_fingerprint"]}
        attempt = read_status(home).get("attempt", 0)
        found.append(Evaluation(checkpoint["step"], attempt, now, metric, value, count, low, high, protocol))

    now = time.time()
    if section := result.get("alignment"):
        for encoder, scores in section["encoders"].items():
            if scores["best"] is not None:
                images, k = section["data"]["images"], section["neighbours"]
                name, _, weights = encoder.partition("=")
                settings = {"extractor": name, "extractor_weights": weights, "neighbours": k}
                metric = "cknna_best" if len(section["encoders"]) == 1 else f"cknna_best_{name}"
                add(metric, section, scores["best"]["value"], images, None, **settings)
    if section := result.get("linear_probe"):
        best = section["best"]
        count = section["images"]["held_out"]
        add(
            "probe_accuracy_best",
            section,
            best["accuracy"],
            count,
            (best["low"], best["high"]),
            images=section["images"],
        )
    if section := result.get("denoising"):
        mean, error = section["all"]["mean"], NORMAL * (section["all"]["standard_error"] or 0.0)
        count = section["data"]["images"]
        add(_loss_name(section), section, mean, count, (mean - error, mean + error), bins=len(section["bins"]))
    return found


def print_tables(result: dict[str, Any]) -> None:
    """The figures, as tables."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    checkpoint = result["checkpoint"]
    console.print(f"{checkpoint['source']}: step {checkpoint['step']}, {checkpoint['weights']} weights")
    data = next(result[name]["data"] for name in SECTIONS if name in result)
    console.print(f"{data['images']} of {data['of']} images of {data['path']}: {TRAINED_ON[data['trained_on']]}")
    for title, cells, key in grids(result):
        times = sorted({cell["t"] for cell in cells})
        values = {(cell["depth"], cell["t"]): _value(cell[key]) for cell in cells}
        console.print(title)
        table = Table()
        table.add_column("depth", justify="right")
        for t in times:
            table.add_column(f"t={t:g}", justify="right")
        for depth in sorted({cell["depth"] for cell in cells}):
            table.add_row(str(depth), *(_text(values.get((depth, t))) for t in times))
        console.print(table)
    for line in notes(result):
        console.print(line)
    if section := result.get("denoising"):
        console.print("denoising loss by t, with standard error")
        table = Table()
        for name in ("t", "loss", "±"):
            table.add_column(name, justify="right")
        for row in section["bins"]:
            bounds = f"{row['from']:g} to {row['to']:g}"
            table.add_row(bounds, *(_text(row[key], 5) for key in ("mean", "standard_error")))
        table.add_row("all", *(_text(section["all"][key], 5) for key in ("mean", "standard_error")))
        console.print(table)


def notes(result: dict[str, Any]) -> list[str]:
    """What the tables leave out: the best cells, and what they are to be held against."""
    lines = []
    if section := result.get("alignment"):
        for encoder, found in section["encoders"].items():
            best = found["best"]
            if best is None:
                lines.append(f"CKNNA with {encoder}: there is none, one of the two gives all images the same features")
            else:
                place = f"depth {best['depth']}, t={best['t']:g}"
                lines.append(f"CKNNA with {encoder}: best {_text(best['value'])} at {place}")
            lds = _text(found["spatial"]["lds"]["mean"])
            lines.append(f"local against distant similarity of {encoder} itself: {lds}")
    if section := result.get("linear_probe"):
        best, images = section["best"], section["images"]
        lines.append(
            f"linear probe: {best['accuracy']:.1%} [{best['low']:.1%}, {best['high']:.1%}] of {images['held_out']} "
            f"held-out images at depth {best['depth']}, t={best['t']:g}, which {images['choose']} others chose; "
            f"the most frequent class alone gives {section['most_frequent_class']:.1%}"
        )
    return lines


def grids(result: dict[str, Any]) -> list[Grid]:
    """Every figure that there is by depth and time."""
    found: list[Grid] = []
    if section := result.get("alignment"):
        k, images = section["neighbours"], section["data"]["images"]
        for encoder, scores in section["encoders"].items():
            found.append((f"CKNNA with {encoder} (k={k}, {images} images)", scores["cknna"], "value"))
        for name in sorted({row["term"] for row in section["cosine"]}):
            rows = [row for row in section["cosine"] if row["term"] == name]
            found.append((f"cosine of projected and target tokens, term {name}", rows, "mean"))
        found.append(("local against distant similarity of the tokens", section["spatial"], "lds"))
    if section := result.get("linear_probe"):
        found.append(("linear probe, held-out accuracy", section["cells"], "accuracy"))
    return found


def picture(result: dict[str, Any]) -> Image.Image:
    """The grids as heat maps, one below the other, and the denoising loss as a row of its own."""
    maps = grids(result)
    if section := result.get("denoising"):
        rows = [{"depth": "loss", "t": (row["from"] + row["to"]) / 2, "mean": row["mean"]} for row in section["bins"]]
        maps.append(("denoising loss by t (middle of the bin)", rows, "mean"))
    heights = [TITLE + CELL[1] * (1 + len({cell["depth"] for cell in cells})) for _, cells, _ in maps]
    across = max(len({cell["t"] for cell in cells}) for _, cells, _ in maps)
    page = Image.new("RGB", (max(MARGIN + CELL[0] * across + 16, 480), sum(heights) + 16), "white")
    top = 0
    for (title, cells, key), height in zip(maps, heights, strict=True):
        _heat_map(ImageDraw.Draw(page), top, title, cells, key)
        top += height
    return page


def _heat_map(draw: ImageDraw.ImageDraw, top: int, title: str, cells: list[dict[str, Any]], key: str) -> None:
    font, small = ImageFont.load_default(15), ImageFont.load_default(13)
    times, depths = sorted({cell["t"] for cell in cells}), sorted({cell["depth"] for cell in cells})
    values = [value for cell in cells if (value := _value(cell[key])) is not None]
    low, high = min(values, default=0.0), max(values, default=1.0)
    draw.text((8, top + 14), title, fill="black", font=font)
    top += TITLE
    for column, t in enumerate(times):
        draw.text((MARGIN + CELL[0] * column + 8, top + 4), f"{t:g}", fill="black", font=small)
    for line, depth in enumerate(depths, start=1):
        draw.text((8, top + CELL[1] * line + 4), str(depth), fill="black", font=small)
    for cell in cells:
        x, y = MARGIN + CELL[0] * times.index(cell["t"]), top + CELL[1] * (1 + depths.index(cell["depth"]))
        value = _value(cell[key])
        share = 0.0 if value is None or high == low else (value - low) / (high - low)
        colour = (230, 230, 230) if value is None else _colour(share)
        draw.rectangle((x, y, x + CELL[0] - 2, y + CELL[1] - 2), fill=colour)
        draw.text((x + 8, y + 4), _text(value), fill="black" if share > 0.6 or value is None else "white", font=small)


def _colour(share: float) -> tuple[int, int, int]:
    """0 dark, 1 bright."""
    place = share * (len(COLOURS) - 1)
    i = min(int(place), len(COLOURS) - 2)
    return tuple(round(a + (place - i) * (b - a)) for a, b in zip(COLOURS[i], COLOURS[i + 1], strict=True))


def _value(found: Any) -> float | None:
    """A figure, or the mean of one with a standard error."""
    return found["mean"] if isinstance(found, dict) else found


def _text(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
