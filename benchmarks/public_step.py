"""The training step of the public REPA code, to compare with: its model and loss, in the loop that its train.py runs.

Its model and loss are imported from a checkout. The loop is written after train.py and what accelerate does for it in
one process: fp32 weights, only the model's and the encoder's forward pass under autocast, outputs cast to fp32, for
fp16 a gradient scaler, clipping at 1, torch's AdamW with its defaults, a full EMA copy updated tensor by tensor,
gradients set to None, and three losses read by the host in every step. TF32 is on, as in its README's command. Left
out are data loading, DistributedDataParallel (one process has none) and logging. The encoder is timm's DINOv2
with fused attention in place of the hub's, which is not to the public code's disadvantage.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.our_step import WEIGHT_STD, fixed_batch
from repa_scale import arithmetic, torchvision_fix
from repa_scale.clock import Clock
from repa_scale.config import Config
from repa_scale.encoders import build_encoder
from repa_scale.errors import ConfigError, UserError
from repa_scale.sizes import backbone, encoder_spec, latent_grid, latent_spec, token_grid

FILES = ("loss.py", "models/sit.py")  # what a folder for --public must hold
# Its SiT-S cannot be built: the constructor leaves decoder_hidden_size at 768 for a width of 384.
MODELS = ("SiT-B/2", "SiT-L/2", "SiT-XL/2")
PRECISIONS = {"fp16": torch.float16, "bf16": torch.bfloat16}
CLIP, DECAY, WEIGHT = 1.0, 0.9999, 0.5


class PublicStep:
    """Calls the public step on one batch, with the interface of `OurStep`.

    Args:
        folder: checkout of the public code, or the `FILES` of one.
        precision: `fp16`, the default of its train.py, or `bf16`.
        rehearse: builds any row of `sizes.BACKBONES` from the public class.

    Raises:
        UserError: a file of `folder` does not import.
    """

    def __init__(
        self, folder: str, config: Config, device: torch.device, precision: str = "fp16", rehearse: bool = False
    ) -> None:
        model, term = config.model.name, config.alignment["repa"]
        constructors, model_class, loss_class = _import(folder)
        self.device, self.dtype, self.spec = device, PRECISIONS[precision], encoder_spec(term.encoder)
        self.grid = token_grid(config.data.image_size, config.latents.name, model)
        size, patch = backbone(model)
        settings = {
            "input_size": latent_grid(config.data.image_size, config.latents.name)[1],
            "num_classes": config.model.num_classes,
            "use_cfg": True,
            "z_dims": [self.spec.width],
            "encoder_depth": term.depth,
            "fused_attn": True,
            "qk_norm": False,
        }
        with device:
            if rehearse:
                shape = {"depth": size.depth, "hidden_size": size.width, "num_heads": size.heads, "patch_size": patch}
                self.model = model_class(decoder_hidden_size=size.width, **shape, **settings)
            else:
                self.model = constructors[model](**settings)
        self.model.to(device).train()
        trained = [p for p in self.model.parameters() if p.requires_grad]
        for parameter in trained:
            nn.init.normal_(parameter, std=WEIGHT_STD)
        self.parameters = sum(p.numel() for p in trained)
        self.ema = copy.deepcopy(self.model).requires_grad_(False).eval()
        self.encoder = build_encoder(term.encoder, "random", self.grid, device, torch.float32, "torch").network
        self.normalize = _normalization(self.spec)
        self.loss = loss_class(prediction="v", path_type="linear", encoders=[], weighting="uniform")
        arithmetic.use("tf32")
        optimizer = config.optimizer
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=optimizer.learning_rate,
            betas=tuple(optimizer.betas),
            weight_decay=optimizer.weight_decay,
            eps=optimizer.eps,
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
        spec = latent_spec(config.latents.name)
        self.scale = torch.tensor(spec.scale * spec.channels, device=device).view(1, -1, 1, 1)
        self.shift = torch.zeros_like(self.scale)
        batch = fixed_batch(config, device)
        self.images, self.moments, self.labels = batch.images, batch.features["moments"], batch.labels
        self.clock, self.phases = Clock(device), {}
        self._steps, self._applied = 0, 0
        self.optimizer.register_step_post_hook(self._count)

    def __call__(self) -> None:
        """One step. It ends with the host reading the losses, as train.py does."""
        self._steps += 1
        clock = self.clock
        with torch.no_grad():
            with clock.phase("latent"):
                mean, std = self.moments.chunk(2, dim=1)
                x0 = (mean + std * torch.randn_like(mean)) * self.scale + self.shift
            with clock.phase("encoder"), torch.autocast(self.device.type, self.dtype):
                tokens = self._targets()
        with clock.phase("forward"):
            denoising, alignment = self.loss(self._forward, x0, {"y": self.labels}, zs=[tokens])
            denoising, alignment = denoising.mean(), alignment.mean()
            loss = denoising + alignment * WEIGHT
        with clock.phase("backward"):
            self.scaler.scale(loss).backward()
        with clock.phase("optimizer"):
            self.scaler.unscale_(self.optimizer)
            norm = nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad(set_to_none=True)
        with clock.phase("ema"):
            self._average()
        for value in (denoising, alignment, norm):
            value.mean().detach().item()
        self.phases = clock.read()

    @property
    def skipped(self) -> int:
        """Steps that the gradient scaler left out."""
        return self._steps - self._applied

    def close(self) -> None:
        """Nothing to end; here for the interface of `OurStep`."""

    def _forward(self, *args: Tensor, **kwargs: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The model as accelerate wraps it: autocast inside, fp32 outside."""
        with torch.autocast(self.device.type, self.dtype):
            velocity, hidden = self.model(*args, **kwargs)
        return velocity.float(), [each.float() for each in hidden]

    def _targets(self) -> Tensor:
        """(N, T, z) patch tokens of the images."""
        x = self.normalize(self.images / 255.0)
        x = F.interpolate(x, self.spec.stride * self.grid[0], mode="bicubic")
        return self.encoder.forward_features(x)[:, self.spec.prefix_tokens :]

    @torch.no_grad()
    def _average(self) -> None:
        averages = dict(self.ema.named_parameters())
        for name, parameter in self.model.named_parameters():
            averages[name].mul_(DECAY).add_(parameter.data, alpha=1 - DECAY)

    def _count(self, *_: object) -> None:
        self._applied += 1


def check(folder: str, model: str, encoder: str, rehearse: bool) -> None:
    """Refuses what `PublicStep` cannot build, before anything is loaded.

    Raises:
        ConfigError: a model that the public code cannot build, or another encoder than DINOv2.
        UserError: `folder` lacks a file.
    """
    if model not in MODELS and not rehearse:
        raise ConfigError(f"--model {model} is not one that the public code builds; use {', '.join(MODELS)}")
    if not encoder.startswith("dinov2-vit"):
        raise ConfigError(f"--encoder {encoder} is not compared with the public code; use dinov2-vit-b")
    missing = [name for name in FILES if not (Path(folder) / name).is_file()]
    if missing:
        raise UserError(f"--public {folder} has no {missing[0]}; name a checkout of the public REPA code")


def _import(folder: str) -> tuple[dict, type, type]:
    """SiT_models, SiT and SILoss of a checkout."""
    torchvision_fix.ensure()  # for timm, which its model imports
    sys.path.insert(0, str(Path(folder).resolve()))
    try:
        from loss import SILoss
        from models.sit import SiT, SiT_models
    except ImportError as error:
        raise UserError(f"--public {folder} does not import ({error}); install what it needs") from None
    finally:
        sys.path.pop(0)
    return SiT_models, SiT, SILoss


def _normalization(spec) -> nn.Module:
    from torchvision.transforms import Normalize

    return Normalize(spec.mean, spec.std)
