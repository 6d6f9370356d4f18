"""Latent spaces: a VAE of diffusers, frozen, or the pixels themselves. The table is sizes.LATENTS."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from repa_scale import torchvision_fix
from repa_scale.config import Config
from repa_scale.errors import UserError, reason, require
from repa_scale.sizes import LatentSpec, latent_spec
from repa_scale.weights import local, vae_files

# Pixels that a VAE sees at a time. Stable Diffusion's holds 3,072 bytes per pixel while it decodes in fp32 and 2,572
# while it encodes: 3.2 GB for 16 decoded images of 256 px or 4 of 512, beside weights and optimizer states. The encoder
# takes twice as many, so that 32 images of 256 px, a usual micro batch, stay one call.
DECODED_PIXELS = 1 << 20
ENCODED_PIXELS = 1 << 21
RANDOM_SEED = 0  # of `latents.weights=random`, so that all ranks have the same VAE
KL_SHAPE = {  # of Stable Diffusion's AutoencoderKL, for random weights
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}


class Latents:
    """Between images and what the transformer sees.

    Args:
        vae: AutoencoderKL or AutoencoderTiny; None: pixel space.
    """

    def __init__(self, spec: LatentSpec, vae: nn.Module | None, device: torch.device | str) -> None:
        self.spec = spec
        self.vae = vae.eval().requires_grad_(False) if vae is not None else None
        self.scale, self.shift = (torch.tensor(v, device=device).view(1, -1, 1, 1) for v in (spec.scale, spec.shift))

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """(N, 3, S, S) uint8 -> the posterior: mean and standard deviation (N, 2C, h, w) fp32, or just (N, C, h, w).

        A tiny VAE and pixel space have no posterior: they give the latent itself. Pixels lie in [-1, 1]. A VAE sees at
        most ENCODED_PIXELS at a time.
        """
        if self.vae is not None:
            return in_parts(self._encode, images, ENCODED_PIXELS // images.shape[2:].numel())
        x = images.float() / 127.5 - 1.0
        return x.mean(dim=1, keepdim=True) if self.spec.channels == 1 else x

    def _encode(self, images: Tensor) -> Tensor:
        encoded = self.vae.encode((images.float() / 127.5 - 1.0).to(self.vae.dtype))
        if self.spec.kind == "tiny":
            return encoded.latents.float()
        posterior = encoded.latent_dist
        return torch.cat([posterior.mean, posterior.std], dim=1).float()

    def draw(self, moments: Tensor, noise: Tensor) -> Tensor:
        """A clean latent x0 = (mean + std * noise - shift) * scale. noise: (N, C, h, w) normal."""
        if moments.shape[1] == 2 * self.spec.channels:
            mean, std = moments.chunk(2, dim=1)
            moments = mean + std * noise
        return (moments - self.shift) * self.scale

    @torch.no_grad()
    def decode(self, latents: Tensor, at_a_time: int = 0) -> Tensor:
        """(N, C, h, w) latents x0 -> (N, 3, S, S) uint8, rounded as round((x + 1) / 2 * 255).

        Args:
            at_a_time: images in one call of the VAE; 0: as many as DECODED_PIXELS allow.
        """
        pixels = latents.shape[2:].numel() * self.spec.factor**2
        return in_parts(self._decode, latents, at_a_time or DECODED_PIXELS // pixels)

    def _decode(self, latents: Tensor) -> Tensor:
        x = latents.float() / self.scale + self.shift
        if self.vae is not None:
            x = self.vae.decode(x.to(self.vae.dtype)).sample.float()
        return ((x.expand(-1, 3, -1, -1) + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)


def in_parts(function: Callable[[Tensor], Tensor], rows: Tensor, most: int) -> Tensor:
    """`function` of all rows, at most `most` (at least 1) at a time, in parts of equal size.

    Equal, and the last one filled up with zeros: a convolution's algorithm, and with it an image's bits, depend on how
    many images it sees.
    """
    count = len(rows)
    parts = -(-count // max(1, most))
    if parts <= 1:
        return function(rows)
    size = -(-count // parts)
    found = []
    for part in rows.split(size):
        filling = part.new_zeros(size - len(part), *part.shape[1:])
        found.append(function(torch.cat([part, filling]) if len(filling) else part)[: len(part)])
    return torch.cat(found)


def build_latents(config: Config, device: torch.device | str, dtype: torch.dtype) -> Latents:
    """The latent space of a configuration, on `device`.

    Raises:
        ConfigError: unknown name.
        UserError: the weights cannot be had, or are those of another kind of VAE.
    """
    spec = latent_spec(config.latents.name)
    if spec.kind == "identity":
        return Latents(spec, None, device)
    torchvision_fix.ensure()  # diffusers imports transformers, which imports torchvision
    diffusers = require("diffusers", "train")
    kind = diffusers.AutoencoderKL if spec.kind == "kl" else diffusers.AutoencoderTiny
    weights = config.latents.weights
    if weights == "random":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(RANDOM_SEED)
            vae = kind(**KL_SHAPE) if spec.kind == "kl" else kind()
    else:
        vae = _load(kind, spec, spec.source if weights == "hub" else weights, config.latents.name)
    return Latents(spec, vae.to(device=device, dtype=dtype), device)


def _load(kind: type, spec: LatentSpec, source: str, name: str) -> nn.Module:
    """The VAE in a local folder or on the hub, checked against its row.

    Diffusers only warns of another class or of missing tensors, which it then draws at random.
    """
    if not Path(source).is_dir():  # from the cache without a word to the hub, once the files are there
        try:
            config, _ = (local(file) for file in vae_files(source, f"latents.name={name}"))
        except UserError as error:
            raise UserError(f"the weights of {error}; or give a local folder (latents.weights=folder)") from None
        source = str(config.parent)
    elif not any(Path(source).glob("*.safetensors")):  # diffusers would go on to a pickle, with advice of its own
        raise UserError(
            f"the weights of latents.name={name} cannot be read from {source}: it holds no .safetensors file, and "
            "pickles are not read; save the VAE again by diffusers' save_pretrained"
        )
    try:
        found = kind.load_config(source, local_files_only=True).get("_class_name", kind.__name__)
        # Without `low_cpu_mem_usage=False` diffusers asks for the package accelerate.
        if found == kind.__name__:
            vae, loaded = kind.from_pretrained(
                source,
                local_files_only=True,
                low_cpu_mem_usage=False,
                use_safetensors=True,
                output_loading_info=True,
            )
    except Exception as error:  # each of the hub's libraries raises its own
        raise UserError(
            f"the weights of latents.name={name} cannot be read from {source}: {reason(error)}; "
            "give a local folder of diffusers' layout (latents.weights=folder)"
        ) from None
    if found != kind.__name__:
        raise UserError(
            f"{source} holds a {found}, but latents.name={name} is a {kind.__name__}; give the folder of one"
        )
    if missing := sorted(loaded["missing_keys"]):
        raise UserError(f"{source} lacks {len(missing)} tensors of its VAE, such as {missing[0]}; fetch it again")
    shape = vae.config.latent_channels, 2 ** (len(vae.config.block_out_channels) - 1)
    if shape != (spec.channels, spec.factor):
        raise UserError(
            f"{source} makes {shape[0]} channels at 1/{shape[1]} of the image's size, but latents.name={name} means "
            f"{spec.channels} at 1/{spec.factor}; give a VAE of that shape"
        )
    return vae
