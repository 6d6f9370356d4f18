"""Frozen target encoders through timm: clean images in, patch tokens out. The table is sizes.ENCODERS."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from repa_scale import torchvision_fix
from repa_scale.errors import ConfigError, DataError, UserError, reason, require
from repa_scale.kernels import normalize_tokens, uses_triton
from repa_scale.models.weights import check_names
from repa_scale.sizes import EncoderSpec, encoder_spec
from repa_scale.weights import encoder_files, local

RANDOM_SEED = 0  # of `weights=random`, so that all ranks have the same encoder
INSTEAD = "give a local file (alignment.NAME.weights=path), or an encoder that a package brings (effnet-lite0)"


class Encoder(nn.Module):
    """A frozen encoder for images of one size.

    Args:
        network: gives (N, prefix + T, z) tokens (`vit`) or a map (N, z, h, w) (`map`).
        grid: tokens (down, across) that are wanted.
    """

    def __init__(self, network: nn.Module, spec: EncoderSpec, grid: tuple[int, int]) -> None:
        super().__init__()
        self.network = network.eval().requires_grad_(False)
        self.spec = spec
        self.size = spec.stride * grid[0]

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, S, S) uint8 -> (N, T, z) in the network's dtype."""
        dtype = next(self.network.parameters()).dtype
        x = preprocess(images, self.spec, self.size).to(dtype)
        if self.spec.kind == "map":
            return self.network(x).flatten(2).transpose(1, 2)
        tokens = self.network.forward_features(x)
        return tokens if isinstance(self.network.norm, PatchNorm) else tokens[:, self.spec.prefix_tokens :]


class PatchNorm(nn.Module):
    """A network's last LayerNorm and the cut of its prefix tokens in one pass: (N, prefix + T, z) -> (N, T, z)."""

    def __init__(self, norm: nn.LayerNorm, prefix: int) -> None:
        super().__init__()
        self.norm = norm
        self.prefix = prefix

    def forward(self, tokens: Tensor) -> Tensor:
        affine = None if self.norm.weight is None else (self.norm.weight, self.norm.bias)
        return normalize_tokens(
            tokens, "layernorm", self.prefix, eps=self.norm.eps, out_dtype=tokens.dtype, affine=affine, kernel="triton"
        )


class FeatureMap(nn.Module):
    """A convolutional network of timm's EfficientNet family, up to its last map of a stride."""

    def __init__(self, network: nn.Module, stride: int) -> None:
        super().__init__()
        # Each block that ends a resolution is named by timm; what lies deeper is left out.
        last = max(i for i, row in enumerate(network.feature_info) if row["reduction"] == stride)
        stages = int(network.feature_info[last]["module"].split(".")[1]) + 1
        self.stem = nn.Sequential(network.conv_stem, network.bn1)
        self.blocks = network.blocks[:stages]

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, s, s) -> (N, z, s / stride, s / stride)."""
        return self.blocks(self.stem(x.contiguous(memory_format=torch.channels_last)))


def build_encoder(
    name: str,
    weights: str,
    grid: tuple[int, int],
    device: torch.device | str,
    dtype: torch.dtype,
    kernel: str = "auto",
) -> Encoder:
    """An encoder that gives one token for each token of the transformer.

    Args:
        name: a row of `sizes.ENCODERS`.
        weights: `hub`; `package` (of the row's Python package); `random`, for tests; or a local file
            (.safetensors, or a pickle of tensors), in timm's names or its authors'.
        grid: tokens (down, across); position tables are resampled to it.
        kernel: `auto`, `triton` or `torch` (repa_scale.kernels), of the final LayerNorm.

    Raises:
        ConfigError: unknown encoder, or weights that the row does not offer.
        UserError: the weights cannot be had or do not fit.
    """
    spec = encoder_spec(name)
    torchvision_fix.ensure()
    timm = require("timm", "train")
    architecture, _, tag = spec.timm_name.partition(".")
    size = {"img_size": spec.stride * grid[0], "num_classes": 0} if spec.kind == "vit" else {}
    if weights == "hub":
        network = _from_hub(timm, spec, name, tag, size)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(RANDOM_SEED)
            network = timm.create_model(architecture, pretrained=False, **size)
        if weights == "package":
            _load_package(network, spec, name)
        elif weights != "random":
            _load_file(network, Path(weights), name)
    if spec.kind == "map":
        network = FeatureMap(network, spec.stride)
    elif not spec.final_norm:
        network.norm = nn.Identity()
    elif _plain_layernorm(network.norm) and uses_triton(kernel, torch.device(device)):
        network.norm = PatchNorm(network.norm, spec.prefix_tokens)
    return Encoder(network, spec, grid).to(device=device, dtype=dtype)


def _plain_layernorm(norm: nn.Module) -> bool:
    return isinstance(norm, nn.LayerNorm) and (norm.weight is None) == (norm.bias is None)


def preprocess(images: Tensor, spec: EncoderSpec, size: int) -> Tensor:
    """What the encoder sees: x / 255, normalised, and resized by bicubic interpolation without antialiasing.

    Args:
        images: (N, 3, S, S) uint8.
        size: pixels an axis of the encoder's input.

    Returns:
        (N, 3, size, size) float32. (REPA's public pre-processing; CLIP resizes first.)
    """
    x = images.float() / 255.0
    if spec.resize_first:
        x = _resize(x, size)
    mean, std = (torch.tensor(values, device=x.device).view(1, 3, 1, 1) for values in (spec.mean, spec.std))
    return _resize((x - mean) / std, size)


def _resize(x: Tensor, size: int) -> Tensor:
    return x if x.shape[-1] == size else F.interpolate(x, size=(size, size), mode="bicubic", align_corners=False)


def _from_hub(timm, spec: EncoderSpec, name: str, tag: str, size: dict) -> nn.Module:
    if not tag:
        instead = "use alignment.NAME.weights=package" if spec.package else "give its file: alignment.NAME.weights=path"
        raise ConfigError(f"encoder={name} is not on the hub; {instead}")
    files = encoder_files(name)
    try:
        # From the cache without a word to the hub, once the file is there.
        overlay = {"file": str(local(files[0]))} if files else None
        return timm.create_model(spec.timm_name, pretrained=True, pretrained_cfg_overlay=overlay, **size)
    except UserError as error:
        raise UserError(f"the weights of {error}; {INSTEAD}") from None
    except Exception as error:  # each of the hub's libraries raises its own
        raise UserError(
            f"the weights of encoder={name} ({spec.timm_name}) cannot be fetched: {reason(error)}; {INSTEAD}"
        ) from None


def _load_package(network: nn.Module, spec: EncoderSpec, name: str) -> None:
    """Weights of a package whose tensors are timm's, in timm's order, under other names."""
    if not spec.package:
        raise ConfigError(f"encoder={name} has no package with weights; use weights=hub or a local file")
    module = require(spec.package, "train")
    folder = Path(module.__file__).parent
    file = next(path for path in sorted(folder.rglob("*")) if path.suffix in (".pth", ".pt"))
    theirs = torch.load(file, map_location="cpu", weights_only=True)
    ours = network.state_dict()
    if [tuple(t.shape) for t in theirs.values()] != [tuple(t.shape) for t in ours.values()]:
        raise DataError(f"the tensors of {spec.package} are not those of {spec.timm_name}; install its tested version")
    network.load_state_dict(dict(zip(ours, theirs.values(), strict=True)))


def _load_file(network: nn.Module, file: Path, name: str) -> None:
    """A local file in timm's names, or in those of the encoder's authors, which timm knows to convert."""
    if not file.is_file():
        raise DataError(
            f"alignment weights={file} for encoder={name}: there is no such file; "
            "use hub, package, random or the path of a weight file"
        )
    tensors = _read(file)
    convert = getattr(importlib.import_module(type(network).__module__), "checkpoint_filter_fn", None)
    if convert is not None:
        tensors = convert(tensors, network)
    wanted = network.state_dict()
    heads = ("head.", "fc_norm.", "classifier.")
    tensors = {key: value for key, value in tensors.items() if key in wanted or not key.startswith(heads)}
    shapes = [{key: tuple(value.shape) for key, value in tree.items()} for tree in (tensors, wanted)]
    check_names(*shapes, f"{file} (encoder={name})")
    network.load_state_dict(tensors)


def _read(file: Path) -> dict[str, Tensor]:
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(file)
        tensors = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch and safetensors raise many kinds for a damaged file
        raise DataError(
            f"{file} cannot be read as weights ({reason(error)}); fetch it again, or save its tensors as .safetensors"
        ) from None
    for key in ("model", "state_dict", "teacher", "encoder"):
        if isinstance(tensors, dict) and isinstance(tensors.get(key), dict):
            tensors = tensors[key]
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise DataError(f"{file} does not hold a dictionary of tensors; give a file of weights")
    return _plain(tensors)


def _plain(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names without what a training script put before them; timm converts the rest.

    MoCo v3 files hold two encoders; the trained one is wanted. In its ViT-L file, made from a JAX one, the names
    norm1, fc1 of block 13 and norm2, fc2 of block 14 carry the block's number.
    """
    base = "module.base_encoder."
    if any(name.startswith(base) for name in tensors):
        trained = {name.removeprefix(base): value for name, value in tensors.items() if name.startswith(base)}
        return {
            re.sub(r"(norm|fc)1[34]\b", lambda m: m[1] + ("1" if m[0].endswith("3") else "2"), name): value
            for name, value in trained.items()
        }
    if all(name.startswith("module.") for name in tensors):
        return {name.removeprefix("module."): value for name, value in tensors.items()}
    return tensors
