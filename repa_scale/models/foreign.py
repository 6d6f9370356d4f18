"""Weights of others in our terms: the names and the geometry of public REPA and SiT checkpoints, as pure functions.

The original SiT runs time from noise (0) to data (1) and predicts u = dx/dt along that way; REPA and this package run
it from data to noise. So t_theirs = 1 - t, and v(x, t) = -u(x, 1 - t).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from repa_scale.errors import DataError
from repa_scale.models.sit import FREQUENCIES
from repa_scale.sizes import BACKBONES, PATCH_SIZES

PREFIXES = ("module.", "_orig_mod.")  # of what DDP and torch.compile wrap
FINAL = ("final_layer.linear.weight", "final_layer.linear.bias")


@dataclass(frozen=True)
class Geometry:
    """What a backbone's weights say of its shape.

    Attributes:
        name: a row of sizes.BACKBONES and the patch size.
        size: latent pixels an axis.
        out_channels: `channels`, or twice as many where the second half is a variance that nothing uses.
    """

    name: str
    channels: int
    size: int
    num_classes: int
    qk_norm: bool
    out_channels: int


def our_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without the prefixes of wrappers, and with the blocks of early REPA checkpoints counted through."""
    bare: dict[str, Tensor] = {}
    for name, value in weights.items():
        while prefix := next((p for p in PREFIXES if name.startswith(p)), ""):
            name = name.removeprefix(prefix)
        bare[name] = value
    first = len({found[1] for name in bare if (found := re.match(r"blocks\.(\d+)\.", name))})

    def counted(name: str) -> str:
        found = re.match(r"decoder_blocks\.(\d+)\.(.*)", name)
        return f"blocks.{first + int(found[1])}.{found[2]}" if found else name

    return {counted(name): value for name, value in bare.items()}


def geometry(weights: Mapping[str, Tensor], where: str) -> Geometry:
    """Reads the shape of a backbone off its weights.

    Raises:
        DataError: they are not a SiT's, or of a size that is not in the table.
    """
    try:
        width, channels, patch, across = weights["x_embedder.proj.weight"].shape
        tokens, _ = weights["pos_embed"].shape[-2:]
        rows, _ = weights["y_embedder.embedding_table.weight"].shape
        out = weights[FINAL[0]].shape[0]
    except (KeyError, ValueError) as error:
        raise DataError(
            f"{where} does not hold the weights of a SiT ({error}); give a SiT or REPA checkpoint"
        ) from None
    depth = len({found[1] for name in weights if (found := re.match(r"blocks\.(\d+)\.", name))})
    size = next((name for name, row in BACKBONES.items() if (row.depth, row.width) == (depth, width)), None)
    grid = math.isqrt(tokens)
    if size is None or patch not in PATCH_SIZES or across != patch or grid * grid != tokens or out % (patch * patch):
        raise DataError(
            f"{where} has {depth} blocks of width {width}, patches of {patch} and {tokens} tokens; "
            f"known sizes are {', '.join(BACKBONES)} on square latents"
        )
    return Geometry(
        name=f"{size}/{patch}",
        channels=channels,
        size=grid * patch,
        num_classes=rows - 1,
        qk_norm="blocks.0.attn.q_norm.weight" in weights,
        out_channels=out // (patch * patch),
    )


def from_original_sit(weights: Mapping[str, Tensor], shape: Geometry) -> dict[str, Tensor]:
    """The same model in our direction of time and with `shape.channels` outputs: v(x, t) = -u(x, 1 - t), exactly.

    Only the first Linear of the time embedding and the final Linear change; computed in float64.
    """
    changed = dict(weights)
    time = "t_embedder.mlp.0.weight"
    changed[time] = _reversed_time(weights[time].double()).float()
    for name in FINAL:
        changed[name] = -_first_channels(weights[name].float(), shape.channels, shape.out_channels)
    return changed


def _reversed_time(weight: Tensor) -> Tensor:
    """The Linear on the features of t that gives what `weight` gives on those of 1 - t: (D, 256) float64.

    cos(w (1 - t)) = cos w cos wt + sin w sin wt, and sin(w (1 - t)) = sin w cos wt - cos w sin wt.
    """
    half = FREQUENCIES // 2
    # As time_features has them: rounded to float32.
    w = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32) / half).double()
    of_cos, of_sin = weight[:, :half], weight[:, half:]
    return torch.cat([of_cos * w.cos() + of_sin * w.sin(), of_cos * w.sin() - of_sin * w.cos()], dim=1)


def _first_channels(value: Tensor, channels: int, out_channels: int) -> Tensor:
    """Of each pixel of a patch the first `channels` outputs: (p * p * out_channels, ...) -> (p * p * channels, ...)."""
    pixels = value.view(-1, out_channels, *value.shape[1:])
    return pixels[:, :channels].reshape(-1, *value.shape[1:]).clone()
