"""How the similarity of patch tokens depends on where they lie: the measures that iREPA found to predict generation.

Singh et al., "What matters for Representation Alignment: Global Information or Spatial Structure?" (arXiv 2512.10794,
section 4 and its public code). All are means over an image of cosines of its tokens, in float32. The fourth measure of
the paper (similarity within a segment) needs segmentation masks and is not here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# Of the paper's 16 x 16 tokens. Other grids take the same part of the picture.
SIDE, FAR, REACH = 16, 6, 8


@dataclass(frozen=True)
class Spatial:
    """One value an image, (N,) float32 each; nan where a measure needs more tokens than there are.

    Attributes:
        lds: local against distant similarity: mean cosine of tokens side by side, minus that of tokens at least `far`
            apart.
        cds: decay of the similarity: minus the slope of a line through the mean cosines at distances 1 to `reach`.
        rmsc: contrast: the root mean square distance of the tokens of length 1 from their mean.
    """

    lds: Tensor
    cds: Tensor
    rmsc: Tensor


def distances(grid: tuple[int, int]) -> tuple[int, int]:
    """`far` and `reach` of a grid (down, across), in tokens, by its shorter side: 6 and 8 at 16 x 16."""
    side = min(grid)
    return max(2, round(FAR * side / SIDE)), max(2, round(REACH * side / SIDE))


def spatial(tokens: Tensor, grid: tuple[int, int]) -> Spatial:
    """The measures of each image. Distances are those of city blocks: |rows| + |columns|.

    Args:
        tokens: (N, T, D) float, row by row.
        grid: (down, across), T = down * across.
    """
    unit = F.normalize(tokens.float(), dim=-1)
    n, t, _ = unit.shape
    far, reach = distances(grid)
    apart = _apart(grid, unit.device)
    cosines = (unit @ unit.transpose(1, 2)).view(n, t * t)
    # The mean cosine at each distance: one matrix product, and no mask of (N, T, T).
    last = int(apart.max())
    member = F.one_hot(apart.flatten(), last + 1).to(cosines.dtype)
    sums, counts = cosines @ member, member.sum(dim=0)
    means = sums / counts
    nan = torch.full((n,), torch.nan, device=unit.device)
    lds = means[:, 1] - sums[:, far:].sum(dim=1) / counts[far:].sum() if last >= far else nan
    reach = min(reach, last)
    at = torch.arange(1, reach + 1, dtype=cosines.dtype, device=unit.device)
    centred = at - at.mean()
    cds = -(means[:, 1 : reach + 1] @ centred) / centred.square().sum() if reach > 1 else nan
    contrast = unit - unit.mean(dim=1, keepdim=True)
    return Spatial(lds, cds, contrast.square().sum(dim=-1).mean(dim=1).sqrt())


def _apart(grid: tuple[int, int], device: torch.device) -> Tensor:
    """(T, T) int64, rows plus columns between two tokens."""
    row, column = (axis.flatten() for axis in torch.meshgrid(*(torch.arange(side) for side in grid), indexing="ij"))
    return ((row[:, None] - row).abs() + (column[:, None] - column).abs()).to(device)
