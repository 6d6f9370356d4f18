"""Sheets of images as PNG files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

# Pixels.
GAP = 4  # between images of a sheet
BETWEEN = 24  # between sheets
TITLE = 32  # height of a title


def sheet(images: np.ndarray, columns: int, captions: Sequence[str] = (), scale: int = 0) -> Image.Image:
    """Lays images out in rows.

    Args:
        images: (N, H, W, 3) uint8.
        captions: one a image, drawn under it; or none.
        scale: whole-number magnification without smoothing; 0: so that a small image becomes at least 64 pixels wide.
    """
    count, height, width, _ = images.shape
    scale = scale or max(1, -(-64 // width))
    cell_w, cell_h = width * scale + GAP, height * scale + GAP + (12 if captions else 0)
    rows = -(-count // columns)
    page = Image.new("RGB", (columns * cell_w + GAP, rows * cell_h + GAP), "white")
    draw = ImageDraw.Draw(page)
    for i, image in enumerate(images):
        x, y = GAP + i % columns * cell_w, GAP + i // columns * cell_h
        page.paste(Image.fromarray(image).resize((width * scale, height * scale), Image.Resampling.NEAREST), (x, y))
        if captions:
            draw.text((x, y + height * scale), str(captions[i]), fill="black")
    return page


def beside(pages: Sequence[Image.Image], titles: Sequence[str]) -> Image.Image:
    """Pictures next to each other, each under its title."""
    font = ImageFont.load_default(20)
    width, height = sum(p.width for p in pages) + BETWEEN * (len(pages) - 1), max(p.height for p in pages)
    page = Image.new("RGB", (width, TITLE + height), "white")
    draw = ImageDraw.Draw(page)
    x = 0
    for picture, title in zip(pages, titles, strict=True):
        draw.text((x + GAP, GAP), title, fill="black", font=font)
        page.paste(picture, (x, TITLE))
        x += picture.width + BETWEEN
    return page


def save_sheet(images: np.ndarray, path: Path, columns: int = 0, captions: Sequence[str] = ()) -> None:
    """Writes `sheet` to `path`, whole or not at all. `columns` 0: a square."""
    save(sheet(images, columns or max(1, round(len(images) ** 0.5)), captions), path)


def save(page: Image.Image, path: Path) -> None:
    """Writes a PNG, whole or not at all."""
    temporary = path.with_suffix(".tmp")
    page.save(temporary, format="PNG")
    temporary.replace(path)
