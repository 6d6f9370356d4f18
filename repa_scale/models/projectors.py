"""Projectors: hidden tokens of the transformer to tokens of the target encoder. A new one is one row of the table."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from repa_scale.errors import ConfigError, did_you_mean


class ConvProjector(nn.Module):
    """iREPA's projector (arXiv 2512.10794): one 3x3 convolution over the tokens laid out as a map."""

    def __init__(self, width: int, out: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.grid = grid
        self.conv = nn.Conv2d(width, out, 3, padding=1)

    def forward(self, tokens: Tensor) -> Tensor:
        """(N, T, D) -> (N, T, z)."""
        n, _, d = tokens.shape
        return self.conv(tokens.transpose(1, 2).reshape(n, d, *self.grid)).flatten(2).transpose(1, 2)


def _mlp(width: int, hidden: int, out: int, grid: tuple[int, int]) -> nn.Module:
    """REPA's projector: three Linears with SiLU between them (REPA, section 4)."""
    layers = (nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, out))
    return nn.Sequential(*layers)


def _linear(width: int, hidden: int, out: int, grid: tuple[int, int]) -> nn.Module:
    return nn.Sequential(nn.Linear(width, out))


def _conv(width: int, hidden: int, out: int, grid: tuple[int, int]) -> nn.Module:
    return ConvProjector(width, out, grid)


PROJECTORS: dict[str, Callable[[int, int, int, tuple[int, int]], nn.Module]] = {
    "mlp": _mlp,
    "linear": _linear,
    "conv": _conv,
}


def build_projector(kind: str, width: int, hidden: int, out: int, grid: tuple[int, int]) -> nn.Module:
    """A module (N, T, D) -> (N, T, z).

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
