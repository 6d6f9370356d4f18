"""`repa-scale export`: a checkpoint becomes a folder with model.safetensors (public names) and config.json."""

from __future__ import annotations

import argparse
import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file

from repa_scale import __version__
from repa_scale.errors import ConfigError, ExitCode
from repa_scale.models.weights import EXPORT_FILE
from repa_scale.trained import EXPORT_CONFIG, KINDS, load_trained

EXAMPLE = "repa-scale export runs/first --out exports/first"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def main(argv: list[str]) -> int:
    """Writes the export whole or not at all."""
    args = _parse(argv)
    out = Path(args.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"--out {out} exists and is not an empty folder; choose another name")
    trained = load_trained(args.source, args.weights)
    temporary = out.with_name(f"{out.name}.tmp-{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
        tensors = {name: tensor.to(DTYPES[args.dtype]).contiguous() for name, tensor in trained.weights.items()}
        save_file(tensors, temporary / EXPORT_FILE, metadata={"format": "pt"})
        described = {
            "made_by": f"repa_scale {__version__}",
            "dtype": args.dtype,
            "trained": trained.facts,
            "config": asdict(trained.config),
        }
        (temporary / EXPORT_CONFIG).write_text(json.dumps(described, indent=1) + "\n")
        if out.exists():
            out.rmdir()
        temporary.rename(out)
    except OSError as error:
        raise ConfigError(f"--out {out} cannot be written ({error.strerror}); choose another folder") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    size = (out / EXPORT_FILE).stat().st_size
    print(
        f"step {trained.facts['step']}, {args.weights} weights, {args.dtype}: {out / EXPORT_FILE} ({size / 1e6:.1f} MB)"
    )
    return ExitCode.COMPLETED


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="repa-scale export", description=__doc__, epilog=f"example: {EXAMPLE}")
    parser.add_argument("source", help="a run folder or a checkpoint folder")
    parser.add_argument("--out", required=True, help="folder to make")
    parser.add_argument("--weights", choices=sorted(KINDS), default="ema", help="default: ema")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="fp32", help="default: fp32")
    return parser.parse_args(argv)
