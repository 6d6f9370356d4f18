"""`repa-scale export`: a checkpoint becomes a folder that others can run. What a form holds stands in its own file."""

from __future__ import annotations

import argparse
import importlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import Any

import torch

from repa_scale import __version__
from repa_scale.errors import ConfigError, ExitCode
from repa_scale.sealed import seal_folder
from repa_scale.sizes import latent_spec
from repa_scale.trained import KINDS, Source, open_source

EXAMPLE = "repa-scale export runs/first --out exports/first --dtype bf16"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
HASHES = "sha256"  # in what a form returns: {file: sha256} of those that it hashed while it wrote them


@dataclass(frozen=True)
class Options:
    """What a user asks of an export.

    Attributes:
        dtype: a name of `DTYPES`.
        vae: the VAE that decodes the latents, as a hub id or a folder; empty: the run's.
        projectors: with the alignment terms' projectors, where the form has a place for them.
    """

    dtype: str = "fp32"
    vae: str = ""
    projectors: bool = False

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]


@dataclass(frozen=True)
class Form:
    """A kind of export.

    Attributes:
        module: has `write(source: Source, folder: Path, options: Options) -> dict`, which fills an empty folder and
            returns facts for the manifest (plain JSON), such as `max_error` and `bound`; it raises `UserError` where
            what it wrote is not what it should be.
        help: its line in the help.
    """

    module: str
    help: str

    @property
    def write(self) -> Callable[[Source, Path, Options], dict[str, Any]]:
        return importlib.import_module(self.module).write


FORMS: dict[str, Form] = {
    "safetensors": Form("repa_scale.export.safetensors", "weights under public names, configuration, model card"),
    "public": Form("repa_scale.export.public", "the .pt file that the public REPA code reads"),
    "diffusers": Form("repa_scale.export.diffusers", "a pipeline in diffusers' layout, exact to our samplers"),
    "diffusers-dit": Form("repa_scale.export.diffusers_dit", "diffusers' own DiT, with its measured deviation"),
    "torch-export": Form("repa_scale.export.torch_export", "one denoiser step by torch.export and AOTInductor"),
    "onnx": Form("repa_scale.export.onnx", "one denoiser step for onnxruntime"),
    "mlflow": Form("repa_scale.export.mlflow", "an MLflow model for `mlflow models serve`"),
}


def main(argv: list[str]) -> int:
    """Writes the export whole or not at all."""
    args = _parse(argv)
    options = Options(args.dtype, args.vae, args.projectors)
    with new_folder(Path(args.out)) as folder:
        source = portable(open_source(args.source, args.weights), options)
        if args.class_names:
            from repa_scale.serving.labels import read_class_names

            names = read_class_names(Path(args.class_names), source.config.model.num_classes)
            source = replace(source, class_names=tuple(names))
        made = FORMS[args.to].write(source, folder, options)
        seal(folder, args.to, source, options, made)
    out = Path(args.out)
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    print(
        f"step {source.facts['step']}, {source.facts['weights']} weights, {args.dtype}: "
        f"{args.to} in {out} ({size / 1e6:.1f} MB)"
    )
    return ExitCode.COMPLETED


def portable(source: Source, options: Options) -> Source:
    """The source with the VAE that was asked for, and without the places of the encoders' weights, which nothing reads.

    Raises:
        ConfigError: a VAE for a model of pixels.
    """
    config = source.config
    latents = config.latents
    if options.vae:
        if latent_spec(latents.name).kind == "identity":
            raise ConfigError(f"--vae {options.vae}: latents.name={latents.name} has no VAE; leave it out")
        latents = replace(latents, weights=options.vae)
    terms = {name: replace(term, weights=PurePath(term.weights).name) for name, term in config.alignment.items()}
    return replace(source, config=replace(config, latents=latents, alignment=terms))


def seal(folder: Path, form: str, source: Source, options: Options, made: dict[str, Any]) -> None:
    """Writes manifest.json: what the folder holds, where it comes from, how it is sampled, and every file's sha256.

    Args:
        made: what the form's `write` returned.
    """
    sample = source.config.sample
    facts = {
        "made_by": f"repa_scale {__version__}",
        "form": form,
        "dtype": options.dtype,
        "trained": source.facts,
        "sampler": {key: getattr(sample, key) for key in ("sampler", "steps", "guidance", "interval")},
        "facts": {key: value for key, value in made.items() if key != HASHES},
    }
    seal_folder(folder, facts, made.get(HASHES))


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder beside `out` to write in; it becomes `out` at the end, or is gone where something was raised.

    Raises:
        ConfigError: `out` exists and is not an empty folder, or cannot be written.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"--out {out} exists and is not an empty folder; choose another name")
    temporary = out.with_name(f"{out.name}.tmp-{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        if out.exists():
            out.rmdir()
        temporary.rename(out)
    except OSError as error:
        raise ConfigError(f"--out {out} cannot be written ({error.strerror or error}); choose another folder") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="repa-scale export",
        description=__doc__,
        epilog="forms:\n" + "\n".join(f"  {name:<14}{form.help}" for name, form in FORMS.items()) + f"\n\n"
        f"example: {EXAMPLE}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", help="a run folder, a checkpoint folder, or a folder made by --to safetensors")
    parser.add_argument("--out", required=True, help="folder to make")
    parser.add_argument("--to", choices=list(FORMS), default="safetensors", help="default: safetensors")
    parser.add_argument("--weights", choices=sorted(KINDS), default="ema", help="default: ema")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="fp32", help="default: fp32")
    parser.add_argument("--vae", default="", metavar="ID", help="VAE, a hub id or a folder (default: the run's)")
    parser.add_argument("--projectors", action="store_true", help="with the projectors of the alignment terms")
    parser.add_argument(
        "--class-names", metavar="FILE", help="names of the classes, one a line or JSON (default: the data set's)"
    )
    return parser.parse_args(argv)
