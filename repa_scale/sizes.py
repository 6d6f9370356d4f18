"""The tables of backbones, projectors, encoders and latent spaces: names and sizes only, no torch.

A new backbone, encoder or latent space is one row here.
"""

from __future__ import annotations

from dataclasses import dataclass

from repa_scale.errors import ConfigError, did_you_mean

PATCH_SIZES = (1, 2, 4, 8)


@dataclass(frozen=True)
class SiTSize:
    """Depth, width and heads of a SiT (SiT paper, table 1; the rows beyond XL keep the head size at 64 or 128)."""

    depth: int
    width: int
    heads: int
    qk_norm: bool = False  # the default of `model.qk_norm`; above 1 B parameters bf16 needs it


BACKBONES: dict[str, SiTSize] = {
    "SiT-S": SiTSize(12, 384, 6),
    "SiT-B": SiTSize(12, 768, 12),
    "SiT-L": SiTSize(24, 1024, 16),
    "SiT-XL": SiTSize(28, 1152, 16),
    "SiT-H": SiTSize(32, 1536, 24, qk_norm=True),
    "SiT-G": SiTSize(40, 1664, 26, qk_norm=True),
    "SiT-3B": SiTSize(40, 2048, 32, qk_norm=True),
    "SiT-7B": SiTSize(32, 3584, 28, qk_norm=True),
    # For tests and demonstrations on a CPU.
    "SiT-Nano": SiTSize(2, 32, 2),
    "SiT-Tiny": SiTSize(6, 128, 4),
}


def backbone(name: str) -> tuple[SiTSize, int]:
    """`"SiT-XL/2"` -> its size and its patch size.

    Raises:
        ConfigError: unknown size or patch.
    """
    size, _, patch = name.partition("/")
    if size not in BACKBONES:
        known = [f"{s}/{p}" for s in BACKBONES for p in PATCH_SIZES]
        raise ConfigError(f"model.name={name} is not a backbone{did_you_mean(name, known)}")
    if not patch.isdigit() or int(patch) not in PATCH_SIZES:
        raise ConfigError(f"model.name={name}: the patch size must be one of 1, 2, 4, 8; use for example {size}/2")
    return BACKBONES[size], int(patch)


PROJECTORS = ("mlp", "linear", "conv")  # built in models/projectors.py

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5)
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class EncoderSpec:
    """A frozen target encoder.

    Attributes:
        timm_name: the architecture in timm.
        width: channels of a token (z).
        stride: input pixels a token and axis.
        input_size: input pixels an axis for a 256-px image; scales in proportion for other image sizes.
        mean, std: normalisation of x / 255.
        prefix_tokens: class and register tokens before the patch tokens (0 for convolutional ones).
        kind: `vit` (patch tokens after the final norm) or `map` (a feature map, flattened row by row).
        resize_first: resize before normalising (CLIP) instead of after.
        min_input: smallest input, in pixels an axis (0: none); smaller images are resized up to it.
    """

    timm_name: str
    width: int
    stride: int
    input_size: int
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    prefix_tokens: int = 1
    kind: str = "vit"
    resize_first: bool = False
    min_input: int = 0


ENCODERS: dict[str, EncoderSpec] = {
    "dinov2-vit-b": EncoderSpec("vit_base_patch14_dinov2", 768, 14, 224),
}


@dataclass(frozen=True)
class LatentSpec:
    """A latent space: z = (encoded - shift) * scale, per channel or one value for all."""

    kind: str  # kl | tiny | identity
    channels: int
    factor: int  # image pixels a latent pixel and axis
    source: str = ""  # hub id of the weights
    scale: tuple[float, ...] = (1.0,)
    shift: tuple[float, ...] = (0.0,)


LATENTS: dict[str, LatentSpec] = {
    "sd-vae-ft-mse": LatentSpec("kl", 4, 8, "stabilityai/sd-vae-ft-mse", (0.18215,)),
    "sd-vae-ft-ema": LatentSpec("kl", 4, 8, "stabilityai/sd-vae-ft-ema", (0.18215,)),
    "taesd": LatentSpec("tiny", 4, 8, "madebyollin/taesd"),
    "identity": LatentSpec("identity", 3, 1),
}


def encoder_spec(name: str) -> EncoderSpec:
    """The row of a target encoder.

    Raises:
        ConfigError: unknown name.
    """
    if name not in ENCODERS:
        raise ConfigError(f"encoder={name} is not an encoder{did_you_mean(name, ENCODERS)}")
    return ENCODERS[name]


def latent_spec(name: str) -> LatentSpec:
    """The row of a latent space.

    Raises:
        ConfigError: unknown name.
    """
    if name not in LATENTS:
        raise ConfigError(f"latents.name={name} is not a latent space{did_you_mean(name, LATENTS)}")
    return LATENTS[name]


def latent_grid(image_size: int, latents_name: str) -> tuple[int, int, int]:
    """Shape (C, H, W) of the latent of a square image of `image_size` pixels.

    Raises:
        ConfigError: the size does not divide.
    """
    spec = latent_spec(latents_name)
    if image_size % spec.factor:
        raise ConfigError(
            f"data.image_size={image_size} does not divide by {spec.factor}, the factor of latents.name={latents_name}"
        )
    return spec.channels, image_size // spec.factor, image_size // spec.factor


def token_grid(image_size: int, latents_name: str, model_name: str) -> tuple[int, int]:
    """Tokens (down, across) that the transformer sees: one for each patch of the latent.

    Raises:
        ConfigError: the latent does not divide into patches.
    """
    _, height, width = latent_grid(image_size, latents_name)
    _, patch = backbone(model_name)
    if height % patch:
        raise ConfigError(
            f"model.name={model_name}: patches of {patch} do not divide a latent of {height} x {width} "
            f"(data.image_size={image_size}, latents.name={latents_name})"
        )
    return height // patch, width // patch
