"""The form `diffusers-dit`: the weights in diffusers' own DiTTransformer2DModel, which is near the model, not equal.

Its time embedding divides the exponents of its frequencies by 127 instead of 128, and no weights can undo that: the
deviation is measured at export, and stands in the manifest and in model_card.md beside the weights.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from repa_scale import rng, torchvision_fix
from repa_scale.errors import UserError, require
from repa_scale.export import HASHES, Options
from repa_scale.export.card import CARD, model_card
from repa_scale.models import sit_sizes
from repa_scale.tensor_file import write_tensors
from repa_scale.trained import Source

WEIGHTS = "diffusion_pytorch_model.safetensors"
BOUND = 5e-3  # of the relative error of a velocity: the time embedding costs up to 1.4e-3
TIMES = (0.05, 0.25, 0.5, 0.75, 0.95, 1.0)  # at which it is measured


def write(source: Source, folder: Path, options: Options) -> dict[str, Any]:
    """Fills `folder` with transformer/ and model_card.md.

    Raises:
        UserError: this model is none that a DiT can hold, or the deviation is over the bound.
    """
    torchvision_fix.ensure()
    diffusers = require("diffusers", "export")
    config = source.config
    size = sit_sizes(config)
    if size["qk_norm"]:
        raise UserError("--to diffusers-dit: diffusers' DiT has no QK-norm, but this model does; use --to diffusers")
    with torch.device("meta"):
        model = diffusers.DiTTransformer2DModel(
            num_attention_heads=size["heads"],
            attention_head_dim=size["width"] // size["heads"],
            in_channels=size["in_channels"],
            out_channels=size["in_channels"],
            num_layers=size["depth"],
            attention_bias=True,
            sample_size=size["input_size"],
            patch_size=size["patch_size"],
            num_embeds_ada_norm=size["num_classes"],
            norm_eps=1e-6,
        )
    parts = {name: _part(name, size["width"]) for name in model.state_dict()}
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    wrong = [
        name for name, (ours, offset) in parts.items()
        if ours not in source.shapes or offset + math.prod(shapes[name]) > math.prod(source.shapes[ours])
    ]  # fmt: skip
    if wrong:
        raise UserError(f"--to diffusers-dit: this diffusers has another DiT ({wrong[0]}); use --to diffusers")

    def read(name: str, start: int, stop: int) -> Tensor:
        ours, offset = parts[name]
        return source.read(ours, offset + start, offset + stop)

    target = folder / "transformer"
    model.save_config(target)
    digest = write_tensors(target / WEIGHTS, shapes, read, options.torch_dtype)
    error = deviation(source, target)
    if not error <= BOUND:
        raise UserError(f"--to diffusers-dit: its velocity is off by {error:.1e}, over {BOUND:.0e}; use --to diffusers")
    (folder / CARD).write_text(model_card(source, options, _use(error, config.interpolant.path)))
    return {HASHES: {f"transformer/{WEIGHTS}": digest}, "max_error": error, "bound": BOUND, "error_is": "relative"}


def deviation(source: Source, transformer: Path) -> float:
    """The largest of |v_dit - v| / |v| over `TIMES`, in float32, on fresh noise and as many classes."""
    from diffusers import DiTTransformer2DModel
    from diffusers.utils import is_accelerate_available

    model, dit = (
        source.build(),
        DiTTransformer2DModel.from_pretrained(
            str(transformer), local_files_only=True, low_cpu_mem_usage=is_accelerate_available()
        ),
    )
    t = torch.tensor(TIMES)
    count = len(t)
    x = rng.normal(0, "deviation", 0, torch.arange(count), (model.in_channels, *[model.grid * model.patch_size] * 2))
    labels = torch.arange(count) * max(1, model.num_classes // count) % (model.num_classes + 1)
    with torch.no_grad():
        ours = model(x, t, labels)[0].double().flatten(1)
        theirs = dit.eval()(x, t, labels).sample.double().flatten(1)
    norm = ours.norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny)
    return float(((theirs - ours).norm(dim=1) / norm).max())


def _part(name: str, width: int) -> tuple[str, int]:
    """Of a DiT's tensor: our tensor, and the element at which it begins there."""
    words = name.split(".")
    kind = words[-1]
    if words[0] == "pos_embed":
        return ("pos_embed", 0) if kind == "pos_embed" else (f"x_embedder.proj.{kind}", 0)
    if words[0] in ("proj_out_1", "proj_out_2"):
        return {"proj_out_1": f"final_layer.adaLN_modulation.1.{kind}", "proj_out_2": f"final_layer.linear.{kind}"}[
            words[0]
        ], 0
    block, inner = f"blocks.{words[1]}", ".".join(words[2:-1])
    if inner in ("attn1.to_q", "attn1.to_k", "attn1.to_v"):
        size = width * width if kind == "weight" else width
        return f"{block}.attn.qkv.{kind}", "qkv".index(inner[-1]) * size
    # diffusers keeps a copy of the embedders in every block.
    return {
        "norm1.emb.timestep_embedder.linear_1": f"t_embedder.mlp.0.{kind}",
        "norm1.emb.timestep_embedder.linear_2": f"t_embedder.mlp.2.{kind}",
        "norm1.emb.class_embedder.embedding_table": f"y_embedder.embedding_table.{kind}",
        "norm1.linear": f"{block}.adaLN_modulation.1.{kind}",
        "attn1.to_out.0": f"{block}.attn.proj.{kind}",
        "ff.net.0.proj": f"{block}.mlp.fc1.{kind}",
        "ff.net.2": f"{block}.mlp.fc2.{kind}",
    }.get(inner, name), 0


def _use(error: float, path: str) -> str:
    return f"""
**Not exact.** The time embedding of diffusers' DiT has slightly other frequencies than the one that this model was
trained with. On this model a velocity deviates by up to **{error:.1e}** of its norm (measured at export at times from
{min(TIMES)} to {max(TIMES)}). `repa-scale export --to diffusers` gives an exact pipeline.

`DiTTransformer2DModel.from_pretrained(FOLDER, subfolder="transformer")` loads it. `timestep` is the time itself, from 0
(data) to 1 (noise), not a step of 1000; the output is the velocity of the {path} path from data to noise. diffusers'
`DiTPipeline` expects another parameterisation and does not sample from it.
"""
