"""Class labels and seeds to images: the trainer's sampling as a pipeline of diffusers.

An image depends on (seed, label, settings) alone. It is number 0 of `repa-scale sample --seed SEED`.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DiffusionPipeline
from diffusers.utils import BaseOutput, is_accelerate_available
from PIL import Image
from torch import Tensor

from repa_scale import rng
from repa_scale.errors import DataError, UserError, did_you_mean
from repa_scale.latents import Latents
from repa_scale.serving.labels import LabelNames
from repa_scale.serving.scheduler import SiTScheduler
from repa_scale.serving.settings import check_guidance, check_interval, check_seed, shown, spread
from repa_scale.serving.transformer import SiTTransformer2DModel
from repa_scale.sizes import LatentSpec

OUTPUTS = ("pil", "np", "pt", "latent", "uint8")
PARTS = {  # [module, class] that model_index.json may name
    "transformer": [["repa_scale.serving.transformer", "SiTTransformer2DModel"]],
    "scheduler": [["repa_scale.serving.scheduler", "SiTScheduler"]],
    "vae": [[None, None], ["diffusers", "AutoencoderKL"], ["diffusers", "AutoencoderTiny"]],
}
HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "token")
RANDOM_BITS = 31  # of a seed that nobody chose: short enough to be typed again


@dataclass
class SiTPipelineOutput(BaseOutput):
    """What a call gives.

    Attributes:
        images: by `output_type`: a list of PIL images (`pil`), (N, H, W, 3) float32 in [0, 1] (`np`), (N, 3, H, W)
            float32 in [0, 1] (`pt`), (N, H, W, 3) uint8 on the CPU (`uint8`), (N, C, h, w) float64 (`latent`).
        seeds: of each image; None where the noise was given.
    """

    images: Any
    seeds: list[int] | None


class SiTPipeline(DiffusionPipeline):
    """A SiT, its sampler, and the VAE of its latents.

    Args:
        vae: None in pixel space.
        id2label: the class names by number (keys are strings in JSON).
        latent_space: the fields of a `sizes.LatentSpec`; by default what `vae.config` says.
    """

    model_cpu_offload_seq = "transformer->vae"
    _optional_components: ClassVar = ["vae"]  # diffusers adds lists
    _callback_tensor_inputs: ClassVar = ["latents"]

    def __init__(
        self,
        transformer: SiTTransformer2DModel,
        scheduler: SiTScheduler,
        vae: AutoencoderKL | AutoencoderTiny | None = None,
        id2label: dict[str, str] | None = None,
        latent_space: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler, vae=vae)
        self.register_to_config(id2label=id2label, latent_space=latent_space)
        self.labels = LabelNames.of(transformer.config.num_classes, id2label)
        self.interrupt = False
        self._guided_always = False

    @classmethod
    def from_pretrained(cls, source: str, **options: Any) -> SiTPipeline:
        """As in diffusers, but a folder brings neither code nor pickles.

        Raises:
            DataError: its model_index.json asks for other classes than ours; diffusers would import them.
        """
        if not is_accelerate_available():
            options.setdefault("low_cpu_mem_usage", False)  # otherwise it warns
        options.setdefault("use_safetensors", True)
        _check_classes(source, cls.load_config(source, **{k: v for k, v in options.items() if k in HUB_OPTIONS}))
        return super().from_pretrained(source, **options)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of a latent."""
        config = self.transformer.config
        return config.in_channels, config.sample_size, config.sample_size

    @property
    def latent_spec(self) -> LatentSpec:
        """Kind, scale and shift of the latents."""
        if described := self.config.latent_space:
            lists = {key: tuple(described[key]) for key in ("scale", "shift")}
            return LatentSpec(**{**described, **lists})
        if self.vae is None:
            return LatentSpec("identity", self.transformer.config.in_channels, 1)
        scale, shift = self.vae.config.scaling_factor, self.vae.config.get("shift_factor") or 0.0
        return LatentSpec("kl", self.transformer.config.in_channels, 8, scale=(scale,), shift=(shift,))

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | Sequence[int | str | None] | None = None,
        seed: int | Sequence[int] | None = None,
        steps: int | None = None,
        guidance: float | Sequence[float] | None = None,
        interval: tuple[float, float] | Sequence[tuple[float, float]] | None = None,
        sampler: str | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[SiTPipeline, int, float, dict], dict | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        fixed_batch: int = 0,
    ) -> SiTPipelineOutput | tuple[Any]:
        """Images of classes.

        Args:
            class_labels: numbers or names, one an image; None (or the number behind the last class): no class.
            seed: of each image; a single one counts up from image to image. By default random; see `.seeds`.
            steps, guidance, interval, sampler: by default what the export recommends. Guidance and interval may differ
                from image to image; guidance of 1 or less means none.
            generator: torch generators for the noise instead of seeds.
            latents: (N, C, H, W) standard normal, the noise itself.
            callback_on_step_end: called as `(pipe, i, t, {"latents": state})` after each evaluation; may return a
                replacement, and may set `pipe.interrupt = True` to end early.
            fixed_batch: evaluate the model with exactly this many images, with and without label, whatever is asked:
                then an image has the same bits whatever else is in the batch (server.py checks it at its start).

        Raises:
            UserError: a value that cannot be; a name that is no class.
        """
        if output_type not in OUTPUTS:
            raise UserError(f"output_type={output_type} is not an output{did_you_mean(output_type, OUTPUTS)}")
        unknown = set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs)
        if unknown:
            raise UserError(f"callback_on_step_end_tensor_inputs: {sorted(unknown)[0]} is not among: latents")
        defaults = self.scheduler.config
        asked = class_labels if isinstance(class_labels, (list, tuple)) else [class_labels]
        others = [seed, guidance, generator, latents]
        count = len(asked) if len(asked) > 1 else max([len(v) for v in others if hasattr(v, "__len__")], default=1)
        if not asked or count < 1:
            raise UserError("class_labels, seed or latents is empty; ask for at least one image")
        numbers = spread("class_labels", [self.labels.number(each) for each in asked], count)
        scales = [
            check_guidance(s) for s in spread("guidance", defaults.guidance if guidance is None else guidance, count)
        ]
        pairs = interval if interval is not None else defaults.interval
        single = len(pairs) == 2 and not any(hasattr(each, "__len__") for each in pairs)
        intervals = [check_interval(each) for each in spread("interval", [pairs] if single else list(pairs), count)]
        seeds = None
        if generator is None and latents is None:
            seeds = _seeds(seed, count)
        total = max(count, fixed_batch)
        if fixed_batch and total > fixed_batch:
            raise UserError(f"{count} images do not fit into fixed_batch={fixed_batch}; ask for fewer at a time")
        state = self._noise(seeds, generator, latents, count, total)
        numbers += [self.labels.null] * (total - count)
        scales += [1.0] * (total - count)
        intervals += [(0.0, 1.0)] * (total - count)

        self.interrupt = False
        self.scheduler.set_timesteps(
            defaults.num_inference_steps if steps is None else steps, device=state.device, sampler=sampler
        )
        step_noise = self._step_noise(seeds, generator, state)
        guided = _Guided(self, numbers, scales, intervals, always=fixed_batch > 0, device=state.device)
        with self.progress_bar(total=len(self.scheduler.timesteps)) as bar:
            for i, (t, at) in enumerate(zip(self.scheduler.times, self.scheduler.guidance_times, strict=True)):
                if self.interrupt:
                    break
                drift = guided(state, t, at)
                noise = step_noise(i) if self.scheduler.needs_noise() else None
                state = self.scheduler.step(drift, t, state, noise=noise).prev_sample
                if callback_on_step_end is not None:
                    back = callback_on_step_end(self, i, t, {"latents": state}) or {}
                    state = back.get("latents", state)
                bar.update()
        images = self._finish(state, count, output_type)
        self.maybe_free_model_hooks()
        return SiTPipelineOutput(images=images, seeds=seeds) if return_dict else (images,)

    def _noise(self, seeds, generator, latents: Tensor | None, count: int, total: int) -> Tensor:
        """The state at t = 1, (total, C, H, W) float64 on the device that the model runs on."""
        device = self._execution_device
        if latents is not None:
            if tuple(latents.shape) != (count, *self.latent_shape):
                raise UserError(f"latents has shape {tuple(latents.shape)} instead of {(count, *self.latent_shape)}")
            noise = latents.to(device)
        else:
            noise = self._draw(seeds, generator, "sample noise", 0, total if seeds else count, device)
        if len(noise) < total:
            noise = torch.cat([noise, noise.new_zeros(total - len(noise), *self.latent_shape)])
        return noise.double()

    def _step_noise(self, seeds, generator, state: Tensor) -> Callable[[int], Tensor]:
        """Number of the evaluation -> the noise of its step, like `state`. Nothing is copied to the device then."""
        if seeds is None and generator is None:  # the noise was given as latents; the steps need some all the same
            return lambda i: torch.randn_like(state)
        if seeds is None:
            return lambda i: self._draw(None, generator, "sampler noise", i, len(state), state.device)
        keys = rng.keys_of_seeds(_padded(seeds, len(state)), "sampler noise", state.device)
        return lambda i: rng.normal_of_keys(keys, i, self.latent_shape)

    def _draw(self, seeds, generator, purpose: str, step: int, rows: int, device: torch.device) -> Tensor:
        if seeds is not None:
            return rng.normal_of_seeds(_padded(seeds, rows), purpose, step, self.latent_shape, device=device)
        from diffusers.utils.torch_utils import randn_tensor

        return randn_tensor((rows, *self.latent_shape), generator=generator, device=device, dtype=torch.float32)

    def _finish(self, state: Tensor, count: int, output_type: str) -> Any:
        if output_type == "latent":
            return state[:count]
        decoded = Latents(self.latent_spec, self.vae, state.device).decode(state)[:count]
        if output_type == "pt":
            return decoded.float() / 255
        pixels: np.ndarray = decoded.permute(0, 2, 3, 1).contiguous().cpu().numpy()
        if output_type == "uint8":
            return pixels
        return pixels.astype(np.float32) / 255 if output_type == "np" else [Image.fromarray(each) for each in pixels]


class _Guided:
    """The drift of a batch whose images may each have a guidance and an interval (sampling._Guided, row by row)."""

    def __init__(self, pipe: SiTPipeline, numbers, scales, intervals, always: bool, device: torch.device) -> None:
        self.pipe, self.always, self.device = pipe, always, device
        self.labels = torch.tensor(numbers, device=device)
        self.scales, self.intervals = scales, intervals
        self.scale = torch.tensor(scales, dtype=torch.float64, device=device).view(-1, 1, 1, 1)
        # Of the rows that are guided, on the device: they change a few times a sampling, not with each evaluation.
        self.index_of, self.acts_of = lru_cache(self._index), lru_cache(self._acts)

    def __call__(self, state: Tensor, t: float, at: float) -> Tensor:
        """state: (N, C, H, W) float64; t: the model's time; at: where guidance is asked -> (N, C, H, W) float64."""
        rows = [
            i for i, (s, (low, high)) in enumerate(zip(self.scales, self.intervals, strict=True))
            if s > 1.0 and low <= at <= high
        ]  # fmt: skip
        if not rows and not self.always:
            return self._drift(state, t, self.labels)
        everyone = self.always or len(rows) == len(state)
        index = self.index_of(tuple(range(len(state)) if everyone else rows))
        nulls = torch.full((len(index),), self.pipe.labels.null, device=self.device)
        both = self._drift(torch.cat([state, state[index]]), t, torch.cat([self.labels, nulls]))
        drift, null = both[: len(state)], both[len(state) :]
        combined = null + self.scale[index] * (drift[index] - null)
        if len(rows) == len(state):
            return combined
        if not everyone:
            return drift.index_copy(0, index, combined)
        return torch.where(self.acts_of(tuple(rows)), combined, drift)

    def _index(self, rows: tuple[int, ...]) -> Tensor:
        return torch.tensor(rows, device=self.device)

    def _acts(self, rows: tuple[int, ...]) -> Tensor:
        """(N, 1, 1, 1) bool: true for these."""
        return torch.tensor([i in rows for i in range(len(self.labels))], device=self.device).view(-1, 1, 1, 1)

    def _drift(self, states: Tensor, t: float, labels: Tensor) -> Tensor:
        times = torch.full((len(states),), t, dtype=torch.float32, device=states.device)
        velocity = self.pipe.transformer(states.float(), times, labels, return_dict=False)[0]
        return self.pipe.scheduler.convert_model_output(velocity, states)


def _check_classes(source: str, index: dict[str, Any]) -> None:
    for part, value in index.items():
        if isinstance(value, list) and value not in PARTS.get(part, []):
            raise DataError(
                f"{source}/model_index.json asks for {part} = {shown(value)}, which is no part of this pipeline; "
                "nothing of it is loaded: export the run again"
            )


def _padded(seeds: list[int], rows: int) -> list[int]:
    return [*seeds, *[0] * (rows - len(seeds))]


def _seeds(seed: int | Sequence[int] | None, count: int) -> list[int]:
    if seed is None:
        return [secrets.randbits(RANDOM_BITS) for _ in range(count)]
    if isinstance(seed, (list, tuple)):
        return [check_seed(each) for each in spread("seed", list(seed), count)]
    return [check_seed(seed) + i for i in range(count)]
