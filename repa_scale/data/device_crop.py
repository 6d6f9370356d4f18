"""The ADM centre crop in torch, on the device where the pixels are: for sets that keep the original pictures.

Pillow's box filter is a mean over whole pixels, found by index; its bicubic filter is torch's with antialiasing. What
differs from crop.py is rounding: by 1 of 255, in less than one value of a thousand (tests/test_decode.py).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from repa_scale.data.crop import resized


def center_crop(image: Tensor, size: int) -> Tensor:
    """(H, W, 3) uint8 of any size -> (size, size, 3) uint8 on the same device; see crop.center_crop."""
    planes = image.permute(2, 0, 1)
    while min(planes.shape[1:]) >= 2 * size:
        planes = _halved(_halved(planes, 2), 1)
    height, width = planes.shape[1:]
    across, down = resized((width, height), size)
    if (down, across) != (height, width):
        planes = _bicubic(planes, down, across)
    top, left = (down - size) // 2, (across - size) // 2
    return planes[:, top : top + size, left : left + size].permute(1, 2, 0)


def _halved(planes: Tensor, axis: int) -> Tensor:
    """Pillow's box filter to half the length, rounded down: means of 2 pixels, of 3 where an odd length needs it."""
    length = planes.shape[axis]
    half = length // 2
    scale = length / half
    shape = [half if i == axis else 1 for i in range(3)]
    centers = (torch.arange(half, dtype=torch.float64) + 0.5) * scale
    # Pillow's bounds, in its own order of operations: where a pixel's middle lies on one, the last bit decides.
    first = (centers - scale / 2 + 0.5).floor().long().clamp(min=0)
    last = (centers + scale / 2 + 0.5).floor().long().clamp(max=length)
    total = torch.zeros((), dtype=torch.int32, device=planes.device)
    count = torch.zeros(shape, dtype=torch.int32, device=planes.device)
    for offset in range(int((last - first).max())):
        pixel = first + offset
        distance = (pixel - centers + 0.5) * (1 / scale)
        inside = (pixel < last) & (distance > -0.5) & (distance <= 0.5)
        inside = inside.int().view(shape).to(planes.device)
        total = total + planes.index_select(axis, pixel.clamp(max=length - 1).to(planes.device)).int() * inside
        count = count + inside
    return ((2 * total + count) // (2 * count)).to(torch.uint8)


def _bicubic(planes: Tensor, height: int, width: int) -> Tensor:
    """Antialiased, in fp32, rounded after each axis, as Pillow does; torch's uint8 filter is far coarser."""
    for shape in ((planes.shape[1], width), (height, width)):
        if tuple(planes.shape[1:]) != shape:
            filtered = F.interpolate(planes[None].float(), shape, mode="bicubic", antialias=True)[0]
            planes = filtered.round().clamp(0, 255).to(torch.uint8)
    return planes
