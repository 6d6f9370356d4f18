"""How a picture becomes a sample: what is stored of it, in which form. Part of the data fingerprint."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from repa_scale.data.features import Stored

SHARD_BYTES = 1 << 26
PART_ITEMS = (256, 2048)  # at least, for features are slow to make again; at most, for pictures may be tiny
BYTES_A_PIXEL = {"png": 2.0, "jpeg": 0.62}  # of photographs at 256 px: 130 and 40 KB
ORIGINAL_BYTES = 110_000  # of ImageNet's photographs, on average
COLUMNS = {"label": "int", "id": "int", "name": "str"}


@dataclass(frozen=True)
class Recipe:
    """How a picture becomes a sample.

    Attributes:
        size: pixels an axis of the crop; with layout `keep` of the crop that training makes.
        format: `png` or `jpeg`; `original` with layout `keep`.
        quality: of jpeg, which is written 4:4:4; else 0.
        layout: `crop`: the cropped picture is stored; `keep`: the bytes of the source's file.
        features: what is stored beside the picture, computed from the cropped pixels before they are encoded.
        flip: features are stored of the mirrored picture too.
    """

    size: int
    format: str = "png"
    quality: int = 95
    crop: str = "adm"
    version: int = 1
    layout: str = "crop"
    features: tuple[Stored, ...] = ()
    flip: bool = False

    def as_dict(self) -> dict[str, Any]:
        """JSON. What has its default is left out where sets were made before it existed: their fingerprints stay."""
        value: dict[str, Any] = {
            "size": self.size,
            "format": self.format,
            "quality": self.quality,
            "crop": self.crop,
            "version": self.version,
        }
        if self.layout != "crop":
            value["layout"] = self.layout
        if self.features:
            value |= {"features": [stored.as_dict() for stored in self.features], "flip": self.flip}
        return value

    @property
    def columns(self) -> dict[str, str]:
        """Name and MDS encoding of each column."""
        picture = "bytes" if self.layout == "keep" else self.format
        features = {name: "bytes" for stored in self.features for name in stored.columns(self.flip)}
        return {"image": picture, **COLUMNS, **features}

    @property
    def picture_bytes(self) -> float:
        """Bytes of a picture, about."""
        return ORIGINAL_BYTES if self.layout == "keep" else BYTES_A_PIXEL[self.format] * self.size**2

    @property
    def part_items(self) -> int:
        """Source images that are prepared as one piece, which is about one shard."""
        least, most = PART_ITEMS
        return max(least, min(most, int(SHARD_BYTES / (self.picture_bytes + self.feature_bytes))))

    @property
    def feature_bytes(self) -> int:
        """Bytes an image of the features."""
        return sum(stored.bytes for stored in self.features) * (2 if self.flip else 1)
