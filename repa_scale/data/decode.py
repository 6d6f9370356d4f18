"""Decode an encoded picture with Pillow, the reference for every other decoder (dali.py).

RGB as Pillow converts it, EXIF orientation not applied, 16 bits cut to the upper 8.
"""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from repa_scale.errors import DataError


def decode(data: bytes, name: str = "image") -> np.ndarray:
    """PNG or JPEG bytes -> (H, W, 3) uint8, by Pillow.

    Raises:
        DataError: it is damaged.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            picture = rgb(image)
            # np.asarray would do the same with one copy more.
            return np.frombuffer(picture.tobytes(), np.uint8).reshape(picture.height, picture.width, 3)
    except (Image.DecompressionBombError, OSError, SyntaxError, ValueError) as error:
        raise DataError(f"{name} cannot be decoded ({error}); check the set with: repa-scale prepare --check") from None


def rgb(picture: Image.Image) -> Image.Image:
    """RGB of 8 bits as Pillow converts it: alpha dropped, palettes looked up; 16-bit grey keeps its upper 8 bits."""
    picture.load()
    if picture.mode.startswith("I"):
        values = np.asarray(picture).astype(np.int64)
        picture = Image.fromarray((values >> (8 if values.max(initial=0) > 255 else 0)).clip(0, 255).astype(np.uint8))
    return picture if picture.mode == "RGB" else picture.convert("RGB")
