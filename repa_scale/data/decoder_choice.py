"""The decoder of a run: tried out on every rank, decided once for all of them, and pinned by the pixels it gives."""

from __future__ import annotations

import logging
import platform
from dataclasses import dataclass
from typing import Any

from repa_scale.data.dali import why_not_dali
from repa_scale.errors import UserError
from repa_scale.ranks import Ranks

NAMES = {"pillow": "Pillow", "dali": "DALI"}
NEEDS = {"nvjpeg": "nvJPEG needs a GPU", "dali-cpu": "they are those of DALI's CPU decoder"}
log = logging.getLogger("repa_scale")


@dataclass(frozen=True)
class Choice:
    """What was decided.

    Attributes:
        decoder: `pillow` or `dali`.
        pixels: what is pinned (`pixels_of`); None: the run decodes no pictures.
        line: for the log; empty: there was nothing to decide.
        warning: the line tells of something that should be put right.
        replaced: the pixels that the run was pinned to before an explicit `data.decoder`; None: they stay.
    """

    decoder: str
    pixels: str | None = None
    line: str = ""
    warning: bool = False
    replaced: str | None = None

    def tell(self) -> None:
        if self.line:
            log.log(logging.WARNING if self.warning else logging.INFO, self.line)


@dataclass(frozen=True)
class Decoders:
    """What this run could decode with, on all of its ranks.

    Attributes:
        wanted: `data.decoder`.
        pixels: of each decoder (`pixels_of`); empty: the run decodes no pictures.
        gpu: whether DALI would decode on GPUs.
        problem: why DALI cannot be used on the first rank that cannot; empty: it can, or nobody asks for it.
    """

    wanted: str
    pixels: dict[str, str]
    gpu: bool
    problem: str = ""

    @classmethod
    def found(cls, wanted: str, ranks: Ranks, recipe: dict[str, Any], pictures: bool) -> Decoders:
        """Tries DALI on each rank's device, where `wanted` asks for it. Collective.

        Args:
            recipe: of the data set.
            pictures: whether the run decodes any.

        Raises:
            UserError: `wanted` is `dali`, and a rank cannot have it.
        """
        gpu = ranks.device.type == "cuda"
        if not pictures:
            return cls(wanted, {}, gpu)
        asked = wanted == "dali" or (wanted == "auto" and gpu)
        why = why_not_dali(ranks.device) if asked else None
        problem = ""
        for rank, (host, theirs) in enumerate(ranks.gather_objects((platform.node(), why))):
            if theirs and not problem:
                problem = f"rank {rank} on {host}: {theirs}"
        if problem and wanted == "dali":
            raise UserError(f"data.decoder=dali, but {problem}; or use data.decoder=pillow")
        return cls(wanted, {name: pixels_of(name, gpu, recipe) for name in NAMES}, gpu, problem)

    def choose(self, pinned: str | None) -> Choice:
        """The decoder of this start.

        Args:
            pinned: the pixels that the run was trained on so far; None: a new run.

        Raises:
            UserError: `data.decoder=auto`, and none of the decoders at hand gives those pixels.
        """
        if not self.pixels:
            return Choice("pillow")
        if self.wanted != "auto":
            pixels = self.pixels[self.wanted]
            changed = pinned not in (None, pixels)
            line = f"data.decoder={self.wanted}: {NAMES[self.wanted]}"
            if changed:
                line += f"; its pixels ({pixels}) differ from those that this run has trained on ({pinned})"
            return Choice(self.wanted, pixels, line, changed, pinned if changed else None)
        first, reason = self._preferred()
        if pinned is None or pinned == self.pixels[first]:
            line = f"data.decoder=auto: {NAMES[first]}, because {reason}"
            return Choice(first, self.pixels[first], line, bool(self.problem))
        if pinned == self.pixels["pillow"]:
            return Choice("pillow", pinned, "data.decoder=auto: Pillow, because the run has trained on its pixels")
        if pinned == self.pixels["dali"] and not self.gpu:
            remedy = "keep them with data.decoder=dali"
        else:
            remedy = f"they are not available here ({self.problem or NEEDS.get(pinned, 'unknown')}); fix that"
        raise UserError(
            f"data.decoder=auto, but this run has trained on the pixels of {pinned}; {remedy}, or switch to "
            "Pillow's pixels with data.decoder=pillow"
        )

    def _preferred(self) -> tuple[str, str]:
        if not self.gpu:
            return "pillow", "without a GPU loader processes decode as fast"
        if self.problem:
            return "pillow", self.problem
        return "dali", "it decodes on the GPUs"


def pixels_of(decoder: str, gpu: bool, recipe: dict[str, Any]) -> str:
    """`pillow`, `nvjpeg` or `dali-cpu`: decoders of one name give the same pixels to the last bit (docs/data.md).

    Args:
        recipe: of the data set; with layout `keep`, DALI's pictures are cropped by torch instead of Pillow.
    """
    if decoder == "pillow":
        return "pillow"
    if gpu and recipe["format"] != "png":
        return "nvjpeg"
    return "dali-cpu" if recipe.get("layout") == "keep" else "pillow"
