"""Sheets of images as PNG files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

GAP = 4  # pixels between images


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


def save_sheet(images: np.ndarray, path: Path, columns: int = 0, captions: Sequence[str] = ()) -> None:
    """Writes `sheet` to `path`, whole or not at all. `columns` 0: a square."""
    temporary = path.with_suffix(".tmp")
    page = sheet(images, columns or max(1, round(len(images) ** 0.5)), captions)
    page.save(temporary, format="PNG")
    temporary.replace(path)
