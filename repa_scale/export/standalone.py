"""Draws images with the programs beside this file: it needs torch and Pillow (and onnxruntime), nothing of repa_scale.

python sample.py --label 3 --seed 0 --out image.png
"""

import argparse
import json
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent


class Unusable(Exception):
    """Why a program does not run on a device, and what does."""


def open_programs(folder, kind, device="cpu", facts=None):
    """(step, decode): functions of tensors on `device`, and of `onnx` of tensors on the CPU.

    Args:
        kind: `torch`, `aoti` or `onnx`.
        facts: of the manifest.

    Raises:
        Unusable: this machine, or this folder, has not what it takes.
    """
    device = _device(device)
    if kind == "onnx":
        return _onnx(folder / "denoiser.onnx", device), _onnx(folder / "decoder.onnx", device)
    if device.type == "cuda":
        if not (device.index or 0) < torch.cuda.device_count():
            raise Unusable(f"--device {device}: torch {torch.__version__} finds no such GPU; use --device cpu")
        # float32 as such, as the programs were compared; torch's default is TF32 in convolutions
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False
    decode = torch.export.load(folder / "decoder.pt2").module().to(device)
    if kind == "aoti":
        return _compiled(folder, device, facts or {}), decode
    return torch.export.load(folder / "denoiser.pt2").module().to(device), decode


def _device(name):
    try:
        device = torch.device(name)
    except RuntimeError:
        raise Unusable(f"--device {name} is no device; give cpu, cuda or cuda:1") from None
    if device.type not in ("cpu", "cuda"):
        raise Unusable(f"--device {name}: these programs run on cpu and cuda")
    return device


def _compiled(folder, device, facts):
    """The package that was compiled for this kind of device."""
    file = "denoiser.aoti.pt2" if device.type == "cpu" else f"denoiser.{device.type}.aoti.pt2"
    if not (folder / file).exists():
        why = facts.get("left_out", {}).get(file, "the exporting machine had no GPU")
        raise Unusable(f"--program aoti --device {device}: {file} is not here ({why}); use --program torch")
    if device.type == "cpu":
        return torch._inductor.aoti_load_package(str(folder / file))
    here = "sm_{}{}".format(*torch.cuda.get_device_capability(device))
    if facts.get("gpu", here) != here:
        raise Unusable(f"{file} is compiled for {facts['gpu']}, and {device} is {here}; use --program torch")
    return torch._inductor.aoti_load_package(str(folder / file), device_index=device.index or 0)


def _onnx(file, device):
    import onnxruntime

    providers = ["CPUExecutionProvider"]
    if device.type == "cuda":
        # TF32 is onnxruntime's default.
        providers.insert(0, ("CUDAExecutionProvider", {"device_id": device.index or 0, "use_tf32": "0"}))
        if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
            raise Unusable(
                f"--device {device}: onnxruntime {onnxruntime.__version__} is a build for the CPU; install "
                "onnxruntime-gpu instead, or use --device cpu"
            )
    session = onnxruntime.InferenceSession(str(file), providers=providers)
    if device.type == "cuda" and session.get_providers()[0] != "CUDAExecutionProvider":  # it falls back by itself
        raise Unusable(
            f"--device {device}: onnxruntime {onnxruntime.__version__} cannot start CUDA (see its lines above); "
            "install the CUDA and cuDNN that it is built for, or use --device cpu"
        )
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
        t = torch.full((len(x),), now, dtype=torch.float32, device=x.device)
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
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda or cuda:1")
    parser.add_argument("--out", default="image.png", help="a .png, or a .pt for the latent")
    args = parser.parse_args()
    if not 0 <= args.label <= facts["num_classes"] or args.steps < 1 or not 0 <= args.guidance < 1000:
        parser.error(f"--label is 0 to {facts['num_classes']}, --steps at least 1, --guidance 0 to 1000")

    from PIL import Image
    from rng import normal

    try:
        step, decode = open_programs(HERE, args.program, args.device, facts)
    except Unusable as error:
        parser.error(str(error))
    place = "cpu" if args.program == "onnx" else args.device
    # The first sample of a seed, as `repa-scale sample --seed` draws it.
    noise = normal(args.seed, "sample noise", 0, torch.zeros(1, dtype=torch.int64), tuple(facts["latent_shape"]))
    guidance = torch.full((1,), args.guidance, dtype=torch.float32, device=place)
    labels = torch.tensor([args.label], device=place)
    latent = sample(step, noise.to(place), labels, args.steps, guidance, args.interval)
    if args.out.endswith(".pt"):
        torch.save(latent.cpu(), args.out)
        return
    image = ((decode(latent.float())[0] + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)
    Image.fromarray(image.permute(1, 2, 0).cpu().numpy()).save(args.out)
    print(args.out)


if __name__ == "__main__":
    main()
