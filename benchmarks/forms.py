"""How far the image of a seed differs between the forms of an export: of a trained run, every form, one table.

    python -m benchmarks.forms demo/repa
    python -m benchmarks.forms demo/repa --public CHECKOUT      a checkout of sihyun-yu/REPA loads the public form too

Each form draws the same seeds with the tools that its users have: diffusers' from_pretrained, the `sample.py` that lies
in the folder (torch.export, AOTInductor, ONNX), mlflow.pyfunc, our own reader (safetensors), the public code's model.
What counts is the largest difference from `repa-scale sample`'s images; a bound of 1 of 255 is the goal.
"""

from __future__ import annotations

import argparse
import base64
import importlib.util
import io
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.rows import write_row
from repa_scale import torchvision_fix
from repa_scale.cli import main as verb
from repa_scale.config import SampleConfig
from repa_scale.latents import build_latents
from repa_scale.models import sit_sizes
from repa_scale.sampling import sample_numbered
from repa_scale.sizes import latent_grid
from repa_scale.trained import Source, open_source

STEPS, GUIDANCE, INTERVAL, SEEDS = 25, 1.8, (0.0, 0.7), (0, 1, 5)
BOUND = 1  # of 255

Drawn = tuple[torch.Tensor | None, np.ndarray]  # latents (N, C, H, W) float64, where the form gives them; uint8 images


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--public", type=Path, help="a checkout of sihyun-yu/REPA")
    args = parser.parse_args()
    torchvision_fix.ensure()
    source = open_source(args.run)
    labels = [number % source.config.model.num_classes for number in (3, 7, 1)]
    wanted = by_our_code(source, labels)
    rows = {}
    with tempfile.TemporaryDirectory(prefix="forms-") as folder:
        for name, (form, draw) in ways(args.public).items():
            out = Path(folder) / form
            if not out.exists() and verb(["export", str(args.run), "--to", form, "--out", str(out)]):
                raise SystemExit(f"{form} could not be exported")
            latents, images = draw(out, labels, source)
            rows[name] = {
                "latents": None if latents is None else float((latents - wanted[0]).abs().max()),
                "images": int(np.abs(images.astype(int) - wanted[1]).max()),
            }
    print(f"\n{args.run}, {STEPS} Euler steps, guidance {GUIDANCE}: largest difference from repa-scale sample")
    for name, row in rows.items():
        latents = "-" if row["latents"] is None else f"{row['latents']:.1e}"
        print(f"  {name:<16} latents {latents:>8}   images {row['images']} of 255 (bound {BOUND})")
    write_row("forms", {"model": source.config.model.name, "step": source.facts["step"], "bound": BOUND, "forms": rows})


def ways(public: Path | None) -> dict[str, tuple[str, Callable[[Path, list[int], Source], Drawn]]]:
    """name -> (form, how its users draw)."""
    found = {
        "safetensors": ("safetensors", lambda out, labels, _: by_our_code(open_source(out), labels)),
        "diffusers": ("diffusers", by_pipeline),
        "torch.export": ("torch-export", lambda *all: by_script(*all, "torch")),
        "AOTInductor": ("torch-export", lambda *all: by_script(*all, "aoti")),
        "ONNX": ("onnx", lambda *all: by_script(*all, "onnx")),
        "MLflow": ("mlflow", by_pyfunc),
    }
    if public:
        found["public"] = ("public", lambda *all: by_public_code(*all, public))
    return found


def by_our_code(source: Source, labels: list[int]) -> Drawn:
    """What `repa-scale sample` draws."""
    model = source.build()
    return by_model(lambda x, t, y: model(x, t, y)[0], labels, source)


def by_model(velocity: Callable, labels: list[int], source: Source) -> Drawn:
    """Our sampler over a model, one image at a time."""
    config = source.config
    settings = SampleConfig(sampler="euler", steps=STEPS, guidance=GUIDANCE, interval=list(INTERVAL))
    shape = latent_grid(config.data.image_size, config.latents.name)
    first = torch.zeros(1, dtype=torch.int64)
    with torch.no_grad():
        latents = torch.cat(
            [
                sample_numbered(
                    velocity,
                    first,
                    torch.tensor([label]),
                    config.model.num_classes,
                    shape,
                    seed,
                    settings,
                    config.interpolant.path,
                )
                for seed, label in zip(SEEDS, labels, strict=True)
            ]
        )
    images = build_latents(config, "cpu", torch.float32).decode(latents)
    return latents, images.permute(0, 2, 3, 1).numpy()


def by_pipeline(out: Path, labels: list[int], source: Source) -> Drawn:
    from repa_scale.serving import SiTPipeline

    pipe = SiTPipeline.from_pretrained(str(out))
    pipe.set_progress_bar_config(disable=True)
    words = {"class_labels": labels, "seed": list(SEEDS), "steps": STEPS, "guidance": GUIDANCE, "interval": INTERVAL}
    latents = pipe(**words, output_type="latent").images
    return latents.double(), np.stack([np.asarray(image) for image in pipe(**words).images])


def by_script(out: Path, labels: list[int], source: Source, program: str) -> Drawn:
    """The sample.py of the folder, as a user calls it."""
    latents, images = [], []
    for seed, label in zip(SEEDS, labels, strict=True):
        words = ["--seed", seed, "--label", label, "--steps", STEPS, "--guidance", GUIDANCE, "--interval", *INTERVAL]
        for file in ("latent.pt", "image.png"):
            command = [sys.executable, out / "sample.py", *words, "--program", program, "--out", out.parent / file]
            subprocess.run([str(word) for word in command], check=True, capture_output=True)
        latents.append(torch.load(out.parent / "latent.pt"))
        images.append(as_rgb(Image.open(out.parent / "image.png")))
    return torch.cat(latents), np.stack(images)


def by_pyfunc(out: Path, labels: list[int], source: Source) -> Drawn:
    import mlflow
    import pandas as pd

    count = len(labels)
    rows = {"class_label": labels, "seed": list(SEEDS), "steps": [STEPS] * count, "guidance": [GUIDANCE] * count}
    answer = mlflow.pyfunc.load_model(str(out)).predict(pd.DataFrame(rows), params={"interval": list(INTERVAL)})
    return None, np.stack([as_rgb(Image.open(io.BytesIO(base64.b64decode(text)))) for text in answer["png_base64"]])


def by_public_code(out: Path, labels: list[int], source: Source, checkout: Path) -> Drawn:
    """Their model, loaded strictly from checkpoint.pt, in our sampler."""
    spec = importlib.util.spec_from_file_location("public_sit", checkout / "models" / "sit.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    held = torch.load(out / "checkpoint.pt", weights_only=True)
    args, size = held["args"], sit_sizes(source.config)
    model = module.SiT(
        path_type=args["path_type"],
        input_size=size["input_size"],
        patch_size=size["patch_size"],
        in_channels=size["in_channels"],
        hidden_size=size["width"],
        decoder_hidden_size=size["width"],
        depth=size["depth"],
        num_heads=size["heads"],
        encoder_depth=args["encoder_depth"],
        num_classes=args["num_classes"],
        use_cfg=True,
        z_dims=[int(width) for width in args["projector_embed_dims"].split(",")],
        qk_norm=args["qk_norm"],
        fused_attn=True,
    )
    model.load_state_dict(held["ema"], strict=True)
    model.eval()
    return by_model(lambda x, t, y: model(x, t, y)[0], labels, source)


def as_rgb(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB"))


if __name__ == "__main__":
    main()
