"""Speed of sampling, of metrics and of the comparison, one part each; the figures go to results/evaluate.jsonl.

    python -m benchmarks.evaluate sampling [--public path/to/REPA] [--model SiT-XL/2 --size 256]

`sampling`: images/s of `repa-scale sample`'s way of drawing against the public sampler's, on the same device with the
same weights, by turns. The public code is not part of this repository: name a checkout of it, or its loop is written
out here, plainly. Goals: at least 1.5 times on a GPU; on a CPU not slower; and with guidance in half of the path at
least 1.3 times the public loop with guidance throughout.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.rows import write_row
from repa_scale import arithmetic, torchvision_fix
from repa_scale.config import Config
from repa_scale.latents import build_latents
from repa_scale.models import build_sit
from repa_scale.ranks import pick_device
from repa_scale.sample_draw import Drawer
from repa_scale.sample_recipe import ROUNDING, Recipe, device_of, versions
from repa_scale.sizes import latent_grid
from repa_scale.trained import Trained

Row = dict[str, Any]
GUIDANCE = 1.8
CASES = {"no guidance": (1.0, (0.0, 1.0)), "guidance": (GUIDANCE, (0.0, 1.0)), "half the path": (GUIDANCE, (0.0, 0.5))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=list(PARTS), help=f"of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--public", help="a checkout of the public REPA code")
    parser.add_argument("--model", default="", help="default: SiT-XL/2 on a GPU, SiT-Tiny/4 on a CPU")
    parser.add_argument("--size", type=int, default=0, help="pixels; 32: in pixel space (default: 256, on a CPU 32)")
    parser.add_argument("--batch", type=int, default=0, help="images at a time (default: 64, on a CPU 16)")
    parser.add_argument("--steps", type=int, default=10, help="of the SDE sampler")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="auto", choices=("auto", "cuda", "cpu"))
    args = parser.parse_args()
    for part in args.parts:
        for row in PARTS[part](args):
            print(", ".join(f"{key} {value}" for key, value in row.items()), flush=True)
            write_row("evaluate", {"part": part, **row})


def sampling(args: argparse.Namespace) -> Iterator[Row]:
    """A row for each of `CASES`: images/s of both ways, medians of rounds by turns."""
    device = pick_device(args.device)
    cuda = device.type == "cuda"
    config = Config()
    config.model.name = args.model or ("SiT-XL/2" if cuda else "SiT-Tiny/4")
    config.data.image_size = args.size or (256 if cuda else 32)
    config.latents.name = "identity" if config.data.image_size < 64 else "sd-vae-ft-mse"
    config.latents.weights = "random"
    batch = args.batch or (64 if cuda else 16)
    weights = _weights(config)
    their_loop, their_model = _public(args.public, config, weights, device)
    shape = latent_grid(config.data.image_size, config.latents.name)
    latents = build_latents(config, device, torch.float32)
    if cuda:
        arithmetic.use("tf32")  # as the public program does
    threads = 1 if cuda else torch.get_num_threads()
    ways: dict[str, Callable[[], int]] = {}
    for name, (guidance, interval) in CASES.items():
        recipe = _recipe(config, batch, args.steps, guidance, interval, device, compile=cuda)
        drawer = Drawer(Trained(weights, config, {"source": "benchmark"}), recipe, latents, device)

        def theirs(guidance: float = guidance, interval: tuple[float, float] = interval) -> int:
            for _ in range(threads):
                z = torch.randn(batch, *shape, device=device)
                y = torch.randint(0, 1000, (batch,), device=device)
                keywords = {"cfg_scale": guidance, "guidance_low": interval[0], "guidance_high": interval[1]}
                drawn = their_loop(their_model, z, y, num_steps=args.steps, **keywords)
                latents.decode(drawn).cpu()
            return threads * batch

        ways[f"ours, {name}"] = lambda drawer=drawer: _side_by_side(drawer, threads) * batch
        ways[f"public, {name}"] = theirs
    rates = _by_turns(ways, args.rounds, cuda)
    for name in CASES:
        ours, public = rates[f"ours, {name}"], rates[f"public, {name}"]
        yield {
            "case": f"{config.model.name}, {config.data.image_size} px, {name}",
            "batch": batch,
            "steps": args.steps,
            "ours": ours,
            "public": public,
            "ratio": ours / public,
            "of_public_with_guidance_throughout": ours / rates["public, guidance"],
            "public_code": "checkout" if args.public else "its loop written out, on our model",
            "goal": 1.5 if cuda else 1.0,
        }


def _side_by_side(drawer: Drawer, threads: int) -> int:
    """As `repa-scale sample` draws: on a CPU one block a thread."""
    if threads == 1:
        drawer(0)
        return 1

    def work(block: int) -> None:
        torch.set_num_threads(1)
        drawer(block)

    at_work = [threading.Thread(target=work, args=(block,)) for block in range(threads)]
    for thread in at_work:
        thread.start()
    for thread in at_work:
        thread.join()
    torch.set_num_threads(threads)
    return threads


def _by_turns(ways: dict[str, Callable[[], int]], rounds: int, cuda: bool) -> dict[str, float]:
    """Images/s, the median of the rounds behind the first."""
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, draw in ways.items():
            began = time.perf_counter()
            count = draw()
            if cuda:
                torch.cuda.synchronize()
            if number:
                rates[name].append(count / (time.perf_counter() - began))
    return {name: statistics.median(values) for name, values in rates.items()}


def _weights(config: Config) -> dict[str, Tensor]:
    """Random ones; trained ones take as long."""
    generator = torch.Generator().manual_seed(0)
    model = build_sit(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02, generator=generator)
    return model.state_dict()


def _recipe(config: Config, batch: int, steps: int, guidance: float, interval, device, compile: bool) -> Recipe:
    return Recipe(
        checkpoint="",
        identity_hash="",
        step=0,
        weights="ema",
        sampler="sde",
        steps=steps,
        guidance=guidance,
        interval=interval,
        seed=0,
        count=1 << 20,
        block=batch,
        decode=16,
        classes="balanced",
        num_classes=config.model.num_classes,
        image_size=config.data.image_size,
        path="linear",
        latents=(config.latents.name, config.latents.weights, ""),
        precision="tf32" if device.type == "cuda" else "fp32",
        compile=compile,
        rounding=ROUNDING,
        device=device_of(device),
        versions=versions(()),
    )


def _public(path: str | None, config: Config, weights: dict[str, Tensor], device) -> tuple[Callable, nn.Module]:
    """The public SDE loop, and a model for it."""
    if not path:
        return _written_out, Trained(weights, config, {"source": "benchmark"}).build(device)
    torchvision_fix.ensure()  # their code imports timm
    sys.path.insert(0, path)
    samplers, models = importlib.import_module("samplers"), importlib.import_module("models.sit")
    channels, side, _ = latent_grid(config.data.image_size, config.latents.name)
    size = build_sit(config)
    model = models.SiT(
        input_size=side,
        patch_size=int(config.model.name.rsplit("/")[-1]),
        in_channels=channels,
        hidden_size=size.blocks[0].mlp.fc1.in_features,
        decoder_hidden_size=size.blocks[0].mlp.fc1.in_features,
        depth=len(size.blocks),
        num_heads=size.blocks[0].attn.heads,
        use_cfg=True,
        z_dims=[768],
        encoder_depth=1,
        fused_attn=True,
        qk_norm=False,
    )
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected and all(name.startswith("projectors") for name in missing), (missing, unexpected)
    return samplers.euler_maruyama_sampler, model.eval().requires_grad_(False).to(device)


@torch.no_grad()
def _written_out(
    model: nn.Module,
    z: Tensor,
    y: Tensor,
    *,
    num_steps: int,
    cfg_scale: float,
    guidance_low: float,
    guidance_high: float,
) -> Tensor:
    """The public Euler-Maruyama loop (REFERENCE: linear path, w(t) = 2t, last step without noise), step by step."""
    null = torch.full_like(y, 1000)
    times = [*torch.linspace(1.0, 0.04, num_steps, dtype=torch.float64), torch.zeros((), dtype=torch.float64)]
    x = z.double()
    for i, (now, then) in enumerate(pairwise(times)):
        guided = cfg_scale > 1.0 and guidance_low <= now <= guidance_high
        states, labels = (torch.cat([x, x]), torch.cat([y, null])) if guided else (x, y)
        t = torch.full((len(states),), float(now), dtype=torch.float64, device=x.device)
        noise = torch.randn_like(x) * (then - now).abs().sqrt()
        v = model(states.to(z.dtype), t.to(z.dtype), labels)[0].double()
        at = t.view(-1, 1, 1, 1)
        ratio = -(1 - at)
        score = (ratio * v - states) / (at**2 - ratio * at)
        drift = v - now * score
        if guided:
            conditional, unconditional = drift.chunk(2)
            drift = unconditional + cfg_scale * (conditional - unconditional)
        x = x + drift * (then - now)
        if i < num_steps - 1:
            x = x + (2 * now).sqrt() * noise
    return x


def _other(module: str) -> Callable[[argparse.Namespace], Iterator[Row]]:
    return lambda args: importlib.import_module(module).rows()


PARTS: dict[str, Callable[[argparse.Namespace], Iterator[Row]]] = {
    "sampling": sampling,
    **{
        name: _other(f"benchmarks.evaluate_{name}")
        for name in ("metrics", "compare")
        if find_spec(f"benchmarks.evaluate_{name}")
    },
}


if __name__ == "__main__":
    main()
