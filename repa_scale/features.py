"""Makes the features that lie beside the pictures of a set: VAE moments and encoder tokens, by the frozen networks.

The same networks as in training (frozen.py). The VAE computes in fp32, on a GPU too, where a 16-bit run would use
TF32: moments are made once. Encoders compute in fp32 on a CPU and in the stored 16-bit type on a GPU. Each feature
records which. How they are stored is data/features.py's business.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor, nn

from repa_scale import arithmetic, devices
from repa_scale.config import Config
from repa_scale.data.features import DTYPES, FLIPPED, MOMENTS_DTYPES, TOKENS_DTYPES, Stored, base_name
from repa_scale.encoders import Encoder, build_encoder
from repa_scale.errors import ConfigError
from repa_scale.latents import Latents, build_latents
from repa_scale.sizes import encoder_spec, latent_grid, latent_spec

TOKEN_PIXELS = 16  # an axis: an f8 VAE and patches of 2, the field's usual grid


def parse_network(text: str) -> tuple[str, str]:
    """`NAME` or `NAME=WEIGHTS` -> name and weights (`hub` by default)."""
    name, _, weights = text.partition("=")
    return name, weights or "hub"


class FeatureNetworks:
    """The networks of a preparation.

    Args:
        size: pixels an axis of the cropped pictures.
        moments: name and weights of a latent space, or None.
        tokens: name and weights of each encoder.
        grid: tokens an axis.
        flip: features of the mirrored picture too.

    Raises:
        ConfigError: an unknown name, a type that would lose too much, or sizes that do not fit.
        UserError: weights that cannot be had.
    """

    def __init__(
        self,
        size: int,
        moments: tuple[str, str] | None,
        tokens: list[tuple[str, str]],
        *,
        moments_dtype: str,
        tokens_dtype: str,
        grid: int | None,
        flip: bool,
        device: torch.device,
    ) -> None:
        self.flip, self.device = flip, device
        self.latents = None if moments is None else _build_latents(size, *moments, device)
        self.encoders: list[Encoder] = []
        self.stored: list[Stored] = []
        if moments is not None:
            shape = moments_shape(size, moments[0])
            digest = weights_sha256(self.latents.vae)
            used = arithmetic.name(device, "fp32")
            self.stored.append(Stored("moments", moments[0], base_name(moments[1]), digest, moments_dtype, shape, used))
        kind = tokens_arithmetic(tokens_dtype, device)
        used, dtype = arithmetic.name(device, kind), DTYPES[kind]
        for name, weights in tokens:
            shape = tokens_shape(size, name, grid)
            side = int(shape[0] ** 0.5)
            encoder = build_encoder(name, weights, (side, side), "cpu", torch.float32)
            digest = weights_sha256(encoder.network)
            self.encoders.append(encoder.to(device=device, dtype=dtype))
            self.stored.append(Stored("tokens", name, base_name(weights), digest, tokens_dtype, shape, used))

    def __call__(self, pictures: np.ndarray) -> list[dict[str, bytes] | str]:
        """(N, S, S, 3) uint8 -> the columns of each picture, or the reason why it has none."""
        images = torch.from_numpy(pictures).to(self.device).permute(0, 3, 1, 2).contiguous()
        columns: list[dict[str, bytes] | str] = [{} for _ in pictures]
        for suffix, seen in [("", images)] + ([(FLIPPED, images.flip(3))] if self.flip else []):
            for stored, values in zip(self.stored, self._values(seen), strict=True):
                for i, data in enumerate(stored.pack(values)):
                    if data is None:
                        columns[i] = f"its {stored.kind} of {stored.network} are not finite in {stored.dtype}"
                    elif isinstance(columns[i], dict):
                        columns[i][stored.column + suffix] = data
        return columns

    @torch.no_grad()
    def _values(self, images: Tensor) -> list[Tensor]:
        with arithmetic.within("fp32"):
            values = [] if self.latents is None else [self.latents.encode(images)]
            return values + [encoder(images) for encoder in self.encoders]


def tokens_arithmetic(stored: str, device: torch.device) -> str:
    """What encoders compute in, for tokens stored as `stored`: a CPU is slower in 16 bits than in fp32."""
    return ("fp16" if stored == "fp16" else "bf16") if devices.on_gpu(device) else "fp32"


def plan_features(
    size: int,
    moments: tuple[str, str] | None,
    tokens: list[tuple[str, str]],
    moments_dtype: str,
    tokens_dtype: str,
    grid: int | None,
) -> list[Stored]:
    """The same without networks, for the sizes: `weights_sha256` stays empty. Raises `ConfigError` as above."""
    if moments_dtype not in MOMENTS_DTYPES:
        raise ConfigError(
            f"--moments-dtype {moments_dtype} would round the posterior away; use {' or '.join(MOMENTS_DTYPES)}"
        )
    if tokens_dtype not in TOKENS_DTYPES:
        raise ConfigError(f"--tokens-dtype {tokens_dtype} is not known; use {', '.join(TOKENS_DTYPES)}")
    stored = []
    if moments is not None:
        shape = moments_shape(size, moments[0])
        stored.append(Stored("moments", moments[0], base_name(moments[1]), "", moments_dtype, shape))
    if len({name for name, _ in tokens}) < len(tokens):
        raise ConfigError("--tokens names an encoder twice; name each once")
    for name, weights in tokens:
        stored.append(Stored("tokens", name, base_name(weights), "", tokens_dtype, tokens_shape(size, name, grid)))
    return stored


def moments_shape(size: int, name: str) -> tuple[int, int, int]:
    """Mean and standard deviation of a VAE with a posterior, else the latent."""
    channels, height, width = latent_grid(size, name)
    return (2 * channels if latent_spec(name).kind == "kl" else channels), height, width


def tokens_shape(size: int, name: str, grid: int | None) -> tuple[int, int]:
    """(tokens, width) of an encoder for pictures of `size` pixels."""
    width = encoder_spec(name).width
    if grid is None and size % TOKEN_PIXELS:
        raise ConfigError(
            f"--tokens: --size {size} is no multiple of {TOKEN_PIXELS}; give --token-grid, the transformer's patches "
            "an axis"
        )
    side = grid or size // TOKEN_PIXELS
    if not 1 <= side <= 256:
        raise ConfigError(f"--token-grid {side} must lie between 1 and 256")
    return side * side, width


def weights_sha256(network: nn.Module | None) -> str:
    """16 hex digits that stand for the values of all tensors; empty for no network."""
    if network is None:
        return ""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _build_latents(size: int, name: str, weights: str, device: torch.device) -> Latents:
    config = Config()
    config.latents.name, config.latents.weights = name, weights
    config.data.image_size = size
    return build_latents(config, device, torch.float32)
