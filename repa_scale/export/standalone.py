"""Draws images with the programs beside this file: it needs torch and Pillow (and onnxruntime), nothing of repa_scale.

python sample.py --label 3 --seed 0 --out image.png
"""

import argparse
import json
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent


def open_programs(folder, kind):
    """(step, decode): functions of CPU tensors. kind: `torch`, `aoti` or `onnx`."""
    if kind == "onnx":
        return _onnx(folder / "denoiser.onnx"), _onnx(folder / "decoder.onnx")
    decode = torch.export.load(folder / "decoder.pt2").module()
    if kind == "aoti":
        return torch._inductor.aoti_load_package(str(folder / "denoiser.aoti.pt2")), decode
    return torch.export.load(folder / "denoiser.pt2").module(), decode


def _onnx(file):
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    names = [item.name for item in session.get_inputs()]
    return lambda *inputs: torch.from_numpy(
        session.run(None, {name: value.numpy() for name, value in zip(names, inputs, strict=True)})[0]
    )


@torch.no_grad()
def sample(step, noise, labels, steps, guidance, interval):
    """Euler from t = 1 (noise) to t = 0 (data): (N, C, H, W) float32 -> (N, C, H, W) float64.

    guidance: (N,) float32, used while t lies in `interval`. The state is float64: many small steps are added up.
    """
    x = noise.double()
    times = torch.linspace(1, 0, steps + 1, dtype=torch.float64).tolist()
    for i in range(steps):
        now, then = times[i], times[i + 1]
        scale = guidance if interval[0] <= now <= interval[1] else torch.ones_like(guidance)
        t = torch.full((len(x),), now, dtype=torch.float32)
        x = x + (then - now) * step(x.float(), t, labels, scale).double()
    return x


def main():
    manifest = json.loads((HERE / "manifest.json").read_text())
    facts, defaults = manifest["facts"], manifest["sampler"]
    kinds = ["torch", "aoti"] if (HERE / "denoiser.pt2").exists() else ["onnx"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--label", type=int, default=0, help=f"0 to {facts['num_classes'] - 1}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=defaults["steps"])
    parser.add_argument("--guidance", type=float, default=defaults["guidance"], help="1: none")
    parser.add_argument("--interval", type=float, nargs=2, default=defaults["interval"], help="times at which it acts")
    parser.add_argument("--program", choices=kinds, default=kinds[0])
    parser.add_argument("--out", default="image.png", help="a .png, or a .pt for the latent")
    args = parser.parse_args()
    if not 0 <= args.label <= facts["num_classes"] or args.steps < 1 or not 0 <= args.guidance < 1000:
        parser.error(f"--label is 0 to {facts['num_classes']}, --steps at least 1, --guidance 0 to 1000")

    from PIL import Image
    from rng import normal

    step, decode = open_programs(HERE, args.program)
    # The first sample of a seed, as `repa-scale sample --seed` draws it.
    noise = normal(args.seed, "sample noise", 0, torch.zeros(1, dtype=torch.int64), tuple(facts["latent_shape"]))
    guidance = torch.full((1,), args.guidance, dtype=torch.float32)
    latent = sample(step, noise, torch.tensor([args.label]), args.steps, guidance, args.interval)
    if args.out.endswith(".pt"):
        torch.save(latent, args.out)
        return
    image = ((decode(latent.float())[0] + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(args.out)
    print(args.out)


if __name__ == "__main__":
    main()
