"""SiT, the diffusion transformer that is trained (SiT paper, section 3), under the public weight names.

Nothing is initialised here beyond what torch's layers do: initial.py gives the values. Under ZeRO-3 a parameter has
shape (0,) outside its module's forward pass, so no forward pass here reads a parameter's shape.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

FREQUENCIES = 256  # of the time embedding


class SiT(nn.Module):
    """Velocity of a noisy latent, and the hidden tokens at the depths asked for.

    Args:
        input_size: latent pixels an axis; `input_size / patch_size` tokens an axis.
        num_classes: 0 for unlabelled data. The label `num_classes` is the null label.
        mlp_ratio: width of a block's MLP over `width`.
        qk_norm: LayerNorm on queries and keys.
    """

    def __init__(
        self,
        input_size: int,
        patch_size: int,
        in_channels: int,
        depth: int,
        width: int,
        heads: int,
        num_classes: int,
        mlp_ratio: float = 4.0,
        qk_norm: bool = False,
    ) -> None:
        super().__init__()
        self.patch_size, self.in_channels, self.grid = patch_size, in_channels, input_size // patch_size
        self.num_classes = num_classes
        self.checkpointing = False  # recompute each block's activations in the backward pass
        self.x_embedder = PatchEmbedder(patch_size, in_channels, width)
        self.t_embedder = TimeEmbedder(width)
        self.y_embedder = LabelEmbedder(num_classes, width)
        self.register_buffer("pos_embed", position_table(self.grid, width))
        self.blocks = nn.ModuleList(SiTBlock(width, heads, mlp_ratio, qk_norm) for _ in range(depth))
        self.final_layer = FinalLayer(width, patch_size * patch_size * in_channels)

    def forward(
        self, x: Tensor, t: Tensor, labels: Tensor, depths: Sequence[int] = ()
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """The model's velocity, and hidden tokens.

        Args:
            x: (N, C, H, W) float, the noisy latent x_t.
            t: (N,) float in [0, 1], 0 = data, 1 = noise.
            labels: (N,) int64; `num_classes` is the null label.
            depths: blocks, counted from 1, behind which the hidden tokens are wanted.

        Returns:
            (N, C, H, W) velocity in the weights' dtype, and {depth: (N, T, D)}.
        """
        dtype = self.x_embedder.proj.weight.dtype
        tokens = self.x_embedder(x.to(dtype)) + self.pos_embed.to(dtype)
        c = self.t_embedder(t, dtype) + self.y_embedder(labels)
        hidden = {}
        for number, block in enumerate(self.blocks, start=1):
            if self.checkpointing and torch.is_grad_enabled():
                tokens = checkpoint(block, tokens, c, use_reentrant=False)
            else:
                tokens = block(tokens, c)
            if number in depths:
                hidden[number] = tokens
        return self._unpatchify(self.final_layer(tokens, c)), hidden

    def _unpatchify(self, tokens: Tensor) -> Tensor:
        """(N, T, p * p * C) -> (N, C, H, W)."""
        n, g, p = tokens.shape[0], self.grid, self.patch_size
        x = tokens.view(n, g, g, p, p, self.in_channels)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(n, self.in_channels, g * p, g * p)


class PatchEmbedder(nn.Module):
    """Patches to tokens, row by row: (N, C, H, W) -> (N, T, D)."""

    def __init__(self, patch_size: int, in_channels: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, width, patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class TimeEmbedder(nn.Module):
    """Sinusoidal features of t, then a small MLP: (N,) -> (N, D)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))
        # None but in an exported program, whose constants move to a device only as buffers. Elsewhere they are computed
        # where t is: a buffer would be cast to the weights' dtype, and not be filled when the model is built on `meta`.
        self.register_buffer("frequencies", None, persistent=False)

    def forward(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        return self.mlp(time_features(t, self.frequencies).to(dtype))


class LabelEmbedder(nn.Module):
    """A table of classes, the last row for the null label: (N,) int64 -> (N, D)."""

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, width)

    def forward(self, labels: Tensor) -> Tensor:
        return self.embedding_table(labels)


class SiTBlock(nn.Module):
    """Attention and MLP with adaLN-Zero: tokens (N, T, D), condition c (N, D) -> (N, T, D)."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, qk_norm: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(width, heads, qk_norm)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(width, int(width * mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = self.adaLN_modulation(c).unsqueeze(1).chunk(6, dim=-1)
        x = x + gate_1 * self.attn(self.norm1(x) * (1 + scale_1) + shift_1)
        return x + gate_2 * self.mlp(self.norm2(x) * (1 + scale_2) + shift_2)


class Attention(nn.Module):
    """Multi-head self-attention: (N, T, D) -> (N, T, D)."""

    def __init__(self, width: int, heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = nn.LayerNorm(width // heads, eps=1e-5) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(width // heads, eps=1e-5) if qk_norm else nn.Identity()
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, t, d = x.shape
        q, k, v = self.qkv(x).view(n, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v)
        return self.proj(out.transpose(1, 2).reshape(n, t, d))


class Mlp(nn.Module):
    """Linear, tanh GELU, Linear."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class FinalLayer(nn.Module):
    """Tokens to patches: (N, T, D), (N, D) -> (N, T, p * p * C)."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(width, out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).unsqueeze(1).chunk(2, dim=-1)
        return self.linear(self.norm_final(x) * (1 + scale) + shift)


def time_features(t: Tensor, frequencies: Tensor | None = None) -> Tensor:
    """(N,) in [0, 1] -> (N, 256) float32: cosines, then sines, of t at `time_frequencies`."""
    frequencies = time_frequencies(t.device) if frequencies is None else frequencies
    angles = t.float()[:, None] * frequencies[None]
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def time_frequencies(device: torch.device | str) -> Tensor:
    """(128,) float32: a geometric series from 1 to 1/10000."""
    half = FREQUENCIES // 2
    steps = torch.arange(half, dtype=torch.float32, device=device)
    return torch.exp(-math.log(10000) * steps / half)


def position_table(grid: int, width: int) -> Tensor:
    """The fixed 2-D sine-cosine table (1, grid * grid, width) float32, computed in float64.

    The first half of the channels encodes the column, the second the row; in each, sines before cosines. It goes
    through numpy because DeepSpeed's zero.Init patches torch's constructors to the run's dtype, which would round it.
    """
    row, column = np.divmod(np.arange(grid * grid, dtype=np.float64), grid)
    frequency = 1.0 / 10000 ** (np.arange(width // 4, dtype=np.float64) / (width // 4))
    angles = [np.outer(coordinate, frequency) for coordinate in (column, row)]
    table = np.concatenate([f(angle) for angle in angles for f in (np.sin, np.cos)], axis=1)
    return torch.from_numpy(table.astype(np.float32))[None]
