"""Features of a set of images on all ranks: their moments, and as many of them as a metric needs. No metric here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from repa_scale.errors import DataError
from repa_scale.evaluate.image_sets import ImageSet
from repa_scale.extractors import Extractor
from repa_scale.metrics.frechet import Moments
from repa_scale.ranks import Ranks

CHUNK = 2048  # features that go into the moments at once: one matrix product of a good size


@dataclass(frozen=True)
class Features:
    """What is known of a set's features.

    Attributes:
        name, fingerprint: of the set; count: of its images, 0 where only their statistics are known.
        moments: by part (`pool`, `spatial`), of all images.
        kept: by part, float32 rows in the order of the images, on rank 0; of all images or of a selection.
    """

    name: str
    fingerprint: str
    count: int
    moments: dict[str, Moments] = field(default_factory=dict)
    kept: dict[str, Tensor] = field(default_factory=dict)


def collect(
    images: ImageSet,
    extractor: Extractor,
    ranks: Ranks,
    batch: int,
    keep: dict[str, Tensor | None],
    progress: Callable[[int], object],
    fingerprint: str = "",
) -> Features:
    """Runs the extractor over the set; each rank over its consecutive share. Memory: the kept rows, and a batch.

    Args:
        keep: part -> numbers of the images whose features are kept (ascending); None: all.
        progress: called with the images done since the last call.

    Raises:
        DataError: an image cannot be used, or its features are not finite.
    """
    if images.count < ranks.world_size:
        raise DataError(f"{images.name} has {images.count} images for {ranks.world_size} processes; start fewer")
    start, stop = (images.count * (ranks.rank + i) // ranks.world_size for i in (0, 1))
    kept: dict[str, Tensor] = {}
    places = {part: torch.arange(images.count) if chosen is None else chosen for part, chosen in keep.items()}
    mine = {part: chosen[(chosen >= start) & (chosen < stop)] for part, chosen in places.items()}
    moments: dict[str, Moments] = {}
    waiting: dict[str, list[Tensor]] = {}
    done, waited = start, 0
    for block in images.read(start, stop, batch):
        pictures = torch.from_numpy(block.copy() if not block.flags.writeable else block).to(ranks.device)
        parts = extractor.parts(pictures.permute(0, 3, 1, 2))
        for part, values in parts.items():
            if not torch.isfinite(values).all():
                bad = done + int((~torch.isfinite(values)).any(1).nonzero()[0])
                raise DataError(
                    f"{images.name}: the features of image {bad} are not finite; are these the weights of "
                    f"--extractor {extractor.name}, and is the image whole?"
                )
            if part in mine:
                here = (mine[part] >= done) & (mine[part] < done + len(values))
                rows = mine[part][here] - done
                if part not in kept:
                    kept[part] = torch.empty(len(mine[part]), values.shape[1])
                kept[part][here] = values[rows.to(values.device)].cpu()
            if part != "logits":
                moments.setdefault(part, Moments.empty(values.shape[1], values.device))
                waiting.setdefault(part, []).append(values)
        done += len(block)
        waited += len(block)
        if waited >= CHUNK or done == stop:
            for part, values in waiting.items():
                moments[part] = moments[part].add(torch.cat(values))
            waiting, waited = {}, 0
        progress(len(block))
    return Features(
        images.name,
        fingerprint,
        images.count,
        {part: value.merge_ranks() for part, value in moments.items()},
        {part: _to_main(rows, ranks) for part, rows in kept.items()},
    )


def _to_main(rows: Tensor, ranks: Ranks) -> Tensor:
    """All ranks' rows, in order, on rank 0; elsewhere its own."""
    if ranks.world_size == 1:
        return rows
    counts = ranks.gather_objects(len(rows))
    padded = torch.zeros(max(counts), rows.shape[1], device=ranks.device)
    padded[: len(rows)] = rows.to(ranks.device)
    boxes = [torch.empty_like(padded) for _ in counts] if ranks.is_main else None
    dist.gather(padded, boxes, dst=0)
    if boxes is None:
        return rows
    return torch.cat([box[:count].cpu() for box, count in zip(boxes, counts, strict=True)])
