"""What the forms without Python classes hold: one guided denoiser step, the decoder, and the check of what was made."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from repa_scale import arithmetic, rng
from repa_scale.config import Config
from repa_scale.errors import UserError
from repa_scale.export import Options
from repa_scale.latents import build_latents
from repa_scale.models.sit import SiT, time_frequencies
from repa_scale.sizes import latent_grid
from repa_scale.trained import Source

STEP_INPUTS = ("x", "t", "labels", "guidance")
STEP_OUTPUT = "velocity"
DECODER_INPUT = "latents"
DECODER_OUTPUT = "images"
# The largest error over the largest value, against PyTorch in the same dtype: other kernels sum in another order, and
# a fused kernel rounds to 16 bits less often than PyTorch does.
BOUNDS = {"fp32": 5e-5, "bf16": 5e-2, "fp16": 1e-2}
CHECKED_BATCHES = (1, 2, 5)

Inputs = tuple[Tensor, ...]


class GuidedStep(nn.Module):
    """The velocity with guidance, v_null + s (v - v_null) where s > 1 and else v (REPA, section 4; sampling.py)."""

    def __init__(self, model: SiT) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, t: Tensor, labels: Tensor, guidance: Tensor) -> Tensor:
        """One step.

        Args:
            x: (N, C, H, W) float32, the state.
            t: (N,) float32 in [0, 1], 0 = data, 1 = noise.
            labels: (N,) int64; `num_classes` is the null label.
            guidance: (N,) float32, of each image; 1 or less: none. Where no image has any, the null labels are not run.

        Returns:
            (N, C, H, W) float32.
        """
        some = (guidance > 1).any()
        if torch.compiler.is_exporting():
            return torch.cond(some, self._guided, self._plain, (x, t, labels, guidance))
        return (self._guided if some else self._plain)(x, t, labels, guidance)  # torch.cond would compile here

    def _plain(self, x: Tensor, t: Tensor, labels: Tensor, guidance: Tensor) -> Tensor:
        return self.model(x, t, labels)[0].float()

    def _guided(self, x: Tensor, t: Tensor, labels: Tensor, guidance: Tensor) -> Tensor:
        nulls = torch.full_like(labels, self.model.num_classes)
        both = self.model(torch.cat([x, x]), torch.cat([t, t]), torch.cat([labels, nulls]))[0].float()
        n = x.shape[0]  # torch.export cannot prove of `chunk` that it gives two parts
        conditional, null = both[:n], both[n:]
        scale = guidance[:, None, None, None]
        return torch.where(scale > 1, null + scale * (conditional - null), conditional)


class Decoder(nn.Module):
    """Latents (N, C, h, w) float32 -> images (N, 3, S, S) float32, about [-1, 1]; to 8 bits: round((x + 1) * 127.5)."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        latents = build_latents(config, "cpu", torch.float32)
        self.vae = _for_any_batch(latents.vae) if latents.vae is not None else None
        self.register_buffer("scale", latents.scale)
        self.register_buffer("shift", latents.shift)

    def forward(self, latents: Tensor) -> Tensor:
        x = latents / self.scale + self.shift
        if self.vae is not None:
            x = self.vae.decode(x, return_dict=False)[0]
        return x.expand(-1, 3, -1, -1).contiguous()


def _for_any_batch(vae: nn.Module) -> nn.Module:
    """The VAE with each of diffusers' Upsample2D replaced by its plain equal.

    Theirs asks whether a batch has 64 images or more, so a program traced through it would hold for fewer alone.
    """
    for module in list(vae.modules()):
        for name, child in module.named_children():
            if type(child).__name__ == "Upsample2D":
                setattr(module, name, nn.Sequential(nn.Upsample(scale_factor=2.0, mode="nearest"), child.conv))
    return vae


def build_step(source: Source, options: Options) -> GuidedStep:
    """The step with the source's weights in the dtype asked for. No tensor is made in its forward pass: that one would
    stay on the exporter's device wherever a program goes."""
    model = source.build().to(options.torch_dtype)
    model.t_embedder.frequencies = time_frequencies("cpu")
    return GuidedStep(model).eval().requires_grad_(False)


def build_decoder(source: Source, options: Options) -> Decoder:
    """The decoder of the run's latents, or with the weights that `--vae` names; always in float32."""
    config = source.config
    if options.vae:
        config = replace(config, latents=replace(config.latents, weights=options.vae))
    return Decoder(config).eval().requires_grad_(False)


def shape_facts(config: Config) -> dict[str, Any]:
    """What a program's user must know of the model: the shape of a latent, the classes, the path."""
    return {
        "latent_shape": list(latent_grid(config.data.image_size, config.latents.name)),
        "num_classes": config.model.num_classes,
        "path": config.interpolant.path,
    }


def trace_step(step: GuidedStep, config: Config) -> ExportedProgram:
    """The step as a program for any batch size."""
    return _trace(step, step_inputs(config, 3, 0), STEP_INPUTS)


def trace_decoder(decoder: Decoder, config: Config) -> ExportedProgram:
    """The decoder as a program for any batch size."""
    return _trace(decoder, decoder_inputs(config, 3), (DECODER_INPUT,))


def step_inputs(config: Config, n: int, case: int) -> Inputs:
    """Inputs of a step: by `case` without guidance, with it for every image, or for every other one.

    Times and labels include their ends: 0 and 1, and the null label.
    """
    index, name = torch.arange(n), "export check"
    shape = latent_grid(config.data.image_size, config.latents.name)
    x = rng.normal(case, name, n, index, shape)
    t = rng.uniform(case, f"{name} time", n, index, ())
    t[0] = case % 2
    labels = (rng.uniform(case, f"{name} label", n, index, ()) * (config.model.num_classes + 1)).long()
    labels[-1] = config.model.num_classes
    guidance = 1 + 3 * rng.uniform(case, f"{name} guidance", n, index, ())
    if case == 0:
        guidance = torch.ones(n)
    elif case == 2:
        guidance[1::2] = 1.0
    return x, t, labels, guidance


def decoder_inputs(config: Config, n: int) -> Inputs:
    """Latents of a decoder's check."""
    return (rng.normal(0, "export check latents", n, torch.arange(n), shape_facts(config)["latent_shape"]),)


def check_step(name: str, run: Callable[..., Tensor], step: GuidedStep, options: Options, config: Config) -> dict:
    """Compares what was written with PyTorch on inputs that it has not seen: {"max_error", "bound"}.

    Raises:
        UserError: they differ by more than the bound.
    """
    inputs = (step_inputs(config, n, case) for n in CHECKED_BATCHES for case in range(3))
    return _check(name, run, step, inputs, BOUNDS[options.dtype])


def check_decoder(name: str, run: Callable[..., Tensor], decoder: Decoder, config: Config) -> dict:
    """The same for the decoder."""
    return _check(name, run, decoder, (decoder_inputs(config, n) for n in CHECKED_BATCHES[:2]), BOUNDS["fp32"])


def _check(
    name: str, run: Callable[..., Tensor], reference: nn.Module, inputs: Iterable[Inputs], bound: float
) -> dict[str, float]:
    worst = 0.0
    for case in inputs:
        with torch.no_grad(), arithmetic.within("fp32"):  # a GPU's TF32 would be all that is measured
            want, found = reference(*case), run(*case)
        error = float((found - want).abs().max() / want.abs().max().clamp(min=1e-30))
        if not error <= bound:  # NaN too
            raise UserError(
                f"{name} differs from PyTorch by {error:.2g} of the largest value at batch {len(case[0])}, and "
                f"{bound:.2g} is the bound; choose another form or --dtype fp32"
            )
        worst = max(worst, error)
    return {"max_error": worst, "bound": bound}


@torch.no_grad()
def _trace(module: nn.Module, inputs: Inputs, names: tuple[str, ...]) -> ExportedProgram:
    batch = Dim("batch", min=1, max=4096)
    logging.getLogger("torch.export").setLevel(logging.ERROR)
    program = torch.export.export(module, inputs, dynamic_shapes={name: {0: batch} for name in names}, strict=False)
    for graph in (m for m in program.graph_module.modules() if isinstance(m, torch.fx.GraphModule)):
        for node in list(graph.graph.nodes):
            if node.target is torch.ops.aten._assert_tensor_metadata.default:  # asserts the exporter's device
                graph.graph.erase_node(node)
                continue
            # Where each operation stands in our source: most of the file's size, and paths of whoever exports.
            for key in ("stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn", "from_node"):
                node.meta.pop(key, None)
        graph.recompile()
    program.example_inputs = None  # they would be written as a pickle
    return program
