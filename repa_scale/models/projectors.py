"""Projectors: hidden tokens of the transformer to tokens of the target encoder. A new one is one row of the table.

Given a target, a projector returns the loss instead of the tokens: the fused kernel reads the projector's weights, and
ZeRO-3 gathers them for the forward pass of the module that holds them.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from repa_scale.errors import ConfigError, did_you_mean
from repa_scale.kernels import cosine_loss, projector_cosine_loss


class Projector(nn.Sequential):
    """Layers in a row, (N, T, D) -> (N, T, z)."""

    def forward(self, tokens: Tensor, target: Tensor | None = None, kernel: str = "auto") -> Tensor:
        """The projected tokens; or their alignment loss for each image, (N,), if there is a target (N, T, z)."""
        if target is None:
            return super().forward(tokens)
        return projector_cosine_loss(tokens, self, target, reduction="image", kernel=kernel)


class ConvProjector(nn.Module):
    """iREPA's projector (arXiv 2512.10794): one 3x3 convolution over the tokens laid out as a map."""

    def __init__(self, width: int, out: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.grid = grid
        self.conv = nn.Conv2d(width, out, 3, padding=1)

    def forward(self, tokens: Tensor, target: Tensor | None = None, kernel: str = "auto") -> Tensor:
        """(N, T, D) -> (N, T, z), or with a target (N, T, z) the alignment loss for each image, (N,)."""
        n, _, d = tokens.shape
        # The map is channels-last as it stands, and so is the convolution's output: neither is copied.
        projected = self.conv(tokens.transpose(1, 2).reshape(n, d, *self.grid)).flatten(2).transpose(1, 2)
        # No more is fused: the convolution keeps its input alone, so there is nothing to recompute.
        return projected if target is None else cosine_loss(projected, target, reduction="image", kernel=kernel)


def _mlp(width: int, hidden: int, out: int, grid: tuple[int, int]) -> nn.Module:
    """REPA's projector: three Linears with SiLU between them (REPA, section 4)."""
    layers = (nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, out))
    return Projector(*layers)


def _linear(width: int, hidden: int, out: int, grid: tuple[int, int]) -> nn.Module:
    return Projector(nn.Linear(width, out))


def _conv(width: int, hidden: int, out: int, grid: tuple[int, int]) -> nn.Module:
    return ConvProjector(width, out, grid)


PROJECTORS: dict[str, Callable[[int, int, int, tuple[int, int]], nn.Module]] = {
    "mlp": _mlp,
    "linear": _linear,
    "conv": _conv,
}


def build_projector(kind: str, width: int, hidden: int, out: int, grid: tuple[int, int]) -> nn.Module:
    """A module (N, T, D) -> (N, T, z), or with a target (N, T, z) and a kernel's name -> the loss (N,).

    Args:
        kind: a name of `PROJECTORS`.
        width: D, of the transformer's tokens.
        hidden: width inside the projector, where it has one.
        out: z, of the encoder's tokens.
        grid: tokens (down, across).

    Raises:
        ConfigError: unknown kind.
    """
    if kind not in PROJECTORS:
        raise ConfigError(f"projector={kind} is not a projector{did_you_mean(kind, PROJECTORS)}")
    return PROJECTORS[kind](width, hidden, out, grid)
