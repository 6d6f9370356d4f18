"""The form `diffusers`: our own pipeline in diffusers' layout, with the VAE beside it; exact to our samplers."""

from __future__ import annotations

from pathlib import Path, PurePath
from typing import Any

import torch

from repa_scale import torchvision_fix
from repa_scale.errors import require
from repa_scale.export import HASHES, Options
from repa_scale.export.card import CARD, model_card
from repa_scale.export.safetensors import write_weights
from repa_scale.latents import build_latents
from repa_scale.sizes import LatentSpec
from repa_scale.trained import Source

USE = """
```python
from repa_scale.serving import SiTPipeline  # pip install 'repa-scale[serve]'
pipe = SiTPipeline.from_pretrained("THIS FOLDER")
pipe(class_labels=[1, 2], seed=[1, 2]).images[0].save("image.png")
```
or `repa-scale serve THIS_FOLDER --port 8000` for a server. The images are those of `repa-scale sample`, bit for bit.
"""
WEIGHTS = "diffusion_pytorch_model.safetensors"  # diffusers' name for them


def write(source: Source, folder: Path, options: Options) -> dict[str, Any]:
    """Fills `folder` with model_index.json, transformer/, scheduler/ and, for latents, vae/.

    The transformer's weights go from file to file, a piece at a time.

    Raises:
        UserError: diffusers is missing, or the VAE cannot be had.
    """
    torchvision_fix.ensure()
    require("diffusers", "export")
    from repa_scale.serving import SiTPipeline
    from repa_scale.serving.build import empty_transformer, id2label, latent_space, scheduler

    latents = build_latents(source.config, "cpu", torch.float32)
    vae = latents.vae
    pipe = SiTPipeline(
        empty_transformer(source.config),
        scheduler(source.config),
        vae,
        id2label(source.class_names),
        latent_space(source.config),
    )
    pipe.save_config(folder)
    pipe.scheduler.save_pretrained(folder / "scheduler")
    pipe.transformer.save_config(folder / "transformer")
    hashes = write_weights(source, folder / "transformer", options, named=WEIGHTS)
    if vae is not None:
        _describe(vae, latents.spec)
        vae.to(options.torch_dtype).save_pretrained(folder / "vae")
    (folder / CARD).write_text(model_card(source, options, USE))
    return {
        HASHES: {f"transformer/{file}": digest for file, digest in hashes.items()},
        "vae": (PurePath(options.vae).name or source.config.latents.name) if vae is not None else None,
        "class_names": len(source.class_names),
    }


def _describe(vae: Any, spec: LatentSpec) -> None:
    """What vae/config.json says: the scale that the model was trained with, and not where the VAE lay here."""
    vae.register_to_config(_name_or_path="")
    if len(spec.scale) == len(spec.shift) == 1:  # diffusers' fields hold no channels; our pipeline does not read them
        vae.register_to_config(scaling_factor=spec.scale[0], shift_factor=spec.shift[0])
