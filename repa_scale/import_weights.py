"""`repa-scale import`: a public REPA or SiT checkpoint becomes a folder like an export's, for train.init_from."""

from __future__ import annotations

import argparse
import math
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from repa_scale.config import Config, DataConfig, InterpolantConfig, LatentsConfig, ModelConfig
from repa_scale.errors import ConfigError, DataError, ExitCode, UserError, reason
from repa_scale.export import DTYPES, FORMS, Options, new_folder, seal
from repa_scale.models import build_sit, position_table_of
from repa_scale.models.foreign import Geometry, from_original_sit, geometry, our_names
from repa_scale.models.weights import backbone_names, check_names, open_weights
from repa_scale.sealed import sha256_file
from repa_scale.sizes import LATENTS, latent_spec
from repa_scale.trained import POSITIONS, Source

EXAMPLE = "repa-scale import SiT-XL-2-256x256.pt --out imported/sit-xl"
CONVENTIONS = ("auto", "repa", "sit")
PATHS = {"linear": "linear", "cosine": "cosine", "gvp": "cosine"}  # what they call the paths, in lower case
LATENTS_BY_CHANNELS = {4: "sd-vae-ft-mse", 3: "identity", 1: "identity-grey"}
PREDICTIONS = ("velocity", "noise", "score")  # as the original's train.py calls them; REPA's has "v"
TOLD = (
    "model", "num_classes", "encoder_depth", "projector_embed_dims", "resolution", "image_size", "qk_norm", "path_type",
    "prediction", "weighting", "cfg_prob", "enc_type", "proj_coeff", "vae", "learning_rate", "batch_size",
    "global_batch_size", "mixed_precision", "seed",
)  # fmt: skip
POSITION_BOUND = 1e-5  # between their position table and ours: float32 rounding


def main(argv: list[str]) -> int:
    """Writes the folder whole or not at all."""
    args = _parse(argv)
    options = Options(args.dtype)
    with new_folder(Path(args.out)) as folder:
        source = read_foreign(Path(args.file), args.weights, args.convention, args.latents)
        made = FORMS["safetensors"].write(source, folder, options)
        seal(folder, "safetensors", source, options, made)
    told = source.facts["imported"]
    print(
        f"{source.config.model.name}, {source.config.model.num_classes} classes, {told['convention']} convention: "
        f"{args.out} (train.init_from={args.out})"
    )
    return ExitCode.COMPLETED


def read_foreign(path: Path, weights: str = "ema", convention: str = "auto", latents: str = "") -> Source:
    """A public checkpoint's backbone in our convention. Nothing that the file holds is executed.

    Args:
        path: .pt of the public REPA or SiT code (a dict with `ema`, `model`, `args`), or bare weights as .pt or
            .safetensors.
        convention: `repa`, `sit` (the original's: time from noise to data), or `auto`.
        latents: a row of sizes.LATENTS; empty: by the number of channels and what `args` says.

    Raises:
        DataError: the file is not such a checkpoint, or holds more than weights.
        UserError: `auto` can't tell the convention.
    """
    found, told, step = _read(path, weights)
    found = our_names(found)
    has_projectors = any(name.startswith("projectors.") for name in found)
    found = {name: found[name] for name in backbone_names(found)}
    shape = geometry(found, str(path))
    if convention == "auto":
        convention = _convention(path, shape, told, has_projectors)
    if convention == "sit":
        found = from_original_sit(found, shape)
    elif shape.out_channels != shape.channels:
        raise UserError(
            f"{path} has {shape.out_channels} output channels for {shape.channels} input channels, as the original SiT "
            "has; use --convention sit"
        )
    config = _config(path, shape, told, convention, latents)
    _check(found, config, str(path))

    def read(name: str, start: int, stop: int) -> Tensor:
        return found[name].flatten()[start:stop].float()

    imported = {"file": path.name, "sha256": sha256_file(path), "convention": convention, "args": told}
    unknown = dict.fromkeys(("samples", "identity_hash", "pair_id", "data_fingerprint", "git_commit", "mlflow_run_id"))
    facts = {"step": step, **unknown, "weights": weights, "imported": imported}
    return Source({name: tuple(value.shape) for name, value in found.items()}, read, config, facts, path)


def _read(path: Path, weights: str) -> tuple[dict[str, Tensor], dict[str, Any], int | None]:
    """The weights under their names, plain values of `args`, and the step."""
    if not path.is_file():
        raise DataError(f"{path} is not a file; give a .pt or .safetensors file of the public code")
    if path.suffix == ".safetensors":
        shapes, read = open_weights(path)
        return {name: read(name, 0, math.prod(shape)).view(shape) for name, shape in shapes.items()}, {}, None
    held = read_pickle(path)
    if not isinstance(held, dict):
        raise DataError(f"{path} holds a {type(held).__name__}; a checkpoint is a dict of weights")
    told = _plain(held.get("args"))
    step = held.get("steps", held.get("train_steps"))
    keys = {"ema": ("ema", "model"), "raw": ("model",)}[weights]
    if any(isinstance(held.get(key), dict) for key in ("ema", "model")):
        held = next((held[key] for key in keys if isinstance(held.get(key), dict)), None)
        if held is None:
            raise DataError(f"{path} holds no {keys[0]!r}; use --weights ema")
    strange = next((name for name, value in held.items() if not _is_weight(name, value)), None)
    if strange is not None or not held:
        raise DataError(f"{path} holds {strange!r} among its weights, which is no tensor of floating point numbers")
    return held, told, step if type(step) is int and step >= 0 else None


def read_pickle(path: Path) -> Any:
    """What torch.save wrote, where it is tensors, plain containers and argparse.Namespace; all else is refused unread.

    Raises:
        DataError: the file holds something else, or is damaged.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # the unpickler raises whatever a damaged or hostile file leads it to
        raise DataError(
            f"{path} is not a checkpoint of tensors and plain values, so it is not read: {_why(error)}"
        ) from None


def _why(error: Exception) -> str:
    text = str(error)
    if "Unsupported global: GLOBAL" in text:
        return f"it asks for {text.split('Unsupported global: GLOBAL ')[1].split()[0]}"
    return reason(error)


def _is_weight(name: object, value: object) -> bool:
    """A dense tensor that is as large as its shape says: a small file can't claim a large one."""
    return (
        isinstance(name, str)
        and isinstance(value, Tensor)
        and value.is_floating_point()
        and value.layout == torch.strided
        and value.numel() * value.element_size() <= value.untyped_storage().nbytes()
    )


def _plain(args: object) -> dict[str, Any]:
    """What a Namespace or dict tells of the model; not whose machine trained it."""
    values = vars(args) if isinstance(args, argparse.Namespace) else args
    if not isinstance(values, dict):
        return {}
    kept = {
        k: v for k, v in values.items() if isinstance(k, str) and isinstance(v, (str, bool, int, float, type(None)))
    }
    return {key: value for key, value in kept.items() if not isinstance(value, float) or math.isfinite(value)}


def _convention(path: Path, shape: Geometry, told: dict[str, Any], has_projectors: bool) -> str:
    if shape.out_channels == 2 * shape.channels or told.get("prediction") in PREDICTIONS:
        return "sit"
    if has_projectors or "encoder_depth" in told or told.get("prediction") == "v":
        return "repa"
    raise UserError(
        f"{path} does not say which way its time runs; use --convention repa (from data to noise) or "
        "--convention sit (the original SiT's)"
    )


def _config(path: Path, shape: Geometry, told: dict[str, Any], convention: str, latents: str) -> Config:
    prediction = told.get("prediction", "velocity")
    if prediction not in ("v", "velocity"):
        raise DataError(f"{path} was trained to predict {prediction!r}; only models of the velocity are taken")
    way = str(told.get("path_type", "linear")).lower()
    if way not in PATHS:
        raise DataError(f"{path} was trained on the path {way!r}; known are {', '.join(PATHS)}")
    if not latents:
        latents = LATENTS_BY_CHANNELS.get(shape.channels, "")
        if told.get("vae") == "ema" and latents == "sd-vae-ft-mse":
            latents = "sd-vae-ft-ema"
    if not latents or latent_spec(latents).channels != shape.channels:
        fitting = ", ".join(name for name, row in LATENTS.items() if row.channels == shape.channels) or "none"
        raise ConfigError(f"--latents {latents}: {path} has {shape.channels} channels; spaces that fit: {fitting}")
    return Config(
        method="baseline",
        model=ModelConfig(name=shape.name, num_classes=shape.num_classes, qk_norm=shape.qk_norm),
        data=DataConfig(image_size=shape.size * latent_spec(latents).factor),
        latents=LatentsConfig(name=latents),
        interpolant=InterpolantConfig(path=PATHS[way]),
    )


def _check(found: dict[str, Tensor], config: Config, where: str) -> None:
    """Names and shapes against our model, and the position table, which we compute, against theirs."""
    with torch.device("meta"):
        wanted = {name: tuple(value.shape) for name, value in build_sit(config).state_dict().items()}
    check_names({name: tuple(value.shape) for name, value in found.items()}, wanted, where)
    if not torch.allclose(found[POSITIONS].float(), position_table_of(config), atol=POSITION_BOUND, rtol=0):
        raise DataError(f"{where} has another position table than the fixed sine-cosine one; it can't be taken")


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="repa-scale import", description=__doc__, epilog=f"example: {EXAMPLE}")
    parser.add_argument("file", help="a .pt or .safetensors file of the public REPA or SiT code")
    parser.add_argument("--out", required=True, help="folder to make")
    parser.add_argument("--weights", choices=("ema", "raw"), default="ema", help="which of a .pt file (default: ema)")
    parser.add_argument(
        "--convention", choices=CONVENTIONS, default="auto", help="which way time runs (default: as the file shows)"
    )
    parser.add_argument("--latents", default="", choices=["", *LATENTS], help="latent space (default: by the channels)")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="fp32", help="default: fp32")
    return parser.parse_args(argv)
