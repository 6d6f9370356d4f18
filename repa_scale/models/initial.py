"""Initial weights by name, from the counter-based generator: any slice of any parameter, the same bits everywhere.

A ZeRO rank makes only the elements that it owns, and a REPA run and its baseline begin with the same backbone.
"""

from __future__ import annotations

import math
import re

import torch
from torch import Tensor, nn

from repa_scale import rng

EMBEDDING_STD = 0.02

# The first pattern that a name matches decides (SiT's initialisation; REPA's public code initialises projectors alike).
RULES: tuple[tuple[str, str], ...] = (
    (r"(blocks\.\d+|final_layer)\.adaLN_modulation\.1\.(weight|bias)", "zero"),  # adaLN-Zero
    (r"final_layer\.linear\.(weight|bias)", "zero"),
    (r"t_embedder\.mlp\.[02]\.weight", "normal"),
    (r"y_embedder\.embedding_table\.weight", "normal"),
    (r"blocks\.\d+\.attn\.[qk]_norm\.weight", "one"),
    (r".*\.bias", "zero"),
    (r"x_embedder\.proj\.weight", "xavier"),
    (r"blocks\.\d+\.(attn\.(qkv|proj)|mlp\.fc[12])\.weight", "xavier"),
    (r"projectors\..+\.weight", "xavier"),
)


def initial_values(
    name: str, shape: tuple[int, ...], start: int, stop: int, seed: int, device: torch.device | str = "cpu"
) -> Tensor:
    """Elements [start, stop) of the flattened initial parameter -> (stop - start,) float32.

    Args:
        name: the public name; a prefix `model.` does not matter.
        shape: of the whole parameter.

    Raises:
        KeyError: no rule covers the name.
    """
    name = name.removeprefix("model.")
    rule = next((rule for pattern, rule in RULES if re.fullmatch(pattern, name)), None)
    purpose = f"initial {name}"
    if rule == "zero":
        return torch.zeros(stop - start, device=device)
    if rule == "one":
        return torch.ones(stop - start, device=device)
    if rule == "normal":
        return rng.normal_range(seed, purpose, start, stop, device) * EMBEDDING_STD
    if rule == "xavier":
        # Of a convolution the flattened weight (out, in * p * p), as for the patches of a ViT.
        bound = math.sqrt(6.0 / (shape[0] + math.prod(shape[1:])))
        return (rng.uniform_range(seed, purpose, start, stop, device) * 2.0 - 1.0) * bound
    raise KeyError(f"no rule says how to initialise {name}; add one to {__name__}.RULES")


@torch.no_grad()
def initialize(module: nn.Module, seed: int) -> None:
    """Sets every parameter of an unsharded module to its initial values."""
    for name, parameter in module.named_parameters():
        values = initial_values(name, tuple(parameter.shape), 0, parameter.numel(), seed, parameter.device)
        parameter.copy_(values.view_as(parameter))
