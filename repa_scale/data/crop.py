"""The centre crop of the ADM code, pixel for pixel."""

from __future__ import annotations

from PIL import Image


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """The middle `size` x `size` pixels of `image` after its short side was brought to `size`.

    Halved with a box filter while the short side is at least twice the target, then bicubic, then cropped (the rule of
    the ADM code, which the public REPA code takes over). An image of `size` x `size` comes back unchanged.

    Args:
        image: of any size; RGB, so that the filters see colours and not palette entries.
        size: pixels an axis.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    image = image.resize(resized(image.size, size), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def resized(shape: tuple[int, int], size: int) -> tuple[int, int]:
    """Width and height with the short side at `size`, rounded as the ADM code does."""
    scale = size / min(shape)
    return round(shape[0] * scale), round(shape[1] * scale)
